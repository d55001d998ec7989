"""Has Ray Data answer all shards of a plan, on this machine or a cluster. Each shard's file is written once, by whichever worker does it:
what is killed, a worker, a node or the command, costs the shards that were under way, and the same command goes on with the others.
"""

import errno
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.launch import ClusterHardware
from cluster.storage import Storage, is_uri, open_storage
from trainer.inference.inputs import listed
from trainer.inference.plan import PLAN, SUMMARY, Plan, differences, part_name, read_plan, shard_of, write_plan
from trainer.inference.refusals import reading, writing_to
from trainer.inference.shard import UNDER_WAY, Counts, Job, Reporting, Spent, counts_in, sort_of
from trainer.settings.units import duration, number

MAX_THREADS = 4
"""Of a worker on a CPU: more of them do not make its network faster, and another worker does."""
READERS = 16
SAY_SECONDS = 5.0
Say = Callable[[str], None]


class WorkersLost(OSError):
    """Workers died, or their files are not there. The same command goes on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a command asks for."""

    out: str
    inputs: tuple[str, ...]
    column: str
    """The one that holds the images or the texts; "" finds it by its usual names."""
    job: Job
    shard_images: int
    workers: int
    """0: as many as the machine's processors call for."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What decides the answers, and the shards."""
        return {
            "model": self.job.model_sha256,
            "inputs": [each if is_uri(each) else os.path.abspath(os.path.expanduser(each)) for each in self.inputs],
            f"{self.job.unit.removesuffix('s')}_column": self.column,
            "top": self.job.top,
            "calibrated": self.job.calibrated,
            "fit": self.job.fit,
            "shard_images": self.shard_images,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Begun:
    """A job whose plan is written, and what earlier commands did of it."""

    plan: Plan
    done: Mapping[int, Counts]

    @property
    def left(self) -> list[int]:
        return [shard for shard in range(self.plan.shards) if shard not in self.done]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """What came out."""

    counts: Counts
    here: int
    """Images that this command answered."""
    seconds: float
    """From the first worker's start to the last answer."""
    workers: int
    spent: Spent
    """Of all workers, added up."""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "counts": self.counts.to_json(), "images_per_second": self.here / self.seconds if self.seconds else 0.0}


def begin(asked: Asked, say: Say) -> Begun:
    """Write the plan, or read the one that is there. ValueError if that is of another job, or for what the user has to mend; OSError if a
    storage does not answer."""
    storage = open_storage(asked.out)
    _check_out(storage)
    with writing_to(storage):
        plan = read_plan(storage)
        strange = next((entry.name for entry in storage.list("") if not entry.name.startswith(".")), None) if plan is None else None
    if strange is not None:
        raise ValueError(f"--out {storage.address} holds {strange}, and no predictions; name a folder that is new or empty")
    if plan is None:
        say(f"listing the {asked.job.unit}")
        sort = sort_of(asked.job.unit)
        with reading(f"{sort.one.upper()}...", "name what you may read"):
            found = listed(asked.inputs, sort=sort, column=asked.column, most_rows=asked.shard_images)
        with writing_to(storage):
            mine = None if storage.exists(PLAN) else write_plan(storage, found, asked.settings, asked.shard_images)
            plan = read_plan(storage)  # another command may have written one since, before this one or after it
        if mine is not None and mine == plan:
            return Begun(plan=mine, done={})
        if plan is None:
            raise OSError(f"--out {storage.address} lost {PLAN} as soon as that was written")
    if different := differences(plan, asked.settings):
        raise ValueError(
            f"--out {storage.address} holds predictions of another job: {'; '.join(different)}. Name another folder, or delete that one"
        )
    with writing_to(storage):
        _forget_under_way(storage)
        done = _done(storage, plan)
    count = sum(counts.images for counts in done.values())
    say(f"{number(count)} of {number(plan.images)} {asked.job.unit} are done; going on with the list in {PLAN}, as it was made at first")
    return Begun(plan=plan, done=done)


def _check_out(out: Storage) -> None:
    """Refuse at once what could not be written to after all samples have been listed. ValueError for it."""
    if not out.root:
        raise ValueError(f"--out {out.address} names no folder; give one, such as s3://BUCKET/FOLDER")
    if not out.is_local:
        return
    where = out.root
    while not os.path.lexists(where):
        where = os.path.dirname(where)
    if not os.path.isdir(where):
        raise ValueError(f"--out {out.address}: {where} is no folder; name one that is new or empty")
    if not os.access(where, os.W_OK | os.X_OK):
        raise ValueError(f"--out {out.address}: nothing can be written to {where}; name a folder that you may write to")


def _forget_under_way(storage: Storage) -> None:
    """How often shards were begun: a new command tries anew, and nothing of it is left beside the answers."""
    try:
        storage.delete_dir(UNDER_WAY)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another command on the same --out notes one just now, and deletes it
            raise


def _done(storage: Storage, plan: Plan) -> dict[int, Counts]:
    """The counts of the shards that are complete, from the footers of their files. A file that is damaged is made again."""

    def look(name: str) -> Counts | None:
        with suppress(ValueError, FileNotFoundError):
            return counts_in(storage, name)
        return None

    names = [entry.name for entry in storage.list("") if (shard := shard_of(entry.name)) is not None and shard < plan.shards]
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(look, names))
    return {int(shard_of(name) or 0): counts for name, counts in zip(names, found, strict=True) if counts is not None}


def placed(hardware: ClusterHardware, workers: int, device: str) -> tuple[int, int, int]:
    """Workers, the CPUs of each and its GPUs. `device`: auto, cpu or cuda; ValueError if there is no GPU for cuda."""
    if device == "cuda" and not hardware.gpus:
        raise ValueError("--device cuda, but no node of the cluster has a GPU; use --device cpu or auto")
    if device != "cpu" and hardware.gpus:
        count = min(workers or hardware.gpus, hardware.gpus)
        return count, max(1, min(hardware.cpus // count, 2 * MAX_THREADS)), 1
    if workers:
        return workers, max(1, min(MAX_THREADS, hardware.cpus // workers)), 0
    threads = max(1, min(MAX_THREADS, hardware.cpus))
    return max(1, hardware.cpus // threads), threads, 0


def carry_out(asked: Asked, begun: Begun, hardware: ClusterHardware, say: Say) -> Ended:
    """Answer what is left, in a Ray that runs, and write the summary. OSError if workers could not go on, ValueError if what they were
    given is at fault; then the same command goes on."""
    plan, left = begun.plan, begun.left
    storage = open_storage(asked.out)
    if not hardware.local and storage.is_local and hardware.nodes > 1:
        say(f"note: {storage.address} has to be the same folder on all {hardware.nodes} nodes")
    workers, cpus, gpus = placed(hardware, asked.workers, asked.job.device)
    workers = min(workers, max(1, len(left)))
    job = replace(asked.job, plan=plan.ident, threads=cpus, device="cuda" if gpus else "cpu")
    counts = sum(begun.done.values(), Counts())
    before, spent = counts.images, Spent()
    began, said_at = time.monotonic(), -SAY_SECONDS
    each = "a GPU" if gpus else f"{cpus} CPU{'s' * (cpus != 1)}"
    unit = asked.job.unit
    say(f"{number(plan.images - before)} {unit} in {number(len(left))} shards; workers: {workers}, of {each} each")
    for row in _answers(job, left, workers, cpus, gpus):
        counts = counts + Counts(**row["counts"])
        spent = Spent(**{name: getattr(spent, name) + seconds for name, seconds in row["spent"].items()})
        now = time.monotonic()
        if now - said_at >= SAY_SECONDS or counts.images == plan.images:
            said_at, here = now, counts.images - before
            rate = here / (now - began)
            remaining = (plan.images - counts.images) / rate
            left_words = "" if counts.images == plan.images else f", {duration(remaining)} left"
            say(f"{number(counts.images)} of {number(plan.images)} {unit}, {rate:.0f} {unit}/s{left_words}")
    with writing_to(storage):
        done = _done(storage, plan)
    if lacking := [shard for shard in range(plan.shards) if shard not in done]:
        raise WorkersLost(
            f"{len(lacking)} files are not in {storage.address}, {part_name(lacking[0])} the first of them, though workers wrote them: "
            "--out must be storage that all nodes share"
        )
    ended = Ended(counts=counts, here=counts.images - before, seconds=time.monotonic() - began, workers=workers, spent=spent)
    with writing_to(storage):
        _forget_under_way(storage)
        storage.write_atomic(SUMMARY, json.dumps(ended.to_json(), indent=1).encode())
    return ended


def _answers(job: Job, shards: Sequence[int], workers: int, cpus: int, gpus: int) -> Iterator[Mapping[str, Any]]:
    """What the workers say of their shards, as these end."""
    import ray.data
    from ray.exceptions import RayError

    if not shards:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    context.log_internal_stack_trace_to_stdout = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    listed_shards = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
    answered = listed_shards.map_batches(
        Reporting,
        fn_constructor_args=(job,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
        num_cpus=cpus,
        num_gpus=gpus,
    )
    try:
        for row in answered.iter_rows():
            told = json.loads(str(row["done"]))
            if "message" in told:
                raise ValueError(told["message"]) if told["refused"] else WorkersLost(told["message"])
            yield told
    except RayError as error:  # what a worker refuses comes as a row
        text = str(error).strip().splitlines()
        raise WorkersLost(f"the workers could not go on: {text[-1] if text else type(error).__name__}") from error
