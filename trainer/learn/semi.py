"""Learning from images without labels (`data.unlabelled`): the model's guess at a mildly changed image, the weak view, is the label of a
strongly changed one, if the guess is sure enough. trainer.learn.build makes the Semi, trainer.learn.gradients hands it each virtual rank's
unlabelled images and, once a step, the sums over all of them.

Three rules say what "sure" is: FixMatch (Sohn et al. 2020, arXiv 2001.07685), SoftMatch (Chen et al. 2023, arXiv 2301.10921) and FreeMatch
(Wang et al. 2023, arXiv 2205.07246). The last two judge a guess by running averages over all guesses so far. These are the run's state:

- Sums over a virtual rank's images go through the same ordered reduction as its gradients, so they have the same bits for any number of
  ranks.
- They are taken into the averages once a step, after the reduction, and judge the guesses of the *next* step. (The papers' programs take
  in a step's own guesses first; here these are spread over ranks.)
- A checkpoint holds them (`state`).
- Update t = 0, 1, ... has the decay min(semi_decay, (1 + t) / (10 + t)), as trainer.learn.ema: a fine-tune of some hundred steps would not
  get away from the first values otherwise.

Labelled images, weak and strong views go through the model in one pass, as in USB (Wang et al. 2022): BatchNorm then has one batch and one
set of statistics. A guess is a slice of that pass, without gradient. The unlabelled loss is the mean over *all* unlabelled images of the
step, also those whose guess counts nothing. An image that cannot be read is zeros everywhere, and counts nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dataio.batch import Batch, Targets
from dataio.order import Order
from trainer.learn.augment.views import Views

Method = Literal["softmatch", "fixmatch", "freematch"]
SummedLoss = Callable[[Tensor, Targets], Tensor]

N_SIGMA = 2.0
"""SoftMatch: a guess that is this many half standard deviations below the mean weighs exp(-1/2)."""
FAIRNESS = 0.001
"""FreeMatch: what the fairness of classes counts in the loss."""
STRONG_OPS, STRONG_MAGNITUDE, STRONG_ERASE = 3, 9, 1.0
"""The strong view: RandAugment's operations, and how often a rectangle is erased, as FixMatch's Cutout does always."""

LABELS, RUNNING, SCALE, SUMS = "\0unlabelled", "\0running", "\0scale", "\0sums"
"""Beside a batch's targets: (n,) int64, classes of the unlabelled images where known; the running averages; labelled images of the step for
each unlabelled one, (); and what the pass adds its sums to. No target has such a name."""

# Sums over images; then (C,) each: probabilities, guesses, weights by guess.
COUNT, ABOVE, SQUARED, WEIGHT, USED, KNOWN, RIGHT, KNOWN_WEIGHT, RIGHT_WEIGHT, NUMBERS = range(10)
# Running averages; then (C,) each: probabilities, guesses.
MEAN, VARIANCE, UPDATES, AVERAGES = range(4)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """How a guess is judged."""

    method: Method
    classes: int
    threshold: float = 0.95
    decay: float = 0.999

    @property
    def sums(self) -> int:
        return NUMBERS + 3 * self.classes

    def first_averages(self) -> Tensor:
        """(AVERAGES + 2 * classes,) float32: a model that knows nothing."""
        running = torch.full((AVERAGES + 2 * self.classes,), 1.0 / self.classes)
        running[VARIANCE], running[UPDATES] = 1.0, 0.0
        return running


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Judged:
    """Guesses at n images, and what they count."""

    guesses: Tensor  # (n,) int64
    weights: Tensor  # (n,) in [0, 1]
    confidence: Tensor  # (n,) by which they were judged


def judge(rule: Rule, probabilities: Tensor, running: Tensor) -> Judged:
    """Of guesses with these probabilities, (n, C), by the averages of the steps before."""
    confidence, guesses = probabilities.max(1)
    by_class = running[AVERAGES : AVERAGES + rule.classes]
    match rule.method:
        case "fixmatch":
            weights = (confidence >= rule.threshold).float()
        case "freematch":
            thresholds = running[MEAN] * by_class / by_class.max()
            weights = (confidence >= thresholds[guesses]).float()
        case "softmatch":
            # Uniform alignment: a class that is guessed too often needs more. The guess itself is of the plain probabilities.
            aligned = probabilities * (1.0 / rule.classes + 1e-6) / (by_class + 1e-6)
            confidence = (aligned / aligned.sum(1, keepdim=True)).max(1).values
            below = (confidence - running[MEAN]).clamp(max=0.0)
            weights = torch.exp(-(below**2) / (2 * running[VARIANCE].clamp(min=1e-12) / N_SIGMA**2))
    return Judged(guesses=guesses, weights=weights, confidence=confidence)


def sums_of(rule: Rule, judged: Judged, probabilities: Tensor, labels: Tensor, running: Tensor) -> Tensor:
    """(rule.sums,) float32 over n images. Confidences are counted from the running mean, so that their squares do not cancel. `labels`: -1
    where the class is not known."""
    counts = judged.weights >= 0  # all of them; a bad image has weight -1
    weights = judged.weights.clamp(min=0.0)
    above = torch.where(counts, judged.confidence - running[MEAN], 0.0)
    known, right = (labels >= 0) & counts, (labels == judged.guesses) & counts
    numbers = (counts, above, above**2, weights, weights > 0.5, known, right, weights * known, weights * right)
    guessed = F.one_hot(judged.guesses, rule.classes).float() * counts[:, None]  # (n, C)
    by_class = ((probabilities * counts[:, None]).sum(0), guessed.sum(0), (guessed * weights[:, None]).sum(0))
    return torch.cat([torch.stack([each.float().sum() for each in numbers]), *by_class])


def averaged(rule: Rule, running: Tensor, sums: Tensor) -> Tensor:
    """The running averages after a step with these sums over all its images. A step without a usable image changes nothing."""
    count, classes = sums[COUNT], rule.classes
    n = count.clamp(min=1.0)
    updates = running[UPDATES]
    decay = ((1 + updates) / (10 + updates)).clamp(max=rule.decay)
    variance = (sums[SQUARED] - sums[ABOVE] ** 2 / n).clamp(min=0.0) / (count - 1).clamp(min=1.0)
    found = torch.cat(
        [
            torch.stack([running[MEAN] + sums[ABOVE] / n, torch.where(count > 1, variance, running[VARIANCE]), updates + 1]),
            sums[NUMBERS : NUMBERS + 2 * classes] / n,
        ]
    )
    mixed = running * decay + found * (1 - decay)
    mixed[UPDATES] = updates + 1
    return torch.where(count > 0, mixed, running)


def fairness(judged: Judged, strong: Tensor, running: Tensor, classes: int) -> Tensor:
    """FreeMatch's term (equation 11): minus the cross-entropy between the classes' average probabilities over all guesses and those over
    the strong views whose guess counts, each divided by how often the class was guessed. () float32, 0 if no guess counts. `strong`: (n,
    C)."""
    weights = judged.weights.clamp(min=0.0)
    count = weights.sum()
    probabilities = strong.softmax(1)
    guessed = (F.one_hot(probabilities.argmax(1), classes).float() * weights[:, None]).sum(0)  # (C,)
    mean = (probabilities * weights[:, None]).sum(0) / count.clamp(min=1.0)
    now = _shares(mean, guessed / count.clamp(min=1.0))
    before = _shares(running[AVERAGES : AVERAGES + classes], running[AVERAGES + classes :])
    return torch.where(count > 0, (before * torch.log(now + 1e-12)).sum(), 0.0)


def _shares(mean: Tensor, guessed: Tensor) -> Tensor:
    """`mean / guessed` with a sum of 1; 0 for a class that nobody guessed."""
    ratios = torch.where(guessed > 0, mean / torch.where(guessed > 0, guessed, 1.0), 0.0)
    return ratios / ratios.sum().clamp(min=1e-12)


def semi_loss(loss_sum: SummedLoss, rule: Rule, *, weight: float) -> SummedLoss:
    """`loss_sum` of the labelled images and the part of the unlabelled ones, for outputs (labelled + 2 * unlabelled, C) of labelled images,
    weak and strong views; for batches without unlabelled images `loss_sum` as it is.

    Adds the images' sums to the batch's SUMS. The fairness of classes is that of the images that go through the model together, as
    BatchNorm's statistics are."""

    def summed(outputs: Tensor, targets: Targets) -> Tensor:
        if LABELS not in targets:
            return loss_sum(outputs, targets)
        own = {name: values for name, values in targets.items() if name not in (LABELS, RUNNING, SCALE, SUMS)}
        labels, running = targets[LABELS], targets[RUNNING]
        n, labelled = len(labels), len(outputs) - 2 * len(labels)
        strong = outputs[labelled + n :]  # (n, C)
        probabilities = outputs[labelled : labelled + n].detach().softmax(1)
        judged = judge(rule, probabilities, running)
        is_bad = labels == BAD_IMAGE
        judged = replace(judged, weights=torch.where(is_bad, -1.0, judged.weights))
        targets[SUMS].add_(sums_of(rule, judged, probabilities, labels, running))
        losses = F.cross_entropy(strong, judged.guesses, reduction="none")
        learned = weight * (judged.weights.clamp(min=0.0) * losses).sum()
        if rule.method == "freematch":
            learned = learned + FAIRNESS * n * fairness(judged, strong, running, rule.classes)
        return loss_sum(outputs[:labelled], own) + targets[SCALE] * learned

    return summed


BAD_IMAGE = -2
"""The label of an image that could not be read."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TwoViews:
    """n unlabelled images."""

    weak: Tensor  # (n, 3, H, W) uint8
    strong: Tensor  # (n, 3, H, W) uint8
    labels: Tensor  # (n,) int64: the run's class where the data say it, -1 where not, BAD_IMAGE


class Semi:
    """A run's rule for images without labels, and its state. The order says how many each step has."""

    def __init__(
        self,
        rule: Rule,
        order: Order,
        *,
        weight: float,
        weak: Views | None,
        strong: Views,
        known: Sequence[int],
        device: torch.device,
        labels: str = "label",
    ) -> None:
        """`known`: for each class of the unlabelled data's own target `labels` the run's, or -1."""
        self.rule, self.order, self.weight = rule, order, weight
        self._weak, self._strong, self._labels = weak, strong, labels
        self._known = torch.tensor([*known, -1], device=device)  # the last one is that of -1
        self.running = rule.first_averages().to(device)
        self.totals = torch.zeros(rule.sums, dtype=torch.float64, device=device)
        """Sums over the steps since the last evaluation."""
        self.newest = torch.zeros(rule.sums, device=device)
        """Sums over the newest step."""

    def loss(self, loss_sum: SummedLoss) -> SummedLoss:
        return semi_loss(loss_sum, self.rule, weight=self.weight)

    def count(self, step: int) -> int:
        """Unlabelled images of the run's step `step`, over all virtual ranks."""
        return self.order.batch_count(step % self.order.steps_per_epoch)

    def views(self, batch: Batch) -> TwoViews:
        """The strong view begins where the weak one ends: both have the same crop and flip."""
        weak = self._weak(batch) if self._weak is not None else batch.samples
        strong = self._strong(replace(batch, samples=weak))
        own = batch.targets[self._labels]
        labels = self._known[torch.where(own >= 0, own, len(self._known) - 1)]
        is_bad = batch.samples.amax((1, 2, 3)) == 0
        return TwoViews(weak=weak, strong=strong, labels=torch.where(is_bad, BAD_IMAGE, labels))

    def like(self, batch: Batch) -> Batch:
        """`batch` of blank samples as one of this stream."""
        return replace(batch, targets={self._labels: torch.full((len(batch.ids),), -1, device=self.running.device)})

    def begin(self, step: int, labelled: int) -> Mapping[str, Tensor]:
        """What every micro-batch of a virtual rank needs in `step`, which has `labelled` labelled images in all. Its SUMS are that of one
        virtual rank: begin anew for the next."""
        device = self.running.device
        scale = torch.full((), labelled / self.count(step), device=device)
        return {RUNNING: self.running, SCALE: scale, SUMS: torch.zeros(self.rule.sums, device=device)}

    @torch.no_grad()
    def end(self, sums: Tensor) -> None:
        """Take in the sums of a step over all its images, which are the same on all ranks. The next step is judged by them."""
        self.running.copy_(averaged(self.rule, self.running, sums))
        self.newest.copy_(sums)
        self.totals.add_(sums)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold, by reference."""
        return {"running": self.running, "totals": self.totals}

    def taken(self) -> dict[str, float | list[float]]:
        """What the steps since the last call came to (see `told`). Waits for the device."""
        sums = self.totals.tolist()
        self.totals.zero_()
        return told(self.rule, sums)


def told(rule: Rule, sums: Sequence[float]) -> dict[str, float | list[float]]:
    """Sums in words: the share of images `used` (of a weight above one half), their mean `weight`, `guesses` and `used_guesses` by class
    (the latter by weight); if labels are known, how many, and the share of guesses that were right, of all and by weight."""
    count = max(sums[COUNT], 1.0)
    by_class = [sums[NUMBERS + part * rule.classes : NUMBERS + (part + 1) * rule.classes] for part in (1, 2)]
    found: dict[str, float | list[float]] = {
        "unlabelled_count": sums[COUNT],
        "unlabelled_used": sums[USED] / count,
        "unlabelled_weight": sums[WEIGHT] / count,
        "unlabelled_guesses": list(by_class[0]),
        "unlabelled_used_guesses": list(by_class[1]),
    }
    if sums[KNOWN]:
        found |= {"unlabelled_known": sums[KNOWN], "unlabelled_right": sums[RIGHT] / sums[KNOWN]}
        if sums[KNOWN_WEIGHT]:
            found["unlabelled_used_right"] = sums[RIGHT_WEIGHT] / sums[KNOWN_WEIGHT]
    return found


def assembled(samples: Tensor, targets: Targets, views: TwoViews, common: Mapping[str, Tensor], parts: int) -> list[tuple[Tensor, Targets]]:
    """Micro-batches of labelled samples (n, 3, H, W) with their prepared targets, and of unlabelled ones: each has its share of both. An
    empty one is left out."""
    split = {name: values.tensor_split(parts) for name, values in targets.items()}
    pieces = zip(samples.tensor_split(parts), *(view.tensor_split(parts) for view in (views.weak, views.strong, views.labels)), strict=True)
    return [
        (_joined(few, weak, strong), {**{name: values[number] for name, values in split.items()}, **common, LABELS: labels})
        for number, (few, weak, strong, labels) in enumerate(pieces)
        if len(few) or len(weak)
    ]


def _joined(labelled: Tensor, weak: Tensor, strong: Tensor) -> Tensor:
    """(n + 2 m, 3, H, W) uint8 in the memory order of its parts."""
    return torch.cat([part for part in (labelled, weak, strong) if len(part)])


def together(views: Sequence[TwoViews]) -> TwoViews:
    """Those of several virtual ranks that go through the model together."""
    if len(views) == 1:
        return views[0]
    return TwoViews(
        weak=torch.cat([each.weak for each in views]),
        strong=torch.cat([each.strong for each in views]),
        labels=torch.cat([each.labels for each in views]),
    )
