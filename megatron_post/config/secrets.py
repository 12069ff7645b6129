"""Keys and passwords are hidden in what is printed or kept: messages, tracebacks, the script of a dry run.

Settings take the name of an environment variable and never a key. Even so one may stand in a URL, in a line
that a user has pasted, or in what a server answers.
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
# where secrets stand, and the shapes of the usual keys; the group in parentheses of a match stays
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
    """`text` with `***` for each of `secrets`, however it is quoted, and for whatever looks like a secret."""
    for secret in filter(None, secrets):
        for spelling in _spellings(secret):
            text = re.sub(re.escape(spelling), HIDDEN, text, flags=re.IGNORECASE)
    return _SECRET.sub(lambda match: (match[match.lastindex] if match.lastindex else "") + HIDDEN, text)


def repeats(text: str, secrets: Iterable[str]) -> bool:
    """Whether `text` holds one of `secrets`, however it is quoted.

    What has fewer than 8 characters is a word, such as the "EMPTY" that local servers take for a key.
    """
    return any(spelling in text for s in secrets if len(s) >= 8 for spelling in _spellings(s))


def _spellings(secret: str) -> list[str]:
    """A secret as it may be quoted, the longest first."""
    in_json = json.dumps(secret)[1:-1]
    found = {secret, in_json, in_json.replace("/", r"\/"), quote(secret, safe=""), html.escape(secret)}
    return sorted(found, key=len, reverse=True)


def is_secret_name(name: str) -> bool:
    """Whether a key or variable is named like one that holds a secret: `api_key`, HF_TOKEN."""
    return _SECRET_NAME.fullmatch(name) is not None
