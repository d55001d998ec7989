"""A pass that is replayed as a CUDA graph gives the bits of one whose kernels are launched singly. Rehearsed on a CPU, with a graph that
does a recording's operations again on its memory (recorded_graph.py); tests/gpu does it with CUDA's own."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cluster.reduce import TreeReducer
from dataio.batch import Targets
from tests.trainer.recorded_graph import RecordedGraph
from tests.trainer.test_step import EVERYTHING, FOUR, SEED, Net, batches_of, loop, make, order_of, sgd
from trainer.learn import capture
from trainer.learn.augment.mix import Mix
from trainer.learn.augment.views import make_views
from trainer.learn.ema import Ema
from trainer.learn.gradients import PassConfig
from trainer.learn.optim import build_optimizer, clip_gradients, set_trainable
from trainer.learn.state import weights_sha256
from trainer.settings.tree import OptimConfig

OPTIM = OptimConfig(lr=0.05, momentum=0.9, weight_decay=1e-3)
ALONE = (1, 332)
"""(virtual ranks, batch): seven steps an epoch of 2,000, of which the last has 8 images."""


@pytest.fixture(autouse=True)
def rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    RecordedGraph.recordings = RecordedGraph.replays = 0
    monkeypatch.setattr(capture, "cuda_graphs", lambda device: RecordedGraph)


def trained(shape: tuple[int, int], first: int, last: int, *, model: nn.Module | None = None, freeze: Any = "none", **how: Any) -> str:
    """Weights, their average, BatchNorm's counters, and losses."""
    model = model or Net()
    set_trainable(model, freeze, 0, lp_epochs=1, head_name="head")
    optimizer, ema = build_optimizer(model, OPTIM, "head"), Ema(model, 0.9)
    stepper = make(model, optimizer, virtual_ranks=shape[0], ema=ema, full_batches=(shape[1] // shape[0],), **how)
    losses = [pair for stats in loop(stepper, iter(batches_of(shape, first, last)), order_of(shape), first, last) for pair in stats.losses]
    assert len(losses) == last - first
    counters = [int(buffer) for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")]
    return f"{weights_sha256(model)} {weights_sha256(ema.weights())} {counters} {losses}"


def clip(parameters: Any) -> Tensor:
    return clip_gradients(parameters, max_norm=0.5)


HOW: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"precision": "bf16"},
    "clipped": {"clip": clip},
    "augmented": {"views": make_views(EVERYTHING, seed=SEED, image_size=24), "mix": Mix(seed=SEED, mixup=0.4, cutmix=1.0)},
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("shape", "recordings", "replays"), [(ALONE, 1, 6), (FOUR, 1, 24)], ids=["alone", "four virtual ranks"])
def test_a_replayed_step_gives_the_same_bits(shape: tuple[int, int], how: str, recordings: int, replays: int) -> None:
    """Over the end of an epoch, whose short batch is not replayed; the net has BatchNorm and dropout."""
    singly = trained(shape, 3, 10, **HOW[how])
    assert RecordedGraph.recordings == 0
    assert trained(shape, 3, 10, cuda_graphs=True, **HOW[how]) == singly
    assert (RecordedGraph.recordings, RecordedGraph.replays) == (recordings, replays)


@pytest.mark.parametrize("shape", [ALONE, FOUR], ids=["alone", "four virtual ranks"])
def test_what_is_frozen_stays_so(shape: tuple[int, int]) -> None:
    singly = trained(shape, 0, 3, freeze="backbone")
    assert trained(shape, 0, 3, freeze="backbone", cuda_graphs=True) == singly
    assert RecordedGraph.replays == 3 * shape[0]


def test_a_run_that_goes_on_with_graphs_ends_as_one_that_never_had_them() -> None:
    """As after a kill, on a machine where `auto` decides otherwise."""
    model = Net()
    trained(ALONE, 0, 3, model=model)
    trained(ALONE, 3, 5, model=model, cuda_graphs=True)
    whole = Net()
    trained(ALONE, 0, 3, model=whole)
    trained(ALONE, 3, 5, model=whole)
    assert weights_sha256(model) == weights_sha256(whole)


def test_each_size_and_each_divisor_has_its_own_recording() -> None:
    """What a batch's loss is divided by is a number of the host: it is baked into a graph."""
    model = Net()
    stepper = make(model, build_optimizer(model, OPTIM, "head"), cuda_graphs=True, full_batches=(100, 101))
    other = Net()
    singly = make(other, build_optimizer(other, OPTIM, "head"), full_batches=(100, 101))
    for step, (count, divisor) in enumerate([(100, 100), (101, 101), (100, 100), (100, 200), (50, 50), (101, 101)]):
        (batches,) = batches_of((1, count), 0, 1)
        losses = [each.step(batches, global_count=divisor, step=step) for each in (stepper, singly)]
        assert torch.equal(*losses)
    assert (RecordedGraph.recordings, RecordedGraph.replays) == (3, 5)
    assert weights_sha256(model) == weights_sha256(other)


def test_losses_stay_what_they_were_when_the_next_step_is_replayed() -> None:
    model = Net()
    stepper = make(model, build_optimizer(model, OPTIM, "head"), cuda_graphs=True)
    losses = [stepper.step(batches, global_count=332, step=step) for step, batches in enumerate(batches_of(ALONE, 0, 4))]
    kept = [float(loss) for loss in losses]
    assert len(set(kept)) == 4
    again = Net()
    singly = make(again, build_optimizer(again, OPTIM, "head"))
    assert kept == [float(singly.step(batches, global_count=332, step=step)) for step, batches in enumerate(batches_of(ALONE, 0, 4))]


def test_what_a_replay_returns_is_not_overwritten_by_the_next_one() -> None:
    model = nn.Linear(2, 1)
    captures = capture.Captures(model, list(model.parameters()), torch.device("cpu"))

    def compute(samples: Tensor, targets: Targets) -> Tensor:
        loss = (model(samples) - targets["label"]).square().sum()
        loss.backward()
        return loss.detach()

    def run(level: float) -> Tensor:
        samples, targets = torch.full((3, 2), level), {"label": torch.full((3, 1), level)}
        loss, counted = captures.run(samples, targets, 1.0, compute, lambda: Counter({7: 1}))
        assert counted == {7: 1}
        return loss

    first = run(1.0)
    kept = float(first)
    assert float(run(2.0)) != kept
    assert float(first) == kept
    assert (len(captures), RecordedGraph.replays) == (1, 2)


def test_weights_that_are_loaded_or_moved_between_steps_are_the_ones_that_count() -> None:
    def trained(cuda_graphs: bool) -> str:
        model = Net()
        stepper = make(model, build_optimizer(model, OPTIM, "head"), cuda_graphs=cuda_graphs)
        for step, batches in enumerate(batches_of(ALONE, 0, 4)):
            if step == 1:
                model.load_state_dict(Net(seed=5).state_dict())  # as after a spike: in place
            if step == 2:
                model.head.weight.data = model.head.weight.data * 0.5  # by a user's own code, somewhere else
            stepper.step(batches, global_count=332, step=step)
        return weights_sha256(model)

    assert trained(True) == trained(False)
    assert (RecordedGraph.recordings, RecordedGraph.replays) == (2, 4)


class Waiting(Net):
    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return logits * (2.0 if logits.mean().item() > 1e9 else 1.0)


def test_a_model_that_waits_for_its_device_is_refused_with_the_way_out() -> None:
    model = Waiting()
    stepper = make(model, build_optimizer(model, OPTIM, "head"), cuda_graphs=True)
    (batches,) = batches_of(ALONE, 0, 1)
    with pytest.raises(ValueError, match=r"train.cuda_graphs=on cannot record this step: .*not permitted.*use --train.no-cuda-graphs"):
        stepper.step(batches, global_count=332, step=0)


def test_no_gradient_is_handed_over_while_a_pass_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook that ran in a recording would hand over a warm-up's gradients."""
    put, parts = TreeReducer.put, []

    def noted(reducer: TreeReducer, part: int, value: Tensor) -> None:
        parts.append(part)
        put(reducer, part, value)

    monkeypatch.setattr(TreeReducer, "put", noted)
    model = Net()
    stepper = make(model, build_optimizer(model, OPTIM, "head"), virtual_ranks=4, cuda_graphs=True)
    for step, batches in enumerate(batches_of(FOUR, 0, 2)):
        parts.clear()
        stepper.step(batches, global_count=FOUR[1], step=step)
        assert len(parts) == 4 * len(set(parts)), "each part once for each virtual rank"


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and "empty" not in func._overloadpacket.__name__
        return func(*args, **(kwargs or {}))


def test_a_replayed_step_launches_few_kernels_besides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight virtual ranks: for each the copies of samples and target, the replay, the loss, the statistics, and the tree's sums."""
    launched: dict[bool, int] = {}
    for cuda_graphs in (False, True):
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
        stepper = make(model, optimizer, virtual_ranks=8, cuda_graphs=cuda_graphs)
        first, second = batches_of((8, 80), 0, 2)
        stepper.step(first, global_count=80, step=0)
        monkeypatch.setattr(RecordedGraph, "replay", lambda graph: None)  # one launch, whatever is in it
        with Launches() as seen:
            stepper.step(second, global_count=80, step=1)
        launched[cuda_graphs] = seen.count
        monkeypatch.undo()
        monkeypatch.setattr(capture, "cuda_graphs", lambda device: RecordedGraph)
    assert launched[True] <= 8 * 12 + 20, launched
    assert launched[True] < launched[False] / 3, launched


def test_a_replayed_step_of_one_process_launches_nothing_to_prove_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
    stepper = make(model, optimizer, cuda_graphs=True)
    first, second = batches_of(ALONE, 0, 2)
    stepper.step(first, global_count=332, step=0)
    monkeypatch.setattr(RecordedGraph, "replay", lambda graph: None)
    with Launches() as seen:
        stepper.step(second, global_count=332, step=1)
    # The samples' and the label's copy, the loss's, BatchNorm's counters, and the optimiser's own counters and update.
    assert seen.count <= 7, seen.count


class Rooted(Net):
    """Its loss is finite and one of its gradients is not."""

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + self.level.sqrt()


@pytest.mark.parametrize("virtual_ranks", [1, 4])
def test_a_gradient_that_is_not_finite_shows_in_a_replayed_loss(virtual_ranks: int) -> None:
    for net, is_finite in ((Net, True), (Rooted, False)):
        model = net()
        stepper = make(model, sgd(model), virtual_ranks=virtual_ranks, cuda_graphs=True)
        (batches,) = batches_of((virtual_ranks, 332), 0, 1)
        assert torch.isfinite(stepper.step(batches, global_count=332, step=0)) == is_finite
    assert RecordedGraph.replays == 2 * virtual_ranks


def test_micro_batches_are_no_graphs() -> None:
    with pytest.raises(AssertionError):
        PassConfig(seed=0, cuda_graphs=True, accumulate=2)
