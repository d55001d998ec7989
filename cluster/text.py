"""Shows foreign text: keys, paths, class names, messages and URIs that anyone may have written, on their way to a terminal, log or page.

`shown` is for one line, `printable` for a message of several lines; both mask secrets. `json_line` is for a line that programs read,
`redact` for secrets alone, `address` for a URI. Whoever prints, logs or journals text calls one of them. Two packages need them and may
not import each other, so cluster/text.py and dataio/text.py are the same file, byte for byte; a test compares them.
"""

import json
import re
import unicodedata
from typing import Any

LONGEST = 300
"""Characters of a value on one line."""
LONGEST_MESSAGE = 50_000
"""Characters of a message of several lines, such as a traceback."""
MASK = "***"

# --- characters ---------------------------------------------------------------------------------------------------------------------------

_PLAIN = re.compile(r"[ -~]*")
_NAMED = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}
_LINE_ENDS = frozenset("\n\t")


def shown(text: object, limit: int = LONGEST) -> str:
    """`text` on one line of at most `limit` characters, without secrets, and with every character visible that could move a cursor, reorder
    or hide text, or end a line: `\\x1b`, `\\n`, `\\u202e`. A byte of a name that is not UTF-8 becomes `\\xff`. Applying it again changes
    nothing."""
    return _cut(_visible(redact(str(text))), limit)


def printable(text: object, limit: int = LONGEST_MESSAGE) -> str:
    """A message of one or more lines: as `shown`, but with its line ends and tabs."""
    return _cut(_visible(redact(str(text)), kept=_LINE_ENDS), limit)


def json_line(value: Any) -> str:
    """`value` as JSON on one line that is valid UTF-8 and moves no cursor: the characters that `shown` replaces are JSON's own escapes.
    Only half a surrogate pair, which is no text, becomes what `shown` makes of it."""
    text = json.dumps(value, ensure_ascii=False)
    if _PLAIN.fullmatch(text):
        return text
    return "".join(character if not _is_hidden(character) else _json_escape(character) for character in text)


def _visible(text: str, kept: frozenset[str] = frozenset()) -> str:
    if _PLAIN.fullmatch(text):
        return text
    return "".join(character if character in kept or not _is_hidden(character) else _escape(character) for character in text)


def _is_hidden(character: str) -> bool:
    """Controls, format characters (bidirectional overrides, zero width), line and paragraph separators, surrogates, unassigned ones."""
    return not character.isprintable() and unicodedata.category(character) != "Zs"


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python holds a byte of a file name that is not UTF-8
        code -= 0xDC00
    if code <= 0xFF:
        return _NAMED.get(character) or f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def _json_escape(character: str) -> str:
    if unicodedata.category(character) == "Cs":
        return "\\" + _escape(character)
    return json.dumps(character)[1:-1]


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: max(0, limit - 1)] + "…"


# --- secrets ------------------------------------------------------------------------------------------------------------------------------

_NAME = (
    r"(?:aws_?)?access_?key(?:_?id)?|[a-z0-9_.-]*(?:secret|account_?key)[a-z0-9_-]*"
    r"|[a-z0-9_.-]*(?:token|passw(?:or)?d|signature|credentials?)"
)
_AFTER_SCHEME = re.compile(r"(?<![A-Za-z0-9+.-])([A-Za-z][A-Za-z0-9+.-]*)://([^\s'\"<>|`]+)")
_QUERY = re.compile(r"\?[A-Za-z_][A-Za-z0-9_.-]*=")
_PARAMETER = re.compile(rf"(?i)(?<=[?&])((?:{_NAME}|sig|key)=)[^&\s'\"<>|`]+")
_ASSIGNED = re.compile(  # an environment variable, TOML, JSON, a header of a signed request
    rf"(?i)(?<![A-Za-z0-9_.?&-])((?:{_NAME})\\?[\"']?(?:=|\s*[=:]\s*(?=\\?[\"'])))(\\?[\"'])?"
    r"(?!(?:none|null|true|false)\b)(?:(?(2)[^\"'\\]+|[^\s\"',;&)]+))"
)
_BEARER = re.compile(r"(?i)\b(bearer |basic )([A-Za-z0-9._~+/=-]{8,})")
_MAY_CONTAIN = re.compile(r"://|=|:\s*\\?[\"']|(?i:bearer |basic )")
_WITHOUT_PASSWORD = frozenset({"hdfs", "viewfs"})
_WITHOUT_PORT = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss"})
_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.%]*\]|localhost|[^:@\[\]]*\.[^:@\[\]]*):\d*")
"""A host with a port; a name without a dot may be a user, and the digits the beginning of a password."""


def redact(text: str) -> str:
    """`text` without secrets: user names and passwords of URIs (`s3://KEY:SECRET@bucket`, whatever characters the secret has), secret
    parameters (`?secret_key=...`, `&sig=...`) and assignments (`AWS_SECRET_ACCESS_KEY=...`, `"secret_key": "..."`). Other text stays as it
    is."""
    if not _MAY_CONTAIN.search(text):
        return text
    text = _AFTER_SCHEME.sub(lambda found: f"{found[1]}://{_without_secrets(found[1].lower(), found[2])}", text)
    text = _PARAMETER.sub(rf"\1{MASK}", text)
    text = _ASSIGNED.sub(lambda found: f"{found[1]}{found[2] or ''}{MASK}", text)
    return _BEARER.sub(rf"\1{MASK}", text)


def address(uri: str) -> str:
    """A URI's scheme, host and path; a path without a scheme as it is."""
    if "://" not in uri:
        return uri
    return redact(uri).partition("?")[0].replace(f"://{MASK}@", "://").rstrip("/")


def has_secrets(text: str) -> bool:
    """Whether `redact` would leave something out: a command that is shown has to be given again with it."""
    return redact(text) != text


def _without_secrets(scheme: str, rest: str) -> str:
    """What follows `scheme://`, without its user and password.

    A secret may hold `/`, `@`, `:`, `+` unencoded, which no grammar can tell apart; so all up to the last `@` before the query is masked
    wherever something looks like a user before the first slash: an `@`, or a colon that no port can follow. A bucket has no port: there a
    colon is enough, because the rest may have been cut off.
    """
    query = _QUERY.search(rest)
    head = rest[: query.start()] if query else rest
    tail = rest[len(head) :]
    user, at, host = head.rpartition("@")
    authority = re.split(r"[/?#]", head, maxsplit=1)[0]
    is_bucket, is_host = scheme in _WITHOUT_PORT, bool(_HOST.fullmatch(authority)) or scheme in _WITHOUT_PASSWORD
    has_user = "@" in authority or (":" in authority and (is_bucket or not is_host))
    if not has_user or not (at or is_bucket):
        return rest
    if scheme in ("abfs", "abfss"):  # the container stands where others have the user
        container, colon, _ = (user if at else head).partition(":")
        return f"{container}{colon}{MASK if colon else ''}{at}{host if at else ''}{tail}"
    return f"{MASK}{at}{host if at else ''}{tail}"
