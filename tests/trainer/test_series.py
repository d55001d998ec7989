"""Several runs as one job: what has finished is not run again, what fails is told, a signal reaches the run, and time is foretold. The runs
are real processes in the place of `trainer.run`; tests/e2e/test_curve.py has real ones."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.storage import Storage, open_storage
from trainer.series import train as series
from trainer.series.train import Member, RunFailed, RunStopped, left_words, seconds_left, train, words_of
from trainer.settings.cli import parse
from trainer.settings.fields import replaced, settings
from trainer.settings.tree import RunConfig

PRETENDED = """
import json, os, pathlib, signal, sys, time
name, storage = sys.argv[sys.argv.index("--run") + 1], sys.argv[sys.argv.index("--storage") + 1]
folder = pathlib.Path(storage, name)
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "starts", "a") as file:
    file.write(f"{os.getpid()}\\n")
print("said by", name)
if name == "bad":
    sys.exit(2)
if name == "waits" and not (folder / "stopped").exists():
    signal.signal(signal.SIGTERM, lambda *_: ((folder / "stopped").touch(), os._exit(143)))
    (folder / "ready").touch()
    time.sleep(60)
(folder / "summary.json").write_text(json.dumps({"status": "finished", "run": name, "steps": 10}))
"""


def members(*names: str) -> list[Member]:
    return [Member(name=name, config=RunConfig(), steps=10) for name in names]


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    pretended = tmp_path / "pretended.py"
    pretended.write_text(PRETENDED)
    monkeypatch.setattr(series, "words_of", lambda *given: [str(pretended), *words_of(*given)[2:]])
    return open_storage(tmp_path / "runs")


def starts(storage: Storage, name: str) -> int:
    return len(storage.read(f"{name}/starts").splitlines())


def test_each_run_is_started_until_it_has_finished_and_not_again(storage: Storage) -> None:
    told: list[tuple[str, int]] = []
    found = [(member.name, summary["run"]) for member, summary in train(members("a", "b"), storage, lambda m, n: told.append((m.name, n)))]
    assert found == [("a", "a"), ("b", "b")]
    again = [summary["run"] for _, summary in train(members("a", "b", "c"), storage, lambda m, n: told.append((m.name, n)))]
    assert again == ["a", "b", "c"]
    assert told == [("a", 0), ("b", 1), ("c", 2)]
    assert [starts(storage, name) for name in "abc"] == [1, 1, 1]
    assert storage.read(".series/a.log") == b"said by a\n"


def test_a_run_that_fails_is_told_with_its_own_words_and_tried_again_by_the_next_call(storage: Storage) -> None:
    for attempt in (1, 2):
        with pytest.raises(RunFailed, match=r"run bad ended with status 2; the same command goes on with it. It said:\nsaid by bad"):
            list(train(members("a", "bad", "c"), storage))
        assert (starts(storage, "a"), starts(storage, "bad")) == (1, attempt)
    assert not storage.exists("c/starts")


def test_a_summary_of_a_run_that_did_not_finish_does_not_count(storage: Storage) -> None:
    storage.write_atomic("a/summary.json", b'{"status": "stopped"}')
    assert [summary["status"] for _, summary in train(members("a"), storage)] == ["finished"]


def test_a_signal_goes_on_to_the_run_which_ends_by_itself(storage: Storage, tmp_path: Path) -> None:
    watcher = subprocess.Popen(  # it sends the signal once the run is there to hear it
        [
            sys.executable,
            "-c",
            "import os, pathlib, sys, time\nwhile not pathlib.Path(sys.argv[1]).exists(): time.sleep(.02)\nos.kill(int(sys.argv[2]), 15)",
            storage.at("waits/ready"),
            str(os.getpid()),
        ]
    )
    with pytest.raises(RunStopped) as stopped:
        list(train(members("waits"), storage))
    watcher.wait()
    assert (stopped.value.number, storage.exists("waits/stopped")) == (signal.SIGTERM, True)
    assert [summary["run"] for _, summary in train(members("waits"), storage)] == ["waits"]


def test_a_run_dies_with_the_job_that_was_killed(storage: Storage, tmp_path: Path) -> None:
    code = textwrap.dedent(
        f"""
        from cluster.storage import open_storage
        from trainer.series import train as series
        from trainer.settings.tree import RunConfig
        words = series.words_of
        series.words_of = lambda *given: [{str(tmp_path / "pretended.py")!r}, *words(*given)[2:]]
        list(series.train([series.Member(name="waits", config=RunConfig(), steps=1)], open_storage({storage.root!r})))
        """
    )
    job = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    ready = Path(storage.at("waits/ready"))
    while not ready.exists():
        assert job.poll() is None
        time.sleep(0.02)
    run = int(Path(storage.at("waits/starts")).read_text())
    job.kill()
    job.wait()
    end = time.monotonic() + 30
    while Path(f"/proc/{run}/stat").exists() and Path(f"/proc/{run}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end, "the run outlives the job"
        time.sleep(0.02)


def test_a_run_gets_all_settings_by_a_file_and_its_name_and_storage_by_flags(tmp_path: Path) -> None:
    config = replaced(replaced(RunConfig(), "data.path", str(tmp_path)), "data.mean", (0.1, 0.2, 0.3))
    member = Member(name="one", config=config, steps=1)
    file = tmp_path / "settings.toml"
    file.write_text(series.to_toml(config))
    module, *flags = words_of(member, open_storage(tmp_path / "runs"), file)[1:]
    found = settings(parse(flags).config)
    assert module == "trainer.run"
    assert found == settings(config) | {"run": "one", "storage": str(tmp_path / "runs")}


def summary(*, steps: int, beside: float, each: float) -> dict[str, Any]:
    return {"steps": steps, "samples_seen": 10 * steps, "images_per_second": 10 / each, "seconds": beside + steps * each}


def test_time_left_is_what_the_finished_runs_took_beside_their_steps_and_a_step() -> None:
    (one, two, three) = (Member(name=str(steps), config=RunConfig(), steps=steps) for steps in (10, 20, 100))
    assert seconds_left([], [one]) is None
    assert left_words([], [one]) == ""
    done = [(one, summary(steps=10, beside=9, each=0.5)), (two, summary(steps=20, beside=11, each=0.5))]
    assert seconds_left(done, [three, three]) == pytest.approx(2 * (10 + 50))
    assert left_words(done, [three, three]) == "about 2:00 min left"
    assert left_words(done, []) == ""
    assert seconds_left([(one, json.loads("{}"))], [two]) is None, "a summary that does not say"
