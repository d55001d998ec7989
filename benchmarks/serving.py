"""How a served export answers under load: requests/s, p50 and p99 of the time to an answer, and the share of 503, at half, at nine tenths
and at twice what it can.

    python -m benchmarks.serving EXPORT [--seconds 20] [--rounds 3] [--images FOLDER] [--json] [--out FILE] [-- FLAGS of deploy.serve]

It starts `python -m deploy.serve EXPORT` on a free port of this machine, and measures first what it can: requests/s while as many
clients as two batches have images ask without a pause. Then, in turns, each load for so many seconds, as an open loop: requests begin at
fixed times, whatever became of those before, and an answer's time counts from when its request was to begin. So a server that falls behind
shows in the figures, and not in fewer requests. The clients are one process on the same machine and take CPU time from the server;
`late_milliseconds` says by how much they themselves fell behind. After the loads one request more must be answered.

Without --images each request sends one of 16 made-up pictures as JPEG, of the size that the export takes.
"""

import argparse
import asyncio
import contextlib
import io
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import PROJECT, add_arguments, described, finish, interleave, parser_of, spread, target

LOADS = {"half": 0.5, "nine tenths": 0.9, "twice": 2.0}
"""Of what the server can."""
PICTURES = 16
MAX_BATCH, MAX_QUEUED = 16, 64  # deploy.serve's own, said here because clients are counted by them
START_SECONDS = 600
PATIENCE_SECONDS = 120


@dataclass(kw_only=True, slots=True)
class Round:
    """What became of the requests of one load for some seconds."""

    wall_seconds: float = 0.0
    offered: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    milliseconds: list[float] = field(default_factory=list)
    """Of those answered 200."""
    late_milliseconds: float = 0.0
    """The most by which a request began late."""

    def count(self, status: str) -> None:
        self.statuses[status] = self.statuses.get(status, 0) + 1

    def figures(self) -> dict[str, Any]:
        answered = self.statuses.get("200", 0)
        times = self.milliseconds or [float("nan")]
        return {
            "offered_per_second": self.offered / self.wall_seconds,
            "answered_per_second": answered / self.wall_seconds,
            "p50_milliseconds": float(np.quantile(times, 0.5)),
            "p99_milliseconds": float(np.quantile(times, 0.99)),
            "refused_503": self.statuses.get("503", 0) / self.offered,
            "late_milliseconds": self.late_milliseconds,
            "statuses": self.statuses,
        }


def main() -> int:
    parser = parser_of("serving", __doc__)
    parser.add_argument("export", help="folder of an ONNX export")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load, each round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of each load, in turns (%(default)s)")
    parser.add_argument("--images", type=Path, help="folder of images to send")
    parser.add_argument("flags", nargs="*", help="after --: flags of deploy.serve")
    add_arguments(parser)
    options = parser.parse_args()
    result = described("serving", options) | measure(options)
    return finish(result, options, table(result))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    images = pictures(options.images, Path(options.export))
    with served(options.export, options.flags) as url:
        return asyncio.run(loads(url, images, options.seconds, options.rounds)) | {"bytes_a_request": sum(map(len, images)) / len(images)}


async def loads(url: str, images: Sequence[bytes], seconds: float, rounds: int) -> dict[str, Any]:
    """The figures of a server that listens at `url`."""
    import aiohttp

    limits = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=limits, timeout=aiohttp.ClientTimeout(total=PATIENCE_SECONDS)) as session:

        async def ask(number: int) -> str:
            """The status, or what went wrong instead."""
            try:
                async with session.post(f"{url}/predict", data=images[number % len(images)]) as response:
                    await response.read()
                    return str(response.status)
            except (aiohttp.ClientError, TimeoutError) as error:
                return type(error).__name__

        await closed_loop(ask, seconds / 4, MAX_BATCH)  # the first requests are slower than all others
        can = (await closed_loop(ask, seconds, 2 * MAX_BATCH)).figures()["answered_per_second"]
        if not can:
            raise RuntimeError("the server answers nothing; does the export take these images?")
        done: dict[str, list[Round]] = {name: [] for name in LOADS}
        for _, name in interleave(list(LOADS), rounds):
            done[name].append(await open_loop(ask, seconds, LOADS[name] * can))
        after = await ask(0)
    return judged(can, done, after)


def judged(can: float, done: Mapping[str, Sequence[Round]], after: str) -> dict[str, Any]:
    """The result's figures and targets. `after`: the status of a request after all loads."""
    figures = {name: [each.figures() for each in each_round] for name, each_round in done.items()}
    others = sum(
        count
        for each_round in done.values()
        for each in each_round
        for status, count in each.statuses.items()
        if status not in ("200", "503")
    )
    keys = [key for key in next(iter(figures.values()))[0] if key != "statuses"]
    return {
        "requests_per_second_it_can": can,
        "loads": {name: {key: spread([row[key] for row in rows]) for key in keys} for name, rows in figures.items()},
        "rounds": {name: [asdict(each) | {"milliseconds": len(each.milliseconds)} for each in rows] for name, rows in done.items()},
        "targets": [
            target("answers other than 200 and 503", others, at_most=0),
            target("share of 503 at half of what it can", max(row["refused_503"] for row in figures["half"]), at_most=0),
            target(
                "answers/s at twice what it can, over what it can",
                min(r["answered_per_second"] for r in figures["twice"]) / can,
                at_least=0.8,
            ),
            target("status of a request after the loads", float(after) if after.isdigit() else None, at_most=200),
        ],
    }


async def closed_loop(ask: Any, seconds: float, clients: int) -> Round:
    """`clients` ask without a pause."""
    found, began = Round(), time.perf_counter()

    async def client(number: int) -> None:
        while time.perf_counter() - began < seconds:
            start = time.perf_counter()
            status = await ask(number)
            found.offered += 1
            found.count(status)
            if status == "200":
                found.milliseconds.append(1e3 * (time.perf_counter() - start))

    await asyncio.gather(*(client(number) for number in range(clients)))
    found.wall_seconds = time.perf_counter() - began
    return found


async def open_loop(ask: Any, seconds: float, per_second: float) -> Round:
    """Requests begin `per_second` times a second, whatever becomes of them. Their times count from when they were to begin."""
    found, began = Round(offered=max(1, round(seconds * per_second))), time.perf_counter()

    async def one(number: int, due: float) -> None:
        status = await ask(number)
        found.count(status)
        if status == "200":
            found.milliseconds.append(1e3 * (time.perf_counter() - due))

    async with asyncio.TaskGroup() as group:
        for number in range(found.offered):
            due = began + number / per_second
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            found.late_milliseconds = max(found.late_milliseconds, 1e3 * (time.perf_counter() - due))
            group.create_task(one(number, due))
    found.wall_seconds = time.perf_counter() - began
    return found


@contextlib.contextmanager
def served(export: str, flags: Sequence[str] = ()) -> Iterator[str]:
    """The URL of a server of its own, until the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "deploy.serve", export, "--port", str(port), "--max-batch", str(MAX_BATCH)]
    command += ["--max-queued", str(MAX_QUEUED), *flags]
    process = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("listening on "):
                break
        else:
            raise RuntimeError(f"deploy.serve did not start: {''.join(said)[-2000:]}")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.stdout.read()
        process.wait()


def pictures(folder: Path | None, export: Path) -> list[bytes]:
    """What the requests send. ValueError for a folder without images."""
    if folder is not None:
        from dataio.formats import images_below

        found = [Path(name).read_bytes() for name in sorted(images_below(folder))]
        if not found:
            raise ValueError(f"--images {folder} holds no image; name another folder")
        return found
    from PIL import Image

    height, width = json.loads((export / "manifest.json").read_text())["input"]["decoded_to"]
    draw = np.random.default_rng(0)
    made = []
    for _ in range(PICTURES):
        coarse = Image.fromarray(draw.integers(0, 256, (8, 8, 3), np.uint8))  # smooth, as photographs are; noise would not compress
        buffer = io.BytesIO()
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        made.append(buffer.getvalue())
    return made


def table(result: Mapping[str, Any]) -> list[str]:
    lines = [
        f"it can {result['requests_per_second_it_can']:.0f} requests/s",
        f"{'load':14}{'offered/s':>10}{'answered/s':>12}{'p50 ms':>9}{'p99 ms':>9}{'503':>8}{'late ms':>9}",
    ]
    for name, row in result["loads"].items():
        median = {key: each["median"] for key, each in row.items()}
        lines.append(
            f"{name:14}{median['offered_per_second']:>10.0f}{median['answered_per_second']:>12.0f}{median['p50_milliseconds']:>9.1f}"
            f"{median['p99_milliseconds']:>9.1f}{100 * median['refused_503']:>7.1f}%{median['late_milliseconds']:>9.1f}"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
