"""What an audit keeps of every sample, image or text: where it is, its label, and the hash of its bytes. gather.py and texts.py add to it
what they compare; findings.py looks names up by it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dataio.manifest import Manifest

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.void]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Kept:
    """Of all n samples, split after split in the order of the data."""

    splits: tuple[str, ...]
    starts: Ints
    """(splits + 1,): where each split begins."""
    bytes_of: Hashes
    """(n,): 16 bytes of the hash of a sample's bytes."""
    labels: Ints
    """(n,): classes; -1 where a label is not known, and for data with other targets than one label."""
    is_bad: npt.NDArray[np.bool_]
    """(n,): could not be read; what is kept of it means nothing."""

    @property
    def count(self) -> int:
        return int(self.starts[-1])

    def place(self, sample: int) -> tuple[str, int]:
        """The split that a sample is in, and its row there."""
        number = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return self.splits[number], sample - int(self.starts[number])

    def of_split(self, split: str) -> range:
        number = self.splits.index(split)
        return range(int(self.starts[number]), int(self.starts[number + 1]))


def starts_of(manifest: Manifest) -> Ints:
    """(splits + 1,): where each split begins."""
    return np.concatenate(([0], np.cumsum([split.count for split in manifest.splits.values()], dtype=np.int64)))


def hashes_of(raw: Sequence[bytes]) -> Hashes:
    """(n,): of 16 bytes each."""
    return np.frombuffer(b"".join(raw), "V16")
