"""Waits for a storage that is away while a run is being set up. start.py makes one SetUp for a command; from the session on, the run's own
Patience does this (session.py).

Nothing trains yet, so a wait has an end: a command that nobody watches must not wait for ever for an address that was mistyped.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from rich.console import Console
from rich.text import Text

from cluster.journal import Journal
from cluster.patience import Patience

T = TypeVar("T")

WAIT_SECONDS = 3600.0
"""How long a command waits for its storage before it has begun anything."""


class SetUp:
    """See the module."""

    def __init__(self, console: Console, *, patience_seconds: float = WAIT_SECONDS) -> None:
        self._patience_seconds = patience_seconds
        self._noted: list[tuple[str, dict[str, Any]]] = []
        self._patience = Patience(say=lambda line: console.print(Text(line), soft_wrap=True), record=self._note)

    def call(self, what: str, operation: Callable[[], T]) -> T:
        """What `operation()` returns, as soon as the storage answers. It may be repeated. `what` names it for people. StorageOutage after
        the patience; a signal ends the wait."""
        return self._patience.call(what, operation, seconds=self._patience_seconds)

    def tell(self, journal: Journal) -> None:
        """Write what happened so far into the run's journal, which did not exist yet."""
        noted, self._noted = self._noted, []
        for event, fields in noted:
            journal.write(event, **fields)

    def _note(self, event: str, **fields: Any) -> None:
        self._noted.append((event, fields))
