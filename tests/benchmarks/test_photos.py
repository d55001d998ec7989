"""The comparison on photographs: what is laid out, and what is read of the peer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.photos import gain_of, lay_out, look, of_key, pictures_of, rows_of_timm, targets_of


def test_pictures_are_laid_out_once_each_on_white_and_the_same_each_time(tmp_path: Path) -> None:
    for name, count in {"ant": 10, "bee": 4, "few": 2}.items():
        for number in range(count):
            path = tmp_path / "source" / name / "deep" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGBA", (5 + number, 7), (10 * number, 0, 0, 0)).save(path)
    pictures = pictures_of(tmp_path / "source", least=3)
    assert {name: len(paths) for name, paths in pictures.items()} == {"ant": 10, "bee": 4}
    assert lay_out(tmp_path / "one", pictures) == {"train": 10, "test": 4}
    lay_out(tmp_path / "two", pictures)
    files = {
        folder: {str(path.relative_to(tmp_path / folder)): path.read_bytes() for path in (tmp_path / folder).rglob("*.*g")}
        for folder in ("one", "two")
    }
    assert files["one"] == files["two"]
    assert sorted(path.name for path in (tmp_path / "one" / "timm" / "validation" / "ant").iterdir()) == [
        "0000.jpg",
        "0001.png",
        "0002.png",
    ]
    sizes = []
    for path in (tmp_path / "one" / "ours").rglob("*.*g"):
        with Image.open(path) as image:
            sizes.append((path.parent.name, image.width))
            if path.suffix == ".jpg":
                assert min(image.convert("L").tobytes()) > 250, "transparent: white, whatever lies below"
    assert sorted(path.name for path in (tmp_path / "one" / "ours").iterdir()) == ["test", "train"], "no split to choose an epoch by"
    assert sorted(sizes) == [*(("ant", 5 + n) for n in range(10)), *(("bee", 5 + n) for n in range(4))]


def test_the_peer_is_judged_by_its_last_epoch_and_its_best_one_is_told() -> None:
    text = "epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n0,2.1,1.0,40.5,80,0.1\n1,1.1,.5,71.25,90,0.1\n2,1.0,.6,70.0,90,0.1\n"
    assert rows_of_timm(text) == {"accuracy": 0.7, "best_accuracy": 0.7125, "epochs": 3}
    with pytest.raises(ValueError, match="no epoch"):
        rows_of_timm("epoch,eval_top1\n")


def test_the_claims_are_judged() -> None:
    own = [{"wrong": ["ant/1"], "seconds": 100.0, "cpu_seconds": 150.0, "others_share": 0.02}]
    theirs = [{"wrong": ["ant/1", *(f"bee/{n}" for n in range(20))], "seconds": 80.0, "cpu_seconds": 160.0, "others_share": 0.1}]
    better, slower, cheaper = targets_of(own, theirs, "timm", 100)
    assert (better["measured"], better["met"]) == (pytest.approx(20.0), True)
    assert (slower["measured"], slower["met"]) == (pytest.approx(1.25), False)
    assert (cheaper["measured"], cheaper["met"]) == (pytest.approx(0.9375), True)
    _, slower, cheaper = targets_of(own, [theirs[0] | {"others_share": 0.5}], "timm", 100)
    assert (slower["measured"], slower["met"]) == (None, None), "wall time beside other work says nothing"
    assert cheaper["met"]


def test_a_gain_counts_pictures_and_not_runs() -> None:
    once = gain_of([["a/1"]], [["a/2", "a/3"]], 50)
    assert once[0] == pytest.approx(2.0)
    assert once[1] < 0 < once[2], "three of fifty pictures that differ decide nothing"
    assert gain_of([["a/1"]] * 3, [["a/2", "a/3"]] * 3, 50) == pytest.approx(once), "the same pictures again tell nothing new"
    assert of_key("/x/ours/test/a/2.png") == of_key("test/a/2.png") == "a/2.png"


def test_cpu_time_of_processes_that_outlive_their_parents_counts() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass\nprint('burnt', flush=True); input()"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {burn!r}], start_new_session=True)"
    marked = {**os.environ, "BENCHMARK_PHOTOS": "ours-1"}
    with subprocess.Popen([sys.executable, "-c", parent], env=marked, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"burnt\n"
        cpu: dict[tuple[str, str], float] = {}
        look(b"ours-1", cpu, set())
        others: dict[tuple[str, str], float] = {}
        look(b"another's", others, set())
        process.communicate(b"\n")
    assert sum(cpu.values()) >= 0.29
    assert not others
