"""One measurement in a process of its own: `python -m benchmarks.streaming.child JOB.json`; the job names the file for the result.

Called by `measure.py`, which compares the results. Four jobs: `convert`, `speed` (begins an epoch, measures some of it), `epoch` (reads all
of it, saves a state in the middle), `resume` (continues from that state).
"""

import time

_BEGAN = time.monotonic()  # before anything else is imported

import hashlib  # noqa: E402
import importlib.metadata  # noqa: E402
import json  # noqa: E402
import pickle  # noqa: E402
import sys  # noqa: E402
from contextlib import closing  # noqa: E402
from dataclasses import asdict  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

COMPARED = 8
"""Number of images of the first batch to compare with the reference."""


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    work = {"convert": convert, "speed": speed, "epoch": epoch, "resume": resume, "versions": versions}[job["what"]]
    result = work(job)
    Path(job["result"]).write_text(json.dumps(result))


def versions(job: dict[str, Any]) -> dict[str, Any]:
    """Versions of the requested packages in this interpreter; null for a missing one."""
    found: dict[str, Any] = {}
    for name in job["packages"]:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def convert(job: dict[str, Any]) -> dict[str, Any]:
    from benchmarks.streaming.contenders import contender_of
    from benchmarks.streaming.pictures import open_images
    from benchmarks.streaming.usage import cpu_seconds

    kind, _ = contender_of(job["contender"])
    began, cpu = time.perf_counter(), cpu_seconds()
    kind.convert(open_images(Path(job["images"])), Path(job["folder"]))
    return {"seconds": time.perf_counter() - began, "cpu_seconds": cpu_seconds() - cpu}


def speed(job: dict[str, Any]) -> dict[str, Any]:
    from benchmarks.streaming.usage import cpu_seconds, memory

    contender = begin(job)
    imported = time.monotonic()
    resting = memory()
    with closing(contender.batches()) as batches:
        first = next(batches)
        first_seconds = time.monotonic() - job["started"]
        shape, dtype, kept = list(first.images.shape), str(first.images.dtype), first.images[:COMPARED].clone()
        seen = [strip(first)]
        del first
        early = memory()
        seen += [strip(next(batches)) for _ in range(job["warm_up_batches"] - 1)]
        began, cpu = time.perf_counter(), cpu_seconds()
        count = 0
        for _ in range(job["batches"]):
            batch = next(batches)
            count += len(batch.images)
            seen.append(strip(batch))
            del batch
        wall, used = time.perf_counter() - began, cpu_seconds() - cpu
        late = memory()  # while the workers are still running
    ids = image_ids(contender, seen, job)
    images = open_images_of(job)
    return {
        "images": count,
        "wall_seconds": wall,
        "cpu_seconds": used,
        "python_seconds": _BEGAN - job["started"],
        "import_seconds": imported - _BEGAN,
        "first_batch_seconds": first_seconds,
        "memory": {name: max(asdict(early)[name], asdict(late)[name]) for name in ("pss_bytes", "private_bytes", "peak_rss_bytes")},
        "imported_pss_bytes": resting.pss_bytes,
        "repeated": len(ids) - len(set(ids.tolist())),
        "wrong_labels": wrong_labels(images, ids, seen),
        "order": hashlib.sha256(ids.tobytes()).hexdigest()[:16],
        "difference": difference(images, kept, ids, job["size"]),
        "shape": shape,
        "dtype": dtype,
    }


def epoch(job: dict[str, Any]) -> dict[str, Any]:
    """Reads all of an epoch, by ids; writes the state after `stop_after` batches to a file."""
    from benchmarks.streaming import contenders

    contenders.DECODING.value = 0
    contender = begin(job)
    began = time.perf_counter()
    seen, done = [], 0
    with closing(contender.batches()) as batches:
        for number, batch in enumerate(batches, 1):
            seen.append(strip(batch))
            if number == job["stop_after"]:
                Path(job["state"]).write_bytes(pickle.dumps(contender.state(number)))
                done = sum(len(each.ids) for each in seen)
    ids = image_ids(contender, seen, job)
    return {
        "ids": ids.tolist(),
        "done": done,
        "wrong_labels": wrong_labels(open_images_of(job), ids, seen),
        "seconds": time.perf_counter() - began,
        "decoded": contender.always_decodes,
    }


def resume(job: dict[str, Any]) -> dict[str, Any]:
    """Continues from the saved state: time to the first decoded batch, and the ids of all remaining images."""
    from benchmarks.streaming import contenders

    contender = begin(job)
    imported = time.monotonic()
    state = pickle.loads(Path(job["state"]).read_bytes())
    seen = []
    first_seconds = 0.0
    with closing(contender.batches(state)) as batches:
        for batch in batches:
            if not seen:
                first_seconds = time.monotonic() - job["started"]
                contenders.DECODING.value = 0
                if not job["to_end"]:
                    seen.append(strip(batch))
                    break
            seen.append(strip(batch))
    ids = image_ids(contender, seen, job)
    return {"first_batch_seconds": first_seconds, "import_seconds": imported - _BEGAN, "ids": ids.tolist()}


def begin(job: dict[str, Any]) -> Any:
    """The contender, with its libraries imported."""
    import torch

    from benchmarks.streaming.contenders import Task, contender_of

    torch.set_num_threads(1)
    kind, decoder = contender_of(job["contender"])
    fields = {name: job[name] for name in ("size", "batch_size", "workers", "seed", "window", "memory_bytes")}
    contender = kind(Task(folder=Path(job["folder"]), decoder=decoder, **fields))
    contender.load()
    return contender


def strip(batch: Any) -> Any:
    """Drops the pixels; an empty view would keep them all in memory. Copies the labels: they may lie in memory shared with a worker."""
    import torch

    from benchmarks.streaming.contenders import Got

    ids = batch.ids.tolist() if hasattr(batch.ids, "tolist") else list(batch.ids)
    return Got(images=torch.empty(0, dtype=torch.uint8), labels=batch.labels.clone(), ids=ids)


def image_ids(contender: Any, seen: list[Any], job: dict[str, Any]) -> Any:
    return contender.image_ids([each for batch in seen for each in batch.ids], open_images_of(job))


def open_images_of(job: dict[str, Any]) -> Any:
    from benchmarks.streaming.pictures import open_images

    return open_images(Path(job["images"]))


def wrong_labels(images: Any, ids: Any, seen: list[Any]) -> int:
    import numpy as np

    labels = np.concatenate([batch.labels.numpy() for batch in seen]) if seen else np.empty(0, np.int64)
    return int((images.labels()[ids] != labels).sum())


def difference(images: Any, kept: Any, ids: Any, size: int) -> float:
    """Mean absolute difference of pixel values (0..255) to the reference, PIL, over the kept images.

    For each image the closest variant counts: mirrored or not, moved by at most one pixel (libraries round the middle differently), without
    the border.
    """
    import torch

    from benchmarks.streaming.contenders import Decode

    reference = Decode(size, "pil", flip=False)
    total = 0.0
    for image, image_id in zip(kept, ids, strict=False):
        wanted = reference(images.read(int(image_id))).permute(2, 0, 1).to(torch.int16)
        found = image.to(torch.int16)
        inner = found[:, 1:-1, 1:-1]
        moves = [(dy, dx) for dy in (0, 1, 2) for dx in (0, 1, 2)]
        moved = [each[:, dy : size - 2 + dy, dx : size - 2 + dx] for each in (wanted, wanted.flip(2)) for dy, dx in moves]
        total += min(float((inner - each).abs().float().mean()) for each in moved)
    return total / max(len(kept), 1)


if __name__ == "__main__":
    main()
