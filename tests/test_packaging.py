"""What `pip install .` and `uv sync` give: the command, its packages with their data, and the tested versions."""

import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the project is installed, from a copy: building leaves files beside the sources."""
    copy, target = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("installed")
    for name in ("trainer", "cluster", "dataio"):
        shutil.copytree(PROJECT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, copy / name)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    subprocess.run([*pip, str(copy)], check=True, capture_output=True, text=True)
    return target


def finetune(installed: Path, *words: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(installed), "HOME": str(folder)}
    command = [sys.executable, str(installed / "bin" / "finetune"), *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_works_in_any_folder_and_without_torch(installed: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    said = finetune(installed, "--version", folder=tmp_path)
    seconds = time.monotonic() - began
    version = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]
    assert (said.returncode, said.stdout) == (0, f"ray-finetune {version}\n"), said.stderr
    assert seconds < 5, "it imports more than it needs"  # 0.2 s on a machine that does nothing else


def test_recipes_and_sample_images_are_installed_too(installed: Path, tmp_path: Path) -> None:
    said = finetune(installed, "run", "--config", "quickstart", "--print-config", folder=tmp_path)
    assert said.returncode == 0, said.stderr
    samples = Path(tomllib.loads(said.stdout)["data"]["path"])
    assert samples == installed / "dataio" / "samples" / "fashion_mnist"
    here = PROJECT / "dataio" / "samples" / "fashion_mnist"
    assert {path.name for path in samples.iterdir()} == {path.name for path in here.iterdir()}
    recipes = PROJECT / "trainer" / "recipes"
    assert {path.name for path in (installed / "trainer" / "recipes").glob("*.toml")} == {path.name for path in recipes.glob("*.toml")}


def test_every_module_is_installed_and_nothing_else(installed: Path) -> None:
    packages = ("trainer", "cluster", "dataio")
    there = {path.relative_to(installed) for name in packages for path in (installed / name).rglob("*.py")}
    assert there == {path.relative_to(PROJECT) for name in packages for path in (PROJECT / name).rglob("*.py")}
    assert {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} == {*packages, "bin"}


def test_the_lock_file_has_the_versions_of_the_constraints() -> None:
    lines = (PROJECT / "constraints.txt").read_text().splitlines()
    tested = {_plain(name): version for name, _, version in (line.partition("==") for line in lines if line and line[0] != "#")}
    packages = tomllib.loads((PROJECT / "uv.lock").read_text())["package"]
    locked = {each["name"]: each["version"] for each in packages if "registry" in each["source"]}
    assert {name: version for name, version in locked.items() if tested.get(name, version) != version} == {}
    assert locked.keys() - tested.keys() <= {"setuptools", "wheel", "pyyaml-ft"}  # which `pip freeze` does not list


def test_the_lock_file_is_of_these_dependencies() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    (ours,) = [each for each in tomllib.loads((PROJECT / "uv.lock").read_text())["package"] if each["name"] == project["name"]]
    asked = ours["metadata"]["requires-dist"]
    wanted = {_name_of(each) for each in project["dependencies"]}
    assert {each["name"] for each in asked if "extra" not in each.get("marker", "")} == wanted
    for extra, dependencies in project["optional-dependencies"].items():
        theirs = {each["name"] for each in asked if f"extra == '{extra}'" in each.get("marker", "")}
        assert theirs == {_name_of(each) for each in dependencies}, extra


def _name_of(requirement: str) -> str:
    return _plain(re.match(r"[\w.-]+", requirement)[0])  # type: ignore[index]


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
