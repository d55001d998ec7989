"""Where a step's time goes, and how much of the device's speed it uses: `--profile`. Called by `trainer.rank.observers`.

A Profiler is told by the step when each part of a step is queued: on a GPU it then records an event in the stream, on a CPU it reads the
clock. Nothing waits: a GPU's events are read once they have long passed. It looks at a window of steps after a warm-up. Beside it stand
the work of a step (`count_work`, on tensors without data) and the speed that this device was measured to have (`measure_ceilings`, a few
seconds before training). None of it changes a result.
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
"""Of a step. `reduction` is what the other ranks' gradients add after the last backward pass (DDP on a GPU hides them in `backward`);
`other` is the rest: the host between two steps, and on a GPU what the device idled for it."""
WARM_UP_STEPS, WINDOW_STEPS = 10, 50
MATRIX = {"cpu": 1024, "cuda": 8192}  # side of the matrices that are multiplied for the ceiling
CONVOLUTION = (16, 256, 28)
"""Images, channels and side of a 3x3 convolution. On a CPU it is another library's (oneDNN) than the matrices (MKL), which in fp32 does
213 GFLOP/s on an AMD EPYC where convolutions do 506."""
COPY_BYTES = {"cpu": 128 * 2**20, "cuda": 2**30}
TRIAL_SECONDS = 0.5
DATA_BOUND, REDUCTION_BOUND, HOST_BOUND = 0.1, 0.25, 0.25  # of a step, above which that is its verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Forward and backward of a model. None where an operation of the model cannot be counted."""

    flops_per_image: float | None
    """A multiplication and an addition are two."""
    bytes_per_image: float | None
    """Read and written by PyTorch's operations one by one; a compiled model keeps some of it in registers."""
    bytes_per_pass: float | None
    """That do not grow with the images: the weights and their gradients."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """What the device was measured to do."""

    flops_per_second: float
    """Multiplying square matrices in the run's precision."""
    bytes_per_second: float
    """Read and written, scaling a long vector into another."""


class _Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the operations' multiplications and additions, by PyTorch's formulas. Not its FlopCounterMode: that puts hooks on all modules
    of the process, in whatever thread they are."""

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
    """Count on tensors without data; the model keeps its modes, its gradients and its statistics. (H, W) is what the model sees."""
    try:  # not 1 image: batch norm in training refuses a single value
        counted = [_count(model, images, image_hw, precision) for images in (2, 4)]
    except (NotImplementedError, RuntimeError):  # an operation that does not work without data
        return Work(flops_per_image=None, bytes_per_image=None, bytes_per_pass=None)
    (flops_of_2, bytes_of_2), (flops_of_4, bytes_of_4) = counted
    each = (bytes_of_4 - bytes_of_2) / 2
    return Work(flops_per_image=(flops_of_4 - flops_of_2) / 2, bytes_per_image=each, bytes_per_pass=bytes_of_2 - 2 * each)


class FlopCount:
    """count_work's flops_per_image, in a thread while the model is trained: made before training, `count` called beside it.

    It holds modules of its own, with the model's tensors, and counts as if those were on a CPU: autograd would share its thread of a GPU.
    No operation runs, so that no random state is touched; a model with one that would have to is not counted."""

    def __init__(self, model: nn.Module) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        self._model: nn.Module | None = None
        with contextlib.suppress(Exception):  # of any model: what cannot be copied is not counted, and trained all the same
            self._model = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})

    def count(self, image_hw: tuple[int, int], *, precision: str) -> float | None:
        """(H, W) is what the model sees. None where the model cannot be copied or counted."""
        if self._model is None:
            return None
        fakes = FakeTensorMode(allow_fallback_kernels=False)
        try:
            flops, _ = _count_on(torch.device("cpu"), fakes, self._model, 2, image_hw, precision)
        except Exception:
            return None
        return flops / 2


def _count(model: nn.Module, images: int, image_hw: tuple[int, int], precision: str) -> tuple[int, int]:
    # Not on the meta device: a model may ask for its device's autocast, which meta lacks. Fake tensors say that they are where they were.
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
                logits = torch.func.functional_call(model, tensors, (batch,))
            logits.float().sum().backward()
    return flops.flops, traffic.bytes


def _without_data(tensor: Tensor, device: torch.device) -> Tensor:
    """Its sizes, strides and type, on `device`; to be called where tensors are made without data."""
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
    """Each of the two gradients costs what the forward pass does. PyTorch's own count takes grouped convolutions for whole ones."""
    forward: int = conv_flop_count(list(images), list(weight), list(grad), transposed=transposed)
    return forward * (wanted[0] + wanted[1])


_FORMULAS = flop_registry | {torch.ops.aten.convolution_backward: shape_wrapper(_convolution_backward)}  # type: ignore[no-untyped-call]


def measure_ceilings(device: torch.device, *, precision: str, clock: Callable[[], float] = time.perf_counter) -> Ceilings:
    """Two seconds of matrices, convolutions and copies on `device`, best of several trials. The global random state is not touched."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    side, count = MATRIX[device.type], COPY_BYTES[device.type] // 4
    left, right = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))  # zeros would be too easy
    product = torch.empty(side, side, device=device, dtype=dtype)
    # Convolutions may use TF32 where matrices are not allowed to, by PyTorch's defaults; the ceiling is of what the model may use.
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
    source = torch.randn(count, device=device, generator=generator)
    into = torch.empty_like(source)
    copy_seconds = _best_seconds(lambda: torch.mul(source, 1.5, out=into), device, clock)
    return Ceilings(flops_per_second=flops_per_second, bytes_per_second=2.0 * 4 * count / copy_seconds)


def _best_seconds(job: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    """Of one `job`: the fastest of the trials that fit into TRIAL_SECONDS, after two that warm up."""
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
    """Once the device has done all that was asked of it. Only before training."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()


class Profiler:
    """mark() in the steps, stepped() after each, and result() once the window has passed."""

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
        """`first_step` to before `stop_step` are the steps that this attempt will do; `share` is the part of a batch that this rank
        carries, in `passes` goes through the model."""
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
        """Nothing more will be marked."""
        return self._step >= self._stop

    def mark(self, part: str) -> None:
        """`part` of a step ends here, in the order of the device's work."""
        if self._first - 1 <= self._step < self._stop:  # the step before the window tells when the first one's wait for data began
            self._marks.append((self._step, part, self._moment()))

    def cut(self) -> None:
        """What comes next is no part of a step: an evaluation, a checkpoint."""
        if self._marks and not self.is_over:
            self._marks.append((self._step, "", None))

    def stepped(self, stats: StepStats) -> None:
        """After each step."""
        if self._first <= self._step < self._stop and not stats.skipped:
            self._samples += stats.samples
            self._data_waits[self._step] = stats.data_wait_seconds
            self._exchange_seconds += stats.exchange_seconds
        self._step = stats.steps_done

    def result(self, *, wait: bool = False) -> dict[str, Any] | None:
        """What the window showed, once; None while the device is at work on it, and afterwards. `wait` for it at the end of training."""
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
    """Seconds of each of PARTS over the steps that `data_waits` names. `marks` are (step, part, when it ended) in order, ("", None) being
    a cut: what comes before it and what comes after do not touch.

    Up to a step's "data" mark, from the mark before it, is its wait for data, as far as the host waited for them, and `other`."""
    parts = dict.fromkeys(PARTS, 0.0)
    before: Any = None
    for step, part, when in marks:
        if part and step in data_waits:
            if part == "data":
                waited = data_waits[step]
                gap = between(before, when) if before is not None else waited
                parts["data"] += min(gap, waited)
                parts["other"] += max(0.0, gap - waited)
            else:
                parts[part] += between(before, when)
        before = when
    if parts["reduction"] == 0.0:  # DDP on a CPU waits inside the backward pass
        parts["reduction"] = min(exchange_seconds, parts["backward"])
        parts["backward"] -= parts["reduction"]
    return parts


def describe(
    parts: Mapping[str, float], *, steps: int, samples: int, share: float, passes: int, work: Work, ceilings: Ceilings
) -> dict[str, Any]:
    """A profile as summary.json holds it. `parts` are seconds over `steps` steps of `samples` images in all ranks together."""
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
    """One sentence: what a step is held up by, and how far it is from what the device can do."""
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
