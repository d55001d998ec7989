"""Bad numbers: what the guard takes for one, that a resumed run judges alike, what a skipped step leaves alone, losses that come late."""

import json
import math
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cluster.checkpointer import Buffers, Checkpointer
from cluster.config import FaultPolicy
from cluster.controller import RunFailed, run_attempts
from cluster.failures import BadNumbers, Failure, classify, described, exit_failure
from cluster.ledger import LedgerWriter, read_ledger
from cluster.reduce import TreeReducer
from cluster.store import Receipt
from dataio.batch import Batch, Targets
from dataio.order import blocks_of_virtual_ranks
from dataio.schema import LABEL
from tests.trainer import loss_curves
from tests.trainer.test_step import CPU, TASK, Net, batches_of, make, order_of, same_bits, sgd
from trainer.learn.optim import OptimConfig, set_learning_rate
from trainer.learn.state import TrainState, weights_sha256
from trainer.learn.step import UNOBSERVED, Arriving, StepStats, train_steps
from trainer.rank.guard import ENOUGH, WINDOW, Guard
from trainer.rank.history import History
from trainer.settings.tree import TaskConfig
from trainer.tasks.classification import Classification

sizes = st.sampled_from([100, 100, 100, 60, 50, 49, 3, 1])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small networks: a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def guard_of(sizes: Sequence[int] = (), *, factor: float = 8.0, fresh_at: Sequence[int] = (), floor: float | None = 0.0) -> Guard:
    """Batches of 100, or of `sizes`."""
    return Guard(
        spike_factor=factor,
        batch_size=100,
        samples_of=lambda step: sizes[step] if sizes else 100,
        fresh_at=fresh_at,
        loss_floor=floor,
    )


def verdicts(guard: Guard, losses: Sequence[tuple[int, float]]) -> list[tuple[int, str]]:
    """(step, reason) of each bad loss; the guard goes on as it does after a rollback: without it."""
    found = []
    for step, loss in losses:
        try:
            guard.check(step, loss)
        except BadNumbers as error:
            found.append((error.step, error.reason))
    return found


# --- the rule -------------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.0, 3.0), max_size=150), st.sampled_from([math.nan, math.inf, -math.inf]), st.sampled_from([0.0, 8.0]), sizes)
def test_a_loss_that_is_not_finite_is_bad_at_any_time_and_in_any_batch(before: list[float], bad: float, factor: float, size: int) -> None:
    guard = guard_of([100] * len(before) + [size], factor=factor)
    verdicts(guard, list(enumerate(before)))
    with pytest.raises(BadNumbers, match=f"step {len(before)}: the loss is {bad}"):
        guard.check(len(before), bad)


def limit_of(losses: Sequence[float], factor: float) -> float:
    """The rule, from its definition, on the last 100 losses."""
    window = torch.tensor(losses[-WINDOW:], dtype=torch.float64)
    median = window.quantile(0.5).item()
    sigma = 1.4826 * (window - median).abs().quantile(0.5).item()
    return median + max(factor * sigma, median, 1.0)


@given(st.lists(st.floats(0.0, 2.0), min_size=ENOUGH, max_size=2 * WINDOW), st.floats(0.5, 20.0), st.booleans())
def test_a_spike_is_what_the_rule_says(before: list[float], factor: float, above: bool) -> None:
    guard = guard_of(factor=factor)
    passed: list[float] = []
    for step, loss in enumerate(before):
        if len(passed) < ENOUGH or loss <= limit_of(passed, factor):
            guard.check(step, loss)
            passed.append(loss)
    limit = limit_of(passed, factor)
    if above:
        with pytest.raises(BadNumbers, match=rf"a spike: the {min(WINDOW, len(passed))} losses before it.*train\.spike_factor={factor:g}"):
            guard.check(len(before), limit * 1.0001 + 1e-9)
    else:
        guard.check(len(before), limit * 0.9999 - 1e-9)


eighths = st.integers(0, 80).map(lambda value: value / 8)  # exact in every sum and median here


@given(st.lists(eighths, min_size=ENOUGH, max_size=WINDOW), st.integers(-40, 40), st.sampled_from([0.5, 8.0]), st.booleans())
def test_a_loss_is_judged_by_its_distance_from_the_tasks_floor(losses: list[float], floor: int, factor: float, saved: bool) -> None:
    at_zero, shifted = guard_of(factor=factor), guard_of(factor=factor, floor=float(floor))
    if saved:
        shifted = shifted.copy()
    wanted = verdicts(at_zero, list(enumerate(losses)))
    found = verdicts(shifted, [(step, loss + floor) for step, loss in enumerate(losses)])
    assert [step for step, _ in found] == [step for step, _ in wanted]


def test_a_loss_without_a_floor_is_judged_by_its_scatter_alone() -> None:
    scattered = [(step, 5.0 + step % 2) for step in range(60)]  # sigma 0.74: with a factor of 4 the limit is 2.97 above the median
    for loss, is_bad in ((8.0, False), (9.0, True)):
        assert bool(verdicts(guard_of(factor=4.0, floor=None), [*scattered, (60, loss)])) == is_bad
        assert not verdicts(guard_of(factor=4.0), [*scattered, (60, loss)])
    negative = [(step, -5.0 + step % 2) for step in range(60)]
    assert verdicts(guard_of(factor=4.0, floor=None), [*negative, (60, -2.0)]) == []
    assert [step for step, _ in verdicts(guard_of(factor=4.0, floor=None), [*negative, (60, -1.0)])] == [60]


@given(st.lists(st.floats(0.0, 1e6), min_size=1, max_size=ENOUGH - 1), st.sampled_from([100, 49, 3, 1]), st.booleans())
def test_the_first_losses_may_rise_to_six_times_the_largest_before_them_and_no_further(losses: list[float], size: int, above: bool) -> None:
    losses = sorted(losses, reverse=True)  # none of them rises
    guard, top = guard_of([100] * len(losses) + [size]), losses[0]
    assert verdicts(guard, list(enumerate(losses))) == []
    limit = top + max(5 * max(top, 1.0), 12 / size)
    found = verdicts(guard, [(len(losses), limit * 1.0001 if above else limit * 0.9999)])
    assert [step for step, _ in found] == [len(losses)] * above
    assert all(f"the largest of the run's first {len(losses)} losses is {top:.6g}" in reason for _, reason in found)


def test_a_first_loss_has_nothing_to_be_judged_by() -> None:
    assert verdicts(guard_of(), [(0, 1e30)]) == []
    assert verdicts(guard_of([1, 100]), [(0, 1e30), (1, 1.0)]) == []


@given(st.lists(st.floats(-1e30, 1e30), max_size=150))
def test_a_factor_of_zero_looks_for_nan_and_infinity_only(losses: list[float]) -> None:
    assert verdicts(guard_of(factor=0.0), list(enumerate(losses))) == []


def test_the_rest_of_an_epoch_is_judged_by_its_few_samples_and_leaves_no_trace() -> None:
    sizes = ([100] * 10 + [4]) * 20 + [4]
    guard, without = guard_of(sizes, factor=10.0), guard_of(factor=10.0)
    for step, size in enumerate(sizes[:-1]):
        # Full batches scatter between 1.00 and 1.06. Four samples may be sqrt(100 / 4) times as far above 1.03 as 1.03 is above 0.
        loss = 1.0 + step % 7 * 0.01 if size == 100 else 6.0
        guard.check(step, loss)
        if size == 100:
            without.check(step, loss)
    assert guard.state()["losses"] == without.state()["losses"]
    with pytest.raises(BadNumbers, match=r"the loss of 4 samples is 6\.4, a spike: the 100 losses before it .* the limit is 6\.18"):
        guard.check(len(sizes) - 1, 6.4)


def test_a_single_hard_image_is_no_spike_and_a_ruined_model_is() -> None:
    """65 images in batches of 32, with a short last batch: a ruined model gave single images a loss of 32 (benchmarks/remainder.py)."""
    sizes = ([32, 32, 1] * 30)[:90]
    guard = Guard(spike_factor=10.0, batch_size=32, samples_of=lambda step: sizes[step])
    healthy = [(step, 11.0 if size == 1 else 0.1 + step % 3 * 0.01) for step, size in enumerate(sizes)]
    assert verdicts(guard.copy(), healthy) == []
    assert [step for step, _ in verdicts(guard.copy(), [*healthy[:8], (8, 32.0)])] == [8]
    assert [step for step, _ in verdicts(guard.copy(), [*healthy[:89], (89, 32.0)])] == [89]


@settings(max_examples=30)
@given(st.lists(st.floats(0.0, 40.0), max_size=150))
def test_a_run_begun_before_short_batches_and_first_losses_were_judged_keeps_its_rule(losses: list[float]) -> None:
    sizes = [100, 100, 3] * 50
    old = guard_of(sizes)
    old.load({"last_step": -1, "losses": []})
    found = verdicts(old, list(enumerate(losses)))
    full = [(step, loss) for step, loss in enumerate(losses) if sizes[step] == 100]
    passed: list[float] = []
    for step, loss in full:
        if len(passed) >= ENOUGH and loss > limit_of(passed, 8.0) * 1.0000001:
            assert step in [bad for bad, _ in found]
        else:
            passed.append(loss)
    assert all(sizes[step] == 100 for step, _ in found)
    assert len(found) == len(full) - len(passed)
    again = guard_of(sizes)
    again.load(json.loads(json.dumps(old.state())))
    assert again.state() == old.state()


def test_where_the_backbone_thaws_the_window_starts_anew() -> None:
    losses = [(step, 0.3 if step < 120 else 4.0) for step in range(240)]
    assert verdicts(guard_of(), losses)[0][0] == 120
    assert verdicts(guard_of(fresh_at=(120,)), losses) == []
    assert verdicts(guard_of(fresh_at=(120,)), [pair for pair in losses if pair[0] != 120]) == []  # its batch was skipped


def test_losses_that_come_twice_or_backwards_are_a_bug() -> None:
    guard = guard_of()
    guard.check(5, 1.0)
    with pytest.raises(AssertionError, match="step 5 came after that of step 5"):
        guard.check(5, 1.0)


# --- what a resumed run remembers -------------------------------------------------------------------------------------------------------

wild = st.one_of(st.floats(0.0, 3.0), st.floats(0.0, 3.0), st.floats(0.0, 100.0), st.sampled_from([math.nan, math.inf]))


@given(
    curve=st.lists(st.tuples(st.integers(1, 3), wild, sizes), max_size=250),
    cut=st.integers(0, 250),
    factor=st.sampled_from([0.0, 3.0, 8.0]),
    fresh_at=st.lists(st.integers(0, 400), max_size=2),
)
def test_a_guard_saved_and_loaded_at_any_point_judges_exactly_alike(
    curve: list[tuple[int, float, int]], cut: int, factor: float, fresh_at: list[int]
) -> None:
    steps, losses, size_of = [], [], {}
    step = -1
    for gap, loss, size in curve:  # gaps: steps that were skipped
        step += gap
        losses.append((step, loss))
        size_of[step] = size
        steps.append(step)

    def fresh() -> Guard:
        return Guard(spike_factor=factor, batch_size=100, samples_of=size_of.__getitem__, fresh_at=fresh_at)

    whole, first, second = fresh(), fresh(), fresh()
    wanted = verdicts(whole, losses)
    found = verdicts(first, losses[:cut])
    second.load(json.loads(json.dumps(first.state())))
    found += verdicts(second, losses[cut:])
    assert found == wanted
    assert second.state() == whole.state()


@given(losses=st.lists(wild, max_size=150), seen=st.integers(0, 150), late=st.integers(0, 20))
def test_a_proof_judges_the_late_losses_as_if_they_had_come_in_time(losses: list[float], seen: int, late: int) -> None:
    pairs = [(step, torch.tensor(loss).item()) for step, loss in enumerate(losses)]
    guard, whole = guard_of(), guard_of()
    verdicts(guard, pairs[:seen])
    verdicts(whole, pairs[:seen])
    bad = None
    proof = guard.proof([Arriving(step, torch.tensor(loss)) for step, loss in pairs[seen : seen + late]])
    verdicts(guard, pairs[seen:])  # the loop goes on meanwhile
    try:
        for step, loss in pairs[seen : seen + late]:
            whole.check(step, loss)
    except BadNumbers as error:
        bad = error
    if bad is None:
        judged = proof()
        assert (judged.state(), judged.newest_loss) == (whole.state(), whole.newest_loss)
    else:
        with pytest.raises(BadNumbers) as caught:
            proof()
        assert str(caught.value) == str(bad)


class Held(Arriving):
    """A loss that arrives when it is let go: what a GPU's is to the host."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(step, torch.tensor(loss))
        self.arrived = threading.Event()

    def wait(self) -> float:
        assert self.arrived.wait(30)
        return super().wait()


@pytest.mark.parametrize("last", [1.0, math.nan])
def test_a_checkpoint_is_acknowledged_only_once_the_losses_before_it_have_passed(last: float) -> None:
    guard, acks = guard_of(), []

    def stage(step: int, name: str, buffers: Buffers) -> Receipt:
        return Receipt(name=name, size_bytes=0, sha256="")

    def snapshot(late: Sequence[Arriving]) -> Any:
        proof = guard.proof(late)

        def files() -> Iterator[tuple[str, Buffers]]:
            proof()
            yield "a", [b""]

        return files

    checkpointer = Checkpointer(stage=stage, ack=lambda step, receipts, meta: acks.append(step))
    held = [Held(0, 1.0), Held(1, last)]
    checkpointer.save(2, lambda: snapshot(held), {})  # does not wait
    held[0].arrived.set()
    assert acks == []
    held[1].arrived.set()
    if last == 1.0:
        checkpointer.wait()
        assert acks == [2]
    else:
        with pytest.raises(BadNumbers, match="step 1: the loss is nan"):
            checkpointer.wait()
        assert acks == []


# --- real training ----------------------------------------------------------------------------------------------------------------------


def trained(
    steps: int,
    *,
    shape: tuple[int, int] = (1, 64),
    skip: frozenset[int] = frozenset(),
    optim: OptimConfig | None = None,
    poison: Callable[[Iterator[tuple[Batch, ...]]], Iterator[tuple[Batch, ...]]] | None = None,
) -> tuple[nn.Module, list[StepStats]]:
    """A small network after `steps` steps on real images, and its stats; `poison` may change the batches."""
    model = Net()
    order, optimizer = order_of(shape), sgd(model)
    optim = optim or OptimConfig(lr=0.05, schedule="triangular", warmup_steps=steps // 3)
    for group in optimizer.param_groups:
        group["lr_factor"] = 1.0
    batches: Iterator[tuple[Batch, ...]] = iter(batches_of(shape, 0, steps))
    if poison is not None:
        batches = poison(batches)
    stats = train_steps(
        make(model, optimizer, virtual_ranks=shape[0]),
        batches,
        start_step=0,
        stop_step=steps,
        steps_per_epoch=order.steps_per_epoch,
        batch_count=order.batch_count,
        set_learning_rate=lambda step: set_learning_rate(optimizer, optim, step, steps),
        device=CPU,
        sum_over_ranks=False,
        skip=skip,
    )
    return model, list(stats)


def judged(stats: Sequence[StepStats], shape: tuple[int, int] = (1, 64)) -> list[tuple[int, str]]:
    order = order_of(shape)
    guard = Guard(spike_factor=10.0, batch_size=shape[1], samples_of=lambda step: order.batch_count(step % order.steps_per_epoch))
    return verdicts(guard, [pair for each in stats for pair in each.losses])


@pytest.mark.parametrize("lr", [0.01, 0.2])
def test_ordinary_training_over_warm_up_peak_and_small_last_batches_raises_no_alarm(lr: float) -> None:
    _, stats = trained(128, optim=OptimConfig(lr=lr, schedule="triangular", warmup_steps=60))  # 4 epochs, the last batch of each has 16
    assert stats[31].samples == 16
    assert judged(stats) == []


def test_real_runs_that_learn_raise_no_alarm_and_those_that_are_ruined_do() -> None:
    """36 networks' losses (tests/trainer/loss_curves.py), from their first step on, each epoch's last batch being a single image."""
    learned = ruined = 0
    for case in json.loads(loss_curves.CURVES.read_text()):
        sizes = [1 if step % 11 == 10 else case["batch_size"] for step in range(loss_curves.STEPS)]
        guard = Guard(spike_factor=10.0, batch_size=case["batch_size"], samples_of=sizes.__getitem__)
        found = verdicts(guard, list(enumerate(case["losses"])))
        whole = [loss for loss, size in zip(case["losses"], sizes, strict=True) if size > 1]
        if sorted(whole[-20:])[10] < 1.0:
            learned += 1
            assert found == [], case
        elif any(loss > 6 * max(1.0, *whole[:number]) for number, loss in enumerate(whole[1:50], start=1)):
            ruined += 1
            assert found != [], case
    assert (learned, ruined) == (25, 6)


def test_a_batch_of_wrong_labels_is_found() -> None:
    def poisoned(batches: Iterator[tuple[Batch, ...]]) -> Iterator[tuple[Batch, ...]]:
        for step, (batch,) in enumerate(batches):
            yield (replace(batch, targets={"label": (batch.targets["label"] + 5) % 10}) if step == 120 else batch,)

    _, stats = trained(124, poison=poisoned, optim=OptimConfig(lr=0.1, schedule="constant"))
    assert [step for step, _ in judged(stats)] == [120]


def test_a_rate_that_blows_the_weights_up_is_found_as_a_spike_or_nan_within_a_step() -> None:
    model = Net()
    optimizer = sgd(model)
    found = []
    guard = guard_of(factor=10.0)
    for stats in train_steps(
        make(model, optimizer),
        iter(batches_of((1, 64), 0, 62)),
        start_step=0,
        stop_step=62,
        steps_per_epoch=32,
        batch_count=order_of((1, 64)).batch_count,
        set_learning_rate=lambda step: [group.update(lr=1e4 if step == 58 else 0.01) for group in optimizer.param_groups] and 0.01,
        device=CPU,
        sum_over_ranks=False,
    ):
        found += verdicts(guard, stats.losses)
    assert found[0][0] == 59


@pytest.mark.parametrize("virtual_ranks", [1, 4])
def test_a_gradient_that_is_not_finite_shows_in_its_own_steps_loss(virtual_ranks: int) -> None:
    shape = (virtual_ranks, 332)
    model = Net()
    model.head.weight.register_hook(lambda gradient: gradient * math.inf)
    (batches,) = batches_of(shape, 0, 1)
    loss = make(model, sgd(model), virtual_ranks=virtual_ranks).step(batches, global_count=332, step=0)
    assert not math.isfinite(loss.item())


@pytest.mark.parametrize("clip", [None, lambda parameters: nn.utils.clip_grad_norm_(parameters, 1.0)])
def test_the_loss_of_a_good_step_has_the_same_bits_whether_gradients_are_clipped_or_not(clip: Any) -> None:
    (batches,) = batches_of((1, 332), 0, 1)
    model = Net()
    loss = make(model, sgd(model), clip=clip).step(batches, global_count=332, step=0)
    with torch.no_grad():
        torch.testing.assert_close(loss, loss + 0.0, rtol=0, atol=0)
    wanted = make(Net(), sgd(Net()))._gradients.compute(batches, global_count=332, step=0, observer=UNOBSERVED)
    assert loss.item() == wanted.item()


# --- skipped steps ----------------------------------------------------------------------------------------------------------------------


@settings(max_examples=6)
@given(skip=st.frozensets(st.integers(0, 5), max_size=4), virtual_ranks=st.sampled_from([1, 4]))
def test_a_skipped_step_changes_nothing_but_the_count_and_the_rate(skip: frozenset[int], virtual_ranks: int) -> None:
    shape = (virtual_ranks, 64)
    optim = OptimConfig(lr=0.05, schedule="cosine")
    model, stats = trained(6, shape=shape, skip=skip, optim=optim)
    plain = Net()
    optimizer, order = sgd(plain), order_of(shape)
    for group in optimizer.param_groups:
        group["lr_factor"] = 1.0
    stepper, losses = make(plain, optimizer, virtual_ranks=virtual_ranks), []
    for step, batches in enumerate(batches_of(shape, 0, 6)):
        rate = set_learning_rate(optimizer, optim, step, 6)
        assert stats[step].learning_rate == rate
        if step not in skip:
            losses.append((step, stepper.step(batches, global_count=order.batch_count(step), step=step).item()))
    assert same_bits(model, plain)
    assert [each.skipped for each in stats] == [step in skip for step in range(6)]
    assert [each.steps_done for each in stats] == list(range(1, 7))
    assert [each.samples for each in stats] == [64] * 6
    assert [pair for each in stats for pair in each.losses] == losses


# --- roll back and skip, all parts together ---------------------------------------------------------------------------------------------

LENGTH = 12  # steps of 64 images
NAN_LABEL = 99


class NanWhereMarked(Classification):
    """Its loss is no number where a label is NAN_LABEL."""

    def loss_sum(self, outputs: Tensor, targets: Targets) -> Tensor:
        labels = targets[LABEL]
        return F.cross_entropy(outputs, labels % 10, reduction="sum") * (math.nan if NAN_LABEL in labels else 1.0)


class Killed(Exception):
    """Stands for the loss of a process."""


class Story:
    """A run by its real parts: guard, steps, state, history, ledger, policy; commits are kept in memory."""

    def __init__(self, folder: Path, bad: frozenset[int], every: int, kills: dict[int, int]) -> None:
        self.folder, self.bad, self.every, self.kills = folder, bad, every, kills
        self.commits: dict[int, tuple[dict[str, bytes], bytes]] = {}
        self.skip: set[int] = set()
        self.weights, self.history = "", History()

    def attempt(self, number: int) -> Failure | None:
        try:
            self.train(number)
        except Killed:
            return exit_failure(0, -9)
        except BadNumbers as error:  # as the driver meets it
            return classify(described(error), rank=0)
        return None

    def train(self, number: int) -> None:
        shape, model = (1, 64), Net()
        order, optimizer = order_of(shape), sgd(model)
        stepper = make(model, optimizer, task=NanWhereMarked(TaskConfig(), TASK.targets))
        state, self.history = TrainState(model, optimizer), History()
        guard = Guard(spike_factor=10.0, batch_size=64, samples_of=order.batch_count)
        start = max(self.commits, default=0)
        if start:
            files, history = self.commits[start]
            state.load(files.__getitem__)
            self.history = History.from_json(history)
        guard.load(self.history.guard)
        ledger = LedgerWriter(self.folder, number, 0, start_step=start)

        def batches() -> Iterator[tuple[Batch, ...]]:
            for step, (batch,) in enumerate(batches_of(shape, start, LENGTH), start=start):
                if self.kills.get(number) == step:
                    raise Killed
                ledger.record(0, step, 0, batch.ids, skipped=step in self.skip)
                yield (
                    replace(batch, targets={"label": torch.full_like(batch.targets["label"], NAN_LABEL)}) if step in self.bad else batch,
                )

        try:
            for stats in train_steps(
                stepper,
                batches(),
                start_step=start,
                stop_step=LENGTH,
                steps_per_epoch=order.steps_per_epoch,
                batch_count=order.batch_count,
                set_learning_rate=lambda step: 0.05,
                device=CPU,
                sum_over_ranks=False,
                skip=self.skip,
            ):
                for step, loss in stats.losses:
                    guard.check(step, loss)
                self.history.stepped(stats)
                if stats.steps_done % self.every == 0:
                    snapshot, proof = state.snapshot(), guard.proof(stats.late)
                    saved = {name: b"".join(buffers) for name, buffers in snapshot.files().items()}
                    self.commits[stats.steps_done] = saved, self.history.copy().settled(proof(), (), lambda step: 100)
        finally:
            ledger.close()
        self.weights = weights_sha256(model)

    def run(self, policy: FaultPolicy) -> int:
        return run_attempts(
            self.attempt,
            first_attempt=1,
            committed_step=lambda: max(self.commits, default=-1),
            policy=policy,
            on_failure=lambda number, failure, history: None,
            on_skip=lambda step, failure: self.skip.add(step),
            sleep=lambda seconds: None,
        )


@settings(max_examples=8)
@given(
    bad=st.frozensets(st.integers(1, LENGTH - 1), max_size=4),
    every=st.integers(1, 5),
    kills=st.dictionaries(st.integers(1, 4), st.integers(0, LENGTH - 1), max_size=2),
)
def test_a_run_that_meets_bad_batches_and_kills_ends_in_the_bits_of_one_that_left_them_out_from_the_start(
    tmp_path_factory: pytest.TempPathFactory, bad: frozenset[int], every: int, kills: dict[int, int]
) -> None:
    policy = FaultPolicy(max_failures_without_progress=10, max_rollbacks=3)
    story = Story(tmp_path_factory.mktemp("ledger"), bad, every, kills)
    if len(bad) > 3:
        with pytest.raises(RunFailed, match=r"max_rollbacks=3; the run diverges"):
            story.run(policy)
        assert story.skip == set(sorted(bad)[:3])
        assert all(step <= sorted(bad)[3] for step in story.commits)  # none holds what the bad batch did
        return
    story.run(policy)
    assert story.skip == bad
    straight = Story(tmp_path_factory.mktemp("ledger"), bad, LENGTH, {})
    straight.skip = set(bad)
    assert straight.run(policy) == 0
    assert story.weights == straight.weights
    assert (story.history.samples, story.history.skipped_samples) == (64 * (LENGTH - len(bad)), 64 * len(bad))
    assert story.history.train_loss == straight.history.train_loss
    records = read_ledger(story.folder)
    ids = [sample for record in records for sample in record.ids]
    assert len(ids) == len(set(ids)) == 64 * LENGTH
    assert {record.step for record in records if record.skipped} == bad


def test_a_first_step_that_is_bad_ends_the_run_at_once(tmp_path: Path) -> None:
    story = Story(tmp_path, frozenset({0}), 2, {})
    with pytest.raises(RunFailed, match=r"step 0: the loss is nan[^$]*the first step of the run is bad already") as caught:
        story.run(FaultPolicy())
    assert caught.value.attempts == 1


# --- several real processes -------------------------------------------------------------------------------------------------------------

STEPS, SKIP = 8, frozenset({2, 3, 7})


def ddp_losses(rank: int, skip: frozenset[int]) -> tuple[list[Any], list[Any], list[list[int]]]:
    """What arrived in the steps, what another thread got of the late losses after each step, and which were late."""
    shape = (3, 333)
    model = Net()
    order = order_of(shape)
    stepper = make(model, sgd(model), distributed=True, world_size=2)
    batches = iter(batches_of(shape, 0, STEPS, carried=blocks_of_virtual_ranks(3, 2, rank)))
    arrived: list[Any] = []
    late: list[Any] = []
    which: list[list[int]] = []
    for stats in train_steps(
        stepper,
        batches,
        start_step=0,
        stop_step=STEPS,
        steps_per_epoch=order.steps_per_epoch,
        batch_count=order.batch_count,
        set_learning_rate=lambda step: 0.05,
        device=CPU,
        sum_over_ranks=True,
        skip=skip,
    ):
        arrived += stats.losses
        got: list[tuple[int, float]] = []
        thread = threading.Thread(target=lambda got=got, stats=stats: got.extend((each.step, each.wait()) for each in stats.late))
        thread.start()
        if stats.steps_done % 2:  # in the other half of the steps it waits beside the next step
            thread.join()
        late.append((thread, got))
        which.append([each.step for each in stats.late])
    for thread, _ in late:
        thread.join()
    return arrived, [pair for _, got in late for pair in got], which


def tree_losses(rank: int, skip: frozenset[int]) -> tuple[list[Any], str]:
    shape = (4, 332)
    model = Net()
    stepper = make(model, sgd(model), reducer=TreeReducer([range(2), range(2, 4)], rank), distributed=True, world_size=2)
    steps = train_steps(
        stepper,
        iter(batches_of(shape, 0, STEPS, carried=blocks_of_virtual_ranks(4, 2, rank))),
        start_step=0,
        stop_step=STEPS,
        steps_per_epoch=order_of(shape).steps_per_epoch,
        batch_count=order_of(shape).batch_count,
        set_learning_rate=lambda step: 0.05,
        device=CPU,
        sum_over_ranks=False,
        skip=skip,
    )
    return [pair for stats in steps for pair in stats.losses], weights_sha256(model)


def without(skip: frozenset[int]) -> tuple[list[Any], str]:
    """The same run by one process that never meets the steps in `skip`."""
    shape = (4, 332)
    model = Net()
    stepper, losses = make(model, sgd(model), virtual_ranks=4), []
    for step, batches in enumerate(batches_of(shape, 0, STEPS)):
        if step not in skip:
            count = order_of(shape).batch_count(step % order_of(shape).steps_per_epoch)
            losses.append((step, stepper.step(batches, global_count=count, step=step).item()))
    return losses, weights_sha256(model)


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {
        "ddp": ddp_losses(rank, frozenset()),
        "ddp skipping": ddp_losses(rank, SKIP),
        "tree skipping": tree_losses(rank, SKIP),
        "alone": without(SKIP),  # here, where threads are the same
    }
    dist.barrier()
    dist.destroy_process_group()
    Path(f"{folder}/{rank}.pickle").write_bytes(pickle.dumps(results))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two real processes saw."""
    folder = tmp_path_factory.mktemp("guard")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        mp.spawn(rank_main, (str(folder),), nprocs=2)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(2)]


@pytest.mark.parametrize(("case", "skip"), [("ddp", frozenset()), ("ddp skipping", SKIP)])
def test_late_losses_are_the_ones_that_arrive_later_the_same_on_all_ranks(
    ranks: list[dict[str, Any]], case: str, skip: frozenset[int]
) -> None:
    arrived, waited_for, which = ranks[0][case]
    assert ranks[1][case] == ranks[0][case]
    assert [step for step, _ in arrived] == [step for step in range(STEPS) if step not in skip]
    assert waited_for == [pair for pair in arrived if [pair[0]] in which]
    assert which == [[step] if step not in skip and step != STEPS - 1 else [] for step in range(STEPS)]


def test_two_ranks_that_skip_the_same_steps_have_the_bits_of_one_that_never_met_them(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["tree skipping"] == ranks[1]["tree skipping"] == ranks[0]["alone"]


def test_a_loss_of_a_tensor_is_read_once_and_stays() -> None:
    loss: Tensor = torch.tensor(2.5)
    arriving = Arriving(3, loss)
    assert (arriving.step, arriving.is_here(), arriving.wait(), arriving.wait()) == (3, True, 2.5, 2.5)
