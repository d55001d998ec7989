"""What a run makes of notices of preemption: nodes that say that they are about to go. Pure; fleets.py acts on it.

A notice is answered once: all ranks commit and go on without that node, where there is room elsewhere. Such a file may stay for hours, on a
node that does not go, so a run that has nowhere else to go trains on there, and says so. A notice that is taken back and given again is a
new one, for MOST_PAUSES times a node.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

MOST_PAUSES = 3
"""Pauses for notices of one node, over this driver's life: a hook that flaps must not hold up the run for ever."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What to do about the notices that stand."""

    act: Literal["leave", "stay"]
    """Commit and go on elsewhere; or train on, and say so once."""
    nodes: tuple[str, ...]
    """Ids of the nodes that it is about."""
    reason: str


class Notices:
    """Remembers which nodes have given notice, and what was answered."""

    def __init__(self) -> None:
        self._noticed: dict[str, str] = {}  # node -> its notice, as long as it stands as far as is known
        self._leaving: set[str] = set()  # told to leave, and the fleet is still the same
        self._answered: set[str] = set()  # a fleet began since
        self._warned: set[str] = set()
        self._pauses: Counter[str] = Counter()

    @property
    def nodes(self) -> frozenset[str]:
        """Nodes to keep away from."""
        return frozenset(self._noticed)

    def keep(self, nodes: Collection[str]) -> None:
        """Of the nodes that have given notice, only these still do."""
        for node in self.nodes - set(nodes):
            self._forget(node)

    def moved(self) -> None:
        """A new fleet begins: what was told to leave has been left, or could not be."""
        self._answered |= self._leaving
        self._leaving.clear()

    def hear(self, said: Mapping[str, str]) -> Answer | None:
        """`said`: the notice of each node where the run has agents, "" for none. None if there is nothing new. To leave is said until the
        run has `moved`."""
        for node, text in said.items():
            if text:
                self._noticed[node] = text
            else:
                self._forget(node)
        standing = {node: text for node, text in said.items() if text}
        new = [node for node in standing if node not in self._answered | self._leaving and self._pauses[node] < MOST_PAUSES]
        self._pauses.update(new)
        self._leaving |= set(new)
        if self._leaving & set(standing):
            return Answer(act="leave", nodes=tuple(sorted(standing)), reason="; ".join(sorted(set(standing.values()))))
        # Answered, and there are agents of ours on it all the same: no other place had room.
        unsaid = sorted(node for node in standing if node not in self._warned)
        if not unsaid:
            return None
        self._warned |= set(unsaid)
        return Answer(act="stay", nodes=tuple(unsaid), reason="; ".join(sorted({standing[node] for node in unsaid})))

    def _forget(self, node: str) -> None:
        self._noticed.pop(node, None)
        for known in (self._leaving, self._answered, self._warned):
            known.discard(node)
