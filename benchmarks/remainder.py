"""What an epoch's last, short batch does to a model, and what five rules make of it: test loss and accuracy after fine-tuning few images.

    python -m benchmarks.remainder [--seeds 0 1 2 3] [--json] [--out FILE]

One process, no Ray. The quickstart's network and weights learn N images of Fashion-MNIST at 32 pixels in batches of 32 for 6 epochs,
without augmentation, and are tested on 500 others. Each seed draws other images; the rules see the same ones. This chose
`dataio.order.Order.spread` and the limit in `dataio.order.spreads`.
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.bare import loader_of
from benchmarks.common import SAMPLE, add_arguments, described, finish, interleave, parser_of, spread
from dataio.batch import Batch
from dataio.order import Order
from dataio.parquet import open_dataset
from trainer.learn.build import Learner, build_learner, task_of
from trainer.learn.gradients import evaluating
from trainer.rank.worker import make_repeatable
from trainer.settings.cli import parse
from trainer.settings.tree import RunConfig

RULES = {
    "last": "a short last batch, as it was",
    "spread": "as many batches, which differ by one image at most",
    "weighed": "a short last batch whose step weighs as much as its images",
    "weighed, at rest": "the same, and BatchNorm normalises it by its running statistics",
    "left out": "for comparison: the last batch's images are not seen (not a rule that we may use)",
}
BATCH = 32
CASES = ((64, 1), (33, 1), (65, 1), (97, 1), (68, 1), (72, 1), (80, 1), (88, 1), (65, 4))
"""(images, virtual ranks)."""
TIMES_WORSE = 2.0
"""A run counts as ruined if its test loss is more than this many times that of the same images with the remainder left out."""
EPOCHS = 6


def config_of(seed: int, virtual_ranks: int) -> RunConfig:
    flags = [
        *("--config", "quickstart", "--model.image-size", "32", "--data.batch-size", str(BATCH), "--data.pad", "0", "--data.no-flip"),
        *("--train.epochs", str(EPOCHS), "--optim.warmup-steps", "3", "--train.seed", str(seed)),
        *("--train.virtual-ranks", str(virtual_ranks)),
    ]
    return parse(flags).config


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Images:
    """Decoded images on the device, in memory."""

    samples: torch.Tensor  # (n, 3, H, W) uint8
    targets: Mapping[str, torch.Tensor]

    def batch(self, ids: Any, *, step: int = 0, virtual_rank: int = 0) -> Batch:
        at = torch.from_numpy(np.asarray(ids, dtype=np.int64))
        targets = {name: values[at] for name, values in self.targets.items()}
        return Batch(samples=self.samples[at], targets=targets, ids=np.asarray(ids), epoch=0, step=step, virtual_rank=virtual_rank)


def batches_of(order: Order, images: Images, chosen: Any, rule: str) -> Iterator[tuple[int, tuple[Batch, ...]]]:
    """(samples that the step's loss is divided by, the batches of its virtual ranks) of all steps."""
    for step in range(EPOCHS * order.steps_per_epoch):
        epoch, number = divmod(step, order.steps_per_epoch)
        count = order.batch_count(number)
        if rule == "left out" and count < BATCH:
            continue
        ids = [order.samples(epoch, number, rank) for rank in range(order.virtual_ranks)]
        divisor = BATCH if rule.startswith("weighed") else count
        yield divisor, tuple(images.batch(chosen[each], step=step, virtual_rank=rank) for rank, each in enumerate(ids))


def train(learner: Learner, order: Order, images: Images, chosen: Any, rule: str) -> None:
    stepper = learner.stepper()
    norms = [module for module in learner.model.modules() if isinstance(module, _BatchNorm)]
    steps = list(batches_of(order, images, chosen, rule))
    for step, (divisor, batches) in enumerate(steps):
        rests = rule == "weighed, at rest" and sum(len(batch.ids) for batch in batches) < BATCH
        for norm in norms:
            norm.train(not rests)
        learner.set_learning_rate(step, len(steps))
        stepper.step(batches, global_count=divisor, step=step)
    for norm in norms:
        norm.train()


def tested(learner: Learner, images: Images) -> dict[str, float]:
    evaluation = learner.task.evaluation(torch.device("cpu"))
    with evaluating(learner.model), torch.inference_mode():
        for start in range(0, len(images.samples), 250):
            batch = images.batch(np.arange(start, min(start + 250, len(images.samples))))
            evaluation.update(learner.model(learner.preprocess(batch.samples)).float(), batch.targets)
    result = evaluation.result()
    return {"test_loss": result.loss, "accuracy": result.measures["accuracy"]}


def measure(*, seeds: Sequence[int], threads: int) -> dict[str, Any]:
    """All measurements, JSON-able."""
    make_repeatable(threads)
    config, device = config_of(0, 1), torch.device("cpu")
    dataset = open_dataset(str(SAMPLE))
    loader = loader_of(config, dataset, device)
    whole = {}
    for split in ("train", "test"):
        (batch,) = loader.evaluate(split, range(dataset.split(split).count), dataset.split(split).count)
        whole[split] = Images(samples=batch.samples, targets=batch.targets)
    rows: dict[str, list[dict[str, Any]]] = {}
    for number, name in interleave([f"{count}/{ranks}/{rule}" for count, ranks in CASES for rule in RULES], len(seeds)):
        count, ranks, rule = name.split("/")
        if int(count) % BATCH == 0 and rule != "last":
            continue  # all rules are one there
        seed = seeds[number]
        own = config_of(seed, int(ranks))
        order = Order(
            seed=seed,
            fingerprint="remainder",
            count=int(count),
            batch_size=BATCH,
            virtual_ranks=int(ranks),
            spread=rule == "spread",
        )
        chosen = np.random.default_rng(seed).permutation(dataset.split("train").count)[: int(count)]
        learner = build_learner(own, task_of(own, dataset.manifest), loader.image_size, device)
        learner.set_trainable(0)
        train(learner, order, whole["train"], chosen, rule)
        rows.setdefault(name, []).append({"seed": seed, **tested(learner, whole["test"])})
        print(name, rows[name][-1], file=sys.stderr, flush=True)
    return {"batch_size": BATCH, "epochs": EPOCHS, "rules": RULES, "cases": judged(rows)}


def judged(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    cases = []
    for name, each in rows.items():
        count, ranks, rule = name.split("/")
        peers = rows.get(f"{count}/{ranks}/left out", each)
        worse = [row["test_loss"] / peer["test_loss"] for row, peer in zip(each, peers, strict=True)]
        cases.append(
            {
                "images": int(count),
                "virtual_ranks": int(ranks),
                "remainder": int(count) % BATCH,
                "rule": rule,
                "test_loss": spread([row["test_loss"] for row in each]),
                "accuracy": spread([row["accuracy"] for row in each]),
                "test_loss_over_left_out": spread(worse),
                "ruined": sum(ratio > TIMES_WORSE for ratio in worse),
                "rounds": [dict(row) for row in each],
            }
        )
    return sorted(cases, key=lambda case: (case["virtual_ranks"], case["remainder"], case["images"], list(RULES).index(case["rule"])))


def lines_of(result: Mapping[str, Any]) -> list[str]:
    lines = ["images  virtual ranks  remainder  rule               test loss: median (least to most)      accuracy  ruined"]
    for case in result["cases"]:
        loss, accuracy = case["test_loss"], case["accuracy"]
        lines.append(
            f"{case['images']:6} {case['virtual_ranks']:14} {case['remainder']:10}  {case['rule']:18} "
            f"{loss['median']:10.3f} ({loss['least']:.3f} to {loss['most']:.3f})".ljust(92)
            + f"{accuracy['median']:.1%}  {case['ruined']} of {len(case['rounds'])}"
        )
    return lines


def main() -> int:
    parser = parser_of("remainder", __doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(4)))
    parser.add_argument("--threads", type=int, default=1, help="torch threads (%(default)s)")
    add_arguments(parser)
    options = parser.parse_args()
    result = described("remainder", options) | measure(seeds=options.seeds, threads=options.threads)
    return finish(result, options, lines_of(result))


if __name__ == "__main__":
    sys.exit(main())
