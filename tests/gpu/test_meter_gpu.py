"""On a GPU: seconds of the device by real events, and what its driver says of it."""

import time

import pytest
import torch

from cluster.metrics import Metrics
from trainer.rank.device_metrics import GpuWatch, gpu_address
from trainer.rank.meter import Split

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False here"),
]
CYCLES = 200_000_000


def test_the_split_is_the_devices_and_the_host_does_not_wait_for_it() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    split = Split(device)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(3):
        split.mark("data")
        for part in ("forward", "backward"):
            torch.cuda._sleep(CYCLES)  # type: ignore[attr-defined]
            split.mark(part)
        torch.cuda._sleep(CYCLES)  # type: ignore[attr-defined]
        split.mark("optimizer")
    end.record()
    assert not end.query()  # all of it is queued, and the host is here
    torch.cuda.synchronize()
    split.mark("data")
    assert split.forward_backward_seconds + split.optimizer_seconds == pytest.approx(begin.elapsed_time(end) / 1e3, rel=0.1)
    assert split.forward_backward_seconds == pytest.approx(2 * split.optimizer_seconds, rel=0.1)


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
