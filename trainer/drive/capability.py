"""What a device is good at, and what `auto` of `train.precision`, `train.channels_last` and `train.small_maps` becomes on it. Called by
trainer/drive/start.py, identity.py and dry_run.py.

The driver decides it once a run: where the run goes on, as it was started (`as_started`), else from what the workers' nodes report
(`here`, run on each of them; `decide`). Pure but for `here`, which imports torch only where there are GPUs and nvidia-smi is silent.
What the choices are worth is measured by benchmarks/step.py.
"""

import dataclasses
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.settings.tree import RunConfig, TrainConfig

BF16_COMPUTE_CAPABILITY = (8, 0)  # Ampere; before it there are no bf16 tensor cores
CHANNELS_LAST_COMPUTE_CAPABILITY = (7, 0)  # the first tensor cores, which want NHWC
BF16_CPU_FLAGS = ("amx_bf16", "avx512_bf16")
QUERY_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Capability:
    """What one kind of device computes fast."""

    device: Literal["cpu", "cuda"]
    name: str
    """For people: `NVIDIA H200`, `CPU with amx_bf16`."""
    has_bf16: bool
    likes_channels_last: bool = True
    likes_products: bool = False
    """Of convolutions on small maps in bf16 (trainer.models.im2col)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """`train` with nothing left at auto, and what to tell the user."""

    train: TrainConfig
    said: tuple[str, ...]
    warnings: tuple[str, ...] = ()


def of_cpu(cpuinfo: str) -> Capability:
    """From the text of /proc/cpuinfo: its `flags` lines."""
    flags = {flag for line in cpuinfo.splitlines() if line.startswith("flags") for flag in line.partition(":")[2].split()}
    fast = [flag for flag in BF16_CPU_FLAGS if flag in flags]
    return Capability(
        device="cpu",
        name=f"CPU with {fast[0]}" if fast else "CPU without bf16 instructions",
        has_bf16=bool(fast),
        likes_products=fast == ["avx512_bf16"],  # with AMX the convolutions have other kernels
    )


def of_gpu(name: str, compute_capability: tuple[int, int]) -> Capability:
    """From a GPU's name and its compute capability, (9, 0) being Hopper's."""
    return Capability(
        device="cuda",
        name=name,
        has_bf16=compute_capability >= BF16_COMPUTE_CAPABILITY,
        likes_channels_last=compute_capability >= CHANNELS_LAST_COMPUTE_CAPABILITY,
    )


def weakest(seen: Sequence[Capability]) -> Capability:
    """What all of `seen` can do; the name is that of the first that lacks something."""
    assert seen, "no device was asked"
    lacking = [one for one in seen if not (one.has_bf16 and one.likes_channels_last)]
    return dataclasses.replace(
        (lacking or seen)[0],
        has_bf16=all(one.has_bf16 for one in seen),
        likes_channels_last=all(one.likes_channels_last for one in seen),
        likes_products=all(one.likes_products for one in seen),
    )


def here(*, use_gpus: bool) -> Capability:
    """Of this node's GPUs, or of its CPU where the run uses no GPU. ValueError where GPUs are asked for and none answers."""
    if not use_gpus:
        return of_cpu(_cpuinfo())
    return weakest(_gpus())


def as_started(train: TrainConfig, saved: TrainConfig) -> TrainConfig:
    """`train` with what it leaves at auto taken from the settings that the run was started with: another precision would be another run."""
    return dataclasses.replace(
        train,
        precision=saved.precision if train.precision == "auto" else train.precision,
        channels_last=saved.channels_last if train.channels_last == "auto" else train.channels_last,
        small_maps=saved.small_maps if train.small_maps == "auto" else train.small_maps,
    )


def decide(train: TrainConfig, capability: Capability, *, has_depthwise: bool) -> Decision:
    """What is left at auto, decided by the devices. `has_depthwise`: whether the model has depthwise convolutions, which CPUs compute more
    slowly in bf16 (EfficientNet-Lite0: 0.67 s a step against 0.46 s in fp32). ValueError for what these devices cannot do."""
    precision, layout, small_maps = train.precision, train.channels_last, train.small_maps
    said, warnings = [], []
    on_cpu = capability.device == "cpu"
    if train.cuda_graphs and on_cpu:
        raise ValueError(
            "train.cuda_graphs=true needs a GPU, and the workers have none; leave it out, or give them one (--cluster.gpus-per-worker 1)"
        )
    if precision == "auto":
        precision, why = "bf16", capability.name
        if not capability.has_bf16:
            precision, why = "fp32", capability.name if on_cpu else f"{capability.name} does not compute in bf16"
        elif on_cpu and has_depthwise:
            precision, why = "fp32", f"{capability.name}, but depthwise convolutions are slower in it"
        said.append(f"train.precision=auto: {precision} ({why})")
    elif precision == "bf16" and not capability.has_bf16:
        warnings.append(
            f"train.precision=bf16 is emulated here and slow ({capability.name}); a new run is faster with --train.precision fp32"
        )
    if layout == "auto":
        layout = "on" if capability.likes_channels_last else "off"
        said.append(f"train.channels_last=auto: {layout} ({capability.name})")
    is_of_use = on_cpu and precision == "bf16" and layout == "on" and not train.compile
    if small_maps == "auto":
        small_maps = "product" if is_of_use and capability.likes_products else "convolution"
        if small_maps == "product":  # the other is what everybody expects
            said.append(f"train.small_maps=auto: product ({capability.name})")
    elif small_maps == "product" and not is_of_use:
        warnings.append(
            "train.small_maps=product changes nothing here: it is for steps that a CPU computes in bf16 and channels_last, not compiled"
        )
    decided = dataclasses.replace(train, precision=precision, channels_last=layout, small_maps=small_maps)
    return Decision(train=decided, said=tuple(said), warnings=tuple(warnings))


def settled(config: RunConfig, capability: Capability, *, has_depthwise: bool, tell: Callable[[str], None]) -> RunConfig:
    """`config` with what is still at auto decided by the devices, and told. A run that goes on has nothing left open (`as_started`)."""
    decision = decide(config.train, capability, has_depthwise=has_depthwise)
    for line in (*decision.said, *(f"warning: {warning}" for warning in decision.warnings)):
        tell(line)
    return dataclasses.replace(config, train=decision.train)


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux: no instructions are known of
        return ""


def _gpus() -> list[Capability]:
    """By the driver's own tool, which sees all GPUs from a process that was given none, and opens no context on them."""
    command = ["nvidia-smi", "--query-gpu=compute_cap,name", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return _gpus_by_torch()
    return parse_gpus(text) or _gpus_by_torch()


def parse_gpus(text: str) -> list[Capability]:
    """Of nvidia-smi's lines `9.0, NVIDIA H200`; a line without numbers (an old driver) says nothing."""
    found = []
    for line in text.splitlines():
        numbers, _, name = line.partition(",")
        major, dot, minor = numbers.strip().partition(".")
        if dot and major.isdigit() and minor.isdigit():
            found.append(of_gpu(name.strip(), (int(major), int(minor))))
    return found


def _gpus_by_torch() -> list[Capability]:
    import torch

    found = [
        of_gpu(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)) for index in range(torch.cuda.device_count())
    ]
    if not found:
        raise ValueError(
            "the run uses GPUs, but neither nvidia-smi nor torch finds one on this node; say --train.precision bf16 (or fp32) and "
            "--train.channels-last on instead of auto, or --cluster.gpus-per-worker 0"
        )
    return found
