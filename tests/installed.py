"""The project installed as `pip install .` does it, for tests of what a user gets."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Installed:
    """The folder that it is installed in; the other packages are this Python's."""

    folder: Path

    def finetune(self, *words: str, home: Path, timeout: float = 120) -> "subprocess.CompletedProcess[str]":
        """Run the installed command in the folder `home`, which is the user's home folder too."""
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "HOME": str(home)}
        command = [sys.executable, str(self.folder / "bin" / "finetune"), *words]
        return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def install(copy: Path, target: Path) -> Installed:
    """Install into `target`, from a `copy`: building leaves files beside the sources."""
    for name in ("trainer", "cluster", "dataio"):
        shutil.copytree(PROJECT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, copy / name)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    done = subprocess.run([*pip, str(copy)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return Installed(folder=target)
