"""What decides the tokens of a text: the tokenizer's file, and how many tokens a text may have. Imports no tokenizer.

Called by convert and scan, which are told by the settings that their source holds texts. The form is part of a conversion's identity, and
the data's fingerprint holds it, so that a run on other tokens is another run.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataio.config import DataConfig, TooLong
from dataio.foreign import MAX_TOKENIZER_BYTES, read_regular

TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class TextForm:
    """How the texts of a source become tokens."""

    tokenizer: Path
    sha256: str
    """Of the tokenizer's file."""
    max_tokens: int
    too_long: TooLong

    @property
    def identity(self) -> list[Any]:
        """What of it decides the tokens: plain JSON."""
        return ["texts", 1, self.sha256, self.max_tokens, self.too_long]


def text_form(config: DataConfig) -> TextForm | None:
    """The form of a source of texts; None for one of images. ValueError if the tokenizer's file cannot be read."""
    if not config.tokenizer:
        return None
    path = tokenizer_file(config.tokenizer)
    return TextForm(tokenizer=path, sha256=tokenizer_sha256(path), max_tokens=config.max_tokens, too_long=config.too_long)


def tokenizer_file(given: str) -> Path:
    """The file that `data.tokenizer` names: itself, or the one in that folder."""
    path = Path(given).expanduser()
    return path / TOKENIZER_FILE if path.is_dir() else path


def tokenizer_sha256(path: Path) -> str:
    """ValueError if there is no such file."""
    return hashlib.sha256(tokenizer_bytes(path)).hexdigest()


def tokenizer_bytes(path: Path) -> bytes:
    """ValueError if there is no such file."""
    try:
        return read_regular(path, MAX_TOKENIZER_BYTES)
    except OSError as error:
        raise ValueError(
            f"data.tokenizer={path} cannot be read ({error.strerror}); name the {TOKENIZER_FILE} of the tokenizers library that lies "
            "beside the model's weights, or the folder that holds it"
        ) from None
