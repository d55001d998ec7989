"""Runs from Python: the words that the arguments make, the handle of a run that is over, and processes that say, fail, are stopped and
interrupted. Whole runs: tests/e2e/test_python.py."""

import io
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import trainer
from tests.trainer.small_run import train
from tests.trainer.test_evaluate import BASE
from trainer import handle
from trainer.handle import Run, RunFailed, RunStopped, finetune, open_run, words_of
from trainer.settings.cli import parse
from trainer.settings.fields import settings as settings_of
from trainer.settings.tree import RunConfig


def made(**given: Any) -> list[str]:
    return words_of(**{"data": "", "recipe": (), "name": "", "storage": "", "settings": {}, **given})


# --- words ------------------------------------------------------------------------------------------------------------------------------


def test_arguments_make_the_command_lines_words() -> None:
    assert made(data=Path("photos"), recipe="quickstart", name="pets", storage=Path("runs")) == (
        ["photos", "--config", "quickstart", "--run", "pets", "--storage", "runs"]
    )
    settings = {"train.epochs": 3, "data.flip": True, "optim.lr": 1e-3, "data.mean": (0.4, 0.5, 0.6), "train.checkpoint_every": 10}
    words = "--train.epochs 3 --data.flip true --optim.lr 0.001 --data.mean 0.4 0.5 0.6 --train.checkpoint-every 10"
    assert made(settings=settings) == words.split()


def test_every_setting_goes_through_the_command_line_unchanged() -> None:
    every = {key: value for key, value in settings_of(RunConfig()).items() if key not in ("run", "storage")}
    given = {key: value for key, value in every.items() if not isinstance(value, dict) and value != ()}
    assert len(given) > 0.9 * len(every)
    found = settings_of(parse(made(settings=given)).config)
    assert {key: found[key] for key in given} == given


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"train.epoch": 3}, "'train.epoch' is no setting; did you mean train.epochs?"),
        ({"run": "pets"}, "settings have 'run'; give it as the argument name="),
        ({"config": "best"}, "'config' is no setting; recipes are the argument recipe="),
        ({"optim.lr": None}, r"settings\['optim.lr'\] is a NoneType; give text, a number, True, False, or a list of these"),
    ],
)
def test_a_wrong_setting_is_told(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        finetune(settings=settings)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"data": "nowhere"}, "nowhere: there is no such folder or file"),
        ({"settings": {"train.epochs": 0}}, "train.epochs=0"),
        ({"settings": {"train.epochs": "many"}}, "many"),
        ({"recipe": "qickstart"}, "quickstart"),
    ],
)
def test_what_the_command_line_refuses_is_a_value_error_with_its_words(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as raised:
        finetune(**arguments)
    assert "\n" not in str(raised.value)


def test_the_package_gives_them_and_nothing_else() -> None:
    assert (trainer.finetune, trainer.open_run) == (finetune, open_run)
    with pytest.raises(AttributeError, match="no attribute 'finetun'"):
        trainer.finetun  # noqa: B018


def test_importing_the_package_imports_nothing_of_it() -> None:
    code = "import sys, trainer\nassert not [name for name in sys.modules if name.startswith(('trainer.', 'torch', 'cluster'))]"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- a run that is over -----------------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_opened_by_name_or_folder(tmp_path: Path) -> None:
    from PIL import Image

    folder = train(tmp_path, BASE, steps=2)
    picture = tmp_path / "picture.png"
    Image.new("RGB", (28, 28), "white").save(picture)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for run in (open_run("sample", storage=tmp_path), open_run(folder)):
        assert (run.name, run.folder, run.report) == ("sample", str(folder), None)
        assert run.metrics["test_count"] == 500
        answered, broken = run.predict(picture, tmp_path / "broken.png", top=2)
        assert answered["image"] == str(picture)
        assert len(answered["predictions"]) == 2
        assert broken["error"]
        assert "sample" in repr(run)
        assert "<table>" in run._repr_html_()
    with pytest.raises(ValueError, match="there is no run smple; did you mean sample"):
        open_run("smple", storage=tmp_path)


# --- processes: a script in place of the driver -----------------------------------------------------------------------------------------


def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str) -> Run:
    """A run whose process is a script of the test."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(body))
    made = handle._Process.__init__

    def instead(self: handle._Process, words: Any) -> None:
        real = subprocess.Popen

        def popen(command: list[str], **options: Any) -> subprocess.Popen[str]:
            return real([*command[: command.index("-m") + 3], str(script)], **options)  # trainer.series.child PID SCRIPT

        monkeypatch.setattr(handle.subprocess, "Popen", popen)
        try:
            made(self, words)
        finally:
            monkeypatch.setattr(handle.subprocess, "Popen", real)

    monkeypatch.setattr(handle._Process, "__init__", instead)
    return Run(storage=str(tmp_path), name="", process=handle._Process([]))


def test_it_shows_what_the_run_says_and_learns_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = started(monkeypatch, tmp_path, "print('starting'); print('run pets-1a2b in here: 2 workers'); print('done')")
    shown = io.StringIO()
    run.wait(60, show=shown)
    assert shown.getvalue() == "starting\nrun pets-1a2b in here: 2 workers\ndone\n"
    assert (run.name, run.folder) == ("pets-1a2b", str(tmp_path / "pets-1a2b"))
    again = io.StringIO()
    run.wait(60, show=again)
    assert again.getvalue() == ""  # from where the last call ended


def test_a_run_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = started(monkeypatch, tmp_path, "import sys; print('error: no room'); sys.exit(1)")
    with pytest.raises(RunFailed, match=r"ended with status 1; the same call goes on\. It said:\nerror: no room"):
        run.wait(60, show=None)
    assert run._process is not None
    assert run._process.ended() == "failed"
    with pytest.raises(RunFailed, match="came to no name"):
        _ = run.name
    assert "has no name yet" in repr(run)


WAITS = """
import signal, sys, time
def ended(number, frame):
    print('saved', number, flush=True)
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, ended)
signal.signal(signal.SIGINT, ended)
print('run pets in here: ready', flush=True)
while True:
    time.sleep(0.05)
"""


def test_stop_lets_it_save(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = started(monkeypatch, tmp_path, WAITS)
    assert run.name == "pets"
    assert run.status == "running"
    with pytest.raises(TimeoutError, match="still under way after 0 s; it goes on"):
        run.wait(0, show=None)
    run.stop()
    run.stop()  # nothing happens
    assert run.status == "stopped"
    shown = io.StringIO()
    with pytest.raises(RunStopped, match="the same call goes on"):
        run.wait(show=shown)
    assert shown.getvalue() == f"run pets in here: ready\nsaved {signal.SIGTERM.value}\n"


def test_an_interrupt_is_passed_on_and_raised_when_it_has_saved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = started(monkeypatch, tmp_path, WAITS)
    assert run.name == "pets"

    class Shows(io.StringIO):
        def write(self, text: str) -> int:
            if "ready" in text:  # the wait has begun
                signal.raise_signal(signal.SIGINT)
            return super().write(text)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run.wait(60, show=Shows())
    finally:
        signal.signal(signal.SIGINT, before)
    assert run.status == "stopped"


def test_it_outlives_the_thread_that_started_it_but_not_the_process(tmp_path: Path) -> None:
    """The kernel's signal at a parent's death is that of the thread's."""
    (tmp_path / "waits.py").write_text(WAITS.replace("print('saved'", "open('saved', 'w'); print('saved'"))
    (tmp_path / "notebook.py").write_text(
        textwrap.dedent(f"""
            import os, signal, subprocess, sys, threading, time
            sys.path.insert(0, {str(Path(__file__).parents[2])!r})
            from trainer import handle
            real = subprocess.Popen
            handle.subprocess.Popen = lambda command, **options: real([*command[:4], "waits.py"], **options)
            processes = []
            thread = threading.Thread(target=lambda: processes.append(handle._Process([])))
            thread.start()
            thread.join()
            print(processes[0].named(), flush=True)
            time.sleep(0.5)
            assert processes[0].ended() == "running"
            print(processes[0]._process.pid, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        """)
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "notebook.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout.splitlines()[0] == "pets"
    deadline = threading.Event()
    for _ in range(600):
        if (tmp_path / "saved").exists():
            break
        deadline.wait(0.1)
    assert (tmp_path / "saved").exists()
    pid = int(done.stdout.splitlines()[1])
    for _ in range(600):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]:
            return
        time.sleep(0.1)
    pytest.fail("the run is still there")
