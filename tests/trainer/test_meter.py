"""What a rank tells of its steps: seconds by a clock that the test holds, norms by PyTorch's own, and no change of a run's bits."""

import copy
import itertools
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cluster.metrics import Metrics
from cluster.straggler import StragglerWatch
from dataio.loader import Tokens
from tests.trainer.test_step import CPU, FOUR, Net, Residual, batches_of, loop, make, order_of, same_bits, sgd
from trainer.learn.gradients import StepObserver
from trainer.learn.step import Stepper, StepStats, train_steps
from trainer.learn.update import Update
from trainer.rank.history import History, Speed
from trainer.rank.meter import SLOW_SECONDS, Meter, Split, resident_bytes
from trainer.rank.observers import BeatStats
from trainer.rank.profile import FlopCount, count_work
from trainer.tasks.info import CLASSIFICATION

WHOLE = (1, 300)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Loaded:
    """A loader's counts."""

    bytes_read, read_wait_seconds, decode_seconds, memory_held_bytes = 1000, 0.5, 2.0, 700
    tokens = Tokens()


def value(metrics: Metrics, name: str) -> float | None:
    return metrics.registry.get_sample_value(f"finetune_{name}", {"run": "run", "rank": "0", "attempt": "1"})


def meter_of(metrics: Metrics, *, clock: Callable[[], float] | None = None, **changes: Any) -> Meter:
    settings: dict[str, Any] = {
        "device": CPU,
        "share": 0.5,
        "steps_per_epoch": 10,
        "planned_steps": 40,
        "waits_in_backward": False,
        "peak_flops_per_second": None,
        "reads": Loaded(),
        "speed": Speed(),
        **changes,
    }
    return Meter(metrics, **settings, **({"clock": clock} if clock else {}))


def stats_of(step: int, **changes: Any) -> StepStats:
    settings: dict[str, Any] = {
        "steps_done": step + 1,
        "epoch": 0,
        "samples": 100,
        "learning_rate": 0.1,
        "step_seconds": 2.0,
        "data_wait_seconds": 0.25,
        "losses": (),
        **changes,
    }
    return StepStats(**settings)


class Watch:
    """What a step tells a meter, as the rank has it told."""

    def __init__(self, meter: Meter) -> None:
        self.part, self.takes_norm = meter.mark, meter.takes_norm

    def phase(self, phase: str, /) -> None: ...


class AlwaysTakes:
    """Wants each step's norm."""

    def __init__(self, mark: Callable[[str], None]) -> None:
        self.part = mark

    def phase(self, phase: str, /) -> None: ...

    def takes_norm(self) -> bool:
        return True


def watched(meter: Meter, model: nn.Module, **changes: Any) -> Stepper:
    meter.begin()
    return make(model, sgd(model), observer=Watch(meter), **changes)


# --- seconds --------------------------------------------------------------------------------------------------------------------------


def a_step(mark: Callable[[str], None], passes: Callable[[float], None], *, passes_through_the_model: int, reduces: bool) -> None:
    mark("other")
    passes(0.125)
    mark("data")
    for _ in range(passes_through_the_model):
        passes(1.0)
        mark("forward")
        passes(2.0)
        mark("backward")
    if reduces:
        passes(0.5)
        mark("reduction")
    passes(0.25)
    mark("optimizer")


@pytest.mark.parametrize("reduces", [False, True])
@pytest.mark.parametrize("passes", [1, 3])
def test_the_split_is_what_the_clock_says(passes: int, reduces: bool) -> None:
    clock = Clock()
    split = Split(CPU, clock)

    def advance(seconds: float) -> None:
        clock.now += seconds

    for _ in range(4):
        a_step(split.mark, advance, passes_through_the_model=passes, reduces=reduces)
        split.mark("data")  # a step whose batch is left out
        advance(50.0)
    assert split.forward_backward_seconds == 4 * passes * 3.0
    assert split.optimizer_seconds == 4 * 0.25
    assert split.own_seconds == 0.0  # the host's clock has it


class Device:
    """A GPU's stream that is `behind` seconds of work late; events are passed in its own time."""

    def __init__(self) -> None:
        self.queued = self.done = 0.0
        self.events = 0

    def event(self, *, enable_timing: bool) -> "Event":
        assert enable_timing
        self.events += 1
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.at = device, -1.0

    def record(self) -> None:
        self.at = self.device.queued

    def query(self) -> bool:
        return self.device.done >= self.at

    def elapsed_time(self, other: "Event") -> float:
        assert self.query()
        assert other.query(), "the host would wait, or be told an error"
        return (other.at - self.at) * 1e3


@pytest.mark.parametrize("behind", [0.0, 5.0, 30.0])
def test_on_a_gpu_the_split_is_the_devices_and_nobody_waits_for_it(monkeypatch: pytest.MonkeyPatch, behind: float) -> None:
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    split = Split(torch.device("cuda", 0))

    def queue(seconds: float) -> None:
        device.queued += seconds

    for _ in range(50):
        a_step(split.mark, queue, passes_through_the_model=2, reduces=True)
        device.done = device.queued - behind
    over = int((50 * 6.875 - behind) // 6.875)
    split.mark("other")
    assert split.forward_backward_seconds == over * 6.0
    assert split.optimizer_seconds == over * 0.25
    assert split.own_seconds == over * (0.125 + 6.0 + 0.25)  # all but the reduction
    assert device.events <= 5 * (behind // 6.875 + 3)  # used again
    device.done = device.queued
    split.mark("other")
    assert split.forward_backward_seconds == 50 * 6.0


@pytest.mark.parametrize("marked", [False, True])
def test_on_a_gpu_what_ddp_waits_for_inside_the_backward_pass_is_no_rank_s_own(monkeypatch: pytest.MonkeyPatch, marked: bool) -> None:
    """Two micro-batches; the second one's backward pass ends with a wait of 7 s."""
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    split = Split(torch.device("cuda", 0))
    for part, seconds in [
        *[("other", 50.0), ("data", 0.5), ("forward", 1.0), ("gradients", 2.0), ("backward", 0.0)],
        *[("forward", 1.0), ("gradients", 2.0), ("backward", 7.0), ("optimizer", 0.25)],
    ]:
        device.queued += seconds
        if part != "gradients" or marked:
            split.mark(part)
    device.done = device.queued
    split.mark("other")
    waited = 0.0 if marked else 7.0  # the first step does not know yet which gradient is the last
    assert split.forward_backward_seconds == 6.0 + waited
    assert split.own_seconds == 0.5 + 6.0 + 0.25 + waited


class Working:
    """Gradients that a device takes its time for, while its host goes on. The last step's loss has been waited for."""

    proves = True
    wait_seconds = 0.0

    def __init__(self, device: Device, seconds: float, stop: int) -> None:
        self.device, self.seconds, self.stop = device, seconds, stop

    def compute(self, batches: Any, *, global_count: int, step: int, observer: StepObserver) -> torch.Tensor:
        self.device.queued += self.seconds
        for part in ("forward", "backward"):
            observer.part(part)
        if step + 1 == self.stop:
            self.device.done = self.device.queued
        return torch.tensor(1.0)

    def compile_ahead(self, image: Any) -> float:
        return 0.0


def steps_on(device: Device, makings: list[float], lag: float = 0.0) -> Iterator[StepStats]:
    """Steps of a second each on a device, `lag` seconds behind its host. A batch takes `makings` seconds on the loader's stream."""
    model, made = Net(), itertools.accumulate(makings)

    def batches() -> Iterator[tuple[Any, ...]]:
        for moment in made:
            device.queued = max(device.queued, moment)  # the stream of the steps waits for the loader's
            device.done = max(device.done, device.queued - lag)
            yield ()

    return train_steps(
        Stepper(Working(device, 1.0, len(makings)), Update(model, sgd(model))),
        batches(),
        start_step=0,
        stop_step=len(makings),
        steps_per_epoch=10,
        batch_count=lambda step: 100,
        set_learning_rate=lambda step: 0.1,
        device=torch.device("cuda", 0),
        sum_over_ranks=False,
        clock=lambda: 0.0,
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 12).map(lambda value: value / 4), min_size=1, max_size=12), st.integers(0, 20).map(float))
def test_on_a_gpu_the_wait_for_data_is_the_devices_and_nobody_waits_for_it(makings: list[float], lag: float) -> None:
    """Whose host takes no time at all, however late the batches are."""
    device = Device()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Event", device.event)
        patch.setattr(torch.cuda, "Stream", lambda device: None)
        stats = list(steps_on(device, makings, lag))
    wanted, done = [], 0.0
    for moment in itertools.accumulate(makings):
        wanted.append(max(0.0, moment - done))
        done = max(done, moment) + 1.0
    assert sum(each.data_wait_seconds for each in stats) == sum(wanted)
    assert all(each.step_seconds == 0.0 for each in stats)
    if lag == 0.0:
        assert [each.data_wait_seconds for each in stats] == wanted


def test_events_of_waits_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    assert len(list(steps_on(device, [0.5] * 100, lag=3.0))) == 100
    assert device.events <= 2 * 6


def test_of_several_gpus_the_slow_one_is_found_though_all_hosts_take_equally_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """In ddp mode: each backward pass ends when the slowest rank's does."""
    ranks, watch = [GpuRank(seconds) for seconds in (1.0, 1.0, 3.0, 1.0)], StragglerWatch(4)
    said = []
    for step in range(60):
        for rank in ranks:
            monkeypatch.setattr(torch.cuda, "Event", rank.device.event)
            rank.begin()
        ends = max(rank.device.queued for rank in ranks)
        for number, rank in enumerate(ranks):
            monkeypatch.setattr(torch.cuda, "Event", rank.device.event)
            rank.end(ends)
            rank.beats.stepped(stats_of(step, step_seconds=3.0))
            if (found := watch.hear(number, step + 1, rank.own_seconds)) is not None:
                said.append((found.rank, found.begins))
    assert said == [(2, True)]
    assert watch.skew > 2.5


def test_waits_of_a_gpu_that_are_told_late_are_taken_from_the_next_steps_seconds() -> None:
    """The host queues two steps at once, then waits in the third."""
    metrics = Metrics("run", 0, 1)
    meter = meter_of(metrics)
    for step, (seconds, waited, computed) in enumerate([(0.25, 0.0, 0.25), (0.25, 1.5, 0.25), (3.0, 0.5, 1.5)]):
        meter.stepped(stats_of(step, step_seconds=seconds, data_wait_seconds=waited))
        assert value(metrics, "compute_seconds_total") == computed
    assert value(metrics, "data_wait_seconds_total") == 2.0


class GpuRank:
    """A rank whose gradients take its device `seconds`, and the heartbeat that it tells of them. The device is a step behind the host."""

    def __init__(self, seconds: float) -> None:
        self.device, self.seconds, self.own_seconds = Device(), seconds, 0.0
        self.meter = meter_of(Metrics("run", 0, 1), device=torch.device("cuda", 0))
        self.beats = BeatStats(
            self,  # type: ignore[arg-type]
            History(),
            Speed(),
            CLASSIFICATION,
            device_seconds=lambda: self.meter.device_seconds,
        )

    def begin(self) -> None:
        for part, seconds in {"other": 0.0, "data": 0.0, "gradients": self.seconds}.items():
            self.device.queued += seconds
            self.meter.mark(part)

    def end(self, moment: float) -> None:
        """The slowest rank's last gradient comes at `moment`."""
        self.device.queued = moment
        self.meter.mark("backward")
        self.meter.mark("optimizer")
        self.device.done = self.device.queued - 4.0

    def progress(self, steps_done: int, stats: Any, *, totals: Any, own_seconds: float) -> None:
        self.own_seconds = own_seconds


def test_on_a_cpu_no_device_knows_a_ranks_own_seconds() -> None:
    assert meter_of(Metrics("run", 0, 1)).device_seconds is None


def test_a_real_steps_parts_are_no_more_than_the_step() -> None:
    metrics = Metrics("run", 0, 1)
    meter = meter_of(metrics, share=1.0)
    stepper = watched(meter, Net(), virtual_ranks=FOUR[0])
    total = 0.0
    for stats in loop(stepper, iter(batches_of(FOUR, 0, 4)), order_of(FOUR), 0, 4):
        meter.stepped(stats)
        total += stats.step_seconds
    names = ("data_wait", "reduce", "compute", "forward_backward", "optimizer")
    seconds = {name: value(metrics, f"{name}_seconds_total") or 0.0 for name in names}
    assert seconds["data_wait"] + seconds["reduce"] + seconds["compute"] == pytest.approx(total)
    assert 0 < seconds["optimizer"] < seconds["forward_backward"]
    assert seconds["forward_backward"] + seconds["optimizer"] < seconds["compute"]
    assert value(metrics, "step_seconds_sum") == pytest.approx(total)
    assert value(metrics, "steps_total") == 4


def test_what_ddp_waits_for_inside_the_backward_pass_is_no_backward() -> None:
    for waits_in_backward, wanted in ((False, 3.0), (True, 2.0)):
        metrics, clock = Metrics("run", 0, 1), Clock()
        meter = meter_of(metrics, waits_in_backward=waits_in_backward)
        meter._split._clock = clock

        def advance(seconds: float, clock: Clock = clock) -> None:
            clock.now += seconds

        a_step(meter._split.mark, advance, passes_through_the_model=1, reduces=False)
        meter.stepped(stats_of(0, exchange_seconds=1.0))
        assert value(metrics, "forward_backward_seconds_total") == wanted
        assert value(metrics, "optimizer_seconds_total") == 0.25


# --- the gradient's norm --------------------------------------------------------------------------------------------------------------


def norm_of(model: nn.Module) -> float:
    return float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"clip": partial(nn.utils.clip_grad_norm_, max_norm=1e-3)},
    "micro-batches": {"accumulate": 3},
    "tree": {"virtual_ranks": 4},
    "tree, clipped": {"virtual_ranks": 4, "clip": partial(nn.utils.clip_grad_norm_, max_norm=1e-3)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("network", [Net, Residual])  # one has a parameter that is never used
def test_the_norm_is_that_of_the_whole_batchs_gradient_before_it_is_clipped(case: str, network: Callable[[], nn.Module]) -> None:
    shape = (CASES[case].get("virtual_ranks", 1), 332)
    (batches,) = batches_of(shape, 0, 1)
    unclipped, model = network(), network()
    make(unclipped, sgd(unclipped), **{k: v for k, v in CASES[case].items() if k != "clip"}).step(batches, global_count=332, step=0)
    meter = meter_of(Metrics("run", 0, 1))
    stepper = watched(meter, model, **CASES[case])
    stepper.step(batches, global_count=332, step=0)
    assert stepper.gradient_norm is not None
    assert float(stepper.gradient_norm) == norm_of(unclipped) > 1e-3
    assert not stepper.gradient_norm.requires_grad
    stepper.step(batches, global_count=332, step=1)
    assert stepper.gradient_norm is None  # it was asked for once


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_is_watched_ends_in_the_same_bits(case: str) -> None:
    """Norms of every step, marks, and the count of its work in a thread beside it, which goes through dropout as the training does."""
    shape = (CASES[case].get("virtual_ranks", 1), 300)
    alone, seen_by_all = Net(), Net()
    plain = list(loop(make(alone, sgd(alone), **CASES[case]), iter(batches_of(shape, 0, 8)), order_of(shape), 0, 8))
    assert not any(stats.gradient_norms for stats in plain)
    metrics = Metrics("run", 0, 1)
    meter = meter_of(metrics, peak_flops_per_second=1e9)
    meter.begin()
    stepper = make(seen_by_all, sgd(seen_by_all), observer=AlwaysTakes(meter.mark), **CASES[case])
    meter.count_flops(FlopCount(seen_by_all), (28, 28), "fp32")
    seen = []
    for stats in loop(stepper, iter(batches_of(shape, 0, 8)), order_of(shape), 0, 8):
        meter.stepped(stats)
        seen.append(stats)
    meter.close()
    assert same_bits(alone, seen_by_all)
    assert [stats.losses for stats in seen] == [stats.losses for stats in plain]
    assert all(len(stats.gradient_norms) == 1 for stats in seen)
    assert value(metrics, "gradient_norm") == seen[-1].gradient_norms[0] > 0
    assert meter.flops_per_image == count_work(seen_by_all, (28, 28), precision="fp32").flops_per_image


def test_the_norm_and_what_else_costs_is_looked_at_every_few_seconds() -> None:
    metrics, clock, loaded = Metrics("run", 0, 1), Clock(), Loaded()
    meter = meter_of(metrics, clock=clock, reads=loaded)
    meter.begin()
    asked = []
    for step in range(20):
        asked.append(meter.takes_norm())  # as the step does
        clock.now += SLOW_SECONDS / 4
        loaded.bytes_read += 10
        meter.stepped(stats_of(step))
    assert [step for step, was in enumerate(asked) if was] == [0, 1, 5, 9, 13, 17]
    assert value(metrics, "read_bytes_total") == 1000 + 10 * 17  # as of the newest look, in step 16
    assert (value(metrics, "read_wait_seconds_total"), value(metrics, "decode_seconds_total")) == (0.5, 2.0)
    assert value(metrics, "loader_memory_bytes") == 700
    assert 10e6 < (value(metrics, "host_memory_bytes") or 0) < 1e12
    assert value(metrics, "device_memory_bytes") is None  # of a CPU
    assert value(metrics, "planned_steps") == 40


def test_tokens_are_counted_as_the_loader_gives_them() -> None:
    metrics, clock, loaded = Metrics("run", 0, 1), Clock(), Loaded()
    meter = meter_of(metrics, clock=clock, reads=loaded)
    meter.look()
    assert value(metrics, "tokens_total") == 0
    for count in (10, 25):
        loaded.tokens = Tokens(given=count, padded=2 * count)
        meter.look()
        assert (value(metrics, "tokens_total"), value(metrics, "padded_tokens_total")) == (count, 2 * count)


def test_resident_memory_is_what_the_kernel_says() -> None:
    with open("/proc/self/status") as status:
        (line,) = (line for line in status if line.startswith("VmRSS"))
    assert resident_bytes() == pytest.approx(int(line.split()[1]) * 1024, rel=0.05)


# --- MFU ------------------------------------------------------------------------------------------------------------------------------


def test_mfu_is_this_ranks_work_over_the_peak_and_absent_where_either_is_unknown() -> None:
    for peak in (None, 1e9):
        metrics = Metrics("run", 0, 1)
        meter = meter_of(metrics, peak_flops_per_second=peak)
        if peak is not None:
            meter.measured(peak_flops_per_second=peak, flops_per_image=None)
        meter.stepped(stats_of(0))
        assert value(metrics, "mfu_ratio") is None
    speed = Speed()
    speed.stepped(stats_of(0))  # 100 images in 2 s, of which this rank has half
    metrics = Metrics("run", 0, 1)
    meter = meter_of(metrics, peak_flops_per_second=1e9, speed=speed)
    meter.measured(peak_flops_per_second=5e9, flops_per_image=4e6)  # what a data sheet says stays
    meter.stepped(stats_of(0))
    assert value(metrics, "images_per_second") == 25
    assert value(metrics, "mfu_ratio") == 25 * 4e6 / 1e9
    meter.begin()  # other parameters from here on
    assert value(metrics, "mfu_ratio") is None


@pytest.mark.parametrize(
    ("make_model", "size"),
    [
        (Net, 28),
        (Residual, 28),
        (partial(torchvision.models.efficientnet_b0, num_classes=10), 64),  # depthwise, stochastic depth
        (partial(torchvision.models.vit_b_16, num_classes=10, image_size=32), 32),  # attention
    ],
)
def test_work_counted_beside_the_training_is_work_counted_before_it(make_model: Callable[[], nn.Module], size: int) -> None:
    model = make_model()
    wanted = count_work(model, (size, size), precision="fp32").flops_per_image
    before, state = copy.deepcopy(model), torch.get_rng_state()
    found: list[float | None] = []
    counter = FlopCount(model)
    thread = threading.Thread(target=lambda: found.append(counter.count((size, size), precision="fp32")))
    thread.start()
    thread.join()
    assert found == [wanted]
    assert wanted
    assert torch.equal(torch.get_rng_state(), state)
    assert same_bits(before, model)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_parameters_that_are_not_trained_are_less_work() -> None:
    model = Net()
    whole = FlopCount(model).count((28, 28), precision="fp32")
    model.body.requires_grad_(False)
    part = FlopCount(model).count((28, 28), precision="fp32")
    assert part is not None
    assert whole is not None
    assert part < 0.5 * whole
    assert part == count_work(model, (28, 28), precision="fp32").flops_per_image


class Unheard(nn.Module):
    """Asks for a value, which a tensor without data does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(images.flatten(1) * (2 if images.sum().item() > 0 else 1))
        return out


class Noisy(nn.Module):
    """With an operation that only exists with data, and draws."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(torch.ops.vision.noise_of_a_test(images.flatten(1)))
        return out


def test_an_operation_that_cannot_be_counted_without_running_it_is_not_run() -> None:
    drawn = []

    def noise(images: torch.Tensor) -> torch.Tensor:
        drawn.append(torch.rand(()))
        return images.clone()

    with torch.library._scoped_library("vision", "FRAGMENT") as library:
        library.define("noise_of_a_test(Tensor images) -> Tensor")
        library.impl("noise_of_a_test", noise, "CPU")
        model = Noisy()
        state = torch.get_rng_state()
        assert FlopCount(model).count((2, 2), precision="fp32") is None
        assert torch.equal(torch.get_rng_state(), state)
        model(torch.zeros(1, 3, 2, 2))  # as training would
    assert len(drawn) == 1


def test_a_model_that_cannot_be_counted_or_copied_has_no_mfu_and_trains_all_the_same() -> None:
    assert FlopCount(Unheard()).count((2, 2), precision="fp32") is None
    model = Net()
    model.lock = threading.Lock()  # type: ignore[assignment]  # cannot be copied
    counter = FlopCount(model)
    assert counter.count((28, 28), precision="fp32") is None
    metrics = Metrics("run", 0, 1)
    meter = meter_of(metrics, peak_flops_per_second=1e9)
    stepper = watched(meter, model)
    meter.count_flops(counter, (28, 28), "fp32")
    steps: Iterator[StepStats] = loop(stepper, iter(batches_of(WHOLE, 0, 2)), order_of(WHOLE), 0, 2)
    for stats in steps:
        meter.stepped(stats)
    meter.close()
    assert value(metrics, "steps_total") == 2
    assert value(metrics, "mfu_ratio") is None
