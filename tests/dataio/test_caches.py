"""Claims about the list of converted folders: all of them and nothing else, what they are of and take, and only what is named goes."""

import fcntl
import os
from pathlib import Path

import pytest
from made import write_folder

from dataio.caches import caches, main
from dataio.config import DataConfig
from dataio.prepared import prepared


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with two conversions of one source, an unfinished one, a download, and things that are none of ours."""
    write_folder(tmp_path / "photos", {"ant": 4, "bee": 4})
    for fraction in (0.25, 0.5):
        prepared(DataConfig(path=str(tmp_path / "photos"), root=str(tmp_path / "root"), test_fraction=fraction))
    made = tmp_path / "root"
    (made / "folder-0123.partial").mkdir()
    (made / "folder-0123.partial" / "conversion.json").write_text("x" * 5000)
    (made / "cifar-10-python.tar.gz").write_bytes(b"downloaded")
    (made / "diary").mkdir()
    (made / "diary" / "today.txt").write_text("dear diary")
    (made / "link").symlink_to(next(made.glob("folder-*")))
    return made


def test_the_list_names_each_conversion_its_source_and_its_size(root: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--root", str(root)]) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert sum(f"{root.parent}/photos: 6 train, 2 test, 2 classes (ant, bee)" in line for line in lines) == 1
    assert sum(f"{root.parent}/photos: 4 train, 4 test, 2 classes (ant, bee)" in line for line in lines) == 1
    assert sum("unfinished" in line for line in lines) == 1
    assert total.startswith(f"3 in {root}, 0.")
    assert all(f"{cache.size_bytes / 1e6:.1f} MB" in line for cache, line in zip(caches(root), lines, strict=True))


def test_what_is_named_is_removed_and_nothing_else(root: Path, capsys: pytest.CaptureFixture[str]):
    first, *others = caches(root)
    assert main(["--root", str(root), "--remove", first.path.name]) == 0
    shown = capsys.readouterr().out
    assert f"removed {first.path.name}" in shown
    assert f"{first.size_bytes / 1e6:.1f} MB freed" in shown
    assert [cache.path for cache in caches(root)] == [cache.path for cache in others]
    assert main(["--root", str(root), "--remove", "all"]) == 0
    assert {path.name for path in root.iterdir()} == {"cifar-10-python.tar.gz", "diary", "link"}


@pytest.mark.parametrize("name", ["diary", "link", "../photos", "nothing", "cifar-10-python.tar.gz"])
def test_what_no_conversion_made_is_not_removed(root: Path, capsys: pytest.CaptureFixture[str], name: str):
    assert main(["--root", str(root), "--remove", name]) == 2
    assert "is no converted folder" in capsys.readouterr().err
    assert len(caches(root)) == 3
    assert (root.parent / "photos" / "ant" / "0.png").is_file()


def test_a_conversion_under_way_is_left_alone(root: Path, capsys: pytest.CaptureFixture[str]):
    descriptor = os.open(root / "folder-0123.partial", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        assert main(["--root", str(root), "--remove", "folder-0123.partial"]) == 1
    finally:
        os.close(descriptor)
    assert "is being written by a conversion" in capsys.readouterr().err
    assert (root / "folder-0123.partial").is_dir()


def test_where_nothing_was_converted_the_list_is_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--root", str(tmp_path / "none")]) == 0
    assert capsys.readouterr().out.startswith("0 in ")
