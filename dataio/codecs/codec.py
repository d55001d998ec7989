"""What a codec is: bytes of one modality to rows of one array, and rows to a batch on the device. Imports no torch.

Called by convert (`Checker`) and by the loader (`Codec`), which know a modality only through these; `make` chooses it. A codec knows no
model and no torch.distributed. It has two halves: samples are checked before any row's shape is known, as that may follow from all of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch  # what only checks samples does without it

Ids = npt.NDArray[np.int64]
Encoded: TypeAlias = "npt.NDArray[np.uint8] | bytes"
"""One sample's bytes; an array is (bytes,) uint8."""
Store: TypeAlias = "npt.NDArray[Any] | torch.Tensor"
"""Decoded samples, (N, *row): an array on the host or a tensor on the device."""
Bad = tuple[tuple[int, str], ...]
"""(index, reason) of each sample that could not be decoded, by index; a reason reads `kind: detail`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One decoded sample, as it is stored: an image (H, W, 3) uint8, a text (T,) int32."""

    shape: tuple[int, ...]
    dtype: Any

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * int(np.dtype(self.dtype).itemsize)


class Facts(Protocol):
    """What is known of a sample that can be used."""

    @property
    def size(self) -> str:
        """As the manifest counts them: of an image "HxW"."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """Why a sample cannot be used: `kind: detail`."""

    reason: str


class Checker(Protocol):
    """Says which encoded samples can be used. Not thread-safe."""

    def check(self, encoded: Sequence[Encoded]) -> Sequence[Facts | Refusal]:
        """For each sample what is known of it, or why it is refused."""
        ...

    def close(self) -> None: ...


class Codec(Protocol):
    """Decodes samples and makes batches of them. One thread decodes and makes augmented batches; `batch` of samples as they are may be
    asked for from another meanwhile."""

    row: Row
    version: int
    """Of what a sample decodes to on this device: part of a run's identity, as its weights follow from it."""
    name: str
    """What makes the batches, to be shown: numpy, torch, dali."""

    def decode(self, encoded: Sequence[Encoded], out: npt.NDArray[Any]) -> Bad:
        """n samples into `out`, (n, *row); the places of bad ones are zeroed. An exception means that the codec is broken, not a sample."""
        ...

    def batch(self, store: Store, rows: Ids, ids: Ids, *, seed: int, epoch: int | None) -> "torch.Tensor":
        """Rows (n,) of a store as the model takes them, (n, ...) on the device: augmented as (seed, epoch, sample id) say, or, without
        an epoch, as they are."""
        ...

    def warm_up(self) -> None:
        """Makes what the first decode will need: a good use of the time until there are bytes to decode."""
        ...

    def close(self) -> None:
        """Frees what decoding needs; the next decode makes it anew. Batches go on."""
        ...
