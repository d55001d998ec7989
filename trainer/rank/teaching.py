"""A rank's teacher (`train.teacher`): loaded before the first step, and asked once for all samples where views never change. worker.py
calls it; trainer.learn.teacher holds the arithmetic.

Where a sample looks the same in every epoch, its answer is the same too. The ranks ask the teacher for equal shares of the training split,
in batches that do not depend on how many ranks there are, and rank 0 writes the answers into the run's folder: an attempt that goes on
reads them, so the same bits cost nothing again.
"""

import hashlib
import json
import platform
from collections.abc import Callable

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from cluster.beat import DECODING, JOINING
from cluster.storage import Storage
from dataio.codecs.image.decode import DECODER_VERSIONS, decoder_device
from dataio.config import PIN
from trainer.learn.build import teacher_of, views_are_fixed
from trainer.learn.teacher import MOST_REMEMBERED_BYTES, Teacher
from trainer.models.weights import WeightsError
from trainer.rank.data import RankData
from trainer.rank.this_rank import ThisRank
from trainer.tasks.task import Task

ANSWERS_FILE = "teacher.safetensors"
BATCH = 256


def teacher_for(me: ThisRank, data: RankData, task: Task) -> Teacher | None:
    """The run's teacher, or None. WeightsError if it is not on this node, or is not the one that the driver saw."""
    if not me.config.train.teacher:
        return None
    # By a name alone nobody could tell whether it is still the same model.
    assert PIN in me.config.train.teacher, "the driver pins the teacher (trainer.drive.survey)"
    try:
        return me.waits.call(lambda: teacher_of(me.config, task, data.loader.shape, me.device), "the teacher")
    except ValueError as error:
        raise WeightsError(
            f"on {platform.node()}: {error}; every node needs the teacher's files, or a storage that all of them see"
        ) from None


def remember_answers(me: ThisRank, data: RankData, storage: Storage, teacher: Teacher, outputs: int) -> None:
    """If views are fixed and the answers fit, let the teacher remember those to the whole training split. A collective."""
    count = data.dataset.split("train").count
    if not views_are_fixed(me.config) or count * outputs * 4 > MOST_REMEMBERED_BYTES:
        return
    path, of = f"{me.config.run}/{ANSWERS_FILE}", _what(me, data)
    answers = torch.zeros((count, outputs), device=me.device)
    is_known = torch.zeros((), dtype=torch.int64, device=me.device)
    if me.rank == 0 and (found := me.waits.call(lambda: _read(storage, path, of, answers.shape), ANSWERS_FILE)) is not None:
        answers.copy_(found)
        is_known += 1
    if me.world_size > 1:
        with me.heartbeat.during(JOINING):
            dist.broadcast(is_known, src=0)
    if not is_known.item():
        with me.heartbeat.during(DECODING):
            _ask(me.rank, me.world_size, data, teacher, answers, me.heartbeat.tick)
    if me.world_size > 1:  # each row is one rank's, and the others' zeros
        with me.heartbeat.during(JOINING):
            dist.all_reduce(answers)
    if me.rank == 0 and not is_known.item():
        content = safetensors.torch.save({of: answers.cpu()})
        me.waits.call(lambda: storage.write_atomic(path, content), ANSWERS_FILE)
    teacher.remember(answers)


def _ask(rank: int, world_size: int, data: RankData, teacher: Teacher, into: Tensor, on_batch: Callable[[], None]) -> None:
    """Put this rank's share of the answers into the rows of `into`, one batch of BATCH samples after the other."""
    ids = np.arange(len(into), dtype=np.int64)
    own = ids[ids // BATCH % world_size == rank]  # every world_size-th batch
    for batch in data.loader.evaluate("train", own, batch_size=BATCH):
        into[batch.ids] = teacher.answers(batch.samples) + 0.0  # -0 becomes 0, as it would in a sum over ranks
        on_batch()


def _what(me: ThisRank, data: RankData) -> str:
    """A hash of what the answers depend on, by which the file names them."""
    config = me.config
    sha256 = config.train.teacher.rpartition(PIN)[2]
    height, width = data.loader.image_size
    decoder = DECODER_VERSIONS[decoder_device(height, width, fit=config.data.fit, device=me.device.type)]
    images = [data.order.fingerprint, (height, width), config.data.fit, config.data.behind, decoder]
    return hashlib.sha256(json.dumps([sha256, *images, config.train.precision]).encode()).hexdigest()


def _read(storage: Storage, path: str, of: str, shape: torch.Size) -> Tensor | None:
    """The answers that lie there; None if there are none, or none of this teacher to these samples."""
    try:
        content = storage.read(path)
    except FileNotFoundError:
        return None
    try:
        found = safetensors.torch.load(content).get(of)
    except SafetensorError:
        return None  # damaged: they are computed again, to the same bits
    return found if found is not None and found.shape == shape else None
