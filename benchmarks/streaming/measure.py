"""Runs the contenders, a fresh process for each measurement, and judges their output. Called by `__main__.py` and by the tests."""

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import interleave, spread
from benchmarks.streaming.contenders import contender_of, disk_bytes, environment
from benchmarks.streaming.pictures import Images, open_images

PROJECT = Path(__file__).resolve().parents[2]
SAME_PICTURE = 6.0
"""Mean levels of 255 by which a contender's images may differ from the reference: decoders and resizers differ by up to two on
photographs, another picture or crop by tens."""
TIDY_SECONDS = 3.0
"""Time for a child's own helpers, such as the one that unlinks shared memory, to end after it."""
SHARED = {"torch", "torchvision", "torchdata", "pillow", "numpy", "pyarrow"}
"""Packages that several contenders use; their versions are reported with each."""


class JobFailed(RuntimeError):
    """A contender's process failed; the message is the end of its output."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What to measure."""

    contenders: tuple[str, ...]
    python: str
    """The interpreter with the peers' packages."""
    scratch: Path
    size: int
    batch_size: int
    workers: tuple[int, ...]
    rounds: int
    warm_up_batches: int
    batches: int
    """Measured in each round, after the warm-up."""
    seed: int
    window: int
    memory_bytes: int
    timeout_seconds: float = 300.0


def make_pictures(python: str, scratch: Path, *, count: int, seed: int, size: int) -> Images:
    """The images in the scratch folder. If missing, an interpreter that has scikit-image and scikit-learn makes them."""
    kind = "small" if size <= 64 else "photos"
    folder = scratch / f"{kind}-{size if size <= 64 else 'full'}-{count}-seed{seed}"
    if not folder.is_dir():
        scratch.mkdir(parents=True, exist_ok=True)
        command = [python, "-m", "benchmarks.streaming.pictures", str(folder)]
        command += ["--count", str(count), "--seed", str(seed), "--size", str(size)]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
            raise ValueError(
                f"the pictures could not be made: {reason[0]}; install what that takes: python -m benchmarks.streaming --setup-peers"
            )
    return open_images(folder)


def measure(plan: Plan, images: Images, *, tell: Callable[[str], None]) -> dict[str, Any]:
    """All measurements, JSON-able: a row for each contender."""
    needed = (plan.warm_up_batches + plan.batches) * plan.batch_size
    if needed > len(images.paths):
        raise ValueError(
            f"{plan.warm_up_batches}+{plan.batches} batches of {plan.batch_size} are {needed} images, an epoch has {len(images.paths)}; "
            "measure fewer (--batches) or make more (--images)"
        )
    packages = sorted({contender_of(name)[0].package for name in plan.contenders} - {""} | SHARED)
    with tempfile.TemporaryDirectory(prefix="finetune-streaming-") as folder:
        jobs = _Jobs(plan, images, Path(folder))
        installed: dict[str, Any] = jobs.run("versions", None, packages=packages)
        rows: dict[str, dict[str, Any]] = {}
        for name in plan.contenders:
            kind, decoder = contender_of(name)
            rows[name] = {
                "decoder": decoder,
                "package": kind.package,
                "version": installed.get(kind.package),
                "resumes_by": kind.resumes_by,
            }
            missing = kind.package and installed[kind.package] is None
            rows[name]["status"] = "not installed" if missing else "measured"
        for name, row in rows.items():
            _guarded(row, tell, name, lambda name=name, row=row: row.update(format=jobs.convert(name, tell)))  # type: ignore[misc]
        _speeds(plan, jobs, rows, tell)
        for name, row in rows.items():
            _guarded(row, tell, name, lambda name=name, row=row: _epoch(plan, jobs, name, row, tell))  # type: ignore[misc]
    for row in rows.values():
        if row["status"] == "measured":
            row["verdict"] = verdict(row)
    return {"contenders": rows, "peers": installed}


def verdict(row: dict[str, Any]) -> str:
    """ "equal work", or why a row's figures cannot be compared with the others'."""
    problems = []
    epoch = row["epoch"]
    if epoch["missing"] or epoch["repeated"]:
        problems.append(f"an epoch lacks {epoch['missing']} images and repeats {epoch['repeated']}")
    if epoch["wrong_labels"] or any(each["wrong_labels"] for each in row["rounds"]):
        problems.append("labels are wrong")
    if any(each["repeated"] for each in row["rounds"]):
        problems.append("images came twice in a measured part")
    if row["difference"] > SAME_PICTURE:
        problems.append(f"its pixels are {row['difference']:.0f} levels off PIL's")
    if any(each["wrong_shape"] for each in row["rounds"]):
        problems.append("its batches have another shape or type")
    return "; ".join(problems) or "equal work"


def compare_ids(ids: Sequence[int], expected: Sequence[int]) -> dict[str, int]:
    """{"missing": how many of `expected` never came, "repeated": how many came more than once or are not expected}"""
    counts, wanted = Counter(ids), set(expected)
    missing = sum(1 for each in wanted if each not in counts)
    return {"missing": missing, "repeated": len(ids) - (len(wanted) - missing)}


def _speeds(plan: Plan, jobs: "_Jobs", rows: dict[str, dict[str, Any]], tell: Callable[[str], None]) -> None:
    cases = [f"{workers} {name}" for workers in plan.workers for name in rows]
    for row in rows.values():
        row["rounds"] = []
    for number, case in interleave(cases, plan.rounds):
        workers, _, name = case.partition(" ")

        def one(name: str = name, workers: int = int(workers), number: int = number) -> None:
            found = jobs.run("speed", name, workers=workers, warm_up_batches=plan.warm_up_batches, batches=plan.batches)
            wrong_shape = found.pop("shape") != [plan.batch_size, 3, plan.size, plan.size] or found.pop("dtype") != "torch.uint8"
            rows[name]["rounds"].append({"round": number, "workers": workers, "wrong_shape": wrong_shape, **found})
            rate = found["images"] / found["cpu_seconds"] if found["cpu_seconds"] else float("nan")
            tell(f"round {number + 1}/{plan.rounds}, {workers} workers, {name}: {rate:,.0f} images a CPU second")

        _guarded(rows[name], tell, name, one)
    for row in rows.values():
        if row["status"] != "measured":
            continue
        row["difference"] = max(each["difference"] for each in row["rounds"])
        row["speed"] = {str(workers): _summary([each for each in row["rounds"] if each["workers"] == workers]) for workers in plan.workers}
        orders = {workers: {each["order"] for each in row["rounds"] if each["workers"] == workers} for workers in plan.workers}
        row["same_order_each_time"] = all(len(each) == 1 for each in orders.values()) if plan.rounds > 1 else None
        row["same_order_for_all_workers"] = len(set.union(*orders.values())) == 1 if len(plan.workers) > 1 else None


def _summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "images_per_cpu_second": spread([each["images"] / each["cpu_seconds"] for each in rounds]),
        "images_per_second": spread([each["images"] / each["wall_seconds"] for each in rounds]),
        "first_batch_seconds": spread([each["first_batch_seconds"] for each in rounds]),
        "import_seconds": spread([each["import_seconds"] for each in rounds]),
        **{name: statistics.median(each["memory"][name] for each in rounds) for name in rounds[0]["memory"]},
        "imported_pss_bytes": statistics.median(each["imported_pss_bytes"] for each in rounds),
    }


def _epoch(plan: Plan, jobs: "_Jobs", name: str, row: dict[str, Any], tell: Callable[[str], None]) -> None:
    """Measures an epoch and a resume in its middle, with the largest number of workers."""
    count, workers = len(jobs.images.paths), max(plan.workers)
    steps = count // plan.batch_size // 2
    stop_after = max(steps // workers * workers, workers)  # the same number from each worker
    whole = jobs.run("epoch", name, workers=workers, stop_after=stop_after)
    ids, done = whole["ids"], whole["done"]
    row["epoch"] = {**compare_ids(ids, range(count)), "handed_out": len(ids), "wrong_labels": whole["wrong_labels"], "workers": workers}
    try:
        rest = [jobs.run("resume", name, workers=workers, to_end=number == 0) for number in range(plan.rounds)]
    except JobFailed as error:  # its speed still counts
        row["resume"] = {"after_images": done, "exact": False, "failed": str(error)}
        tell(f"{name}: {error}")
        return
    left = rest[0]["ids"]
    # Compared with its own epoch; a wrong epoch is reported above.
    found = compare_ids(left, ids[done:])
    row["resume"] = {
        "after_images": done,
        **found,
        "exact": not found["missing"] and not found["repeated"],
        "same_order": left == ids[done:],
        "first_batch_seconds": spread([each["first_batch_seconds"] for each in rest]),
        "import_seconds": spread([each["import_seconds"] for each in rest]),
    }
    tell(f"{name}: an epoch and a resume after {done} images: {row['epoch']}, {found}")


def _guarded(row: dict[str, Any], tell: Callable[[str], None], name: str, work: Callable[[], object]) -> None:
    """Runs `work`; a contender that fails is marked in its row, and left out from then on."""
    if row["status"] != "measured":
        return
    try:
        work()
    except JobFailed as error:
        row["status"] = f"failed: {error}"
        tell(f"{name} {row['status']}")


class _Jobs:
    """Starts a process for each job, passes it a file, and reads the file that it writes."""

    def __init__(self, plan: Plan, images: Images, folder: Path) -> None:
        self.plan, self.images, self._folder = plan, images, folder
        self._environment = {**os.environ, **environment(plan.scratch)}

    def run(self, what: str, name: str | None, **more: Any) -> Any:
        """Returns the job's result. Raises JobFailed."""
        plan = self.plan
        result, path = self._folder / "result.json", self._folder / "job.json"
        result.unlink(missing_ok=True)
        job: dict[str, Any] = {"what": what, "result": str(result), "images": str(self.images.folder), **more}
        if name is not None:
            job |= {"contender": name, "folder": str(self.folder(name)), "state": str(self._folder / "state")}
        job |= {name: getattr(plan, name) for name in ("size", "batch_size", "seed", "window", "memory_bytes")}
        output = self._folder / "output"
        with output.open("wb") as file:
            job["started"] = time.monotonic()
            path.write_text(json.dumps(job))
            process = subprocess.Popen(
                [plan.python, "-m", "benchmarks.streaming.child", str(path)],
                cwd=PROJECT,
                env=self._environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                returncode: int | None = process.wait(plan.timeout_seconds)
            except subprocess.TimeoutExpired:
                returncode = None
            finally:
                _end_group(process)
        if returncode != 0 or not result.is_file():
            printed = output.read_text(errors="replace").strip().splitlines()
            last = printed[-1] if printed else "it said nothing"
            how = f"no end after {plan.timeout_seconds:.0f} s" if returncode is None else f"status {returncode}"
            raise JobFailed(f"{what} ended with {how}: {last[:300]}")
        return json.loads(result.read_text())

    def folder(self, name: str) -> Path:
        kind, _ = contender_of(name)
        return self.images.folder.with_name(f"{self.images.folder.name}.{kind.format}") if kind.format else self.images.folder

    def convert(self, name: str, tell: Callable[[str], None]) -> dict[str, Any]:
        """{"disk_bytes", and the conversion's "seconds" and "cpu_seconds" at the time it was done}; contenders may share a format."""
        kind, _ = contender_of(name)
        folder = self.folder(name)
        if not kind.format:
            return {"name": "image folder", "disk_bytes": disk_bytes(folder / "train"), "seconds": 0.0, "cpu_seconds": 0.0}
        note = folder.with_name(folder.name + ".made.json")
        if not (folder.is_dir() and note.is_file() and json.loads(note.read_text())["images"] == self.images.sha256):
            tell(f"converting to {kind.format}")
            shutil.rmtree(folder, ignore_errors=True)
            note.unlink(missing_ok=True)
            took = self.run("convert", name)
            note.write_text(json.dumps({"images": self.images.sha256, **took}))
        made = json.loads(note.read_text())
        return {
            "name": kind.format,
            "disk_bytes": disk_bytes(folder),
            "seconds": made["seconds"],
            "cpu_seconds": made["cpu_seconds"],
        }


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends the child, and any helper that outlives it, since all share its session. After a normal end, helpers get time to clean up."""
    deadline = time.monotonic() + (TIDY_SECONDS if process.poll() is not None else 0.0)
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def table(result: dict[str, Any], workers: Sequence[int]) -> list[str]:
    """Lines of text: one table of speeds for each number of workers, fastest first, and one of everything else."""
    lines: list[str] = []
    rows = result["contenders"]
    measured = {name: row for name, row in rows.items() if row["status"] == "measured"}
    for count in workers:
        lines += ["", f"{count} worker{'s' if count > 1 else ''}; median (least to most) of {result['rounds']} rounds"]
        speeds = {name: row["speed"][str(count)] for name, row in measured.items()}
        for name, row in sorted(speeds.items(), key=lambda item: -item[1]["images_per_cpu_second"]["median"]):
            by_cpu, by_wall, first = (row[key] for key in ("images_per_cpu_second", "images_per_second", "first_batch_seconds"))
            lines.append(
                f"{name:32} {_shown(by_cpu)} images/CPU s  {_shown(by_wall)} images/s  first batch {first['median']:5.2f} s "
                f"(imports {row['import_seconds']['median']:4.2f})  memory {row['pss_bytes'] / 1e6:5.0f} MB"
                f" (after imports {row['imported_pss_bytes'] / 1e6:4.0f})"
            )
    lines += ["", "epoch, resume in its middle, disk"]
    for name, row in measured.items():
        lines.append(
            f"{name:32} {row['verdict']}; resume by {row['resumes_by']}: {_resumed(row['resume'])}; "
            f"order {_order(row)}; {row['format']['disk_bytes'] / 1e6:,.0f} MB, made in {row['format']['seconds']:.0f} s; "
            f"pixels {row['difference']:.1f} off PIL's"
        )
    lines += [f"{name:32} {row['status']}" for name, row in rows.items() if row["status"] != "measured"]
    return lines


def _shown(values: dict[str, Any]) -> str:
    return f"{values['median']:7,.0f} ({values['least']:,.0f} to {values['most']:,.0f})".ljust(24)


def _resumed(resume: dict[str, Any]) -> str:
    if "failed" in resume:
        return resume["failed"]
    kept = "exact" if resume["exact"] else f"{resume['missing']} lost, {resume['repeated']} twice"
    order = "same order" if resume["same_order"] else "another order"
    return f"{kept}, {order}, first batch {resume['first_batch_seconds']['median']:.2f} s"


def _order(row: dict[str, Any]) -> str:
    again, everywhere = row["same_order_each_time"], row["same_order_for_all_workers"]
    if again is False:
        return "differs from run to run"
    return {None: "known for one number of workers only", True: "the same for any workers", False: "depends on workers"}[everywhere]


def interpreter(peers: Path) -> str:
    """The peers' interpreter if it exists, otherwise this one."""
    python = peers / "bin" / "python"
    return str(python) if python.is_file() else sys.executable
