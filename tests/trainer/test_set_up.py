"""A storage that is away while a run is set up is waited for, said, and journalled once there is a journal."""

import errno
from pathlib import Path

import pytest
from rich.console import Console

from cluster.journal import Journal, read_journal
from cluster.preflight import preflight
from cluster.storage import Storage, StorageOutage, open_storage
from trainer.drive.set_up import SetUp


@pytest.fixture
def console() -> Console:
    return Console(record=True, width=160)


def test_an_outage_is_waited_out_and_told_on_the_terminal_and_later_in_the_journal(tmp_path: Path, console: Console) -> None:
    left = [OSError(errno.ESTALE, "Stale file handle"), OSError(errno.EIO, "Input/output error")]

    def answers() -> str:
        if left:
            raise left.pop()
        return "found"

    set_up = SetUp(console)
    assert set_up.call("the run's folder", answers) == "found"
    assert "the storage does not answer; waiting for it (the run's folder" in console.export_text(clear=False)
    assert "the storage answers again" in console.export_text()
    storage = open_storage(tmp_path)
    set_up.tell(Journal.open(storage, "r", "driver"))
    set_up.tell(Journal.open(storage, "r", "driver"))  # each is told once
    outage, recovery = read_journal(storage, "r")
    assert (outage["event"], outage["what"]) == ("storage_outage", "the run's folder")
    assert (recovery["event"], recovery["what"]) == ("storage_recovered", ["the run's folder"])


def test_the_wait_ends_and_a_mistake_is_none(console: Console) -> None:
    def never() -> None:
        raise StorageOutage("nobody there")

    def wrong() -> None:
        raise ValueError("no such bucket")

    with pytest.raises(StorageOutage, match="the storage: nobody there"):
        SetUp(console, patience_seconds=0).call("the storage", never)
    with pytest.raises(ValueError, match="no such bucket"):
        SetUp(console).call("the storage", wrong)


def test_a_check_of_the_nodes_calls_a_storage_that_is_away_no_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster.launch import ClusterHardware

    storage = open_storage(tmp_path)

    def away(self: Storage, path: str, data: bytes) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Storage, "write_atomic", away)
    with pytest.raises(OSError, match="Stale file handle"):
        preflight(storage, "r", ClusterHardware(local=True, nodes=1, cpus=1, gpus=0), lambda: "data")
