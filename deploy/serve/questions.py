"""What `front` asks a replica, what a replica answers, and what lies between: a batch, ready for the graph."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy.typing as npt

NOT_FINITE = "not finite: the model gives no numbers for this input"


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What `front` asks a replica."""

    body: bytes = field(repr=False)
    """An image or a text, as the client has sent it."""
    top: int
    """How many of the most probable classes to name."""
    is_json: bool = False
    """The client says that the body is JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a replica answers."""

    said: Mapping[str, Any] = field(default_factory=dict)
    """JSON, in the format of `finetune predict --json`, with each class's index. Empty if the body was refused."""
    refusal: str = ""
    """Why there is no answer: `kind: detail`, of the codec (dataio.codecs), or NOT_FINITE."""
    batch_images: int = 0
    """Images or texts of the batch that it was part of, in its first answer; 0 in the others, so that each batch counts once."""
    batch_seconds: float = 0.0
    """Time that this batch took, preparation included; as above."""


Inputs = Mapping[str, npt.NDArray[Any]]
"""What the graph takes, by name: each (n, ...)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A batch, ready for the graph."""

    inputs: Inputs
    """Of the good ones, in order."""
    bad: Mapping[int, str]
    """Why the others are none, by their place in the batch."""
    cut: frozenset[int] = frozenset()
    """Texts whose beginning is answered."""


class Preparation(Protocol):
    """What `images` and `texts` do."""

    def first(self) -> Inputs:
        """Of one sample without meaning, by which the graph is tried out."""

    def prepared(self, questions: Sequence[Question]) -> Prepared: ...
