"""A run's history across restarts: evaluations, where its seconds went, and its curves.

worker.py shows each step to these objects. saving.py saves History and Curves inside every checkpoint, so that steps lost in a failure drop
out here too. RankTotals and Speed last for one attempt.
"""

import io
import json
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from trainer.learn.step import Arriving, StepStats
from trainer.rank.guard import Guard

CURVE_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("epoch", pa.float64()),
        ("attempt", pa.int64()),
        ("time", pa.float64()),
        ("train_loss", pa.float64()),
        ("learning_rate", pa.float64()),
        ("images_per_second", pa.float64()),
        ("data_wait_seconds", pa.float64()),
        ("step_seconds", pa.float64()),
    ]
)

GUESS_CURVES = ("unlabelled_used", "unlabelled_weight")
"""Columns of a run with unlabelled images: of its step, the share whose guess counts by more than one half, and the mean of what they
count."""


@dataclass(kw_only=True, slots=True)
class History:
    """Totals over the steps that led to the present state, without steps lost in a failure."""

    steps_done: int = 0
    samples: int = 0  # trained on
    skipped_samples: int = 0  # in batches skipped for a bad loss
    step_seconds: float = 0.0  # includes data wait
    data_wait_seconds: float = 0.0
    exchange_wait_seconds: float = 0.0  # part of the steps: waiting for the other ranks' gradients
    evaluation_seconds: float = 0.0
    checkpoint_stall_seconds: float = 0.0
    train_loss: float = float("nan")  # of the newest step whose loss has arrived
    mean_train_loss: float = float("nan")  # over the samples since the last evaluation; right after one, those before it
    loss_sum: float = 0.0  # of the losses since the last evaluation, each times its samples
    loss_samples: int = 0
    losses_before: int = 0  # the step from which on losses are not in these sums yet
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    first_classes: dict[str, Any] = field(default_factory=dict)  # what the first evaluation found of each class; see `classes_of`
    unlabelled: dict[str, Any] = field(default_factory=dict)  # what guesses at unlabelled images came to before the last evaluation
    guard: dict[str, Any] = field(default_factory=dict)  # state of trainer.rank.guard.Guard; `settled` fills it in

    def stepped(self, stats: StepStats) -> None:
        self.steps_done = stats.steps_done
        if stats.skipped:
            self.skipped_samples += stats.samples
        else:
            self.samples += stats.samples
        self.step_seconds += stats.step_seconds
        self.data_wait_seconds += stats.data_wait_seconds
        self.exchange_wait_seconds += stats.exchange_seconds
        if stats.losses:
            self.train_loss = stats.losses[-1][1]

    def learned(self, losses: Iterable[tuple[int, float]], samples_of: Callable[[int], int]) -> None:
        """Add the (step, mean loss) that have arrived. A loss that was added already does not count again."""
        for step, loss in losses:
            if step >= self.losses_before:
                samples = samples_of(step)
                self.loss_sum += loss * samples
                self.loss_samples += samples
                self.losses_before = step + 1
                self.mean_train_loss = self.loss_sum / self.loss_samples

    def evaluated(self, entry: dict[str, Any], seconds: float) -> None:
        """Add an evaluation; the mean of the training loss starts anew. The caller must not change `entry` afterwards. Of the ones before
        only the numbers stay: a confusion matrix of 1,000 classes is 3 MB of JSON, and nobody reads an old one."""
        if not self.evaluations:
            self.first_classes = classes_of(entry)
        self.evaluations = [*map(numbers_of, self.evaluations), entry]
        self.evaluation_seconds += seconds
        self.loss_sum, self.loss_samples = 0.0, 0

    def evaluated_again(self, seconds: float) -> None:
        """An evaluation after the last step took `seconds`. It is no entry, as it is done again if the run goes on from its last
        checkpoint."""
        self.evaluation_seconds += seconds

    def stalled(self, seconds: float) -> None:
        """A checkpoint held up the steps for `seconds`."""
        self.checkpoint_stall_seconds += seconds

    def copy(self) -> "History":
        """A copy for a checkpoint. It shares the entries of `evaluations`, which never change."""
        return replace(self, evaluations=list(self.evaluations))

    def settled(self, guard: Guard, late: Sequence[Arriving], samples_of: Callable[[int], int]) -> bytes:
        """`to_json` with the state of `guard` (from Guard.proof), which has seen every loss up to this moment, the late ones included."""
        newest = guard.newest_loss
        history = replace(self, guard=guard.state(), train_loss=self.train_loss if newest is None else newest)
        history.learned([(loss.step, loss.wait()) for loss in late], samples_of)
        return history.to_json()

    def to_json(self) -> bytes:
        return json.dumps({each.name: getattr(self, each.name) for each in fields(self)}).encode()  # asdict would copy every number

    @classmethod
    def from_json(cls, data: bytes) -> "History":
        """A history that was saved, also by a version that kept the details of every evaluation."""
        history = cls(**json.loads(data))
        history.evaluations = [*map(numbers_of, history.evaluations[:-1]), *history.evaluations[-1:]]
        return history


def numbers_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An evaluation's entry without its details: step, epoch, loss, measures, count."""
    return {name: value for name, value in entry.items() if not isinstance(value, list | dict)}


def classes_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Step, epoch, and each class's recall and F1, of an evaluation that has them; else nothing. The report sets the last one's beside
    them."""
    scores = entry.get("per_class")
    if not scores:
        return {}
    about = {name: entry[name] for name in ("step", "epoch") if name in entry}
    return {**about, **{name: [score[name] for score in scores] for name in ("recall", "f1")}}


class LossMean:
    """Adds the losses that arrive to the history's mean. `samples_of(step)` is a batch's size."""

    def __init__(self, history: History, samples_of: Callable[[int], int]) -> None:
        self._history, self.samples_of = history, samples_of

    def stepped(self, stats: StepStats) -> None:
        self._history.learned(stats.losses, self.samples_of)

    def arrived(self, late: Sequence[Arriving]) -> None:
        """Add losses that StepStats called late, once the device has done more work since: after an evaluation they are here."""
        self._history.learned([(loss.step, loss.wait()) for loss in late], self.samples_of)


@dataclass(kw_only=True, slots=True)
class RankTotals:
    """One rank's own seconds since its attempt began, to compare ranks. A rank's images are its share of each batch."""

    share: float
    """Fraction of a batch that this rank carries."""
    steps: int = 0
    images: float = 0.0
    step_seconds: float = 0.0  # includes the waits for data and for other ranks
    data_wait_seconds: float = 0.0
    exchange_wait_seconds: float = 0.0
    checkpoint_stall_seconds: float = 0.0  # between steps

    def stepped(self, stats: StepStats) -> None:
        if not stats.skipped:
            self.steps += 1
            self.images += stats.samples * self.share
            self.step_seconds += stats.step_seconds
            self.data_wait_seconds += stats.data_wait_seconds
            self.exchange_wait_seconds += stats.exchange_seconds

    def stalled(self, seconds: float) -> None:
        """Checkpoints held up the steps for `seconds`."""
        self.checkpoint_stall_seconds += seconds

    def of_all_ranks(self, rank: int, world_size: int, device: torch.device) -> list[dict[str, float]]:
        """One entry per rank, in order. A collective: all ranks call it."""
        own = {name: float(value) for name, value in asdict(self).items() if name != "share"}
        table = torch.zeros((world_size, len(own)), dtype=torch.float64, device=device)
        table[rank] = torch.tensor(list(own.values()), dtype=torch.float64)
        if world_size > 1:
            dist.all_reduce(table)
        return [dict(zip(own, row, strict=True)) for row in table.tolist()]


class Curves:
    """Rows of curves.parquet: fewer than 4,000, whatever the run's length (observers.CurveLog takes every n-th step)."""

    def __init__(self) -> None:
        self._rows: list[dict[str, float]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, **row: float) -> None:
        self._rows.append(row)

    def copy(self) -> "Curves":
        """A copy for a checkpoint. It shares the rows, which never change."""
        curves = Curves()
        curves._rows = list(self._rows)
        return curves

    def to_parquet(self) -> bytes:
        sink, schema = io.BytesIO(), CURVE_SCHEMA
        if any(GUESS_CURVES[0] in row for row in self._rows):
            schema = pa.schema([*schema, *((name, pa.float64()) for name in GUESS_CURVES)])
        pq.write_table(pa.Table.from_pylist(self._rows, schema=schema), sink)
        return sink.getvalue()

    @classmethod
    def from_parquet(cls, data: bytes) -> "Curves":
        curves = cls()
        curves._rows = pq.read_table(io.BytesIO(data)).to_pylist()
        return curves


class Speed:
    """Images per second and data wait over the last steps. The speed uses the median step, so that one hiccup does not show as a dip.
    Skipped steps compute nothing and do not count."""

    def __init__(self, window: int = 20) -> None:
        self._steps: deque[StepStats] = deque(maxlen=window)

    def stepped(self, stats: StepStats) -> None:
        if not stats.skipped:
            self._steps.append(stats)

    @property
    def images_per_second(self) -> float:
        seconds = statistics.median(s.step_seconds for s in self._steps) if self._steps else 0.0
        return statistics.median(s.samples for s in self._steps) / seconds if seconds > 0 else 0.0

    @property
    def data_wait_ratio(self) -> float:
        total = sum(s.step_seconds for s in self._steps)
        return sum(s.data_wait_seconds for s in self._steps) / total if total > 0 else 0.0
