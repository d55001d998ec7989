"""On a GPU: seconds of the device by real events, and what its driver says of it."""

import time

import pytest
import torch
from torch import nn

from cluster.metrics import Metrics
from trainer.learn.gradients import _LastGradient
from trainer.learn.step import DeviceWaits, Unobserved
from trainer.rank.device_metrics import GpuWatch, gpu_address
from trainer.rank.meter import Split

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False here"),
]
CYCLES = 200_000_000
WARM_UP_SECONDS = 1.5


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """An idle GPU's clock is slow (345 MHz) and rises under load (to 1980 MHz), and `_sleep` counts its cycles: let it rise first."""
    matrix, end = torch.randn(4096, 4096, device="cuda"), time.monotonic() + WARM_UP_SECONDS
    while time.monotonic() < end:
        for _ in range(20):
            matrix @ matrix
        torch.cuda.synchronize()


def test_the_split_is_the_devices_and_the_host_does_not_wait_for_it() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    split = Split(device)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(3):
        split.mark("other")
        split.mark("data")
        for part in ("forward", "backward"):
            torch.cuda._sleep(CYCLES)  # type: ignore[attr-defined]
            split.mark(part)
        torch.cuda._sleep(CYCLES)  # type: ignore[attr-defined]
        split.mark("optimizer")
    end.record()
    assert not end.query()  # all of it is queued, and the host is here
    torch.cuda.synchronize()
    split.mark("other")
    assert split.forward_backward_seconds + split.optimizer_seconds == pytest.approx(begin.elapsed_time(end) / 1e3, rel=0.1)
    assert split.forward_backward_seconds == pytest.approx(2 * split.optimizer_seconds, rel=0.1)
    assert split.own_seconds == pytest.approx(split.forward_backward_seconds + split.optimizer_seconds, rel=0.01)


def test_the_wait_for_a_batch_is_what_the_device_waits_and_not_what_its_host_does() -> None:
    waits, side, steps = DeviceWaits(), torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    begin.record()
    with torch.cuda.stream(side):
        torch.cuda._sleep(3 * CYCLES)  # type: ignore[attr-defined]  # a batch is made
        made = side.record_event()
    torch.cuda._sleep(CYCLES)  # type: ignore[attr-defined]  # the step before, at the same time
    for _ in range(2):  # the second time the batch is there
        waits.asked()
        steps.wait_event(made)
        waits.taken()
    end.record()
    assert waits.arrived_seconds() == 0.0  # the host is here long before
    torch.cuda.synchronize()
    assert waits.arrived_seconds() == pytest.approx(begin.elapsed_time(end) / 1e3 * 2 / 3, rel=0.1)
    assert waits.arrived_seconds() == 0.0  # told once


class Marks(Unobserved):
    """A step's observer that tells a Split."""

    def __init__(self, split: Split) -> None:
        self.part = split.mark  # type: ignore[method-assign]


def test_what_follows_the_last_gradient_of_a_backward_pass_is_no_rank_s_own_work() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    model, images = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 8)).to(device), torch.randn(256, 512, device=device)
    split, last = Split(device), _LastGradient(list(model.parameters()))
    marks, before, forward_backward = Marks(split), 0.0, 0.0
    for step in range(3):
        before, forward_backward = split.own_seconds, split.forward_backward_seconds
        torch.cuda.synchronize()
        split.mark("other")
        split.mark("data")
        model.zero_grad()
        last.begin(marks)
        model(images).sum().backward()
        torch.cuda._sleep(CYCLES)  # type: ignore[attr-defined]  # as the device waits where DDP's backward pass ends
        split.mark("backward")
        split.mark("optimizer")
        torch.cuda.synchronize()
        split._collect()
        slept = CYCLES / 3e9  # at least, whatever the clock
        if step > 0:  # the first step does not know yet which gradient is the last
            assert split.own_seconds - before < slept / 2
            assert split.forward_backward_seconds - forward_backward < slept / 2


def test_the_driver_is_asked_about_the_gpu_that_torch_uses() -> None:
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    device = torch.device("cuda", torch.cuda.current_device())
    metrics = Metrics("run", 0, 1)
    held = torch.ones(1 << 28, dtype=torch.uint8, device=device)
    watch = GpuWatch(metrics, gpu_address(device), every_seconds=0.1)
    labels, end = {"run": "run", "rank": "0", "attempt": "1"}, time.monotonic() + 20
    used = None
    while used is None and time.monotonic() < end:
        time.sleep(0.05)
        used = metrics.registry.get_sample_value("finetune_gpu_memory_used_bytes", labels)
    watch.close()
    assert used is not None, f"NVML {pynvml.__name__} told nothing"
    free, total = torch.cuda.mem_get_info(device)
    assert held.numel() < used <= total
    assert abs(used - (total - free)) < 2 << 30
