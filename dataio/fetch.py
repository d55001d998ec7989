"""What the loader asks of whatever holds a split's samples: resident (all of them decoded) or streamed (decoded when asked for)."""

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
    """What the plan gave with them."""
    ids: Ids  # (n,)
    store: Store  # (N, *row)
    rows: Ids  # (n,) where in the store these samples are; valid until the next step is asked for
    targets: dict[str, npt.NDArray[Any]]  # by name, each (n, *shape); of a sample that could not be decoded all are missing


class Fetches(Protocol[T_co]):
    """What a plan wants, step after step."""

    def __iter__(self) -> Iterator[Fetched[T_co]]: ...

    def stop(self) -> None:
        """Ends the iteration, from another thread."""
        ...

    def close(self) -> None:
        """Ends what works for it; after the iteration."""
        ...


class Supply(Protocol):
    """Where the samples of a split come from."""

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

    def fetch(self, plan: Iterable[tuple[T, Ids]], *, horizon: int) -> Fetches[T]:
        """Begins to get what `plan` wants, (tag, ids) a step; no more than `horizon` steps of it are asked for in advance."""
        ...
