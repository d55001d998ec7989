"""Answers a shard of images or texts, in a worker: reads, decodes, asks the model, writes one file. The file appears whole or not at all,
and is the same to the byte whoever writes it, so that a shard may be done twice without harm.
"""

import io
import json
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cluster.storage import Storage, open_storage
from dataio.foreign import json_of
from trainer.inference.columns import columns_of, schema_of, targets_of
from trainer.inference.inputs import IMAGES, Encoded, Sort, encoded
from trainer.inference.parquet import opened_parquet
from trainer.inference.plan import PLAN, Parts, part_name
from trainer.inference.predictor import Predictor
from trainer.inference.refusals import in_words, is_refusal, writing_to
from trainer.runs.folder import RunFolder
from trainer.runs.model_files import described

Unit = Literal["images", "texts"]
_COUNTS = b"finetune.counts"
UNDER_WAY = "_under_way"
"""Folder of the job that says how often each shard was begun and not ended."""
TRIES = 3
"""How often a shard may take its worker down with it before the job ends: Ray would try for ever."""
AHEAD = 2
"""Batches that are read and decoded before the model wants them."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker has to know."""

    out: str
    plan: str = ""
    """Ident of the plan in it, once there is one."""
    model: str
    """URI of the storage that holds the model folder, and its name there."""
    model_name: str
    model_sha256: str
    fit: str
    """ "": as the run had it."""
    top: int
    calibrated: bool
    device: str
    threads: int
    unit: Unit = "images"


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What came out of a shard, or of all."""

    images: int = 0
    bad: int = 0
    transparent: int = 0
    unlike: int = 0
    answers: Mapping[str, int] = field(default_factory=dict)
    """Class -> samples, where the model answers with one class."""
    cut: int = 0
    """Texts whose beginning was answered."""

    def to_json(self) -> dict[str, Any]:
        """Without what no image has."""
        return {name: value for name, value in asdict(self).items() if value or name != "cut"}

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            images=self.images + other.images,
            bad=self.bad + other.bad,
            transparent=self.transparent + other.transparent,
            unlike=self.unlike + other.unlike,
            answers=dict(sorted((Counter(self.answers) + Counter(other.answers)).items())),
            cut=self.cut + other.cut,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Spent:
    """Seconds of a worker."""

    waiting: float = 0.0
    """For images that were read and decoded."""
    model: float = 0.0
    writing: float = 0.0


def counts_in(storage: Storage, name: str) -> Counts:
    """The counts of a shard's file. ValueError if it is damaged, or none of ours."""
    with opened_parquet(storage, name, name, fix="it is made again") as file:
        told = (file.schema_arrow.metadata or {}).get(_COUNTS)
    if told is None:
        raise ValueError(f"{name} is no file of answers")
    try:
        return Counts(**json_of(told))
    except TypeError as error:
        raise ValueError(f"{name} is no file of answers: {error}") from None


class Worker:
    """Holds the model; answers shard after shard. Ray Data makes one in each of its processes."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self._job = job
        self._storage = open_storage(job.out)
        with writing_to(self._storage):
            self._parts = Parts(self._storage)
        if self._parts.plan.ident != job.plan:
            raise ValueError(f"--out {self._storage.address} holds the list of another command by now; give each job an --out of its own")
        folder = RunFolder(storage=open_storage(job.model), name=job.model_name)
        if (now := described(folder)["file_sha256"]) != job.model_sha256:
            raise ValueError(f"{job.model_name} holds another model by now ({now[:12]}, not {job.model_sha256[:12]}); give another --out")
        self._sort = sort_of(job.unit)
        self._predictor = _predictor(folder, job)
        self._schema = schema_of(self._predictor.task, knows_novelty=self._predictor.knows_novelty, of_texts=job.unit == "texts")

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Answer the shards of a batch; a row of JSON for each."""
        return {"done": np.array([json.dumps(self.answer(int(shard))) for shard in batch["shard"]])}

    def answer(self, shard: int) -> dict[str, Any]:
        """Answer the shard and write its file. OSError if a storage does not answer; the shard can be done again. ValueError if that is in
        vain: workers died of it."""
        with writing_to(self._storage):
            note = self._begin(shard)
        waiting = model = 0.0
        before = self._predictor.transparent
        tables, counts = [], Counter[str]()
        bad = unlike = images = cut = 0
        part, row = self._parts.part(shard)
        began = time.perf_counter()
        for keys, decoded, errors in self._decoded(part):
            waiting += time.perf_counter() - began
            began = time.perf_counter()
            said, strange = self._predictor.ask(decoded, top=self._job.top)
            answers = [None if errors[index] is not None else answer for index, answer in enumerate(said)]
            columns = columns_of(self._predictor.task, answers)
            columns |= {"row": list(range(row, row + len(keys))), "key": keys, "error": errors}
            if self._predictor.knows_novelty:
                columns["unlike_training"] = [None if error is not None else each for each, error in zip(strange, errors, strict=True)]
                unlike += sum(bool(each) for each in columns["unlike_training"])
            if self._job.unit == "texts":
                columns["cut"] = [None if error is not None else each for each, error in zip(decoded.cut, errors, strict=True)]
                cut += sum(bool(each) for each in columns["cut"])
            tables.append(pa.Table.from_pydict({name: columns[name] for name in self._schema.names}, schema=self._schema))
            bad += sum(error is not None for error in errors)
            counts.update(self._classes(columns))
            row += len(keys)
            images += len(keys)
            model += time.perf_counter() - began
            began = time.perf_counter()
        waiting += time.perf_counter() - began
        began = time.perf_counter()
        found = Counts(
            images=images,
            bad=bad,
            transparent=self._predictor.transparent - before,
            unlike=unlike,
            answers=dict(sorted(counts.items())),
            cut=cut,
        )
        data = self._file(tables, found)
        with writing_to(self._storage):
            self._storage.write_atomic(part_name(shard), data)
            self._storage.delete_file(note)
        spent = Spent(waiting=waiting, model=model, writing=time.perf_counter() - began)
        return {"shard": shard, "counts": found.to_json(), "spent": asdict(spent)}

    def _begin(self, shard: int) -> str:
        """Note that the shard is under way; returns where. ValueError if workers died of it."""
        note = f"{UNDER_WAY}/{shard:05d}"
        try:
            tries = int(self._storage.read(note))
        except FileNotFoundError:
            tries = 0
        if tries >= TRIES:
            raise ValueError(
                f"shard {shard} (row {self._parts.part(shard)[1]} of {PLAN} on) has taken {tries} workers down with it; look for one "
                "there that is not honest, leave it out, and give another --out; FINETUNE_VERBOSE=1 shows what the workers say"
            )
        self._storage.write_atomic(note, str(tries + 1).encode())
        return note

    def _classes(self, columns: Mapping[str, Sequence[Any]]) -> Iterator[str]:
        targets = targets_of(self._predictor.task)
        if len(targets) == 1 and targets[0].kind == "label":
            yield from (each for each in columns[targets[0].name] if each is not None)

    def _file(self, tables: Sequence[pa.Table], counts: Counts) -> bytes:
        schema = self._schema.with_metadata({_COUNTS: json.dumps(counts.to_json()).encode()})
        buffer = io.BytesIO()
        pq.write_table(pa.concat_tables(tables).cast(schema), buffer, compression="zstd")
        return buffer.getvalue()

    def _decoded(self, part: pa.Table) -> Iterator[tuple[list[str], Any, list[str | None]]]:
        """Batches of keys, decoded samples and the reasons why there are none, read and decoded in a thread ahead of the model."""
        ready: queue.Queue[Any] = queue.Queue(AHEAD)
        stop = threading.Event()

        def put(item: Any) -> bool:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.2)
                except queue.Full:
                    continue
                return True
            return False

        def work() -> None:
            try:
                plan = self._parts.plan
                for batch in encoded(plan.kind, plan.places, plan.column, part, sort=self._sort):
                    if not put(self._decode(batch)):
                        return
            except BaseException as error:
                put(error)
            else:
                put(None)

        thread = threading.Thread(target=work, name="decode", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    def _decode(self, batch: Sequence[Encoded]) -> tuple[list[str], Any, list[str | None]]:
        decoded = self._predictor.decode([each.data for each in batch])
        reasons = dict(decoded.bad)
        errors = [
            each.error or (self._predictor.explained(reasons[index]) if index in reasons else None) for index, each in enumerate(batch)
        ]
        return [each.key for each in batch], decoded, errors


def sort_of(unit: Unit) -> Sort:
    """What a job on images, or on texts, lists and reads."""
    if unit == "images":
        return IMAGES
    from trainer.inference.text_inputs import TEXTS  # here: no job on images waits for what texts need

    return TEXTS


def _predictor(folder: RunFolder, job: Job) -> Any:
    """Predictor or TextPredictor: both `decode` what is stored and `ask` what was decoded."""
    device = torch.device(job.device)
    if job.unit == "texts":
        from trainer.inference.texts import TextPredictor  # here: it imports tokenizers

        return TextPredictor(folder, device=device, is_calibrated=job.calibrated)
    fit: Any = job.fit or None
    return Predictor(folder, fit=fit, device=device, is_calibrated=job.calibrated, threads=job.threads)


class Reporting:
    """A Worker that says what went wrong as its answer: Ray Data would wrap an exception in words of its own."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._worker: Worker | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        try:
            if self._worker is None:
                self._worker = Worker(self._job)
            return self._worker(batch)
        except (ValueError, OSError) as error:
            return {"done": np.array([json.dumps({"refused": is_refusal(error), "message": in_words(error)})])}
