"""Hides keys and passwords in everything that is printed or saved, such as messages and tracebacks.

Settings contain the name of an environment variable and never a key. But a key may be in a URL, in a line
that a user has pasted, or in a server's answer.
"""

import html
import json
import re
from collections.abc import Iterable
from urllib.parse import quote

HIDDEN = "***"
_NAMES = (
    r"(?:api|access|secret|private|auth)[_-]?key|(?:access|auth|hub|hf)[_-]?token|password|passwd"
    r"|client[_-]?secret"
)
_VALUE = r"""[^\s"',;&})\]]+"""
# The places where secrets are written, and the forms of common keys. The group of a match is not hidden.
_SECRET = re.compile(
    rf"""
    (://) [^\s/?\#'"]{{0,300}} (?=@)                                         # http://user:password@host
  | (://) [^\s:/@'"]{{0,300}} : (?!\d+(?:[/?\#\s'"]|$)) [^\s'"]{{0,300}} (?=@)    # the password has a slash
  | ([?&][\w.-]{{0,40}}(?:key|token|secret|passw|pwd|auth|sig|credential)[\w-]{{0,40}}=) [^&\s'"\#]+
  | (\bauthorization["']?\s*[:=]\s*["']?) (?:(?:basic|bearer)\s+)? {_VALUE}
  | (\bbearer\s+) [\w.~+/=-]{{6,}}
  | ((?:{_NAMES})["']?\s*[:=]\s*["']?) {_VALUE}                              # api_key: ..., HF_TOKEN=...
  | \b(?:sk|pk|rk)-[\w-]{{8,}} | \bhf_[a-z0-9]{{16,}} | \bgh[pousr]_\w{{16,}} | \bgithub_pat_\w{{16,}}
  | \bglpat-[\w-]{{16,}} | \bxox[abeprs]-[\w-]{{8,}} | \bAKIA[0-9A-Z]{{12,}} | \bAIza[\w-]{{20,}}
  | \bnvapi-[\w-]{{16,}} | \beyJ[\w-]{{8,300}}\.[\w-]+\.[\w-]*
    """,
    re.IGNORECASE | re.VERBOSE,
)
_SECRET_NAME = re.compile(
    rf"(?:.*[_.-])?(?:{_NAMES}|(?:api)?keys?|token|secrets?|credentials?|authorization)", re.I
)


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """`text` with `***` in place of `secrets`, in any quoting, and of everything that looks like a secret."""
    for secret in filter(None, secrets):
        for spelling in _spellings(secret):
            text = re.sub(re.escape(spelling), HIDDEN, text, flags=re.IGNORECASE)
    return _SECRET.sub(lambda match: (match[match.lastindex] if match.lastindex else "") + HIDDEN, text)


def repeats(text: str, secrets: Iterable[str]) -> bool:
    """Whether `text` contains one of `secrets`, in any quoting.

    Secrets of fewer than 8 characters are skipped. They are words such as "EMPTY", which local servers accept
    as a key.
    """
    return any(spelling in text for s in secrets if len(s) >= 8 for spelling in _spellings(s))


def _spellings(secret: str) -> list[str]:
    """The quoted forms of a secret, the longest first."""
    in_json = json.dumps(secret)[1:-1]
    found = {secret, in_json, in_json.replace("/", r"\/"), quote(secret, safe=""), html.escape(secret)}
    return sorted(found, key=len, reverse=True)


def is_secret_name(name: str) -> bool:
    """Whether the name of a key or variable suggests a secret, as `api_key` and HF_TOKEN do."""
    return _SECRET_NAME.fullmatch(name) is not None
