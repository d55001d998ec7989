"""Which kernels a step launches, and how long the device computes: a table from torch's profiler. benchmarks/gpu_suite.py calls it.

`profiled` runs steps under the profiler; `table` and `busy_seconds` judge what it saw, without torch.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROWS = 40
KINDS: Mapping[str, tuple[str, ...]] = {
    "copies": ("memcpy", "memset"),
    "convolutions": ("conv", "cudnn", "xmma", "dgrad", "wgrad", "implicit", "cutlass"),
    "matrix products": ("gemm", "cublas", "nvjet"),
    "optimiser": ("multi_tensor", "fusedsgd", "fusedadam"),
    "compiled": ("triton",),
}
"""Kind -> parts of its kernels' names, in lower case; the first kind that fits counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """One kernel, or one copy, on the device."""

    name: str
    begin_seconds: float
    end_seconds: float


def profiled(run: Callable[[], object], device: Any) -> list[Kernel]:
    """What the device did in `run()`. On a CPU: the operators, those inside of others included."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    is_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities):  # the first one loads the tracer
        torch.ones(8, device=device).sum()
    with profile(activities=activities) as profiler:
        run()
        if is_cuda:
            torch.cuda.synchronize(device)
    wanted = DeviceType.CUDA if is_cuda else DeviceType.CPU
    return [
        Kernel(name=event.name, begin_seconds=event.time_range.start / 1e6, end_seconds=event.time_range.end / 1e6)
        for event in profiler.events() or ()
        if event.device_type == wanted and not event.is_user_annotation
    ]


def kind_of(name: str) -> str:
    lower = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in lower for part in parts)), "others")


def busy_seconds(kernels: Iterable[Kernel]) -> float:
    """Time in which at least one kernel ran: what runs at once on two streams counts once."""
    busy, until = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda each: each.begin_seconds):
        if kernel.end_seconds > until:
            busy += kernel.end_seconds - max(kernel.begin_seconds, until)
            until = kernel.end_seconds
    return busy


def table(kernels: Sequence[Kernel], steps: int, *, rows: int = ROWS) -> dict[str, Any]:
    """Launches and microseconds a step, in all, by kind, and by name for the `rows` that take most; the rest is one row."""
    if not kernels:
        raise ValueError(f"the profiler saw no kernel in {steps} steps: does it support this device (CUPTI)?")
    by_name: dict[str, list[float]] = {}
    by_kind: dict[str, list[float]] = {}
    for kernel in kernels:
        for key, sums in ((kernel.name, by_name), (kind_of(kernel.name), by_kind)):
            sums.setdefault(key, []).append(kernel.end_seconds - kernel.begin_seconds)
    whole = sum(map(sum, by_kind.values()))

    def row(name: str, seconds: Sequence[float]) -> dict[str, Any]:
        took = sum(seconds)
        return {
            "name": name,
            "launches_a_step": len(seconds) / steps,
            "microseconds_a_step": 1e6 * took / steps,
            "share": took / whole if whole else 0.0,
        }

    ordered = sorted(by_name.items(), key=lambda item: (-sum(item[1]), item[0]))
    named = [row(name, seconds) | {"kind": kind_of(name)} for name, seconds in ordered[:rows]]
    if ordered[rows:]:
        rest = [each for _, seconds in ordered[rows:] for each in seconds]
        named.append(row(f"({len(ordered) - rows} more)", rest) | {"kind": ""})
    return {
        "launches_a_step": len(kernels) / steps,
        "busy_microseconds_a_step": 1e6 * busy_seconds(kernels) / steps,
        "by_kind": [row(kind, seconds) for kind, seconds in sorted(by_kind.items(), key=lambda item: -sum(item[1]))],
        "kernels": named,
    }


def lines_of(found: Mapping[str, Any], *, rows: int = 12) -> list[str]:
    """The table as text."""
    lines = [f"  {found['launches_a_step']:.0f} launches a step, {found['busy_microseconds_a_step']:,.0f} us busy"]
    for each in (*found["by_kind"], *found["kernels"][:rows]):
        measured = f"{each['microseconds_a_step']:9,.1f} us  {each['share']:6.1%}  {each['launches_a_step']:6.1f} x"
        lines.append(f"  {measured}  {each['name'][:80]}")
    return lines
