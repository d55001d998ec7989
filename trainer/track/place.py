"""The seam to a tracker."""

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from trainer.track.recorded import End, Point, Run

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
"""A full disk may have room again: it is waited for, as a tracker that is away is."""


class Away(OSError):
    """The tracker does not answer; it may later."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What a user says of the tracker."""

    at: str = ""
    """Folder or address; "" for the tracker's own default."""
    project: str = ""
    """Experiment or project."""


class Place(Protocol):
    """A run in a tracker. All methods may be called again with the same arguments after a failure, and after a restart: what a tracker was
    told twice must not be there twice, as far as it can. Away for a tracker that does not answer, ValueError for one that refuses."""

    def open(self, run: Run, known: Mapping[str, Any]) -> Mapping[str, Any]:
        """Make the run there, or go on with the one that an earlier call made: `known` is what that returned, {} at first. What is returned
        is kept in the run's folder."""
        ...

    def log(self, points: Sequence[Point]) -> None:
        """Add points, in the order of their steps."""
        ...

    def end(self, run: Run, end: End, files: Mapping[str, bytes]) -> None:
        """Say how the run ended, and keep the files."""
        ...

    def where(self) -> str:
        """Where a person finds it."""
        ...

    def close(self) -> None:
        """Write out what is held back."""
        ...
