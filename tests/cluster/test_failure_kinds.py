"""Each exception of ours says what it means for a retry, and that reaches the driver by the way on which a rank's last words travel."""

import ast
import builtins
import pickle
from pathlib import Path

import pytest

from cluster.coordinator import CoordinatorKeepsDying
from cluster.failures import KINDS, BadNumbers, CheckpointNotSaved, WeightsDiffer, is_refusal
from cluster.heartbeat import CoordinatorLost
from cluster.rank import AgentLost, CallFailed, GroupIncomplete
from cluster.ray_cluster import RayNotStarted
from cluster.spill import ForeignSpillFolder, SpillDamaged
from cluster.state import AttemptOver
from cluster.storage import StorageOutage, StorageRefused
from cluster.store import AlreadyCommitted, CorruptCheckpoint, Fenced, NoValidCheckpoint, StagedFileLost, StorageFull, UnknownFormat
from cluster.surroundings import NoSuchInterface
from cluster.zygote import ForeignZygote
from dataio.conversion import DiskFull
from dataio.manifest import ManifestError
from dataio.parquet import CorruptShard
from dataio.quarantine import TooManyBadSamples
from dataio.remote import DataOutage, DataRefused
from dataio.sources import SourceError
from dataio.unlabelled import UnlabelledError
from tests.cluster.told import failure_on_a_rank
from trainer.drive.check import ModelCheckDied
from trainer.learn.state import StateError
from trainer.models.attribution import NoEmbeddingsError
from trainer.models.cam import NoPlacesError
from trainer.models.own import OwnCodeError
from trainer.models.weights import WeightsError

PROJECT = Path(__file__).resolve().parents[2]
INSIDE = {
    *("cluster.controller.RunFailed", "dataio.stream.Stopped", "trainer.series.train.RunFailed", "trainer.series.train.RunStopped"),
    *("trainer.handle.RunFailed", "trainer.handle.RunStopped", "trainer.track.place.Away", "trainer.track.mlflow.Refused"),
    "trainer.inference.job.WorkersLost",
}
"""Caught by those who call what raises them; the controller's RunFailed carries a Failure, a handle's is for a notebook that started a run;
a tracker's and a job's of answers are never in a run. So are classes with a private name."""

KIND_OF: list[tuple[BaseException, str]] = [
    (BadNumbers(7, 1.0, "the loss is nan"), "numbers"),
    (WeightsDiffer(7, (1,), (5, 6, 5)), "numbers"),
    (CoordinatorLost("x"), "infrastructure"),
    (CallFailed("x"), "infrastructure"),
    (AttemptOver("x"), "infrastructure"),
    (CoordinatorKeepsDying("x"), "infrastructure"),
    (AgentLost("x"), "infrastructure"),
    (DataOutage("x"), "infrastructure"),
    (TooManyBadSamples("x"), "data"),
    (CorruptShard("x"), "data"),
    (DataRefused("x"), "storage"),
    (ManifestError("x"), "user"),
    (SourceError("x"), "user"),
    (UnlabelledError("x"), "user"),
    (DiskFull(28, "x"), "storage"),
    (StorageOutage("x"), "infrastructure"),
    (StorageRefused("x"), "storage"),
    (StorageFull(28, "x"), "storage"),
    (ForeignSpillFolder("x"), "storage"),
    (SpillDamaged("x"), "infrastructure"),
    (AlreadyCommitted("x"), "infrastructure"),
    (StagedFileLost("x"), "infrastructure"),
    (CheckpointNotSaved("x"), "infrastructure"),
    (GroupIncomplete("x"), "infrastructure"),
    (ModelCheckDied("x"), "infrastructure"),
    (RayNotStarted("x"), "infrastructure"),
    (CorruptCheckpoint("x"), "infrastructure"),  # the driver passes over it and names another
    (Fenced("x"), "user"),
    (NoSuchInterface("x"), "user"),
    (ForeignZygote("x"), "user"),
    (NoValidCheckpoint("x"), "user"),
    (UnknownFormat("x"), "user"),
    (StateError("x"), "user"),
    (WeightsError("x"), "user"),
    (OwnCodeError("x"), "user"),
    (NoPlacesError("x"), "user"),
    (NoEmbeddingsError("x"), "user"),
]


@pytest.mark.parametrize(("error", "kind"), KIND_OF, ids=lambda each: type(each).__name__ if isinstance(each, BaseException) else "")
def test_its_kind_reaches_the_driver(error: BaseException, kind: str) -> None:
    failure = failure_on_a_rank(error, 3)
    assert (failure.kind, failure.rank, failure.message) == (kind, 3, f"{type(error).__name__}: {error}")
    assert failure.step == (7 if isinstance(error, BadNumbers) else None)


def test_a_subclass_is_of_its_base_s_kind() -> None:
    class Mine(TooManyBadSamples):
        pass

    assert failure_on_a_rank(Mine("x")).kind == "data"


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


def test_a_checkpoint_or_a_call_that_the_storage_refuses_is_a_refusal_and_any_other_is_tried_again() -> None:
    def errors(because: Exception) -> list[BaseException]:
        return [CheckpointNotSaved("x", is_refused=is_refusal(because)), CallFailed("x", because)]

    for because in (StorageFull(28, "x"), StorageRefused("x"), OSError(28, "x"), PermissionError(13, "x")):
        for error in errors(because):
            assert failure_on_a_rank(error).kind == "storage"
            assert pickle.loads(pickle.dumps(error)).failure_kind == "storage"
    for other in (StorageOutage("x"), OSError(5, "x"), KeyError("x")):
        for error in errors(other):
            assert failure_on_a_rank(error).kind == "infrastructure"
    assert failure_on_a_rank(CallFailed("x")).kind == "infrastructure"


BARE = {
    "BaseException",
    "Exception",
    "RuntimeError",
    "OSError",
    "IOError",
    "EnvironmentError",
    "TimeoutError",
    "ConnectionError",
    "PermissionError",
}
MAY_BE_BARE = {
    ("dataio/foreign.py", "open_regular"): "an errno says why a file is not read; the readers turn it into a bad sample or a SourceError",
    ("dataio/foreign.py", "read_regular"): "likewise",
    ("cluster/storage.py", "open_regular"): "likewise, for files of a run that somebody else may have made",
    ("cluster/store.py", "_verify"): "the system's own errno, whose kind it keeps, with what to do",
    ("dataio/sources/hostile.py", "read_below"): "an errno says why a sample cannot be read; the source turns it into a bad sample",
    ("trainer/handle.py", "wait"): "a caller's own limit in a notebook; nothing has failed, and the run goes on",
    ("trainer/inference/job.py", "begin"): "never in a run: a job of answers ends with status 1 and these words",
    ("trainer/inference/refusals.py", "writing_to"): "likewise",
    ("trainer/track/tensorboard.py", "__init__"): "caught two lines below and put into words",
    ("trainer/compress/measure.py", "timed"): "likewise, of a command that compresses",
    ("dataio/conversion.py", "convert"): "as the system would raise it; caught five lines below and put into words",
}


def bare_raises(source: str) -> set[tuple[str, str]]:
    """(function, class) of each exception of Python's own that code raises and that says nothing about a retry."""
    found = set()

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        if isinstance(node, ast.Raise) and node.exc is not None:
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if isinstance(raised, ast.Name) and raised.id in BARE:
                found.add((function, raised.id))
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(source), "")
    return found


def test_what_our_code_raises_on_purpose_says_what_it_means_for_a_retry() -> None:
    found = {
        (str(path.relative_to(PROJECT)), function)
        for package in ("cluster", "dataio", "trainer")
        for path in (PROJECT / package).rglob("*.py")
        for function, _ in bare_raises(path.read_text())
    }
    assert found == set(MAY_BE_BARE)
    assert bare_raises("def f():\n    raise TimeoutError('x')\ntry:\n    raise OSError\nexcept E:\n    raise") == {
        ("f", "TimeoutError"),
        ("", "OSError"),
    }
