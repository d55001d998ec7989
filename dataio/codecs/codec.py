"""The interface of a codec: bytes of one modality to rows of one array, and rows to a batch on the device. Imports no torch.

Convert uses a `Checker`, the loader a `Codec`; they know a modality only through these two, and `make` chooses which. A codec knows no
model and no torch.distributed. It has two halves because samples are checked before the shape of a row is known: all samples may decide it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch  # not needed to check samples

Ids = npt.NDArray[np.int64]
Encoded: TypeAlias = "npt.NDArray[np.uint8] | bytes"
"""One sample's bytes; an array is (bytes,) uint8."""
Store: TypeAlias = "npt.NDArray[Any] | torch.Tensor"
"""Decoded samples, (N, *row): an array on the host or a tensor on the device."""
Bad = tuple[tuple[int, str], ...]
"""(index, reason) of each sample that could not be decoded, ordered by index; a reason reads `kind: detail`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Type and shape of one decoded sample as stored: an image (H, W, 3) uint8, a text (T,) int32."""

    shape: tuple[int, ...]
    dtype: Any

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * int(np.dtype(self.dtype).itemsize)


class Facts(Protocol):
    """What is known of a usable sample."""

    @property
    def size(self) -> str:
        """The size as the manifest counts it; for an image "HxW", for a text its tokens."""
        ...

    @property
    def has_alpha(self) -> bool:
        """Whether an image may be transparent somewhere; False for a text."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """Why a sample cannot be used: `kind: detail`."""

    reason: str


class Checker(Protocol):
    """Says which encoded samples can be used. Not thread-safe."""

    def check(self, encoded: Sequence[Encoded]) -> Sequence[Facts | Refusal]:
        """For each sample its facts, or the reason to refuse it."""
        ...

    def close(self) -> None: ...


class Codec(Protocol):
    """Decodes samples and makes batches of them. One thread decodes and makes augmented batches; another thread may meanwhile call `batch`
    for samples without augmentation."""

    row: Row
    version: int
    """Version of the decoded values on this device; part of a run's identity, since its weights depend on them."""
    name: str
    """Name of the backend that makes the batches, for display: numpy, torch, dali."""

    def room(self, n: int) -> Store:
        """An uninitialised store of n samples, (n, *row), where the next step wants them: on the host, or on the device if it decodes."""
        ...

    def decode(self, encoded: Sequence[Encoded], out: Store) -> Bad:
        """Decodes n samples into `out`, (n, *row): an array, or what `room` gave. Bad ones become zeros. An exception means that the codec
        is broken, not a sample."""
        ...

    def batch(self, store: Store, rows: Ids, ids: Ids, *, seed: int, epoch: int | None) -> "torch.Tensor":
        """Rows (n,) of a store as the model takes them, (n, ...) on the device: augmented according to (seed, epoch, sample id), or
        unchanged if `epoch` is None."""
        ...

    def warm_up(self) -> None:
        """Makes what the first decode needs, to use the time until there are bytes to decode."""
        ...

    def close(self) -> None:
        """Frees what decoding needs; the next decode makes it again. `batch` still works."""
        ...
