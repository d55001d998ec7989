"""What is known of a device: data sheets' peaks by name, and NVML's values, by a module that answers as NVIDIA's does."""

import logging
import sys
import threading
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.metrics import Metrics
from trainer.rank.device_metrics import PEAKS, GpuAddress, GpuWatch, device_peak, gpu_address, peak_flops_per_second

ADDRESS = GpuAddress(uuid="11111111-2222-3333-4444-555555555555", pci_bus_id="00000000:1b:00.0")
NAMES = ("gpu_utilization_ratio", "gpu_power_watts", "gpu_memory_used_bytes")


class FakeNvml(ModuleType):
    """pynvml, of one GPU. `lacks` are calls that it does not support, `broken` the error that all calls give from now on."""

    class NVMLError(Exception): ...

    class NVMLError_NotSupported(NVMLError): ...

    class NVMLError_NotFound(NVMLError): ...

    class NVMLError_InvalidArgument(NVMLError): ...

    class NVMLError_LibraryNotFound(NVMLError): ...

    class NVMLError_GpuIsLost(NVMLError): ...

    def __init__(self, *, knows: str = "GPU-" + ADDRESS.uuid, lacks: tuple[str, ...] = (), init: Exception | None = None) -> None:
        super().__init__("pynvml")
        self.knows, self.lacks, self.init = knows, lacks, init
        self.broken: Exception | None = None
        self.power = 301_500
        self.calls: list[str] = []

    def nvmlInit(self) -> None:
        if self.init is not None:
            raise self.init
        self.calls.append("init")

    def nvmlShutdown(self) -> None:
        self.calls.append("shutdown")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return self._handle(uuid)

    def nvmlDeviceGetHandleByPciBusId(self, bus_id: str) -> str:
        return self._handle(bus_id)

    def _handle(self, name: str) -> str:
        if name != self.knows:
            raise self.NVMLError_NotFound("Not Found")
        return "the GPU"

    def _read(self, call: str, gpu: str) -> None:
        assert gpu == "the GPU"
        self.calls.append(call)
        if self.broken is not None:
            raise self.broken
        if call in self.lacks:
            raise self.NVMLError_NotSupported("Not Supported")

    def nvmlDeviceGetUtilizationRates(self, gpu: str) -> Any:
        self._read("utilization", gpu)
        return SimpleNamespace(gpu=75, memory=30)

    def nvmlDeviceGetPowerUsage(self, gpu: str) -> int:
        self._read("power", gpu)
        return self.power

    def nvmlDeviceGetMemoryInfo(self, gpu: str) -> Any:
        self._read("memory", gpu)
        return SimpleNamespace(total=80 << 30, free=10 << 30, used=70 << 30)


def values(metrics: Metrics) -> dict[str, float]:
    labels = {"run": "run", "rank": "0", "attempt": "1"}
    found = {name: metrics.registry.get_sample_value(f"finetune_{name}", labels) for name in NAMES}
    return {name: value for name, value in found.items() if value is not None}


def until(condition: Any) -> None:
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    assert condition()


def watched(monkeypatch: pytest.MonkeyPatch, nvml: ModuleType | None) -> tuple[Metrics, GpuWatch]:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # None: not installed
    metrics = Metrics("run", 0, 1)
    return metrics, GpuWatch(metrics, ADDRESS, every_seconds=0.02)


@pytest.mark.parametrize("knows", ["GPU-" + ADDRESS.uuid, "MIG-" + ADDRESS.uuid, ADDRESS.pci_bus_id])
def test_what_the_gpu_says_is_exported_in_base_units_and_kept_up_to_date(monkeypatch: pytest.MonkeyPatch, knows: str) -> None:
    nvml = FakeNvml(knows=knows)
    metrics, watch = watched(monkeypatch, nvml)
    until(lambda: len(values(metrics)) == 3)
    assert values(metrics) == {"gpu_utilization_ratio": 0.75, "gpu_power_watts": 301.5, "gpu_memory_used_bytes": 70 << 30}
    nvml.power = 120_000
    until(lambda: values(metrics)["gpu_power_watts"] == 120.0)
    watch.close()
    assert nvml.calls[0] == "init"
    assert nvml.calls[-1] == "shutdown"
    assert "gpu-watch" not in {thread.name for thread in threading.enumerate()}


def test_what_a_gpu_does_not_tell_is_left_out_and_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    nvml = FakeNvml(lacks=("power",))
    metrics, watch = watched(monkeypatch, nvml)
    until(lambda: nvml.calls.count("memory") >= 3)
    watch.close()
    assert set(values(metrics)) == {"gpu_utilization_ratio", "gpu_memory_used_bytes"}
    assert nvml.calls.count("power") == 1
    assert [record.getMessage() for record in caplog.records] == ["gpu_power_watts is not exported: NVML says Not Supported"]


def test_values_of_a_gpu_that_is_lost_do_not_stay(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    nvml = FakeNvml()
    metrics, watch = watched(monkeypatch, nvml)
    until(lambda: len(values(metrics)) == 3)
    nvml.broken = FakeNvml.NVMLError_GpuIsLost("GPU is lost")
    until(lambda: nvml.calls[-1] == "shutdown")
    assert values(metrics) == {}
    assert [record.getMessage() for record in caplog.records] == ["what the GPU does is no longer exported: NVML says GPU is lost"]
    watch.close()


@pytest.mark.parametrize(
    ("nvml", "said"),
    [
        (None, "pip install nvidia-ml-py"),
        (FakeNvml(init=FakeNvml.NVMLError_LibraryNotFound("NVML Shared Library Not Found")), "NVML says NVML Shared Library Not Found"),
        (FakeNvml(knows="another GPU"), "NVML says Not Found"),
    ],
)
def test_without_the_library_or_the_driver_that_is_said_once_and_there_are_no_series(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, nvml: ModuleType | None, said: str
) -> None:
    metrics, watch = watched(monkeypatch, nvml)
    until(lambda: "gpu-watch" not in {thread.name for thread in threading.enumerate()})
    watch.close()
    assert values(metrics) == {}
    (record,) = caplog.records
    assert said in record.getMessage()


def test_on_a_cpu_there_is_nothing_to_watch(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    metrics = Metrics("run", 0, 1)
    before = threading.active_count()
    watch = GpuWatch(metrics, gpu_address(torch.device("cpu")))
    assert threading.active_count() == before
    watch.close()
    assert values(metrics) == {}
    assert [record.getMessage()[:6] for record in caplog.records] == ["no GPU"]


def test_a_gpu_is_found_by_what_cuda_visible_devices_does_not_renumber(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(uuid=ADDRESS.uuid, pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert gpu_address(torch.device("cuda", 0)) == ADDRESS


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "teraflops"),
    [
        ("NVIDIA H200", "bf16", True, 989.4),
        ("NVIDIA H100 80GB HBM3", "fp32", True, 494.7),
        ("NVIDIA H100 80GB HBM3", "fp32", False, 66.9),
        ("NVIDIA H100 PCIe", "bf16", True, 756.0),
        ("NVIDIA A100-SXM4-40GB", "bf16", True, 312.0),
        ("NVIDIA A100 80GB PCIe", "fp32", True, 156.0),
        ("NVIDIA L4", "bf16", True, 121.0),
        ("NVIDIA L40S", "bf16", True, 362.0),
        ("Tesla V100-SXM2-16GB", "fp32", True, 15.7),  # has no TF32
        ("Tesla T4", "bf16", True, None),  # and no bf16
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", True, None),  # a part of a GPU is not the GPU
        ("NVIDIA A10G", "bf16", True, None),  # is not an A10
        ("NVIDIA GeForce RTX 9999", "bf16", True, None),
    ],
)
def test_a_peak_is_a_data_sheets_or_none(name: str, precision: str, tf32: bool, teraflops: float | None) -> None:
    assert peak_flops_per_second(name, precision, tf32=tf32) == (teraflops * 1e12 if teraflops is not None else None)


def test_peaks_are_in_the_order_that_hardware_has_and_a_cpu_has_none() -> None:
    for peak in PEAKS:
        assert (peak.bf16 is None) == (peak.tf32 is None)
        if peak.bf16 is not None and peak.tf32 is not None:
            assert peak.bf16 == pytest.approx(2 * peak.tf32, rel=0.02)  # what makes dense of sparse by mistake shows here
            assert peak.tf32 > 1.9 * peak.fp32
    assert device_peak(torch.device("cpu"), "bf16") is None
