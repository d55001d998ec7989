"""Reads all texts of a data set once, and keeps of each what the audit compares: hashes of it as it is and folded, its shingles, and how it
looks. __main__.py calls it; text_copies.py and text_looks.py judge.

The texts themselves are not kept. Their shingles are, MOST_SHINGLES at the most: where there are more, every second, fourth, ... of all
possible ones is left out, the same of every text, so that what two texts share of the rest says what they share of all.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from dataio.codecs.text.tokens import PART_BIT
from dataio.foreign import json_of
from dataio.order import mixed
from dataio.parquet import Dataset
from dataio.schema import is_single_label
from trainer.audit.kept import Hashes, Ints, Kept, hashes_of, starts_of

LENGTH = 5
"""Characters of a shingle."""
MOST_SHINGLES = 32_000_000
"""Of all texts together, eight bytes each."""
TOGETHER = {"HIRAGANA": "CJK", "KATAKANA": "CJK"}
"""Scripts that are written with others, by their names in Unicode."""
_WORDS = re.compile(r"\w+")
_FACTORS = np.frombuffer(hashlib.sha512(b"shingles 1").digest(), "<u8")[:LENGTH] | np.uint64(1)

Whole = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Shingles:
    """The shingles of n texts, each once a text."""

    values: Whole
    """(shingles,): text after text."""
    starts: Ints
    """(n + 1,)"""

    def of(self, texts: Ints) -> tuple[Whole, Ints]:
        """(values, starts) of these texts."""
        sizes = self.starts[texts + 1] - self.starts[texts]
        starts = np.concatenate(([0], np.cumsum(sizes)))
        places = np.arange(int(starts[-1])) + np.repeat(self.starts[texts] - starts[:-1], sizes)
        return self.values[places], starts


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GatheredTexts(Kept):
    """What is kept of all n texts."""

    folded_of: Hashes
    """(n,): a hash of the text without what case, spaces and forms of characters add (`folded`)."""
    shingles: Shingles
    words: Ints
    """(n,): runs of letters and digits."""
    tokens: Ints
    """(n,): at most data.max_tokens."""
    unknown: npt.NDArray[np.float64]
    """(n,): the share of its tokens that the tokenizer does not know; 0 where it knows everything."""
    scripts: npt.NDArray[np.int64]
    """(n,): the script that most of its letters are in, a place in `script_names`; -1 for a text without letters."""
    script_names: tuple[str, ...]


def folded(text: str) -> str:
    """The text in Unicode's NFKC form, without its case, with single spaces, and without what is not seen (format characters)."""
    if not text.isascii():
        text = "".join(each for each in text if unicodedata.category(each) != "Cf")
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())  # folding may take a character's form apart
    return " ".join(text.casefold().split())


def shingles_of(text: str) -> Whole:
    """Of a folded text, the runs of LENGTH characters of its words, each once, as hashes; of a shorter one the text itself. A text without
    letters and digits has those of its signs."""
    codes = np.frombuffer((" ".join(_WORDS.findall(text)) or text).encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    if len(codes) < LENGTH:
        codes = np.concatenate((codes, np.zeros(LENGTH - len(codes), np.uint64)))
    windows = np.lib.stride_tricks.sliding_window_view(codes, LENGTH)  # (runs, LENGTH)
    return np.unique(mixed((windows * _FACTORS).sum(1, dtype=np.uint64), np.uint64(0)))


class _Sampled:
    """Collects shingles, MOST_SHINGLES at the most."""

    def __init__(self) -> None:
        self._parts: list[Whole] = []
        self._count = 0
        self._every = 1

    def add(self, values: Whole) -> None:
        self._parts.append(self._of(values))
        self._count += len(self._parts[-1])
        while self._count > MOST_SHINGLES:
            self._every *= 2
            self._parts = [self._of(each) for each in self._parts]
            self._count = sum(map(len, self._parts))

    def _of(self, values: Whole) -> Whole:
        return values if self._every == 1 else values[values % np.uint64(self._every) == 0]

    def all(self) -> Shingles:
        starts = np.concatenate(([0], np.cumsum([len(each) for each in self._parts], dtype=np.int64)))
        return Shingles(values=np.concatenate([np.empty(0, np.uint64), *self._parts]), starts=starts)


def gather_texts(dataset: Dataset, tokenizer: bytes, *, on_part: Callable[[int, int], None] = lambda done, total: None) -> GatheredTexts:
    """Read all splits. `tokenizer`: the content of the file that made the data's tokens. `on_part` is told how many texts were read, of how
    many."""
    manifest, starts = dataset.manifest, starts_of(dataset.manifest)
    n = int(starts[-1])
    ids, sampled, script_of = _ids_of(tokenizer), _Sampled(), dict[str, int]()
    bytes_of, folded_of = np.zeros(n, "V16"), np.zeros(n, "V16")
    labels, words, tokens, scripts = (np.full(n, nothing, np.int64) for nothing in (-1, 0, 0, -1))
    unknown = np.zeros(n)
    at = 0
    for name in manifest.splits:
        split = dataset.split(name)
        hashes = split.hashes()
        for number in range(split.groups):
            group = split.read_group(number)
            rows = range(at, at + len(group.keys))
            begin = int(split.group_offsets[number])
            texts = [folded(each) for each in split.texts(range(begin, begin + len(rows)))]
            here = slice(rows.start, rows.stop)
            bytes_of[here] = hashes_of([next(hashes)[:16] for _ in rows])
            folded_of[here] = hashes_of([hashlib.blake2b(each.encode(errors="surrogatepass"), digest_size=16).digest() for each in texts])
            if is_single_label(manifest.targets):
                labels[here] = group.labels
            for row, text, encoded in zip(rows, texts, group.encoded, strict=True):
                sampled.add(shingles_of(text))
                words[row] = len(_WORDS.findall(text))
                stored = encoded.view("<i4") & ((1 << PART_BIT) - 1)
                tokens[row], unknown[row] = len(stored), ids.unknown_share(stored)
                if script := _script_of(text):
                    scripts[row] = script_of.setdefault(script, len(script_of))
            at = rows.stop
            on_part(at, n)
    return GatheredTexts(
        splits=tuple(manifest.splits),
        starts=starts,
        bytes_of=bytes_of,
        labels=labels,
        is_bad=np.zeros(n, bool),
        folded_of=folded_of,
        shingles=sampled.all(),
        words=words,
        tokens=tokens,
        unknown=unknown,
        scripts=scripts,
        script_names=tuple(script_of),
    )


def _script_of(text: str) -> str:
    """The script that most of the letters of a folded text are in; "" without letters. Ties fall to the one that comes first."""
    found: Counter[str] = Counter()
    for character, count in Counter(text).items():
        if script := _script_of_character(character):
            found[script] += count
    return found.most_common(1)[0][0] if found else ""


@lru_cache(maxsize=1 << 16)
def _script_of_character(character: str) -> str:
    """ "" for what is no letter."""
    if not unicodedata.category(character).startswith("L"):
        return ""
    script = unicodedata.name(character, "").partition(" ")[0]
    return TOGETHER.get(script, script)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ids:
    """Tokens of a vocabulary that stand for no words."""

    unknown: int | None
    """In the place of what the tokenizer does not know; None if there is no such token."""
    special: tuple[int, ...]
    """That it adds to a text, and the like."""

    def unknown_share(self, tokens: npt.NDArray[np.int32]) -> float:
        own = tokens[~np.isin(tokens, self.special)]
        return float((own == self.unknown).mean()) if self.unknown is not None and len(own) else 0.0


def _ids_of(tokenizer: bytes) -> _Ids:
    """From the content of a tokenizer.json, which the library has read before."""
    described = json_of(tokenizer)
    model, added = described["model"], described.get("added_tokens") or []
    name, vocabulary = model.get("unk_token"), model.get("vocab")
    unknown = model.get("unk_id")  # of a unigram model, whose vocabulary is a list
    if isinstance(name, str):
        listed = [each["id"] for each in added if each["content"] == name]
        unknown = listed[0] if listed else vocabulary.get(name) if isinstance(vocabulary, dict) else None
    return _Ids(unknown=unknown, special=tuple(each["id"] for each in added if each.get("special") and each["id"] != unknown))
