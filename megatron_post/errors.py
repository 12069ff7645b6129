"""The exit status and the message of an error that ends a command.

An error that a user can mend becomes one message and exit status 2. Any other error keeps its traceback.
Readers name the file that is wrong (`storage.reading`). This module decides by the type of an error alone.
"""

import csv
import errno
import os
import sys
import traceback
import zlib
from collections.abc import Callable
from typing import Any

import typer

from megatron_post.config.secrets import redact
from megatron_post.display import printable, say

FOR_A_USER, FAULT, INTERRUPTED = 2, 1, 130

_REMEDIES = {
    errno.ENOENT: "check the path",
    errno.EACCES: "change its permissions, or choose another path",
    errno.EPERM: "change its permissions, or choose another path",
    errno.EROFS: "choose a path on a disk that can be written",
    errno.EEXIST: "choose another path",
    errno.EISDIR: "name a file",
    errno.ENOTDIR: "every part of the path but the last must be a directory",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its symbolic links lead to each other: mend them",
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some space and run the same command again",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f) and run the same command again",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENOMEM: "free some memory",
    errno.ENOEXEC: "it is no program of this machine",
    errno.EADDRINUSE: "choose another port, or wait until it is free",
}


def exit_status(command: Callable[[], Any]) -> int:
    """Run a command, print its error on standard error, and return the exit status.

    With `--debug` (MEGATRON_POST_DEBUG) every error keeps its traceback.
    """
    try:
        status = command()
        return status if isinstance(status, int) else 0
    except (KeyboardInterrupt, Exception) as error:
        # typer turns every EOFError into an Abort. A damaged file raises EOFError too, and must be reported.
        cause = error.__cause__ if isinstance(error, typer.Abort) else None
        return _report(cause or error)


def message_of(error: BaseException) -> str | None:
    """The message of an error that a user can mend, or None for a fault of this program."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError):
        return _system_message(error)
    if isinstance(error, ValueError | FloatingPointError | csv.Error):
        return text
    if isinstance(error, EOFError | zlib.error):
        return f"a compressed file is damaged or cut off: {text}; fetch it again"
    if isinstance(error, RecursionError):
        return "a value in a file or an argument is nested too deeply for Python; flatten it"
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return f"this machine has not enough memory: {text}; ask for less, or use a larger machine"
    return None


def _report(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        say("megatron-post: interrupted", file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, typer.Abort):
        return FAULT
    if hasattr(error, "format_message"):  # a wrong command or option, by a class of typer or of click
        if text := error.format_message():
            context = getattr(error, "ctx", None)
            usage = f"; see `{context.command_path} --help`" if context is not None else ""
            text = text.replace("Value error, ", "")  # pydantic's words, with which typer checks a choice
            say(redact(f"megatron-post: {text.rstrip('.')}{_as_override(error)}{usage}"), file=sys.stderr)
        return int(error.exit_code) if hasattr(error, "exit_code") else FOR_A_USER
    text = message_of(error)
    if text is not None and not os.environ.get("MEGATRON_POST_DEBUG"):
        say(redact(f"megatron-post: {text}"), file=sys.stderr)
        return FOR_A_USER
    say(redact("".join(traceback.format_exception(error)).rstrip()), file=sys.stderr)
    if text is None:
        say(
            "megatron-post: this error was not expected. If this machine did not cause it, please report it "
            "with the command, the lines above and what `megatron-post doctor` prints",
            file=sys.stderr,
        )
    return FAULT if text is None else FOR_A_USER


def _as_override(error: BaseException) -> str:
    """The remedy for an override that was written as an option, `--optimizer.lr=1` or `--optimizer.lr 1`."""
    option, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    parameters = context.command.params if context is not None else ()
    if not option or not any(parameter.name == "overrides" for parameter in parameters):
        return ""
    for text in sys.argv[1:]:
        if text.startswith(option) and ("=" in text or "." in text):
            right = text.lstrip("-") if "=" in text else f"{text.lstrip('-')}=VALUE"
            return f"; write {right}, without hyphens before it"
    return ""


def _system_message(error: OSError) -> str:
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    reason = error.strerror or str(error) or type(error).__name__
    remedy = _REMEDIES.get(error.errno or 0, "--debug shows where it happened")
    return f"{' and '.join(map(printable, names))}{': ' if names else ''}{reason}; {remedy}"
