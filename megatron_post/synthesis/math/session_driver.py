"""Runs in the sandbox, and imports nothing of the package: the blocks of a session, the last one with output.

The arguments are the names of the blocks' files. As in IPython, the value of the last expression of a block
is printed, and an exception ends its block alone.
"""

import ast
import contextlib
import linecache
import os
import random
import sys
import traceback

_END = "\n(end of session)\n"


def run(name: str, variables: dict[str, object]) -> None:
    """Raises what the block raises."""
    with open(name, encoding="utf-8", errors="surrogatepass") as file:
        source = file.read()
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    tree = ast.parse(source, name)
    last = tree.body[-1] if tree.body else None
    if isinstance(last, ast.Expr):
        tree.body.pop()
    exec(compile(tree, name, "exec"), variables)
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), name, "eval"), variables)
        if value is not None:
            print(repr(value))


def main() -> int:
    *earlier, last = sys.argv[1:]
    variables: dict[str, object] = {"__name__": "__main__"}
    random.seed(0)  # a block that is replayed draws the same numbers
    stdout, stderr = sys.stdout, sys.stderr
    kept, nowhere = (os.dup(1), os.dup(2)), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1), os.dup2(nowhere, 2)
    for name in earlier:
        with contextlib.suppress(BaseException):  # the model has seen it
            run(name, variables)
    sys.stdout, sys.stderr = stdout, stderr
    stdout.flush(), stderr.flush()
    os.dup2(kept[0], 1), os.dup2(kept[1], 2)
    status = 0
    try:
        run(last, variables)
    except BaseException as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename not in (*earlier, last):
            trace = trace.tb_next  # this file's frames, and the parser's, are not the block's
        traceback.print_exception(type(error), error, trace, file=stderr)
        status = 1
    stdout.flush()
    stderr.write(_END)
    stderr.flush()
    return status


if __name__ == "__main__":
    os._exit(main())  # no thread or handler of a block runs on
