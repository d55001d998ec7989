"""What is asked of the training samples: a part of them, a fold held out of them. Reads `data.part`, `data.fold` and `data.choice_seed`.

dataio.config checks the settings with it, and dataio.selection chooses by it. No numpy: `--help` need not wait for it.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dataio.config import DataConfig

_MOST = 1 << 53  # whole numbers beyond it are not told apart
MAX_FOLDS = 1000
_FOLD = re.compile(r"([0-9]{1,4})/([0-9]{1,4})")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fold:
    """Fold `number` of `folds`, the first being 1."""

    number: int
    folds: int

    def __str__(self) -> str:
        return f"{self.number}/{self.folds}"

    @property
    def described(self) -> str:
        return f"fold {self.number} of {self.folds}"

    def size(self, count: int) -> int:
        """Samples in the fold, of `count` that are dealt out one by one."""
        return count // self.folds + (self.number <= count % self.folds)


def fold_of(text: str) -> Fold | None:
    """Parses `data.fold`; None for "". ValueError for other text."""
    if not text:
        return None
    found = _FOLD.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"data.fold={text!r} is no fold; write NUMBER/FOLDS, such as 2/5 for the second of five")
    number, folds = int(found[1]), int(found[2])
    if not 2 <= folds <= MAX_FOLDS:
        raise ValueError(f"data.fold={text}: there can be 2 to {MAX_FOLDS} folds; use 5, such as 1/5")
    if not 1 <= number <= folds:
        raise ValueError(f"data.fold={text}: the folds of {folds} are 1/{folds} to {folds}/{folds}; use one of them")
    return Fold(number=number, folds=folds)


def part_of(value: float) -> float:
    """`data.part` as it is. ValueError if it is neither a fraction nor a number of samples."""
    if not 0 < value <= _MOST or (value > 1 and value != int(value)):
        given = f"{value:g}" if isinstance(value, float) else value
        raise ValueError(
            f"data.part={given} is neither a fraction (above 0, up to 1, which is everything) nor a whole number of training samples "
            "(2 or more); use 0.1 for a tenth, or 600 for so many"
        )
    return value


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Which training samples are asked for: all but a fold, and of those a part."""

    part: float = 1.0
    """Up to 1 a fraction, above it a number of samples."""
    fold: Fold | None = None
    seed: int = 0

    @classmethod
    def of(cls, config: "DataConfig") -> "Choice":
        return cls(part=part_of(config.part), fold=fold_of(config.fold), seed=config.choice_seed)

    @property
    def is_all(self) -> bool:
        return self.part == 1 and self.fold is None

    @property
    def settings(self) -> str:
        """As they are written, for what the user is told."""
        part = [f"data.part={self.part:.12g}"] if self.part != 1 else []
        fold = [f"data.fold={self.fold}"] if self.fold is not None else []
        return ", ".join([*part, *fold, f"data.choice_seed={self.seed}"])

    def sizes(self, count: int) -> tuple[int, int]:
        """(samples to train on, samples held out as a fold), of `count` training samples. ValueError if there are not enough."""
        held = self.fold.size(count) if self.fold is not None else 0
        left = count - held
        if self.fold is not None and (not held or not left):
            raise ValueError(
                f"data.fold={self.fold}: {_samples(count)} cannot be cut into {self.fold.folds} folds, none of them empty; use at most "
                f"{count}"
            )
        if self.part <= 1:
            return max(1, round(self.part * left)), held
        wanted = int(self.part)
        if wanted > left:
            without = f" that {self.fold.described} leaves of {count:,}" if self.fold is not None else ""
            raise ValueError(
                f"data.part={wanted} is more than the {_samples(left)}{without}; use at most {left}, or a fraction of them, such as 0.5"
            )
        return wanted, held


def _samples(count: int) -> str:
    return f"{count:,} training sample{'' if count == 1 else 's'}"
