"""`--profile`: where a step's time goes, and how much of the device's speed it uses. observers.py calls it; `--dry-run` and benchmarks use
`count_work`.

The step tells a Profiler when each part is queued. On a GPU the Profiler then records an event in the stream, on a CPU it reads the clock.
Nothing waits: a GPU's events are read long after the device has passed them. The Profiler looks at a window of steps after a warm-up.
`count_work` counts the work of a step on tensors without data. `measure_ceilings` measures the device's speed for a few seconds before
training. None of this changes a result.
"""

import contextlib
import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry, shape_wrapper

from trainer.learn.step import StepStats
from trainer.settings.units import percent

PARTS = ("data", "forward", "backward", "reduction", "optimizer", "other")
"""Parts of a step. `reduction` is the time that exchanging gradients adds after the last one is there. `other` is the rest:
the host's work between two steps, and the time a GPU idles for it."""
WARM_UP_STEPS, WINDOW_STEPS = 10, 50
MATRIX = {"cpu": 1024, "cuda": 8192}  # side of the matrices multiplied for the ceiling
CONVOLUTION = (16, 256, 28)
"""Images, channels and side of a 3x3 convolution. On a CPU convolutions use another library (oneDNN) than matrix products (MKL): on an AMD
EPYC in fp32 convolutions reach 506 GFLOP/s and matrix products 213."""
COPY_BYTES = {"cpu": 128 * 2**20, "cuda": 2**30}
TRIAL_SECONDS = 0.5
DATA_BOUND, REDUCTION_BOUND, HOST_BOUND = 0.1, 0.25, 0.25  # fraction of a step above which this part is the verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Work of a model's forward and backward pass. None if an operation of the model cannot be counted."""

    flops_per_image: float | None
    """A multiplication and an addition count as two."""
    bytes_per_image: float | None
    """Bytes that PyTorch's operations read and write one by one. A compiled model keeps some of them in registers."""
    bytes_per_pass: float | None
    """Bytes that do not grow with the number of images: weights and their gradients."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """Measured speed of the device."""

    flops_per_second: float
    """When multiplying square matrices in the run's precision; on a CPU, when convolving if that is faster."""
    bytes_per_second: float
    """Read plus written, when scaling a long vector into another."""


class _Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the operations' multiplications and additions by PyTorch's formulas. PyTorch's FlopCounterMode would put hooks on all modules
    of the process, in every thread."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


class _Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of each operation's tensors. Views move nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        is_view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not is_view and func.namespace == "aten":
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            self.bytes += sum(tensor.numel() * tensor.itemsize for tensor in tensors)
        return out


def count_work(model: nn.Module, image_hw: tuple[int, int], *, precision: str) -> Work:
    """Count on tensors without data. The model keeps its modes, gradients and statistics. `image_hw`: (H, W) that the model sees."""
    try:  # 2 and 4 images: BatchNorm in training refuses a single value
        counted = [_count(model, images, image_hw, precision) for images in (2, 4)]
    except (NotImplementedError, RuntimeError):  # some operation does not work without data
        return Work(flops_per_image=None, bytes_per_image=None, bytes_per_pass=None)
    (flops_of_2, bytes_of_2), (flops_of_4, bytes_of_4) = counted
    each = (bytes_of_4 - bytes_of_2) / 2
    return Work(flops_per_image=(flops_of_4 - flops_of_2) / 2, bytes_per_image=each, bytes_per_pass=bytes_of_2 - 2 * each)


class FlopCount:
    """count_work's flops_per_image, counted in a thread while the model trains. Make it before training; the thread calls `count`.

    It copies the modules but shares the model's tensors, and counts as if they were on a CPU, because on a GPU autograd would use the same
    thread as training. No operation runs, so no random state changes. A model with an operation that must run is not counted."""

    def __init__(self, model: nn.Module) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        self._model: nn.Module | None = None
        with contextlib.suppress(Exception):  # any model may fail here: one that cannot be copied trains all the same, uncounted
            self._model = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})

    def count(self, image_hw: tuple[int, int], *, precision: str) -> float | None:
        """FLOPs per image. `image_hw`: (H, W) that the model sees. None if the model cannot be copied or counted."""
        if self._model is None:
            return None
        fakes = FakeTensorMode(allow_fallback_kernels=False)
        try:
            flops, _ = _count_on(torch.device("cpu"), fakes, self._model, 2, image_hw, precision)
        except Exception:
            return None
        return flops / 2


def _count(model: nn.Module, images: int, image_hw: tuple[int, int], precision: str) -> tuple[int, int]:
    # Fake tensors instead of the meta device: a model may use its device's autocast, which meta lacks. Fake tensors keep their device.
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        return _count_on(device, FakeTensorMode(), model, images, image_hw, precision)


def _count_on(
    device: torch.device, fakes: FakeTensorMode, model: nn.Module, images: int, image_hw: tuple[int, int], precision: str
) -> tuple[int, int]:
    flops, traffic = _Flops(), _Traffic()
    with fakes:
        tensors: dict[str, Tensor] = {}
        for parameter_name, parameter in model.named_parameters():
            tensors[parameter_name] = _without_data(parameter, device).requires_grad_(parameter.requires_grad)
        tensors |= {name: _without_data(buffer, device) for name, buffer in model.named_buffers()}
        batch = torch.empty(images, 3, *image_hw, device=device)  # (n, 3, H, W)
        with flops, traffic:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = torch.func.functional_call(model, tensors, (batch,))  # (n, outputs)
            logits.float().sum().backward()
    return flops.flops, traffic.bytes


def _without_data(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor with the same sizes, strides and type on `device`. Call it inside a FakeTensorMode."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def _convolution_backward(
    grad: Sequence[int],
    images: Sequence[int],
    weight: Sequence[int],
    _bias: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: bool,
    _output_padding: Any,
    _groups: int,
    wanted: Sequence[bool],
    **_: Any,
) -> int:
    """Each of the two gradients costs as much as the forward pass. PyTorch's own formula counts grouped convolutions as full ones."""
    forward: int = conv_flop_count(list(images), list(weight), list(grad), transposed=transposed)
    return forward * (wanted[0] + wanted[1])


_FORMULAS = flop_registry | {torch.ops.aten.convolution_backward: shape_wrapper(_convolution_backward)}  # type: ignore[no-untyped-call]


def measure_ceilings(device: torch.device, *, precision: str, clock: Callable[[], float] = time.perf_counter) -> Ceilings:
    """Time matrix products, convolutions and copies on `device` for two seconds, and take the best of several trials. The global random
    state is not touched."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    side, count = MATRIX[device.type], COPY_BYTES[device.type] // 4
    left, right = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))  # zeros would be too fast
    product = torch.empty(side, side, device=device, dtype=dtype)
    # By PyTorch's defaults convolutions may use TF32 and matrix products may not. The ceiling is for what the model may use.
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        torch.set_float32_matmul_precision("high")
    try:
        seconds = _best_seconds(lambda: torch.mm(left, right, out=product), device, clock)
    finally:
        torch.set_float32_matmul_precision(before)
    flops_per_second = 2.0 * side**3 / seconds
    if device.type == "cpu":
        images, channels, pixels = CONVOLUTION
        x, kernel = (torch.randn(shape, generator=generator).to(dtype, memory_format=torch.channels_last)
                     for shape in ((images, channels, pixels, pixels), (channels, channels, 3, 3)))  # fmt: skip
        with torch.no_grad():
            seconds = _best_seconds(lambda: torch.conv2d(x, kernel, padding=1), device, clock)
        flops_per_second = max(flops_per_second, 2.0 * images * (channels * pixels) ** 2 * 9 / seconds)
    source = torch.randn(count, device=device, generator=generator)  # (count,) float32
    into = torch.empty_like(source)
    copy_seconds = _best_seconds(lambda: torch.mul(source, 1.5, out=into), device, clock)
    return Ceilings(flops_per_second=flops_per_second, bytes_per_second=2.0 * 4 * count / copy_seconds)


def _best_seconds(job: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    """Seconds of one `job`: the fastest of the trials that fit into TRIAL_SECONDS, after two warm-up trials."""
    for _ in range(2):
        job()
    best, until = float("inf"), clock() + TRIAL_SECONDS
    while True:
        begin = _now(device, clock)
        job()
        best = min(best, _now(device, clock) - begin)
        if clock() > until:
            return best


def _now(device: torch.device, clock: Callable[[], float]) -> float:
    """The time once the device has done all its work. It synchronises, so use it only before training."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()


class Profiler:
    """Call mark() inside the steps, stepped() after each one, and result() once the window has passed."""

    def __init__(
        self,
        *,
        device: torch.device,
        first_step: int,
        stop_step: int,
        share: float,
        work: Work,
        passes: int,
        ceilings: Ceilings,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """This attempt will do the steps `first_step` .. `stop_step` - 1. `share`: fraction of a batch that this rank carries, in `passes`
        passes through the model."""
        steps = stop_step - first_step
        warm_up = min(WARM_UP_STEPS, steps // 3)
        self._first = first_step + warm_up
        self._stop = min(self._first + WINDOW_STEPS, stop_step)
        self._step = first_step
        self._is_cuda, self._clock = device.type == "cuda", clock
        self.work, self.ceilings = work, ceilings
        self._share, self._passes = share, passes
        self._marks: list[tuple[int, str, Any]] = []  # (step, part, when it ended)
        self._data_waits: dict[int, float] = {}  # of the steps that count
        self._exchange_seconds = 0.0
        self._samples = 0
        self._result: dict[str, Any] | None = None

    @property
    def is_over(self) -> bool:
        """The window has passed: mark() records no more."""
        return self._step >= self._stop

    def mark(self, part: str) -> None:
        """Mark the end of `part` of a step, in the order of the device's work."""
        if part == "other" and not self._is_cuda:
            return  # the host's own clock tells its waits for data from the rest (StepStats)
        if self._first - 1 <= self._step < self._stop:  # the step before the window shows when the first wait for data began
            self._marks.append((self._step, part, self._moment()))

    def cut(self) -> None:
        """The time that follows is not part of a step: an evaluation or a checkpoint."""
        if self._marks and not self.is_over:
            self._marks.append((self._step, "", None))

    def stepped(self, stats: StepStats) -> None:
        """Call it after each step."""
        if self._first <= self._step < self._stop and not stats.skipped:
            self._samples += stats.samples
            self._data_waits[self._step] = stats.data_wait_seconds
            self._exchange_seconds += stats.exchange_seconds
        self._step = stats.steps_done

    def result(self, *, wait: bool = False) -> dict[str, Any] | None:
        """The window's profile, returned once. None while the device still works on the window, and after the first result. `wait` makes it
        wait for the device, at the end of training."""
        if not (self.is_over or wait) or self._result is not None or not self._data_waits:
            return None
        if self._is_cuda:
            last = next(when for _, _, when in reversed(self._marks) if when is not None)
            if wait:
                last.synchronize()
            elif not last.query():
                return None
        self._result = describe(
            step_parts(self._marks, self._data_waits, self._exchange_seconds, self._seconds_between),
            steps=len(self._data_waits),
            samples=self._samples,
            share=self._share,
            passes=self._passes,
            work=self.work,
            ceilings=self.ceilings,
        )
        self._marks.clear()
        return self._result

    def _moment(self) -> Any:
        if not self._is_cuda:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _seconds_between(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1e3 if self._is_cuda else float(end - begin)


def step_parts(
    marks: Sequence[tuple[int, str, Any]], data_waits: Mapping[int, float], exchange_seconds: float, between: Callable[[Any, Any], float]
) -> dict[str, float]:
    """Seconds of each of PARTS over the steps in `data_waits`. `marks` are (step, part, when it ended) in order. A cut has part "" and when
    None: the time across it counts for no part.

    The time from the previous mark to a step's "data" mark is its wait for data, as long as the host waited; the rest of it is `other`. On
    a GPU, whose waits no host's clock shows, there is an "other" mark between the two."""
    parts = dict.fromkeys(PARTS, 0.0)
    before: Any = None
    newest = ""
    for step, part, when in marks:
        if part and step in data_waits:
            if part == "other":
                parts["other"] += between(before, when) if before is not None else 0.0
            elif part == "data" and newest == "other":
                parts["data"] += between(before, when)
            elif part == "data":
                waited = data_waits[step]
                gap = between(before, when) if before is not None else waited
                parts["data"] += min(gap, waited)
                parts["other"] += max(0.0, gap - waited)
            elif part == "gradients":
                parts["backward"] += between(before, when)
            else:  # from DDP's last gradient on, its backward pass waits for other ranks
                parts["reduction" if newest == "gradients" else part] += between(before, when)
        before, newest = when, part
    if parts["reduction"] == 0.0:  # DDP on a CPU waits inside the backward pass
        parts["reduction"] = min(exchange_seconds, parts["backward"])
        parts["backward"] -= parts["reduction"]
    return parts


def describe(
    parts: Mapping[str, float], *, steps: int, samples: int, share: float, passes: int, work: Work, ceilings: Ceilings
) -> dict[str, Any]:
    """The profile in the format of summary.json. `parts`: seconds over `steps` steps, with `samples` images over all ranks together."""
    total = sum(parts.values())
    images, ratios = samples * share, {part: seconds / total if total else 0.0 for part, seconds in parts.items()}
    flops_ratio = bytes_ratio = None
    if total and work.flops_per_image is not None:
        flops_ratio = work.flops_per_image * images / total / ceilings.flops_per_second
    if total and work.bytes_per_image is not None and work.bytes_per_pass is not None:
        moved = work.bytes_per_image * images + work.bytes_per_pass * passes * steps
        bytes_ratio = moved / total / ceilings.bytes_per_second
    return {
        "steps": steps,
        "step_seconds": total / steps,
        "images_per_second": samples / total if total else None,
        "parts_seconds": {part: seconds / steps for part, seconds in parts.items()},
        "parts_ratio": ratios,
        "work": asdict(work),
        "ceilings": asdict(ceilings),
        "flops_ratio": flops_ratio,
        "bytes_ratio": bytes_ratio,
        "verdict": verdict(ratios, flops_ratio, bytes_ratio),
    }


def verdict(ratios: Mapping[str, float], flops_ratio: float | None, bytes_ratio: float | None) -> str:
    """One sentence: what limits a step, and how close it is to the device's speed."""
    peak = f" at {percent(flops_ratio)} of peak" if flops_ratio is not None else ""
    data = f"; data wait {percent(ratios['data'])}"
    if ratios["data"] > DATA_BOUND:
        return f"waits for data {percent(ratios['data'])} of the time: compute{peak}"
    if ratios["reduction"] > REDUCTION_BOUND:
        return f"waits for other ranks {percent(ratios['reduction'])} of the time: compute{peak}{data}"
    if ratios["other"] > HOST_BOUND:
        return f"held up by the host {percent(ratios['other'])} of the time: compute{peak}{data}"
    if flops_ratio is not None and bytes_ratio is not None and bytes_ratio > flops_ratio:
        return f"memory-bound at {percent(bytes_ratio)} of peak bandwidth: compute{peak}{data}"
    return f"compute-bound{peak}{data}"
