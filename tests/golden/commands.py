"""The commands whose results are pinned, and what starts them. Called by test_golden.py and record.py."""

import io
import itertools
import json
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from tests.e2e.running import PROJECT, Run

SAMPLES = "dataio/samples/fashion_mnist"  # relative to the project, where all commands run: no machine's path gets into a run's files
ARCHIVE = "{archive}"  # stands for a CIFAR-10 archive of the samples
STOPPED_RUNS = Path(__file__).parent / "run_of_86cc2bf"
BF16_CPU_FLAGS = {"amx_bf16", "avx512_bf16"}

# No GPU, as a GPU rounds otherwise; one thread, as the number of threads decides the bits.
_EVERYWHERE = ["--cluster.threads-per-worker", "1", "--cluster.gpus-per-worker", "0"]
_CUT_IN_TWO = ["--train.virtual-ranks", "2", "--train.checkpoint-every", "2", "--train.ledger"]

QUICKSTART = ["--config", "quickstart", "--model.image-size", "48", "--train.max-steps", "10", *_CUT_IN_TWO, *_EVERYWHERE]
# 200 images in batches of 20: the second epoch begins at step 10.
ARTICLE = ["--config", "article", "--model.weights", "none", "--data.batch-size", "20", "--train.max-steps", "14"]
ARTICLE += ["--data.path", ARCHIVE, *_CUT_IN_TWO, *_EVERYWHERE]
ARTICLE_BF16 = [*ARTICLE, "--train.precision", "bf16", "--train.channels-last", "on"]
# As little as possible is at its default. 5 steps an epoch: the head alone for the first, then everything.
UNUSUAL = [
    *("--model.name", "timm/test_resnet", "--model.weights", "none", "--model.image-size", "64", "--model.interpolation", "bicubic"),
    *("--model.freeze", "lp-ft", "--data.path", ARCHIVE, "--data.batch-size", "40", "--data.pad", "3", "--data.no-flip"),
    *("--data.shuffle-window", "64", "--data.mean", "0.4", "0.5", "0.6", "--data.std", "0.2", "0.25", "0.3"),
    *("--optim.name", "adamw", "--optim.lr", "0.003", "--optim.momentum", "0.8", "--optim.weight-decay", "0.01", "--optim.decay-all"),
    *("--optim.schedule", "cosine", "--optim.warmup-steps", "2", "--optim.final-lr-fraction", "0.1", "--optim.head-lr-factor", "3"),
    *("--optim.label-smoothing", "0.1", "--optim.clip-norm", "1.0", "--train.epochs", "2", "--train.max-steps", "8", "--train.seed", "7"),
    *("--train.precision", "bf16", "--train.small-maps", "product", "--train.accumulate", "2", "--train.reduce-dtype", "bf16"),
    *("--train.virtual-ranks", "4", "--train.ema", "0.9", "--train.verify-every", "3", "--train.profile", "--train.ledger"),
    *_EVERYWHERE,
]
# 40 steps an epoch; stopped somewhere in it by 86cc2bf.
STOPPED = [
    *("--workers", "2", "--model.name", "timm/test_efficientnet", "--model.weights", "none", "--data.path", SAMPLES),
    *("--data.batch-size", "50", "--optim.lr", "0.05", "--train.ema", "0.9", "--train.precision", "fp32", "--train.max-steps", "60"),
    *("--train.checkpoint-every", "5", "--cluster.heartbeat-seconds", "0.2", *_CUT_IN_TWO[:2], "--train.ledger", *_EVERYWHERE),
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Golden:
    """A run whose folder is pinned."""

    args: tuple[str, ...]
    bits_of: str
    """The runs with the same name here end in the same bits."""
    needs_bf16: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Killed:
    """A run whose rank 1 is killed after a commit, while there are steps left."""

    args: tuple[str, ...]
    at_commit: int
    same_as: str
    """The run of `RUNS` that ends in the same bits."""


RUNS = {
    "quickstart, 1 worker": Golden(args=("--workers", "1", *QUICKSTART), bits_of="quickstart"),
    "quickstart, 2 workers": Golden(args=("--workers", "2", *QUICKSTART), bits_of="quickstart"),
    "article, 1 worker": Golden(args=("--workers", "1", *ARTICLE), bits_of="article"),
    "article in bf16, 2 workers": Golden(args=("--workers", "2", *ARTICLE_BF16), bits_of="article in bf16", needs_bf16=True),
    "unusual, 2 workers": Golden(args=("--workers", "2", *UNUSUAL), bits_of="unusual"),
}
KILLED = {
    "quickstart, killed": Killed(args=("--workers", "2", *QUICKSTART), at_commit=2, same_as="quickstart, 1 worker"),
    "article, killed": Killed(args=("--workers", "2", *ARTICLE), at_commit=4, same_as="article, 1 worker"),
}
RESUMED = "resumed"
SETTINGS = {
    "default": [],
    "quickstart": ["--config", "quickstart"],
    "article": ["--config", "article"],
    "best": ["--config", "best"],
}
_ON_SAMPLES = ["--data.path", SAMPLES]
NAMED = {
    "default": _ON_SAMPLES,
    "quickstart": ["--config", "quickstart"],
    "quickstart, 2 workers": ["--config", "quickstart", "--workers", "2"],
    "article": ["--config", "article", *_ON_SAMPLES],
    "best": ["--config", "best", *_ON_SAMPLES],
    "quickstart and article": ["--config", "quickstart", "--config", "article", *_ON_SAMPLES],
}


def has_bf16() -> bool:
    """Whether this CPU computes in bf16, and does not emulate it."""
    return not BF16_CPU_FLAGS.isdisjoint(Path("/proc/cpuinfo").read_text().split())


ORDER = (*(name for name, golden in RUNS.items() if has_bf16() or not golden.needs_bf16), *KILLED, RESUMED)


class Started(Run):
    """A command under the name that it gives itself, alone in its storage. (Run's own constructor names it, and adds its settings.)"""

    def __init__(self, *args: str, storage: Path) -> None:
        self.storage = storage
        storage.mkdir(parents=True, exist_ok=True)
        self.log = storage.with_name(f"{storage.name}.{time.monotonic_ns()}.log")
        self.seen_before = len(self.events())
        with self.log.open("w") as log:
            command = [sys.executable, "-m", "trainer.run", *args, "--storage", str(storage)]
            self.process = subprocess.Popen(command, cwd=PROJECT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    @property
    def folder(self) -> Path:  # type: ignore[override]
        """The run's; before there is one, where none is."""
        found = [journal.parent for journal in self.storage.glob("*/journal.jsonl")]
        assert len(found) <= 1, f"two runs in one storage: {found}"
        return found[0] if found else self.storage / "no-run-yet"


class Goldens:
    """Starts commands in `folder`, each once, and remembers where their results are.

    A run is asked for by its name, and the next of `ORDER` is begun beside it: a start waits more than it computes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._archive = folder / "cifar-10-python.tar.gz"
        write_cifar_archive(self._archive, train=200, test=100)
        self._pool = ThreadPoolExecutor(2)
        self._results: dict[str, Future[Path]] = {}
        self._started: list[Started] = []
        self._numbers = itertools.count()

    def finished(self, name: str) -> Path:
        """The folder of a run of `ORDER`."""
        following = ORDER[ORDER.index(name) + 1 :][:1]
        for wanted in (name, *following):
            if wanted not in self._results:
                self._results[wanted] = self._pool.submit(self._finish, wanted)
        return self._results[name].result()

    def _finish(self, name: str) -> Path:
        if name in RUNS:
            run = self.start(name, RUNS[name].args)
        elif name in KILLED:
            run = self.start(name, KILLED[name].args)
            run.wait_for("checkpoint_committed", timeout=300, step=KILLED[name].at_commit)
            run.kill_worker(rank=1)
        else:
            assert name == RESUMED
            shutil.copytree(STOPPED_RUNS, self._folder / RESUMED)
            run = self.start(name, tuple(STOPPED))
        assert run.finish(timeout=400) == 0, run.output()
        return run.folder

    def start(self, name: str, args: tuple[str, ...]) -> Started:
        """A command in a storage of its own, which is called after `name`."""
        run = Started(*self._placed(args), storage=self._folder / name.replace(",", "").replace(" ", "-"))
        self._started.append(run)
        return run

    def name_of(self, args: list[str]) -> str:
        """The name that a command gives its run, without the run: `--resume must` refuses to begin one, and says which."""
        command = [*self._placed(tuple(args)), "--resume", "must", "--storage", str(self._folder / "none")]
        done = subprocess.run([sys.executable, "-m", "trainer.run", *command], cwd=PROJECT, capture_output=True, text=True, timeout=120)
        found = re.search(r"--resume must, but run '([^']+)'", done.stderr)
        assert found, done.stdout + done.stderr
        return found[1]

    def close(self) -> None:
        """End what still runs."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for run in self._started:
            run.kill()

    def _placed(self, args: tuple[str, ...]) -> list[str]:
        placed = [str(self._archive) if arg == ARCHIVE else arg for arg in args]
        # Two runs at the same time would convert the archive into the same folder.
        return [*placed, "--data.root", str(self._folder / f"data-{next(self._numbers)}")] if ARCHIVE in args else placed


def print_config(args: list[str]) -> dict[str, Any]:
    """All settings of a command, flat: `train.epochs` -> 10. The project's place is written `<project>`."""
    command = [sys.executable, "-m", "trainer.run", *args, "--print-config"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120, check=True)
    return flat(tomllib.loads(done.stdout.replace(str(PROJECT), "<project>")))


def flat(tables: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tables.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def write_cifar_archive(path: Path, *, train: int, test: int) -> None:
    """The first `train` and `test` shipped images in CIFAR-10's own format: gray made RGB, 28x28 given a border of 2 black pixels."""
    classes = json.loads((PROJECT / SAMPLES / "manifest.json").read_text())["classes"]

    def batch(label: str, rows: Any) -> dict[bytes, Any]:
        pixels = np.zeros((len(rows), 3, 32, 32), np.uint8)
        for into, row in zip(pixels, rows, strict=True):
            into[:, 2:30, 2:30] = np.asarray(Image.open(io.BytesIO(row["image"])).convert("L"))
        names = [f"image_{label.replace(' ', '_')}_{i:05d}.png".encode() for i in range(len(rows))]
        labels = [row["label"] for row in rows]
        return {b"batch_label": label.encode(), b"labels": labels, b"data": pixels.reshape(len(rows), 3072), b"filenames": names}

    def first(split: str, count: int) -> Any:
        return pq.read_table(PROJECT / SAMPLES / f"{split}-00000.parquet").slice(0, count).to_pylist()

    rows, fifth = first("train", train), train // 5
    batches: dict[str, Any] = {"batches.meta": {"label_names": classes, "num_cases_per_batch": fifth, "num_vis": 3072}}
    for number in range(5):
        part = rows[fifth * number : fifth * (number + 1)]
        batches[f"data_batch_{number + 1}"] = batch(f"training batch {number + 1} of 5", part)
    batches["test_batch"] = batch("testing batch 1 of 1", first("test", test))
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, content in batches.items():
            data = pickle.dumps(content, protocol=2)
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
