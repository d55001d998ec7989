"""Keeps secrets in the process: everything written to journals, configurations and summaries passes through here first. text.py says what
a secret is."""

from typing import Any

from cluster.text import redact

__all__ = ["redact", "redacted"]


def redacted(value: Any) -> Any:
    """A JSON-able value whose strings, keys included, hold no secrets."""
    match value:
        case str():
            return redact(value)
        case dict():
            return {redact(key) if isinstance(key, str) else key: redacted(item) for key, item in value.items()}
        case list() | tuple():
            return [redacted(item) for item in value]
    return value
