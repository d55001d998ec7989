"""Each exception of ours says what it means for a retry, and that reaches the driver by the way on which a rank's last words travel."""

import ast
import builtins
from multiprocessing import Pipe
from pathlib import Path

import pytest

from cluster.agent import RankEnd
from cluster.failures import KINDS, BadNumbers, RankError, WeightsDiffer, described
from cluster.heartbeat import CoordinatorLost
from cluster.launch import failure_of_ranks
from cluster.rank import AgentLost, CallFailed, Calls, serve_calls
from cluster.spill import SpillDamaged
from cluster.storage import StorageOutage, StorageRefused
from cluster.store import CorruptCheckpoint, Fenced, NoValidCheckpoint, StagedFileLost, StorageFull, UnknownFormat
from dataio.convert import DiskFull
from dataio.manifest import ManifestError
from dataio.parquet import CorruptShard
from dataio.quarantine import TooManyBadSamples
from dataio.remote import DataOutage, DataRefused
from dataio.sources import SourceError
from trainer.learn.state import StateError
from trainer.models.vision import WeightsError

PROJECT = Path(__file__).resolve().parents[2]
INSIDE = {"cluster.controller.RunFailed", "dataio.stream.Stopped"}
"""Caught by those who call what raises them; RunFailed carries a Failure. So are classes with a private name."""

KIND_OF: list[tuple[BaseException, str]] = [
    (BadNumbers(7, 1.0, "the loss is nan"), "numbers"),
    (WeightsDiffer(7, (1,), (5, 6, 5)), "numbers"),
    (CoordinatorLost("x"), "infrastructure"),
    (CallFailed("x"), "infrastructure"),
    (AgentLost("x"), "infrastructure"),
    (DataOutage("x"), "infrastructure"),
    (TooManyBadSamples("x"), "data"),
    (CorruptShard("x"), "data"),
    (DataRefused("x"), "user"),
    (ManifestError("x"), "user"),
    (SourceError("x"), "user"),
    (DiskFull(28, "x"), "user"),
    (StorageOutage("x"), "user"),
    (StorageRefused("x"), "user"),
    (StorageFull(28, "x"), "user"),
    (SpillDamaged("x"), "user"),
    (Fenced("x"), "user"),
    (CorruptCheckpoint("x"), "user"),
    (NoValidCheckpoint("x"), "user"),
    (UnknownFormat("x"), "user"),
    (StagedFileLost("x"), "infrastructure"),
    (StateError("x"), "user"),
    (WeightsError("x"), "user"),
]


def through_a_pipe(error: BaseException) -> RankError:
    """As a rank says it and its agent hears it."""
    rank, agent = Pipe()
    told: list[RankError] = []
    Calls(rank).failed(described(error))
    rank.close()
    serve_calls(agent, lambda *_: None, told.append)
    (said,) = told
    return said


@pytest.mark.parametrize(("error", "kind"), KIND_OF, ids=lambda each: type(each).__name__ if isinstance(each, BaseException) else "")
def test_its_kind_reaches_the_driver(error: BaseException, kind: str) -> None:
    failure = failure_of_ranks({3: RankEnd(status=1, error=through_a_pipe(error), killed_by_order=False)})
    assert failure is not None
    assert (failure.kind, failure.rank, failure.message) == (kind, 3, f"{type(error).__name__}: {error}")
    assert failure.step == (7 if isinstance(error, BadNumbers) else None)


def test_a_subclass_is_of_its_base_s_kind() -> None:
    class Mine(TooManyBadSamples):
        pass

    failure = failure_of_ranks({0: RankEnd(status=1, error=through_a_pipe(Mine("x")), killed_by_order=False)})
    assert failure is not None
    assert failure.kind == "data"


def exceptions_of_ours() -> set[str]:
    """By the source: importing everything would take long. A class that is derived from an exception by name, or from one found so."""
    bases: dict[str, set[str]] = {}
    for package in ("cluster", "dataio", "trainer"):
        for path in (PROJECT / package).rglob("*.py"):
            module = ".".join(path.relative_to(PROJECT).with_suffix("").parts)
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    bases[f"{module}.{node.name}"] = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
    names = {name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, BaseException)}
    found: set[str] = set()
    while more := {name for name, above in bases.items() if above & (names | {each.rpartition(".")[2] for each in found})} - found:
        found |= more
    return found


def test_every_exception_class_of_ours_that_may_end_a_rank_says_its_kind() -> None:
    public = {name for name in exceptions_of_ours() if not name.rpartition(".")[2].startswith("_")}
    assert public >= INSIDE
    told = {f"{type(error).__module__}.{type(error).__name__}" for error, _ in KIND_OF}
    assert public - INSIDE == told
    for error, kind in KIND_OF:
        assert type(error).failure_kind == kind  # type: ignore[attr-defined]
        assert kind in KINDS
