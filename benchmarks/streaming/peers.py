"""The peers' virtual environment: their packages alone; torch and what else we share is taken from the environment that makes it.

Called by `--setup-peers`. Versions are those of `benchmarks/peers-constraints.txt`; pip resolves nothing, as the peers' own demands
(numpy below 2.2, transformers below 5) contradict each other and ours: all contenders run on the same torch, numpy and pyarrow, or a
comparison would compare those.
"""

import subprocess
import sysconfig
import venv
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parents[1] / "peers-constraints.txt"


def setup(folder: Path) -> None:
    """Make `folder`, or bring it up to date. Raises CalledProcessError where pip fails; what it says is on stderr."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    asked = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip())
    shared = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "shared.pth").write_text("".join(f"{path}\n" for path in sorted(shared)))
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "-r", str(CONSTRAINTS)]
    subprocess.run([str(python), *install], check=True)
