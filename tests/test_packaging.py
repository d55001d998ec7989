"""What `pip install .` and `uv sync` give: the command, its packages with their data, and the tested versions."""

import re
import shutil
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from tests.installed import PROJECT, Installed, install


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return install(tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("installed"))


def test_the_command_works_in_any_folder_and_without_torch(installed: Installed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    said = installed.finetune("--version", home=tmp_path)
    version = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]
    assert (said.returncode, said.stdout) == (0, f"ray-finetune {version}\n"), said.stderr
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in said.stderr.splitlines()}
    assert "trainer" in imported
    assert not imported & {"torch", "ray", "pyarrow", "numpy"}, "it imports more than it needs"


def test_recipes_and_sample_images_are_installed_too(installed: Installed, tmp_path: Path) -> None:
    said = installed.finetune("run", "--config", "quickstart", "--print-config", home=tmp_path)
    assert said.returncode == 0, said.stderr
    samples = Path(tomllib.loads(said.stdout)["data"]["path"])
    assert samples == installed.folder / "dataio" / "samples" / "fashion_mnist"
    here = PROJECT / "dataio" / "samples" / "fashion_mnist"
    assert {path.name for path in samples.iterdir()} == {path.name for path in here.iterdir()}
    recipes = PROJECT / "trainer" / "recipes"
    there = installed.folder / "trainer" / "recipes"
    assert {path.relative_to(there) for path in there.rglob("*.toml")} == {path.relative_to(recipes) for path in recipes.rglob("*.toml")}
    assert (there / "spaces" / "rates.toml").is_file(), "where a search looks"


def test_every_module_is_installed_and_nothing_else(installed: Installed) -> None:
    packages = ("trainer", "cluster", "dataio")
    there = {path.relative_to(installed.folder) for name in packages for path in (installed.folder / name).rglob("*.py")}
    assert there == {path.relative_to(PROJECT) for name in packages for path in (PROJECT / name).rglob("*.py")}
    assert {path.name for path in installed.folder.iterdir() if not path.name.endswith(".dist-info")} == {*packages, "bin"}


def test_uv_installs_the_versions_of_the_constraints() -> None:
    lines = (PROJECT / "constraints.txt").read_text().splitlines()
    pinned = [line for line in lines if line and not line.startswith("#")]
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    assert project["tool"]["uv"]["constraint-dependencies"] == pinned
    extras = project["project"]["optional-dependencies"].values()
    asked = [*project["project"]["dependencies"], *(each for extra in extras for each in extra)]
    assert {_name_of(each) for each in asked} <= {_name_of(each) for each in pinned}


def _name_of(requirement: str) -> str:
    return _plain(re.match(r"[\w.-]+", requirement)[0])  # type: ignore[index]


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_functions_in_the_working_directory_are_found_and_shadow_no_library(installed: Installed, tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for side in (40, 48):
            Image.new("RGB", (side, 40), "red").save(tmp_path / "photos" / name / f"{side}.png")
    shutil.copy(PROJECT / "tests" / "trainer" / "own_functions.py", tmp_path / "mine.py")
    (tmp_path / "json.py").write_text("raise ImportError('not the library')")  # a file that lies there by chance
    model = ("--model.name", "mine:small_network", "--model.weights", "none")
    said = installed.finetune("run", "photos", *model, "--data.augment", "mine:darken", "--dry-run", home=tmp_path)
    assert said.returncode == 0, said.stdout + said.stderr
    wrong = installed.finetune("run", "photos", *model, "--data.augment", "mine:fails", "--dry-run", home=tmp_path)
    assert wrong.returncode == 2
    assert f"data.augment=mine:fails failed: KeyError: 'no such thing' ({tmp_path}/mine.py, line 28:" in wrong.stderr
