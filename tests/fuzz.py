"""Reads thousands of damaged and hostile files of every foreign format, each under limits of memory and time.

    python -m tests.fuzz --seconds 60            # all readers, as long as that
    python -m tests.fuzz --reader parquet --seed 17 --count 1    # one case again

A reader must end with a value or with one of its own errors: no crash, no hang, no other exception, no more memory than LIMIT_BYTES. Every
case is a small valid file changed by a seed, so a case's reader and number are all that is needed to see it again. The cases run in a child
process that has the limits; tests/dataio/test_fuzz.py runs some hundred.
"""

import argparse
import gzip
import io
import itertools
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT / "tests" / "dataio")]  # as pytest does for the tests there

# ruff: noqa: E402
import pyarrow as pa
import pyarrow.parquet as pq
from corpus import good
from made import hf_rows, write_hf, write_idx, write_table
from test_sources_cifar import cifar_content, cifar_members, write_tar

from cluster.storage import open_storage
from dataio.codecs.image.decode import Checker
from dataio.codecs.image.sniff import sniff
from dataio.conversion import convert
from dataio.manifest import Manifest, ManifestError
from dataio.parquet import open_dataset
from dataio.sources import SourceError, open_source
from dataio.sources.pickled import load_cifar_pickle
from trainer.report.files import read_files
from trainer.runs.__main__ import table
from trainer.runs.folder import RunFolder
from trainer.runs.journal_tail import JournalTail
from trainer.runs.progress import final_table
from trainer.runs.status import look, read_summary
from trainer.runs.watch import RunTracker
from trainer.settings.say import Terminal
from trainer.settings.toml import load, to_toml
from trainer.settings.tree import RunConfig

LIMIT_BYTES = 1 << 30
"""Memory that a case may take, beyond that of the process before it."""
LIMIT_SECONDS = 5.0
"""Processor time of a case. A real hang takes for ever; the largest honest case takes 0.1 s."""
MAX_PIXELS = 1 << 22


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """How to read a case, and the errors with which that may end."""

    read: Callable[[Path, bytes], object]
    """Gets an empty folder and the changed file."""
    seeds: Callable[[], Sequence[bytes]]
    errors: tuple[type[Exception], ...]


# --- the readers --------------------------------------------------------------------------------------------------------------------------


def _made(write: Callable[[Path], object], *names: str) -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return [(Path(folder) / name).read_bytes() for name in names]


def _exhaust(path: Path, folder: Path, **options: Any) -> None:
    source = open_source(str(path), root=folder, test_fraction=0.2, **options)
    assert source.targets
    assert len(source.identity) == 64
    for split in source.splits():
        source.count(split)
        for sample in itertools.islice(source.samples(split), 1000):
            assert isinstance(sample.data, bytes)


def _read_file(name: str, **options: Any) -> Callable[[Path, bytes], object]:
    def read(folder: Path, data: bytes) -> None:
        (folder / name).write_bytes(data)
        _exhaust(folder / name, folder, **options)

    return read


def _read_idx(name: str) -> Callable[[Path, bytes], object]:
    def read(folder: Path, data: bytes) -> None:
        write_idx(folder)
        (folder / name).unlink(missing_ok=True)
        (folder / f"{name}.gz").write_bytes(data) if data[:2] == b"\x1f\x8b" else (folder / name).write_bytes(data)
        _exhaust(folder, folder)

    return read


def _read_table(folder: Path, data: bytes) -> None:
    path = write_table(folder, "image,label\n")
    path.write_bytes(data)
    _exhaust(path, folder)


def _read_images(checker: list[Checker] = []) -> Callable[[Path, bytes], object]:  # noqa: B006 (one pipeline for all cases)
    def read(folder: Path, data: bytes) -> None:
        sniff(data, max_pixels=MAX_PIXELS)
        if not checker:
            checker.append(Checker(max_pixels=MAX_PIXELS, batch_size=4))
        (verdict,) = checker[0].check([data])
        assert verdict is not None

    return read


def _read_dataset(name: str) -> Callable[[Path, bytes], object]:
    def read(folder: Path, data: bytes) -> None:
        _convert(folder)
        (folder / "made" / name).write_bytes(data)
        dataset = open_dataset(folder / "made")
        for split in map(dataset.split, dataset.manifest.splits):
            split.targets()
            for group in range(split.groups):
                split.read_group(group)
            list(split.content())

    return read


def _convert(folder: Path) -> None:
    source = write_table(folder / "source", "image,label\n" + "".join(f"{{{number}}},{'ab'[number % 2]}\n" for number in range(20)))
    convert(open_source(str(source), root=folder, test_fraction=0.2), folder / "made", max_bad_fraction=0.0, max_image_pixels=MAX_PIXELS)


def _read_run(name: str) -> Callable[[Path, bytes], object]:
    def read(folder: Path, data: bytes) -> None:
        _run(folder)
        (folder / "run" / name).write_bytes(data)
        run = RunFolder(storage=open_storage(folder), name="run")
        status = look(run, is_live=False)
        assert status is not None
        json.dumps(status.to_json())
        table([status], width=100, now=1e9)
        with suppress(OSError, ValueError):
            Terminal(file=io.StringIO(), width=100).print(final_table(read_summary(run)))
        tracker = RunTracker("run")
        for event in JournalTail(run.storage, "run").follow():
            tracker.take(event)
        read_files(run, pictures=False)

    return read


def _run(folder: Path) -> None:
    (folder / "run").mkdir()
    events: list[dict[str, Any]] = [
        {"event": "run_started", "pid": 1, "command": "x"},
        {"event": "attempt_started", "attempt": 1, "workers": 1, "start_step": 0},
        {"event": "evaluation", "step": 3, "epoch": 1.0, "test_accuracy": 0.5, "test_loss": 1.0},
        {"event": "checkpoint_committed", "step": 3, "size_bytes": 10},
        {"event": "run_finished", "steps": 3},
    ]
    lines = [json.dumps({"time": 1e9 + number, **event}) for number, event in enumerate(events)]
    (folder / "run" / "journal.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "run" / "config.toml").write_text(to_toml(RunConfig(run="run")))
    summary = {"run": "run", "status": "finished", "steps": 3, "classes": ["a", "b"], "confusion": [[1, 0], [0, 1]], "seconds": 3.0}
    (folder / "run" / "summary.json").write_text(json.dumps(summary))
    pq.write_table(pa.table({"step": [1, 2, 3], "loss": [3.0, 2.0, 1.0]}), folder / "run" / "curves.parquet")


def _parquet_seeds() -> list[bytes]:
    rows = hf_rows(9, paths=True)
    texts = [(data, None, "cat" if label else "dog") for data, _, label in rows]
    lists = [(data, None, [label or 0, 3]) for data, _, label in rows]

    def made(content: list[Any], **options: Any) -> bytes:
        return _made(lambda folder: write_hf(folder / "x", content, **options), "x")[0]

    return [
        made(rows),
        made(rows, names=["a", "b", "c"]),
        made(texts, label_type=pa.string()),
        made(lists, label_type=pa.list_(pa.int64())),
        _bomb("image", "label"),
        _bomb("label", "image"),
    ]


def _bomb(large: str, small: str) -> bytes:
    """Some hundred bytes that say one value of 2 MB for each of 4,000 rows."""
    out = io.BytesIO()
    kind = pa.binary() if large == "image" else pa.string()
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 4000, pa.int32()), pa.array(["a" * (2 << 20)], kind))
    other = pa.array([b"x" if small == "image" else 0] * 4000, pa.binary() if small == "image" else pa.int64())
    pq.write_table(pa.table({large: column, small: other}), out, compression="zstd", store_schema=False)
    return out.getvalue()


def _text_seeds(suffix: str) -> list[bytes]:
    table = [{"text": f"the film is {number}", "label": "ab"[number % 2], "tags": ["x", "y"][: number % 3]} for number in range(9)]
    out = io.BytesIO()
    match suffix:
        case ".jsonl":
            return ["".join(json.dumps(row) + "\n" for row in table).encode(), b'{"text": null, "label": 1.5}\n' * 9]
        case ".csv":
            return [b"text,label,split\n" + b"".join(f'"{row["text"]}, again",{row["label"]},train\n'.encode() for row in table)]
        case _:
            pq.write_table(pa.Table.from_pylist(table), out)
            return [out.getvalue(), _bomb("text", "label")]


def _pickle_seeds() -> list[bytes]:
    content = cifar_content("data_batch_1", 2)
    twice = b"\x80\x02" + b"]q\x00" + b"".join(b"(h%ch%ctq%c" % (n, n, n + 1) for n in range(200)) + b"0}h\xc8K\x01s."
    return [*(pickle.dumps(content, protocol=protocol) for protocol in range(6)), twice]


def _images() -> list[bytes]:
    return [each.data for each in good()]


READERS: dict[str, Reader] = {
    "images": Reader(read=_read_images(), seeds=_images, errors=()),
    "pickle": Reader(read=lambda folder, data: load_cifar_pickle("data_batch_1", data), seeds=_pickle_seeds, errors=(SourceError,)),
    "archive": Reader(
        read=_read_file("x.tar"),
        seeds=lambda: [
            *_made(lambda at: write_tar(at / "x", cifar_members(), mode="w"), "x"),
            *_made(lambda at: write_tar(at / "x", cifar_members()), "x"),
        ],
        errors=(SourceError,),
    ),
    "idx images": Reader(
        read=_read_idx("train-images-idx3-ubyte"), seeds=lambda: _packed("train-images-idx3-ubyte"), errors=(SourceError,)
    ),
    "idx labels": Reader(
        read=_read_idx("train-labels-idx1-ubyte"), seeds=lambda: _packed("train-labels-idx1-ubyte"), errors=(SourceError,)
    ),
    "parquet": Reader(read=_read_file("train.parquet"), seeds=_parquet_seeds, errors=(SourceError,)),
    "table": Reader(
        read=_read_table,
        seeds=lambda: _made(
            lambda at: write_table(at, "image,label,split\n" + "".join(f'{{{n}}},"a|b",train\n' for n in range(9))), "labels.csv"
        ),
        errors=(SourceError,),
    ),
    "text table": Reader(read=_read_file("x.csv", holds_texts=True), seeds=lambda: _text_seeds(".csv"), errors=(SourceError,)),
    "json lines": Reader(read=_read_file("x.jsonl", holds_texts=True), seeds=lambda: _text_seeds(".jsonl"), errors=(SourceError,)),
    "text parquet": Reader(read=_read_file("x.parquet", holds_texts=True), seeds=lambda: _text_seeds(".parquet"), errors=(SourceError,)),
    "manifest": Reader(
        read=lambda folder, data: Manifest.from_json(data), seeds=lambda: _dataset("manifest.json"), errors=(ManifestError,)
    ),
    "shard": Reader(
        read=_read_dataset("train-00000.parquet"),
        seeds=lambda: _dataset("train-00000.parquet"),
        errors=(ValueError,),  # CorruptShard
    ),
    "settings": Reader(
        read=lambda folder, data: ((folder / "x.toml").write_bytes(data), load(str(folder / "x.toml"), RunConfig())),
        seeds=lambda: [to_toml(RunConfig()).encode()],
        errors=(ValueError,),
    ),
    **{
        f"run's {name}": Reader(
            read=_read_run(name),
            seeds=lambda name=name: _made(_run, f"run/{name}"),
            errors=(ValueError, OSError),  # type: ignore[misc]
        )
        for name in ("journal.jsonl", "summary.json", "config.toml", "curves.parquet")
    },
}


def _packed(name: str) -> list[bytes]:
    (plain,) = _made(write_idx, name)
    return [plain, gzip.compress(plain)]


def _dataset(name: str) -> list[bytes]:
    return _made(_convert, f"made/{name}")


# --- the changes --------------------------------------------------------------------------------------------------------------------------

_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)
_TEXTS = (
    b"[" * 5000,
    b'{"a":' * 5000,
    b"9" * 5000,
    b"\xff\xfe\x00",
    b'"',
    b"1e999",
    b"-1",
    b"NaN",
    b"null",
    b"\n",
    b"a.a.a.a.a.a=1\n",
    b"../",
)


def changed(seeds: Sequence[bytes], number: int) -> bytes:
    """Case `number`: one of the seeds, unchanged in the first round, then with one to four changes."""
    if number < len(seeds):
        return seeds[number]
    draw = random.Random(number)
    data = draw.choice(seeds)
    is_packed = data[:2] == b"\x1f\x8b" and draw.random() < 0.5  # what is inside is changed, not its checksum
    data = gzip.decompress(data) if is_packed else data
    for _ in range(draw.randint(1, 4)):
        data = _change(draw, data, seeds)
    return gzip.compress(data, 1) if is_packed else data


_VALUES: tuple[Any, ...] = (None, True, "", "x", "\x1b[2J", [], {}, [[]], {"a": {}}, -1, 0, 0.5, 1e308, 10**400, float("inf"), float("nan"))


def _retyped(draw: random.Random, data: bytes) -> bytes:
    """One value of a line of JSON becomes one of another type."""
    lines = data.split(b"\n")
    at = draw.randrange(len(lines))
    try:
        whole = json.loads(lines[at])
    except (ValueError, RecursionError):
        return data
    place, key = {"": whole}, ""
    while isinstance(inner := place[key], dict | list) and inner and draw.random() < 0.8:  # type: ignore[index]
        place, key = inner, draw.choice(list(inner) if isinstance(inner, dict) else list(range(len(inner))))  # type: ignore[assignment]
    place[key] = draw.choice(_VALUES)
    lines[at] = json.dumps(whole).encode()
    return b"\n".join(lines)


def _change(draw: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    if data[:1] == b"{" and draw.random() < 0.5:
        return _retyped(draw, data)
    at = draw.randrange(len(data) + 1)
    if draw.random() < 0.3:  # headers and footers decide
        at = draw.choice((min(at, 64), max(0, len(data) - draw.randrange(1, 600))))
    to = min(len(data), at + draw.choice((1, 2, 4, 8, 50, 500)))
    match draw.randrange(7):
        case 0:
            flipped = bytes(byte ^ 1 << draw.randrange(8) for byte in data[at : at + 1])
            return data[:at] + flipped + data[at + 1 :]
        case 1:
            return data[:at]
        case 2:
            return data[:at] + data[to:]
        case 3:
            return data[:at] + data[at:to] * draw.choice((2, 3, 1000)) + data[to:]
        case 4:
            size, order = draw.choice((1, 2, 4, 8)), draw.choice(("little", "big"))
            value = (draw.choice(_NUMBERS) & (1 << 8 * size) - 1).to_bytes(size, order)  # type: ignore[arg-type]
            return data[:at] + value + data[at + size :]
        case 5:
            return data[:at] + draw.choice(_TEXTS) + data[at:]
    other = draw.choice(seeds)
    return data[:at] + other[draw.randrange(len(other) + 1) :]


# --- child and parent ---------------------------------------------------------------------------------------------------------------------


_SEEDS: dict[str, Sequence[bytes]] = {}


def run_cases(name: str, numbers: Iterator[int], until: float) -> int:
    """Runs cases in this process, which has the limits; says which one before each. Returns how many were run."""
    reader, seeds = READERS[name], _SEEDS[name]
    done = 0
    for number in numbers:
        if time.monotonic() > until:
            break
        data = changed(seeds, number)
        print(f"{name}\t{number}", flush=True)
        signal.setitimer(signal.ITIMER_PROF, LIMIT_SECONDS)
        with tempfile.TemporaryDirectory() as folder:
            try:
                reader.read(Path(folder), data)
            except reader.errors as error:
                str(error)
            except Exception as error:
                raise RuntimeError(f"{name}: case {number} ends with {type(error).__name__}: {error}") from error
        signal.setitimer(signal.ITIMER_PROF, 0)
        done += 1
    return done


def child(names: Sequence[str], seed: int, count: int, seconds: float) -> None:
    for name in names:  # what is imported and built at the first use counts for no case
        with tempfile.TemporaryDirectory() as folder:
            _SEEDS[name] = READERS[name].seeds()
            READERS[name].read(Path(folder), _SEEDS[name][0])
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    done = sum(run_cases(name, iter(range(seed, seed + count)), time.monotonic() + seconds / len(names)) for name in names)
    print(f"done\t{done}", flush=True)


def fuzz(names: Sequence[str], *, seed: int = 0, count: int = 1 << 60, seconds: float = 1e9) -> tuple[int, str]:
    """(number of cases, "" or what went wrong and in which case)."""
    arguments = ["--child", "--seed", str(seed), "--count", str(count), "--seconds", str(seconds)]
    for name in names:
        arguments += ["--reader", name]
    ended = subprocess.run([sys.executable, "-m", "tests.fuzz", *arguments], cwd=PROJECT, capture_output=True, text=True, check=False)
    lines = [line for line in ended.stdout.splitlines() if "\t" in line]
    last, _, number = (lines or ["nothing\t-"])[-1].partition("\t")
    if ended.returncode == 0 and last == "done":
        return int(number), ""
    why = {-signal.SIGPROF: f"takes more than {LIMIT_SECONDS:g} s"}.get(ended.returncode, f"ends the process with {ended.returncode}")
    again = f"python -m tests.fuzz --reader {last!r} --seed {number} --count 1"
    return len(lines), f"{last}, case {number}: {why}\n{again}\n{ended.stderr[-6000:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--reader", action="append", choices=list(READERS), help="only this one; may be given again")
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--count", type=int, default=1 << 60, help="cases of each reader")
    parser.add_argument("--seconds", type=float, default=60.0, help="for all readers together")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.reader or list(READERS)
    if options.child:
        child(names, options.seed, options.count, options.seconds)
        return 0
    problems = 0
    for name in names:
        cases, problem = fuzz([name], seed=options.seed, count=options.count, seconds=options.seconds / len(names))
        print(f"{name}: {cases} cases{f'; PROBLEM: {problem}' if problem else ''}", flush=True)
        problems += bool(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
