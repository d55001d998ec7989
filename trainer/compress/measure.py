"""Asks and times the models of a compression. __main__.py calls it, stage by stage.

Every stage is asked through the file that would be deployed: an ONNX graph, in ONNX Runtime on the CPU. So the rows differ in the model
alone. A stage that was asked already is not asked again: its answers lie in `stages/`, under the hash of its weights.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cluster.storage import Storage
from trainer.compress.results import Answered, Timed
from trainer.export.model_folder import outputs_of
from trainer.formats import quantise
from trainer.formats.check import compare, points_lost
from trainer.formats.made import ONNX_FILE, Made
from trainer.formats.manifest import card_of, manifest_of, write
from trainer.formats.onnx_graph import make_onnx
from trainer.rank.finished import Opened, open_finished
from trainer.runs.folder import RunFolder
from trainer.runs.model_files import described, model_of, model_sha256
from trainer.settings.units import percent
from trainer.tasks.info import Measure

EXPORTS, STAGES = "exports", "stages"
MAX_DIFFERENCE = 1e-4
ROUNDS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """How much an int8 model may lose."""

    max_drop: float
    """In points of the headline measure; of one that is no ratio, in per cent of it."""
    than: float
    """The measure of the model in float32."""


def answered(job: Storage, stage: str, run: RunFolder) -> tuple[Answered, Measure]:
    """Export the run's model as ONNX and ask it. ValueError if it cannot be exported, or answers otherwise there."""
    return _asked(job, stage, run, lambda opened, made: made, is_exact=True)


def answered_int8(job: Storage, stage: str, run: RunFolder, limit: Limit) -> tuple[Answered, Measure]:
    """The same in int8. One that loses more than the limit says why it is refused."""
    row, headline = _asked(job, stage, run, _int8, is_exact=False)
    return replace(row, refused=_refusal(row.value, headline, limit)), headline  # another command may allow more, or less


def timed(job: Storage, rows: Sequence[Answered], *, threads: int, calls: int) -> dict[str, Timed]:
    """Milliseconds and memory of each row's file: processes in turns, so that what the machine does beside falls on all of them."""
    taken: dict[str, dict[str, list[float]]] = {row.stage: {} for row in rows}
    peaks = dict.fromkeys(taken, 0)
    for _ in range(ROUNDS):
        for row in rows:
            file = Path(job.at(row.file))
            shape = json.loads((file.parent / "manifest.json").read_text())["input"]["shape"][1:]
            words = [str(file), str(threads), str(-(-calls // ROUNDS)), *map(str, shape)]
            done = subprocess.run([sys.executable, "-m", "trainer.compress.latency", *words], capture_output=True, text=True, check=False)
            if done.returncode:
                raise OSError(f"{row.stage} could not be timed (status {done.returncode}): {done.stderr[-500:].strip()}")
            said = json.loads(done.stdout)
            for batch, seconds in said["seconds"].items():
                taken[row.stage].setdefault(batch, []).extend(1e3 * each for each in seconds)
            peaks[row.stage] = max(peaks[row.stage], said["peak_bytes"])
    return {stage: Timed(milliseconds=each, peak_bytes=peaks[stage]) for stage, each in taken.items()}


def _asked(job: Storage, stage: str, run: RunFolder, make: Callable[[Opened, Made], Made], *, is_exact: bool) -> tuple[Answered, Measure]:
    description = described(model_of(run))
    known = f"{STAGES}/{stage}.json"
    weights = str(description["file_sha256"])  # wherever they came from, which the model's own hash knows
    opened = open_finished(run, {}, split="auto", device=torch.device("cpu"))
    headline = opened.exported.task.info.headline
    if job.exists(known):
        before = Answered(**json.loads(job.read(known)))
        if before.weights_sha256 == weights:
            return before, headline
    made = make(opened, make_onnx(opened.exported, is_prepared_inside=False, threads=opened.threads))
    compared = compare(opened, made.ask)
    if is_exact and compared.largest_difference > MAX_DIFFERENCE:
        raise ValueError(f"{stage}: as ONNX its outputs differ by {compared.largest_difference:.2g} of the largest; it cannot be compared")
    folder = f"{EXPORTS}/{stage}"
    outputs = outputs_of(opened.exported.task)
    manifest = manifest_of(
        made, compared, opened.exported, description, run=run.name, model_sha256=model_sha256(description), outputs=outputs
    )
    write(job, folder, made, manifest, card_of(made, compared, opened.exported, run=run.name))
    row = Answered(
        stage=stage,
        file=f"{folder}/{ONNX_FILE}",
        weights_sha256=weights,
        bytes=len(made.files[ONNX_FILE]),
        value=compared.result.measures[headline.name],
        count=compared.result.count,
        right="".join("01"[each] for each in compared.right),
    )
    job.write_atomic(known, (json.dumps(row.to_json()) + "\n").encode())
    return row, headline


def _int8(opened: Opened, made: Made) -> Made:
    count = opened.dataset.manifest.splits["train"].count
    batches = opened.loader.evaluate("train", quantise.places(count, quantise.IMAGES), batch_size=quantise.BATCH)
    images = [batch.samples for batch in batches]
    return quantise.quantised(made, opened.exported, images, is_prepared_inside=False, threads=opened.threads)


def _refusal(found: float, headline: Measure, limit: Limit) -> str:
    """Why the int8 model, of which the measure is `found`, is not to be used; "" if it is."""
    points = points_lost(limit.than, found, headline)
    if points <= limit.max_drop:
        return ""
    told = (percent(limit.than, 2), percent(found, 2)) if headline.unit == "ratio" else (f"{limit.than:.4g}", f"{found:.4g}")
    return f"in int8 it goes from {told[0]} to {told[1]}, by {points:.2f}; --max-drop allows {limit.max_drop:g}"
