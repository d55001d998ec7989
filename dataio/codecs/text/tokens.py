"""Texts to tokens. Called by convert (`Checker`), and by whoever asks a finished model about texts (`Tokenizer`).

A token is stored as an int32: its number in the vocabulary, and in the bits above that the part of a pair of texts that it belongs to.
`PAD` fills a row behind a text. It is no token of any vocabulary, so a text may hold a padding token like any other.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dataio.codecs.codec import Encoded, Refusal
from dataio.codecs.text.form import TextForm, tokenizer_bytes
from dataio.config import TooLong
from dataio.texts import BETWEEN, padded

PAD = -1
PART_BIT = 24
MOST_TOKENS_KNOWN = 1 << PART_BIT
"""Entries of a vocabulary."""
MAX_TEXT_BYTES = 1 << 20
MOST_LINES_TRIED = 64
"""Of a pair, as the end of its first text."""
_SHOWN_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFacts:
    """What is known of a usable text."""

    stored: bytes
    """Its tokens, int32 in little-endian order."""
    text: str
    """As people read it."""
    length: int
    """Tokens, at most `data.max_tokens`."""
    was_cut: bool
    """It had more."""
    has_alpha: bool = False

    @property
    def size(self) -> str:
        return str(self.length)


def padded_rows(texts: Sequence[TextFacts]) -> npt.NDArray[np.int32]:
    """(n, T): the tokens of each text, padded to what the longest of them needs."""
    rows = np.full((len(texts), padded(max((each.length for each in texts), default=1))), PAD, np.int32)
    for row, each in zip(rows, texts, strict=True):
        row[: each.length] = np.frombuffer(each.stored, "<i4")
    return rows


class Tokenizer:
    """A model's own tokenizer. Not thread-safe."""

    def __init__(self, content: bytes, *, max_tokens: int, too_long: TooLong, where: str) -> None:
        """`content`: of the tokenizer's file, which lies at `where`. ValueError if it is no tokenizer of the library, or without the
        library."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork, and say so on the terminal
        try:
            import tokenizers
        except ImportError as error:
            raise ValueError(
                'texts are made into tokens by the package tokenizers, which is not installed; pip install "transformers>=5" (extra `text`)'
            ) from error
        try:
            self._whole: Any = tokenizers.Tokenizer.from_buffer(content)
            self._cutting: Any = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises plain Exceptions
            raise ValueError(f"data.tokenizer={where} is no tokenizer of the tokenizers library: {error!s:.300}") from error
        self._max_tokens, self._too_long = max_tokens, too_long
        if max_tokens <= self._whole.num_special_tokens_to_add(is_pair=True):
            raise ValueError(
                f"data.max_tokens={max_tokens} leaves no room for a text: this tokenizer adds "
                f"{self._whole.num_special_tokens_to_add(is_pair=True)} tokens of its own; use 16 or more"
            )
        self._whole.no_padding()
        self._whole.no_truncation()
        self._cutting.no_padding()
        self._cutting.enable_truncation(max_tokens)
        self.vocabulary = max(self._whole.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not 0 < self.vocabulary <= MOST_TOKENS_KNOWN:
            raise ValueError(f"data.tokenizer={where} knows {self.vocabulary} tokens; 1 to {MOST_TOKENS_KNOWN} can be stored")

    def facts(self, encoded: Sequence[Encoded]) -> list[TextFacts | Refusal]:
        """For each text, UTF-8, its tokens, or the reason to refuse it: `undecodable`, `empty`, `too long`."""
        found: list[TextFacts | Refusal] = []
        for each in encoded:
            text = _text_of(each)
            found.append(text if isinstance(text, Refusal) else self._facts_of(text))
        return found

    def places(self, text: str, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.int32] | None:
        """(n, 2) int32: which characters of `text`, as people read it, each of its tokens stands for, as first and behind the last; (0, 0)
        for what the tokenizer adds. None if these are not the tokens of this text."""
        lines = text.split("\n")
        # A pair is read as two texts with a line end between them, which may be any of its line ends.
        for cut in (len(lines), *range(1, min(len(lines), MOST_LINES_TRIED))):
            first, second = "\n".join(lines[:cut]), "\n".join(lines[cut:])
            encoding = self._cutting.encode(first, second) if cut < len(lines) else self._cutting.encode(first)
            if np.array_equal(stored_tokens(encoding.ids, encoding.type_ids), tokens):
                begins = [len(first) + 1 if part == 1 else 0 for part in encoding.sequence_ids]
                spans = [(begin + start, begin + end) for begin, (start, end) in zip(begins, encoding.offsets, strict=True)]
                return np.asarray(spans, np.int32)
        return None

    def _facts_of(self, text: str) -> TextFacts | Refusal:
        first, between, second = text.partition(BETWEEN)
        if not first.strip() or (between and not second.strip()):
            return Refusal(reason="empty: there is no text" if not between else "empty: one of the two texts is")
        given = (first, second) if between else (first,)
        encoding = self._whole.encode(*given)
        if len(encoding.ids) == self._whole.num_special_tokens_to_add(is_pair=bool(between)):
            return Refusal(reason="empty: the tokenizer finds nothing in it")
        if was_cut := len(encoding.ids) > self._max_tokens:
            if self._too_long == "refuse":
                return Refusal(reason=f"too long: {len(encoding.ids)} tokens; data.max_tokens={self._max_tokens} are the most")
            encoding = self._cutting.encode(*given)
        return TextFacts(
            stored=stored_tokens(encoding.ids, encoding.type_ids).tobytes(),
            text=f"{first}\n{second}" if between else first,
            length=len(encoding.ids),
            was_cut=was_cut,
        )


class Checker:
    """Implements `dataio.codecs.codec.Checker`."""

    def __init__(self, form: TextForm) -> None:
        self._tokenizer = Tokenizer(
            tokenizer_bytes(form.tokenizer), max_tokens=form.max_tokens, too_long=form.too_long, where=str(form.tokenizer)
        )
        self.vocabulary = self._tokenizer.vocabulary

    def check(self, encoded: Sequence[Encoded]) -> Sequence[TextFacts | Refusal]:
        return self._tokenizer.facts(encoded)

    def close(self) -> None:
        pass


def stored_tokens(ids: Sequence[int], parts: Sequence[int]) -> npt.NDArray[np.int32]:
    """(n,) int32, little-endian: token and part of the pair."""
    tokens: npt.NDArray[np.int32] = (np.asarray(ids, "<i4") | (np.asarray(parts, "<i4") << PART_BIT)).astype("<i4")
    return tokens


def _text_of(encoded: Encoded) -> str | Refusal:
    raw = bytes(encoded)
    if len(raw) > MAX_TEXT_BYTES:
        return Refusal(reason=f"too long: {len(raw)} bytes; {MAX_TEXT_BYTES} are the most")
    try:
        return raw.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as error:
        return Refusal(reason=f"undecodable: {raw[error.start : error.start + _SHOWN_BYTES]!r} at byte {error.start} is not UTF-8")
