"""Facts about a rank's device: its peak FLOP/s, and the GPU's own readings from NVML.

observers.py asks for the peak, worker.py starts the `GpuWatch`. The peak is a number from a data sheet, never a guess: a device that is not
in the table has none. `GpuWatch` is a thread that reads utilisation, power and memory every few seconds. Without a GPU or NVIDIA's library
it logs that and leaves these series out.
"""

import logging
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from cluster.metrics import Metrics

READ_SECONDS = 5.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """Peak TFLOP/s for dense matrices, from NVIDIA's data sheet of the product (its numbers with sparsity, halved)."""

    name: str
    """Pattern for the whole name that the GPU driver gives."""
    bf16: float | None
    tf32: float | None
    fp32: float


PEAKS = (
    Peak(name=r"Tesla V100-(SXM2|SXM3)-\d+GB(-LS)?", bf16=None, tf32=None, fp32=15.7),
    Peak(name=r"Tesla V100-PCIE-\d+GB", bf16=None, tf32=None, fp32=14.0),
    Peak(name=r"(Tesla|NVIDIA) T4", bf16=None, tf32=None, fp32=8.1),
    Peak(name=r"(NVIDIA )?A100-(SXM4|SXM|PCIE|PCIe)-\d+GB|NVIDIA A100 80GB PCIe", bf16=312.0, tf32=156.0, fp32=19.5),
    Peak(name=r"NVIDIA A30", bf16=165.0, tf32=82.0, fp32=10.3),
    Peak(name=r"NVIDIA A40", bf16=149.7, tf32=74.8, fp32=37.4),
    Peak(name=r"NVIDIA A10", bf16=125.0, tf32=62.5, fp32=31.2),
    Peak(name=r"NVIDIA L4", bf16=121.0, tf32=60.0, fp32=30.3),
    Peak(name=r"NVIDIA L40S", bf16=362.0, tf32=183.0, fp32=91.6),
    Peak(name=r"NVIDIA H100 PCIe", bf16=756.0, tf32=378.0, fp32=51.0),
    Peak(name=r"NVIDIA H100 NVL", bf16=835.5, tf32=417.5, fp32=60.0),
    Peak(name=r"NVIDIA H100 80GB HBM3", bf16=989.4, tf32=494.7, fp32=66.9),
    Peak(name=r"NVIDIA H200", bf16=989.4, tf32=494.7, fp32=66.9),
    Peak(name=r"NVIDIA B200", bf16=2250.0, tf32=1125.0, fp32=75.0),
)


def peak_flops_per_second(device_name: str, precision: str, *, tf32: bool) -> float | None:
    """Peak of a GPU in fp32 or bf16, by the name from torch.cuda.get_device_name; None if unknown. `tf32`: fp32 convolutions may use TF32
    (torch.backends.cudnn.allow_tf32), so the peak of fp32 is that of TF32 if the GPU has it. A part of a GPU (MIG) has another name and
    therefore no peak here."""
    for peak in PEAKS:
        if re.fullmatch(peak.name, device_name):
            found = peak.bf16 if precision == "bf16" else (peak.tf32 if tf32 and peak.tf32 else peak.fp32)
            return found * 1e12 if found is not None else None
    return None


def device_peak(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of this machine's `device`; None for a CPU."""
    if device.type != "cuda":
        return None
    return peak_flops_per_second(torch.cuda.get_device_name(device), precision, tf32=torch.backends.cudnn.allow_tf32)


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuAddress:
    """A GPU's address independent of its number: CUDA_VISIBLE_DEVICES renumbers CUDA's devices but not NVML's."""

    uuid: str
    """Without NVML's prefix `GPU-`."""
    pci_bus_id: str


def gpu_address(device: torch.device) -> GpuAddress | None:
    """The device's address; None for a CPU."""
    if device.type != "cuda":
        return None
    found: Any = torch.cuda.get_device_properties(device)
    bus_id = f"{found.pci_domain_id:08x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
    return GpuAddress(uuid=str(found.uuid), pci_bus_id=bus_id)


class GpuWatch:
    """Sets the gpu_* metrics every `every_seconds` until close(). Its own thread talks to the GPU driver, so steps never wait for it."""

    def __init__(self, metrics: Metrics, address: GpuAddress | None, *, every_seconds: float = READ_SECONDS) -> None:
        self._metrics, self._address, self._every_seconds = metrics, address, every_seconds
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if address is None:
            _log.info("no GPU: gpu_utilization_ratio, gpu_power_watts and gpu_memory_used_bytes are left out")
            return
        self._thread = threading.Thread(target=self._run, args=(address,), name="gpu-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join(self._every_seconds)  # do not wait for a hanging driver; the thread dies with the process

    def _run(self, address: GpuAddress) -> None:
        try:
            import pynvml  # type: ignore[import-untyped]
        except ImportError:
            _log.warning("what the GPU does is not exported (gpu_utilization_ratio, ...): pip install nvidia-ml-py")
            return
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            _log.warning("what the GPU does is not exported (gpu_utilization_ratio, ...): NVML says %s", error)
            return
        names = set(_READINGS)
        try:
            handle = _handle(pynvml, address)
            while names and not self._closed.is_set():
                for name in sorted(names):
                    try:
                        self._metrics.set(name, _READINGS[name](pynvml, handle))
                    except pynvml.NVMLError_NotSupported as error:  # parts of a GPU (MIG), and some cards
                        _log.warning("%s is not exported: NVML says %s", name, error)
                        names.discard(name)
                self._closed.wait(self._every_seconds)
        except pynvml.NVMLError as error:  # e.g. a GPU that fell off the bus: remove the series so that no old value passes for a new one
            _log.warning("what the GPU does is no longer exported: NVML says %s", error)
            for name in names:
                self._metrics.unset(name)
        finally:
            pynvml.nvmlShutdown()


def _handle(nvml: ModuleType, address: GpuAddress) -> Any:
    """NVML's handle of the GPU, or part of a GPU, with this address. NVMLError if there is none."""
    for prefix in ("GPU-", "MIG-"):
        try:
            return nvml.nvmlDeviceGetHandleByUUID(prefix + address.uuid)
        except (nvml.NVMLError_NotFound, nvml.NVMLError_InvalidArgument):
            continue
    return nvml.nvmlDeviceGetHandleByPciBusId(address.pci_bus_id)


_READINGS: dict[str, Callable[[Any, Any], float]] = {
    "gpu_utilization_ratio": lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
    "gpu_power_watts": lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
    "gpu_memory_used_bytes": lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used,
}
