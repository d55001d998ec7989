"""The interface between the loader and what holds a split's samples: resident (all decoded) or streamed (decoded on demand)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy.typing as npt

from dataio.codecs.codec import Codec, Ids, Store

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Fetched(Generic[T_co]):
    """The samples of one step of a plan."""

    tag: T_co
    """The plan's tag for this step."""
    ids: Ids  # (n,)
    store: Store  # (N, *row)
    rows: Ids  # (n,) where in the store these samples are; valid until the next step is asked for
    targets: dict[str, npt.NDArray[Any]]  # by name, each (n, *shape); all are missing for a sample that could not be decoded


class Fetches(Protocol[T_co]):
    """Iterates over the steps of a plan."""

    def __iter__(self) -> Iterator[Fetched[T_co]]: ...

    def stop(self) -> None:
        """Ends the iteration; called from another thread."""
        ...

    def close(self) -> None:
        """Ends its helper threads; called after the iteration."""
        ...


class Supply(Protocol):
    """The source of a split's samples."""

    codec: Codec
    decode_seconds: float

    @property
    def held_bytes(self) -> int: ...
    @property
    def groups_read(self) -> int: ...
    @property
    def bytes_read(self) -> int: ...
    @property
    def read_wait_seconds(self) -> float: ...
    @property
    def waits_for_read(self) -> bool:
        """The making of batches waits for a read of the data at this moment, and for nothing else."""
        ...

    def fetch(self, plan: Iterable[tuple[T, Ids]], *, horizon: int) -> Fetches[T]:
        """Begins to fetch the samples of `plan`, which yields (tag, ids) for each step; requests at most `horizon` steps in advance."""
        ...
