"""The profile: parts of a step by a clock that the test holds, work by counting by hand, and no change of a run's bits."""

import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.trainer.test_step import CPU, Net, batches_of, loop, make, order_of, same_bits, sgd
from trainer.learn.step import StepStats
from trainer.models.vision import build_model
from trainer.rank.profile import PARTS, WINDOW_STEPS, Ceilings, Profiler, Work, count_work, describe, measure_ceilings, step_parts, verdict
from trainer.settings.tree import ModelConfig

WORK = Work(flops_per_image=4e9, bytes_per_image=1e6, bytes_per_pass=1e7)
CEILINGS = Ceilings(flops_per_second=1e12, bytes_per_second=1e10)


def profiler(*, first: int = 0, stop: int = 100, clock: Any = None, share: float = 1.0, passes: int = 1) -> Profiler:
    made = {"clock": clock} if clock else {}
    return Profiler(device=CPU, first_step=first, stop_step=stop, share=share, work=WORK, passes=passes, ceilings=CEILINGS, **made)


def stats(step: int, *, wait: float = 0.0, samples: int = 100, skipped: bool = False) -> StepStats:
    return StepStats(
        steps_done=step + 1,
        epoch=0,
        samples=samples,
        learning_rate=0.1,
        step_seconds=1.0,
        data_wait_seconds=wait,
        losses=(),
        skipped=skipped,
    )


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


LENGTHS = {"data": 0.5, "forward": 2.0, "backward": 4.0, "reduction": 1.0, "optimizer": 0.25}


def run_steps(made: Profiler, clock: Clock, first: int, stop: int, *, between: float = 0.125, skip: tuple[int, ...] = ()) -> None:
    """Steps whose parts last LENGTHS, `between` seconds apart."""
    for step in range(first, stop):
        clock.now += between
        for part, seconds in LENGTHS.items():
            if step in skip and part != "data":
                continue
            clock.now += seconds
            made.mark(part)
        made.stepped(stats(step, wait=LENGTHS["data"], skipped=step in skip))


@pytest.mark.parametrize("first", [0, 1000])
def test_each_part_has_its_own_seconds_and_all_of_them_are_the_steps_whole_time(first: int) -> None:
    clock = Clock()
    made = profiler(first=first, stop=first + 200, clock=clock)
    run_steps(made, clock, first, first + 60)
    found = made.result()
    assert found is not None
    assert found["steps"] == WINDOW_STEPS
    assert found["parts_seconds"] == pytest.approx({**LENGTHS, "other": 0.125})
    assert found["step_seconds"] == pytest.approx(sum(LENGTHS.values()) + 0.125)
    assert sum(found["parts_ratio"].values()) == pytest.approx(1)
    assert found["images_per_second"] == pytest.approx(100 / found["step_seconds"])
    assert made.result() is None  # once


def test_nothing_is_told_before_the_window_is_over_nor_marked_after_it() -> None:
    clock = Clock()
    made = profiler(clock=clock)
    for step in range(60):
        assert made.result() is None
        run_steps(made, clock, step, step + 1)
    assert made.is_over
    assert made.result() is not None
    run_steps(made, clock, 60, 100)
    assert not made._marks


@pytest.mark.parametrize(("steps", "counted"), [(1, 1), (2, 2), (3, 2), (30, 20), (60, 50)])
def test_a_short_run_is_told_at_its_end(steps: int, counted: int) -> None:
    clock = Clock()
    made = profiler(stop=steps, clock=clock)
    run_steps(made, clock, 0, steps)
    found = made.result(wait=True)
    assert found is not None
    assert found["steps"] == counted
    assert found["parts_seconds"]["forward"] == pytest.approx(2.0)


def test_an_attempt_that_did_no_step_of_its_window_has_no_profile() -> None:
    assert profiler().result(wait=True) is None
    clock = Clock()
    made = profiler(clock=clock)
    run_steps(made, clock, 0, 5)
    assert made.result(wait=True) is None


def test_an_evaluation_between_two_steps_and_a_skipped_batch_count_for_nothing() -> None:
    clock = Clock()
    made = profiler(clock=clock)
    run_steps(made, clock, 0, 20)
    made.cut()
    clock.now += 1000.0
    run_steps(made, clock, 20, 40, skip=(30,))
    run_steps(made, clock, 40, 60)
    found = made.result()
    assert found is not None
    assert found["steps"] == 49
    assert {part: found["parts_seconds"][part] for part in LENGTHS} == pytest.approx(LENGTHS)
    assert found["parts_seconds"]["other"] == pytest.approx(0.125 * 48 / 49)  # not the one with the evaluation in it


def test_a_wait_that_the_device_did_not_see_is_no_wait() -> None:
    """The host waited 0.5 s for data, while the device (here the marks) had work queued for all but 0.1 s of it."""
    marks = [(0, "optimizer", 10.0), (1, "data", 10.1), (1, "forward", 11.0)]
    parts = step_parts(marks, {1: 0.5}, 0.0, lambda begin, end: end - begin)
    assert (parts["data"], parts["other"]) == (pytest.approx(0.1), 0.0)


def test_on_a_gpu_waits_for_data_and_for_other_ranks_are_what_the_marks_say() -> None:
    """Whose host has waited for neither. The last gradient of the newest micro-batch is there at 6.0."""
    marks = [(0, "optimizer", 1.0), (1, "other", 1.25), (1, "data", 2.0), (1, "forward", 3.0), (1, "gradients", 3.5), (1, "backward", 3.5)]
    marks += [(1, "forward", 5.0), (1, "gradients", 6.0), (1, "backward", 8.0), (1, "optimizer", 9.0)]
    parts = step_parts(marks, {1: 0.0}, 0.0, lambda begin, end: end - begin)
    assert parts == {"data": 0.75, "forward": 2.5, "backward": 1.5, "reduction": 2.0, "optimizer": 1.0, "other": 0.25}
    assert sum(parts.values()) == 8.0


def test_what_ddp_waits_for_on_a_cpu_is_taken_out_of_the_backward_pass() -> None:
    marks = [(0, "data", 0.0), (0, "forward", 1.0), (0, "backward", 4.0), (0, "optimizer", 5.0)]
    parts = step_parts(marks, {0: 0.0}, 1.5, lambda begin, end: end - begin)
    assert (parts["backward"], parts["reduction"]) == (1.5, 1.5)


def test_shares_of_the_ceilings_are_work_over_time_over_speed() -> None:
    parts = dict.fromkeys(PARTS, 0.0) | {"forward": 4.0, "backward": 4.0}
    found = describe(parts, steps=10, samples=1000, share=0.5, passes=2, work=WORK, ceilings=CEILINGS)
    assert found["flops_ratio"] == pytest.approx(500 * 4e9 / 8.0 / 1e12)
    assert found["bytes_ratio"] == pytest.approx((500 * 1e6 + 10 * 2 * 1e7) / 8.0 / 1e10)
    assert found["verdict"] == "compute-bound at 25.0 % of peak; data wait 0.0 %"
    unknown = Work(flops_per_image=None, bytes_per_image=None, bytes_per_pass=None)
    blind = describe(parts, steps=10, samples=1000, share=0.5, passes=2, work=unknown, ceilings=CEILINGS)
    assert blind["flops_ratio"] is blind["bytes_ratio"] is None
    assert blind["verdict"] == "compute-bound; data wait 0.0 %"


@pytest.mark.parametrize(
    ("changes", "shares", "said"),
    [
        ({"data": 0.002}, (0.31, 0.2), "compute-bound at 31.0 % of peak; data wait 0.2 %"),
        ({}, (0.2, 0.6), "memory-bound at 60.0 % of peak bandwidth: compute at 20.0 % of peak; data wait 0.0 %"),
        ({"data": 0.4}, (0.1, 0.2), "waits for data 40.0 % of the time: compute at 10.0 % of peak"),
        ({"reduction": 0.3}, (0.1, 0.2), "waits for other ranks 30.0 % of the time: compute at 10.0 % of peak; data wait 0.0 %"),
        ({"other": 0.3}, (0.1, 0.2), "held up by the host 30.0 % of the time: compute at 10.0 % of peak; data wait 0.0 %"),
    ],
)
def test_the_verdict_names_what_a_step_is_held_up_by(changes: dict[str, float], shares: tuple[float, float], said: str) -> None:
    assert verdict(dict.fromkeys(PARTS, 0.0) | changes, *shares) == said


@given(st.lists(st.sampled_from(["step", "skip", "cut"]), max_size=70), st.integers(1, 80))
def test_whatever_happens_parts_are_no_less_than_nothing_and_counted_steps_are_whole(happens: list[str], stop: int) -> None:
    clock = Clock()
    made, step = profiler(stop=stop, clock=clock), 0
    for what in happens:
        if what == "cut":
            made.cut()
            clock.now += 7.0
        elif step < stop:
            run_steps(made, clock, step, step + 1, skip=(step,) if what == "skip" else ())
            step += 1
    found = made.result(wait=True)
    if found is not None:
        assert all(seconds >= 0 for seconds in found["parts_seconds"].values())
        assert found["parts_seconds"]["forward"] == pytest.approx(2.0)
        assert found["parts_seconds"]["data"] == pytest.approx(0.5)
        assert found["parts_seconds"]["other"] <= 0.125 + 1e-9 or "skip" in happens


# --- work and ceilings ----------------------------------------------------------------------------------------------------------------


def test_work_is_counted_as_by_hand() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5, bias=False))
    counted = count_work(model, (2, 2), precision="fp32")
    # Forward 2 * 12 * 5; backward only for the weight, as images need no gradient.
    assert counted.flops_per_image == 2 * 60 * 2
    assert counted.bytes_per_pass is not None
    assert counted.bytes_per_pass >= 4 * 60 * 2  # the weight is read, its gradient written
    assert counted.bytes_per_image is not None
    assert counted.bytes_per_image >= 4 * (12 + 5) * 2


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_grouped_convolution_is_as_much_less_work_backward_as_forward(groups: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 8, 3, padding=1, groups=groups, bias=False))
    counted = count_work(model, (4, 4), precision="fp32")
    first, second = 2 * 16 * 3 * 8, 2 * 16 * 8 * 8 * 9 // groups
    assert counted.flops_per_image == 2 * first + 3 * second  # the images need no gradient


def test_resnet18s_work_is_what_others_counted() -> None:
    """3.33 GFLOP an image forward and backward with the tutorial's stem; in bf16 about 26 MB go through memory, operation by operation."""
    model = build_model(ModelConfig(weights="none", stem="article"), classes=10, seed=0, image_hw=(32, 32)).to(
        memory_format=torch.channels_last
    )
    counted = count_work(model, (32, 32), precision="bf16")
    assert counted.flops_per_image == pytest.approx(3.33e9, rel=0.01)
    assert counted.bytes_per_image == pytest.approx(26e6, rel=0.25)
    parameters = sum(p.numel() for p in model.parameters())
    assert counted.bytes_per_pass is not None
    assert 2 * 4 * parameters < counted.bytes_per_pass < 12 * 4 * parameters


def test_counting_leaves_the_model_and_the_random_state_as_they_were() -> None:
    model = Net().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    count_work(model, (28, 28), precision="fp32")
    measure = torch.rand(4)
    assert torch.equal(measure, wanted)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_frozen_backbone_is_less_work() -> None:
    model = torchvision.models.resnet18(num_classes=10)
    whole = count_work(model, (32, 32), precision="fp32").flops_per_image
    model.requires_grad_(False)
    model.fc.requires_grad_(True)
    head = count_work(model, (32, 32), precision="fp32").flops_per_image
    assert whole is not None
    assert head is not None
    assert head < 0.4 * whole


def test_a_model_that_cannot_run_without_data_is_not_counted() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, images: Tensor) -> Tensor:
            bright = images.mean((2, 3))
            return self.layer(bright if float(bright.sum()) >= 0 else -bright)

    counted = count_work(Picky(), (8, 8), precision="fp32")
    assert asdict(counted) == dict.fromkeys(("flops_per_image", "bytes_per_image", "bytes_per_pass"))


@pytest.mark.parametrize("convolution", [(1, 2, 3), (4, 64, 16)])
def test_ceilings_are_numbers_of_this_machine_and_leave_the_random_state_alone(
    monkeypatch: pytest.MonkeyPatch, convolution: tuple[int, int, int]
) -> None:
    monkeypatch.setattr("trainer.rank.profile.CONVOLUTION", convolution)
    images, channels, pixels = convolution
    monkeypatch.setitem(__import__("trainer.rank.profile", fromlist=["MATRIX"]).MATRIX, "cpu", 64)
    monkeypatch.setitem(__import__("trainer.rank.profile", fromlist=["COPY_BYTES"]).COPY_BYTES, "cpu", 2**20)
    ticks = iter(range(10**6))
    torch.manual_seed(3)
    state, precision = torch.get_rng_state(), torch.get_float32_matmul_precision()
    found = measure_ceilings(CPU, precision="fp32", clock=lambda: float(next(ticks)))
    # By this clock every job lasts a second.
    flops = max(2.0 * 64**3, 2.0 * images * channels**2 * 9 * pixels**2)
    assert found == Ceilings(flops_per_second=flops, bytes_per_second=2.0 * 2**20)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_float32_matmul_precision() == precision


class Watch:
    """What a step tells a profile."""

    def __init__(self, profiler: Profiler) -> None:
        self.part = profiler.mark

    def phase(self, phase: str, /) -> None: ...

    def takes_norm(self) -> bool:
        return False


# --- in the loop ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("virtual_ranks", "accumulate"), [(1, 1), (4, 1), (4, 2)])
def test_a_profiled_run_has_the_same_bits_and_all_parts(virtual_ranks: int, accumulate: int) -> None:
    shape, steps = (virtual_ranks, 332), 8
    order = order_of(shape)
    plain, watched = Net(), Net()
    for _ in loop(
        make(plain, sgd(plain), virtual_ranks=virtual_ranks, accumulate=accumulate), iter(batches_of(shape, 0, steps)), order, 0, steps
    ):
        pass
    made = Profiler(
        device=CPU,
        first_step=0,
        stop_step=steps,
        share=1.0,
        work=count_work(watched, (28, 28), precision="fp32"),
        passes=virtual_ranks * accumulate,
        ceilings=CEILINGS,
    )
    stepper = make(watched, sgd(watched), virtual_ranks=virtual_ranks, accumulate=accumulate, observer=Watch(made))
    for done in loop(stepper, iter(batches_of(shape, 0, steps)), order, 0, steps):
        made.stepped(done)
    assert same_bits(plain, watched)
    found = made.result(wait=True)
    assert found is not None
    assert found["steps"] == steps - steps // 3
    present = {part for part, seconds in found["parts_seconds"].items() if seconds > 0}
    assert {"forward", "backward", "optimizer"} <= present
    assert ("reduction" in present) == (virtual_ranks > 1)
    assert math.isfinite(found["flops_ratio"])
