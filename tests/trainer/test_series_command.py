"""What the commands that train a series share: one folder holds one job, a run as the first word stands for its settings, and one end."""

import signal
from pathlib import Path

import pytest

from cluster.storage import open_storage
from trainer.series.command import guarded_series, ranks_of, run_first, same_job
from trainer.series.train import RunFailed, RunStopped
from trainer.settings.fields import as_begun, replaced
from trainer.settings.toml import load, to_toml
from trainer.settings.tree import RunConfig

RECORD = {"settings": {"optim.lr": 0.1, "data.mean": (0.5, 0.5)}, "epochs": [1, 3]}


def test_a_folder_holds_one_job(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "job")
    same_job(storage, ".series/job.json", RECORD)
    same_job(storage, ".series/job.json", RECORD)
    with pytest.raises(ValueError, match=r"was begun with other epochs, optim\.lr; give another --run NAME"):
        same_job(storage, ".series/job.json", {"settings": {"optim.lr": 0.2, "data.mean": (0.5, 0.5)}, "epochs": [1]})
    with pytest.raises(ValueError, match="was begun with other data"):
        same_job(storage, ".series/job.json", {**RECORD, "data": "x"})
    for damaged in (b"{", b"[]", b"\xff"):
        storage.write_atomic(".series/job.json", damaged)
        with pytest.raises(ValueError, match=r"is damaged|begun with other settings"):
            same_job(storage, ".series/job.json", RECORD)


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "config.toml").touch()
    with pytest.raises(ValueError, match="holds something else"):
        same_job(open_storage(tmp_path / "job"), "job.json", RECORD)
    assert [path.name for path in (tmp_path / "job").iterdir()] == ["config.toml"]


def test_a_run_as_the_first_word_stands_for_its_settings(tmp_path: Path) -> None:
    config = replaced(replaced(RunConfig(), "run", "mine"), "optim.lr", 0.125)
    open_storage(tmp_path).write_atomic("mine/config.toml", to_toml(config).encode())
    for words in ([str(tmp_path / "mine"), "--x"], ["mine", "--x", "--storage", str(tmp_path)], ["mine", "--x", f"--storage={tmp_path}"]):
        with run_first(words) as (found, run):
            assert run is not None
            assert (run.name, found[0], found[2:]) == ("mine", "--config", words[1:])
            assert load(found[1], RunConfig()) == replaced(as_begun(config), "run", ""), "the job has a name of its own"
        assert not Path(found[1]).exists()
    for words in ([], ["--run", "mine"], [str(tmp_path)], ["cifar10"], ["s3://"]):
        with run_first(words) as (found, run):
            assert (found, run) == (words, None)


def test_a_name_of_nothing_is_told_with_the_runs_that_are_there(tmp_path: Path) -> None:
    open_storage(tmp_path).write_atomic("pets-1/config.toml", to_toml(RunConfig()).encode())
    with (
        pytest.raises(ValueError, match=r"pets-2 is neither data here nor a run: there is no run pets-2; did you mean pets-1\?"),
        run_first(["pets-2", "--storage", str(tmp_path)]),
    ):
        pass
    for word in ("quickstart", "mine.toml", "no/such/folder"):  # whose words are those of any command line
        with run_first([word, "--storage", str(tmp_path)]) as (found, run):
            assert (found[0], run) == (word, None)


def test_settings_that_cannot_be_read_are_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="is not UTF-8 text"), run_first([str(tmp_path)]):
        pass


def test_each_end_has_its_words_and_its_status(capsys: pytest.CaptureFixture[str]) -> None:
    def ends(error: BaseException) -> int:
        def work() -> int:
            raise error

        return guarded_series(work)

    assert ends(RunStopped(signal.SIGTERM)) == 143
    assert "SIGTERM: stopped; the same command goes on" in capsys.readouterr().err
    assert ends(RunFailed("run x ended with status 1")) == 1
    assert "error: run x ended with status 1" in capsys.readouterr().err
    assert ends(OSError("no answer")) == 1
    assert "error: no answer; the same command goes on" in capsys.readouterr().err
    assert ends(KeyboardInterrupt()) == 130
    with pytest.raises(SystemExit) as ended:
        ends(ValueError("wrong"))
    assert ended.value.code == 2
    assert guarded_series(lambda: 0) == 0


def test_virtual_ranks_are_those_given_or_the_workers() -> None:
    assert ranks_of(replaced(replaced(RunConfig(), "train.virtual_ranks", 4), "workers", "2")) == 4
    assert ranks_of(replaced(RunConfig(), "workers", "2")) == 2
    assert ranks_of(RunConfig()) >= 1
