"""The peers' virtual environment: it has only their packages; torch and other shared packages come from the environment that makes it.

Called by `--setup-peers`. Versions are those of `benchmarks/peers-constraints.txt`. pip resolves nothing, because the peers' own
requirements (numpy below 2.2, transformers below 5) contradict each other and ours. All contenders run on the same torch, numpy and
pyarrow; otherwise the benchmark would compare those.
"""

import subprocess
import sysconfig
import venv
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parents[1] / "peers-constraints.txt"


def setup(folder: Path) -> None:
    """Makes `folder`, or updates it. Raises CalledProcessError if pip fails; pip's message is on stderr."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    asked = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip())
    shared = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "shared.pth").write_text("".join(f"{path}\n" for path in sorted(shared)))
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "-r", str(CONSTRAINTS)]
    subprocess.run([str(python), *install], check=True)
