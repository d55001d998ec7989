"""Keeps secrets in the process: everything written to journals, configurations and summaries passes through here first."""

import re
from typing import Any

_MASK = "***"
_USERINFO = re.compile(r"(?<=://)[^/@\s'\"]+(?=@)")
_PARAMETER = re.compile(
    r"(?i)([?&](?:[a-z_-]*(?:secret|token|password|passwd|signature|credential)[a-z_-]*|access_key(?:_id)?|sig|key)=)[^&\s'\"]+"
)


def redact(text: str) -> str:
    """`text` with user names and passwords of URIs (`s3://KEY:SECRET@bucket`) and secret parameters (`?secret_key=...`) masked."""
    return _PARAMETER.sub(rf"\1{_MASK}", _USERINFO.sub(_MASK, text))


def redacted(value: Any) -> Any:
    """The same for all strings in a JSON-able value."""
    match value:
        case str():
            return redact(value)
        case dict():
            return {key: redacted(item) for key, item in value.items()}
        case list() | tuple():
            return [redacted(item) for item in value]
    return value
