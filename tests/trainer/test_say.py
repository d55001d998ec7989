"""Claims about what the commands print: whatever stands in a data set or in a run's folder, no raw control character reaches a terminal,
nothing is taken for markup, and no secret is printed."""

import ast
import io
import json
import os
import re
import shlex
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.table import Table
from rich.text import Text

from cluster.journal import Journal
from cluster.storage import open_storage
from dataio.config import DataConfig
from dataio.convert import main as convert
from dataio.parquet import open_dataset
from dataio.sources.source import key_of, name_of
from tests.trainer.small_run import train
from trainer.evaluate import main as evaluate
from trainer.predict import main as predict
from trainer.report.__main__ import main as report
from trainer.runs.__main__ import main as runs
from trainer.runs.folder import find_run
from trainer.runs.progress import final_table, predict_command
from trainer.settings.cli import parse
from trainer.settings.say import Terminal, complain, say, say_json
from trainer.settings.tree import ModelConfig, OptimConfig, RunConfig, TrainConfig

PROJECT = Path(__file__).resolve().parents[2]
PACKAGES = ("trainer", "dataio", "cluster")
MAY_PRINT = {"trainer/settings/say.py", "dataio/terminal.py", "dataio/convert.py"}
HOSTILE = "\x1b]0;pwned\x07\x1b[2J\u202e\u200b\x9b\r\n[red]\ufeff"
NOT_UTF8 = os.fsdecode(b"caf\xe9")
SECRET = "abc/def@ghi+jkl"
URI = f"s3://KEY:{SECRET}@bucket/runs"
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def hidden(text: str, allowed: str = "\n") -> set[str]:
    return {c for c in text if c not in allowed and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}


def test_only_one_file_of_the_trainer_prints_and_makes_consoles() -> None:
    """Elsewhere a new line of output would be one more place that can forget what foreign text may do."""
    found = [
        f"{path.relative_to(PROJECT)}:{node.lineno}"
        for package in PACKAGES
        for path in sorted((PROJECT / package).rglob("*.py"))
        if str(path.relative_to(PROJECT)) not in MAY_PRINT
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "Console")
    ]
    assert not found, f"use trainer.settings.say: {', '.join(found)}"


def test_no_text_steers_a_terminal_and_none_is_markup(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"a {HOSTILE} {NOT_UTF8} {URI}")
    complain(f"b {HOSTILE} {NOT_UTF8} {URI}")
    say_json({HOSTILE: [NOT_UTF8, URI]})
    table = Table(title=Text(HOSTILE))
    table.add_row("[red]no markup[/red]", Text(HOSTILE), NOT_UTF8)
    for is_terminal in (False, True):
        console = Terminal(width=200, highlight=False, force_terminal=is_terminal)
        console.print(f"c {HOSTILE} {URI}")
        console.print(Text(f"d {HOSTILE} {NOT_UTF8} {URI}", style="bold"))
        console.print(table)
    out, err = capsys.readouterr()
    assert hidden(COLOURS.sub("", out)) == hidden(err) == set()
    assert "abc" not in out + err
    assert out.count("[red]no markup[/red]") == 2
    assert r"\x1b]0;pwned\x07" in out
    assert r"caf\xe9" in out
    assert json.loads(out.splitlines()[2]) == {HOSTILE: [r"caf\xe9", "s3://***@bucket/runs"]}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_cannot_show_all_shows_what_it_can(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding=encoding, write_through=True))
    say("猫 cat")
    say_json({"猫": 1})
    Terminal().print(final_table({"run": "猫", "status": "finished", "steps": 3}))
    text = written.getvalue().decode(encoding)
    assert text.count(r"\u732b") == 3
    assert json.loads(text.splitlines()[1]) == {"猫": 1}


def test_a_command_can_be_pasted_or_says_that_credentials_are_missing() -> None:
    assert predict_command("/runs/a b#c?d") == "python -m trainer.predict '/runs/a b#c?d' IMAGE..."
    assert predict_command(URI) == "python -m trainer.predict s3://***@bucket/runs IMAGE...   # in place of *** give the credentials again"


def test_the_final_table_prints_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal(width=100).print(final_table({"run": "x"}, report=f"{URI}/x/report.html", predict=predict_command(f"{URI}/x")), soft_wrap=True)
    out = capsys.readouterr().out
    assert "s3://***@bucket/runs/x/report.html" in out
    assert "abc" not in out


# --- the commands, on a run whose every name is hostile -------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pictures(folder: Path) -> Path:
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in (f"cat{HOSTILE}", f"dog{NOT_UTF8}", "[bold]bird"):
            where = folder / split / name
            where.mkdir(parents=True)
            for number in range(6):
                image = Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8))
                image.save(where / f"{number}{HOSTILE}{NOT_UTF8}.png")
        (folder / split / "[bold]bird" / f"bad{HOSTILE}{NOT_UTF8}.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(pictures, their converted folder, the folder of a run on them)."""
    folder = tmp_path_factory.mktemp("hostile #%?é x")
    source, dest = pictures(folder / "pictures"), folder / "converted"
    assert convert([str(source), str(dest), "--max-bad-fraction", "0.5", "--threads", "1"]) == 0
    config = RunConfig(
        run="sample",
        data=DataConfig(path=str(dest), batch_size=6, pad=0),
        model=ModelConfig(name="shufflenet_v2_x0_5", weights="none", stem="native", image_size=32),
        optim=OptimConfig(name="adamw", lr=0.01),
        train=TrainConfig(virtual_ranks=2, precision="fp32", channels_last="on", ema=0.5),
    )
    return source, dest, train(folder / "runs", config, steps=2)


def tell(run: Path, name: str) -> Path:
    """A copy of the run under a hostile name, with a journal whose every field is hostile."""
    place = run.with_name(name)
    place.mkdir()
    for path in run.iterdir():
        (place / path.name).symlink_to(path)
    journal = Journal.open(open_storage(run.parent), name, "driver-1", lambda: 1_700_000_000.0)
    foreign = f"{HOSTILE} {NOT_UTF8} {URI}"
    journal.write("run_started", pid=1, process_started=1_700_000_000.0, command=foreign)
    journal.write("attempt_started", attempt=1, workers=1, start_step=0)
    journal.write("worker_registered", attempt=1, rank=0, host=foreign, pid=1, metrics=foreign)
    journal.write("checkpoint_corrupt", path=foreign, reason=foreign)
    journal.write("sample_quarantined", key=foreign, reason=foreign, split=foreign, sample_id=1)
    journal.write("batch_skipped", step=1, reason=foreign)
    journal.write("attempt_failed", attempt=1, rank=0, kind=foreign, message=foreign, traceback=foreign, last_step=1, lost_steps=1)
    journal.write(f"new {HOSTILE}", whatever=foreign, **{HOSTILE: foreign})
    journal.write("run_failed", kind=foreign, rank=0, message=foreign, reason=foreign)
    return place


def test_no_command_passes_on_what_steers_a_terminal(
    world: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source, _, trained = world
    run = tell(trained, f"run{HOSTILE.replace('/', '')}")
    images = sorted(map(str, (source / "test").rglob("*.png")))
    assert runs(["--storage", str(run.parent)]) == 0
    assert runs(["--storage", str(run.parent), "--json"]) == 0
    assert runs(["watch", str(run)]) == 1
    assert report([str(run)]) == 0
    for more in ([], ["--json"]):
        assert predict([str(trained), *images, "--device", "cpu", *more]) == 1  # two of the images are none
        changed = ["--data.path", str(source), "--data.root", str(tmp_path), "--data.max-bad-fraction", "0.5"]
        assert evaluate([str(trained), *changed, "--device", "cpu", *more]) == 0
    assert convert([str(source), str(tmp_path / "again"), "--max-bad-fraction", "0"]) == 2  # it lists the bad ones
    with pytest.raises(SystemExit):
        predict([str(run.parent / f"none{HOSTILE}"), "x.png"])
    out, err = capsys.readouterr()
    assert hidden(out) == hidden(err) == set()
    assert "abc" not in out + err
    assert r"cat\x1b]0;pwned\x07" in out
    assert r"bad\x1b]0;pwned\x07" in err
    page = (run / "report.html").read_text()
    assert hidden(page, allowed="\n\t") == set()
    assert "def@ghi" not in page


def test_a_path_of_any_characters_is_told_as_it_is(world: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    *_, trained = world
    assert {"#", "%", "?", "é", " "} < set(str(trained))
    assert report([str(trained)]) == 0
    assert Path(capsys.readouterr().out.strip()) == trained / "report.html"
    assert shlex.split(predict_command(find_run(str(trained)).location))[3] == str(trained)


def test_names_that_are_no_utf8_are_keys_that_name_their_files(world: tuple[Path, Path, Path]) -> None:
    source, dest, _ = world
    split = open_dataset(dest).split("test")
    keys = split.keys(np.arange(split.count))
    assert all(os.path.isfile(os.path.join(os.fsencode(source), name_of(key))) for key in keys)
    assert any(r"caf\xe9" in key for key in keys)
    assert [key_of(name_of(key)) for key in keys] == list(keys)


def test_a_setting_that_is_no_utf8_is_refused_before_anything_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--data.path", f"/data/{NOT_UTF8}"])
    assert r"data.path=/data/caf\xe9 is not UTF-8 text" in capsys.readouterr().err
