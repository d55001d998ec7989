"""Shared by the benchmarks: interleaved rounds, spread, paired differences, targets, the machine's description, the command line's end.

Each benchmark is a module with `main`, run as `python -m benchmarks.NAME [--json] [--out FILE]`. The module decides what is measured, and
against which peer. This file decides how it is repeated, judged and written, so that all results read the same (benchmarks/readme.py).
"""

import argparse
import json
import math
import os
import platform
import resource
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.versions import versions

PROJECT = Path(__file__).resolve().parents[1]
SAMPLE = PROJECT / "dataio" / "samples" / "fashion_mnist"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Folder of Debian's package dataset-fashion-mnist."""
_INSIDE = "FINETUNE_INSIDE_BENCHMARK"
_NOT_TOLD = ("--out", "--hardware", "--keep")


# -- repeating ------------------------------------------------------------------------------------------------------------------------


def interleave(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Yields (round, name): every name once a round. Each round begins with another name, so that no case always comes first."""
    for number in range(rounds):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            yield number, name


class Kept:
    """What was measured already. With a file (`--keep`) each new row is added to it, and the same command goes on there after an end of any
    kind; without, a row is known in this process alone."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._rows: dict[str, Any] = {}
        if file is not None and file.exists():
            whole, _, torn = file.read_text().rpartition("\n")
            if torn:  # the end came while it was written
                file.write_text(f"{whole}\n" if whole else "")
            for line in whole.splitlines():
                kept = json.loads(line)
                self._rows[_key(kept["key"])] = kept["row"]

    def known_or(self, key: Any, measure: Callable[[], Any]) -> Any:
        """The row of `key`, JSON-able, which is all that it depends on: the known one, or `measure`'s, which is told and kept."""
        if (name := _key(key)) not in self._rows:
            row = self._rows[name] = measure()
            print(f"{name}: {row}", file=sys.stderr, flush=True)
            if self._file is not None:
                with self._file.open("a") as file:
                    file.write(json.dumps({"key": key, "row": row}) + "\n")
        return self._rows[name]


def _key(key: Any) -> str:
    return key if isinstance(key, str) else json.dumps(key, sort_keys=True)


def add_keep(parser: argparse.ArgumentParser) -> None:
    """`--keep FILE`, for `Kept`."""
    told = "keeps what was measured: the same command, or one for more, goes on there"
    parser.add_argument("--keep", type=Path, metavar="FILE", help=told)


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """Time that something took."""

    wall_seconds: float
    cpu_seconds: float
    """Of all threads of this process; with `cpu_of_all`, also of the children that have ended."""


class Stopwatch:
    """Wall and CPU time since it was created. `settle` runs before each reading: on a GPU it waits for the device."""

    def __init__(self, settle: Callable[[], object] = lambda: None) -> None:
        self._settle = settle
        settle()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def taken(self) -> Taken:
        self._settle()
        return Taken(wall_seconds=time.perf_counter() - self._wall, cpu_seconds=time.process_time() - self._cpu)


WARM_SECONDS = 1.5
"""An idle H200 runs at 345 MHz and takes about a second of work to come up to 1,980."""


def warm_clocks(device: Any, seconds: float = WARM_SECONDS) -> int:
    """Keep a GPU at work until its clocks are those of steady work. Returns the number of matrix products. Nothing to do on a CPU."""
    import torch

    if device.type != "cuda":
        return 0
    matrix = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    done, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(20):
            matrix @ matrix
        torch.cuda.synchronize(device)
        done += 20
    return done


def cpu_of_all() -> float:
    """CPU seconds of this process and of the children that have ended and were waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """A command that has ended."""

    command: str
    returncode: int
    wall_seconds: float
    cpu_seconds: float
    """Of the process and of the children that it waited for. Processes that outlive their parent (Ray's) are not included."""
    lines: tuple[tuple[float, str], ...]
    """(seconds after the start, line) of its output, stderr included."""

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def checked(self) -> "Process":
        """Returns itself; RuntimeError with the end of its output if it failed."""
        if self.returncode:
            raise RuntimeError(f"`{self.command}` ended with {self.returncode}:\n{self.text[-3000:]}")
        return self


def run_process(arguments: Sequence[str], *, timeout_seconds: float, environment: Mapping[str, str] | None = None) -> Process:
    """Runs `python ARGUMENTS` in the project's folder. After `timeout_seconds` it ends the whole process group and raises RuntimeError."""
    command = [sys.executable, *arguments]
    shown = shlex.join(["python", *arguments])
    lines: list[tuple[float, str]] = []
    nested = _INSIDE in os.environ  # a nested call stays in the outer one's process group, so that the outer time limit ends it too
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=PROJECT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", _INSIDE: "1", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=not nested,
    )
    assert process.stdout is not None
    overdue = threading.Event()

    def kill() -> None:
        if nested:
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)

    def end() -> None:
        overdue.set()
        kill()

    timer = threading.Timer(timeout_seconds, end)
    timer.daemon = True
    timer.start()
    try:
        lines.extend((time.perf_counter() - begin, line.rstrip("\n")) for line in process.stdout)  # read as they come
        returncode = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            kill()
            process.wait()
    seconds = time.perf_counter() - begin
    if overdue.is_set():
        last = "\n".join(line for _, line in lines)[-2000:]
        raise RuntimeError(f"`{shown}` did not end within {timeout_seconds:g} s:\n{last}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Process(command=shown, returncode=returncode, wall_seconds=seconds, cpu_seconds=cpu, lines=tuple(lines))


# -- judging --------------------------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles, minimum and maximum; `rounds` is the number of values."""
    if not values:
        raise ValueError("there is nothing to describe: no round was measured")
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return {
        "median": statistics.median(values),
        "quartiles": [low, high],
        "least": min(values),
        "most": max(values),
        "rounds": len(values),
    }


def median_interval(values: Sequence[float], confidence: float = 0.95) -> dict[str, Any]:
    """The median and an interval for the population's median, from order statistics: no assumption about the distribution.

    For sorted x of n independent draws, P(x[k] <= median <= x[n-1-k]) = 1 - 2 * P(Binomial(n, 1/2) <= k). It returns the narrowest such
    interval with at least `confidence`. For n < 6 no interval reaches 95 %; then it returns the whole range with the `confidence` that has.
    """
    if not values:
        raise ValueError("there is nothing to describe: no pair was measured")
    ordered, n = sorted(values), len(values)
    tails = [2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n for k in range((n + 1) // 2)]
    k = max((k for k, tail in enumerate(tails) if 1 - tail >= confidence), default=0)
    return {
        "median": statistics.median(ordered),
        "low": ordered[k],
        "high": ordered[n - 1 - k],
        "confidence": max(0.0, 1 - tails[k]),
        "pairs": n,
    }


T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t at 97.5 % for 1, 2, ... degrees of freedom; beyond, 2.26 is a little wide."""


def mean_interval(values: Sequence[float]) -> dict[str, float | None]:
    """The mean and its 95 % interval by Student's t, for a few paired seeds; no interval for one value."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return {"mean": mean, "low": None, "high": None}
    half = T_QUANTILES[min(count - 2, len(T_QUANTILES) - 1)] * statistics.stdev(values) / math.sqrt(count)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def paired(ours: Sequence[float], theirs: Sequence[float], confidence: float = 0.95) -> dict[str, Any]:
    """`median_interval` of the differences ours - theirs, round by round: a disturbance of a whole round cancels."""
    return median_interval([a - b for a, b in zip(ours, theirs, strict=True)], confidence)


def target(
    name: str,
    measured: float | None,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    interval: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """A claim and its outcome: {"name", "rule", "goal", "measured", "met"}.

    `met` is None if nothing was measured, and if the goal lies inside `interval`: then the noise is larger than the margin.
    """
    assert (at_least is None) != (at_most is None), "a target has one side"
    low, high = interval if interval is not None else (measured, measured)
    met: bool | None = None
    if low is not None and high is not None and measured is not None and not math.isnan(measured):
        if at_least is not None:
            met = True if low >= at_least else False if high < at_least else None
        else:
            assert at_most is not None
            met = True if high <= at_most else False if low > at_most else None
    row = {"name": name, "rule": "<=" if at_least is None else ">=", "goal": at_most if at_least is None else at_least}
    return row | {"measured": measured, "met": met} | ({"interval": [low, high]} if interval is not None else {})


def verdict(row: Mapping[str, Any]) -> str:
    """A target as one line of text."""
    word = {True: "met", False: "MISSED", None: "undecided" if row["measured"] is not None else "not measured"}[row["met"]]
    shown = "-" if row["measured"] is None else f"{row['measured']:,.4g}"
    if "interval" in row:
        shown += " ({:,.4g} to {:,.4g})".format(*row["interval"])
    return f"{word:12}  {row['name']}: {shown} (target {row['rule']} {row['goal']:,.4g})"


# -- writing results --------------------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")
    parser.add_argument("--out", type=Path, help="write the JSON there too (benchmarks/results/NAME.json)")
    parser.add_argument("--hardware", default=machine(), help="what to call this machine (%(default)s)")


def parser_of(name: str, doc: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def described(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The context of a result. Call it before measuring, so that `load_average` shows what else the machine was doing. From here on SIGTERM
    and SIGHUP end the benchmark as Ctrl-C does: with the processes that it started, which measure nothing any more."""
    for name_of_signal in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name_of_signal, signal.default_int_handler)
    return {
        "benchmark": name,
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *told_words(sys.argv[1:])]),
        "hardware": options.hardware,
        "versions": versions(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def finish(result: dict[str, Any], options: argparse.Namespace, lines: Sequence[str]) -> int:
    """Writes and prints the result. Always returns exit status 0: a missed target is a figure, not an error."""
    result["load_average_after"] = round(os.getloadavg()[0], 2)
    text = json.dumps(finite(result), indent=1, allow_nan=False)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    if options.json:
        print(text)
        return 0
    print(f"{result['hardware']}; load {result['load_average_before']} before, {result['load_average_after']} after")
    for line in lines:
        print(line)
    for row in result.get("targets", ()):
        print(verdict(row))
    return 0


def finite(value: Any) -> Any:
    """`value` with null for NaN and infinity, which JSON does not have, and with dataclasses as dicts."""
    match value:
        case float() if not math.isfinite(value):
            return None
        case dict():
            return {key: finite(item) for key, item in value.items()}
        case list() | tuple():
            return [finite(item) for item in value]
        case Taken() | Process():
            return finite(asdict(value))
    return value


def commit() -> str:
    """Commit of the checkout, with "+changes" if tracked files differ from it; "unknown" without git."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=PROJECT, capture_output=True, text=True, check=True)
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], cwd=PROJECT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def machine() -> str:
    """CPU, cores, and the first GPU if there is one. Does not start CUDA in this process, because CUDA does not survive a fork."""
    gpu = gpu_name()
    return f"{cpu_model()}, {os.cpu_count()} CPUs" + (f", {gpu}" if gpu else "")


def gpu_name() -> str:
    try:
        asked = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return asked.stdout.splitlines()[0].strip() if asked.returncode == 0 and asked.stdout.strip() else ""


def cpu_model() -> str:
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def told_words(arguments: Sequence[str]) -> list[str]:
    """The words of a command as its result tells them: without where something is kept and what the machine was called, neither of which
    affects the result, and with the names of files in place of their paths, which are of one machine."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in _NOT_TOLD:
            skip = True
        elif argument.partition("=")[0] not in _NOT_TOLD:
            flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
            kept.append(flag + equals + (Path(value).name if Path(value).is_absolute() else value))
    return kept


# -- data -----------------------------------------------------------------------------------------------------------------------------


def best_source() -> str:
    """The full Fashion-MNIST if it is installed, otherwise the sample in this repository."""
    return str(FASHION_MNIST) if FASHION_MNIST.is_dir() else str(SAMPLE)


def cifar_like(folder: Path, source: str, *, train: int, test: int) -> tuple[Path, Path]:
    """(archive, converted): the source's first images at 32x32, once as CIFAR-10's archive for the tutorial's script, and once converted
    for ours. `source`: as dataio.convert takes it, or converted already; a converted source with too few images repeats them, shifted
    sideways each time, to measure speed."""
    from benchmarks.parity import write_cifar_archive
    from dataio.config import DataConfig
    from dataio.prepared import is_converted, prepare

    archive = folder / "cifar-10-python.tar.gz"
    if is_converted(source):
        write_archive(archive, source, {"train": train, "test": test})
    else:
        write_cifar_archive(archive, source, train=train, test=test)
    return archive, prepare(DataConfig(path=str(archive), root=str(folder / "data")))


def write_archive(path: Path, data: str, counts: Mapping[str, int]) -> None:
    """CIFAR-10's archive of the first images of converted `data`."""
    import io
    import pickle
    import tarfile

    from benchmarks.parity import FOLDER
    from dataio.parquet import open_dataset

    classes = open_dataset(data).manifest.classes
    files: dict[str, Any] = {"batches.meta": {"label_names": list(classes), "num_cases_per_batch": counts["train"] // 5, "num_vis": 3072}}
    for split, names in (("train", [f"data_batch_{number}" for number in range(1, 6)]), ("test", ["test_batch"])):
        rows, labels = _pixels(data, split, counts[split])
        share = counts[split] // len(names)
        for number, name in enumerate(names):
            part = slice(share * number, share * (number + 1))
            files[name] = {
                b"batch_label": name.encode(),
                b"labels": labels[part],
                b"data": rows[part].reshape(share, -1),
                b"filenames": [f"{name}_{i:06d}.png".encode() for i in range(share)],
            }
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, content in files.items():
            encoded = pickle.dumps(content, protocol=2)
            member = tarfile.TarInfo(f"{FOLDER}/{name}")
            member.size = len(encoded)
            archive.addfile(member, io.BytesIO(encoded))


def _pixels(data: str, split: str, count: int) -> tuple[Any, list[int]]:
    """(count, 3, 32, 32) uint8 and their labels; smaller images get a black border."""
    import numpy as np
    import torch

    from benchmarks.bare import loader_of
    from dataio.parquet import open_dataset
    from trainer.settings.cli import parse

    dataset = open_dataset(data)
    config = parse(["--data.path", data, "--train.virtual-ranks", "1", "--data.cache", "host"]).config
    has = dataset.split(split).count
    batches = list(loader_of(config, dataset, torch.device("cpu")).evaluate(split, range(min(count, has)), 256))
    images = np.concatenate([batch.samples.numpy() for batch in batches])
    labels = np.concatenate([batch.targets["label"].numpy() for batch in batches])
    height, width = images.shape[2:]
    if max(height, width) > 32:
        raise ValueError(f"--source {data} has images of {height}x{width}; CIFAR-10's archive holds 32x32, give smaller ones")
    rows = np.zeros((len(images), 3, 32, 32), np.uint8)
    top, left = (32 - height) // 2, (32 - width) // 2
    rows[:, :, top : top + height, left : left + width] = images
    turns = -(-count // len(rows))
    return np.concatenate([np.roll(rows, turn, axis=3) for turn in range(turns)])[:count], np.resize(labels, count).tolist()


def initial_weights(path: Path, *, classes: int = 10, stem: str = "article") -> Path:
    """A ResNet-18 with the tutorial's stem and head, built by our code without pretrained weights, as a start for both programs."""
    import torch

    from trainer.models.vision import build_model
    from trainer.settings.tree import ModelConfig

    model = build_model(ModelConfig(weights="none", stem=stem), classes=classes, seed=0, image_hw=(32, 32))  # type: ignore[arg-type]
    torch.save(model.state_dict(), path)
    return path
