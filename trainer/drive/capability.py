"""What a device computes fast, and what `auto` means on it for `train.precision`, `train.channels_last` and `train.small_maps`. Called by
trainer/drive/start.py, identity.py and dry_run.py, and by benchmarks/bare.py. (device_rules.py: settings for which the data count too.)

The driver decides once per run. A run that goes on keeps the values it was started with (`as_started`). A new run decides (`decide`) from
what the workers' nodes report: `here` runs on each of them. All functions but `here` are pure; `here` imports torch only if the run uses
GPUs and nvidia-smi reports none. benchmarks/step.py measures what the choices gain.
"""

import dataclasses
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.drive.device_rules import Images, augment_backend, captures
from trainer.settings.augmentation import augments
from trainer.settings.fields import replaced
from trainer.settings.tree import RunConfig, TrainConfig

BF16_COMPUTE_CAPABILITY = (8, 0)  # Ampere: the first bf16 tensor cores
CHANNELS_LAST_COMPUTE_CAPABILITY = (7, 0)  # Volta: the first tensor cores, which want NHWC
BF16_CPU_FLAGS = ("amx_bf16", "avx512_bf16")
QUERY_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Capability:
    """What one kind of device computes fast."""

    device: Literal["cpu", "cuda"]
    name: str
    """For people, e.g. `NVIDIA H200`, `CPU with amx_bf16`."""
    has_bf16: bool
    likes_channels_last: bool = True
    likes_products: bool = False
    """Matrix products beat convolutions on small maps in bf16 (trainer.models.im2col)."""
    memory_bytes: int | None = None
    """A GPU's own memory; None if nobody knows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """`train` with nothing left at auto, and the lines to tell the user."""

    train: TrainConfig
    said: tuple[str, ...]
    warnings: tuple[str, ...] = ()


def of_cpu(cpuinfo: str) -> Capability:
    """The CPU's capability, from the `flags` lines of /proc/cpuinfo."""
    flags = {flag for line in cpuinfo.splitlines() if line.startswith("flags") for flag in line.partition(":")[2].split()}
    fast = [flag for flag in BF16_CPU_FLAGS if flag in flags]
    return Capability(
        device="cpu",
        name=f"CPU with {fast[0]}" if fast else "CPU without bf16 instructions",
        has_bf16=bool(fast),
        likes_products=fast == ["avx512_bf16"],  # with AMX, convolutions use other kernels
    )


def of_gpu(name: str, compute_capability: tuple[int, int], memory_bytes: int | None = None) -> Capability:
    """The GPU's capability, from its name and compute capability, e.g. (9, 0) for Hopper."""
    return Capability(
        device="cuda",
        name=name,
        has_bf16=compute_capability >= BF16_COMPUTE_CAPABILITY,
        likes_channels_last=compute_capability >= CHANNELS_LAST_COMPUTE_CAPABILITY,
        memory_bytes=memory_bytes,
    )


def weakest(seen: Sequence[Capability]) -> Capability:
    """What all of `seen` can do. The name is that of the first device that lacks something, else of the first device."""
    assert seen, "no device was asked"
    lacking = [one for one in seen if not (one.has_bf16 and one.likes_channels_last)]
    return dataclasses.replace(
        (lacking or seen)[0],
        has_bf16=all(one.has_bf16 for one in seen),
        likes_channels_last=all(one.likes_channels_last for one in seen),
        likes_products=all(one.likes_products for one in seen),
        memory_bytes=min((one.memory_bytes for one in seen if one.memory_bytes is not None), default=None),
    )


def here(*, use_gpus: bool) -> Capability:
    """Capability of this node's GPUs, or of its CPU if the run uses no GPU. ValueError if the run uses GPUs and none is found."""
    if not use_gpus:
        return of_cpu(_cpuinfo())
    return weakest(_gpus())


def as_started(train: TrainConfig, saved: TrainConfig) -> TrainConfig:
    """`train` with each auto replaced by the value in `saved`, the run's first settings. Another precision would make it another run."""
    return dataclasses.replace(
        train,
        precision=saved.precision if train.precision == "auto" else train.precision,
        channels_last=saved.channels_last if train.channels_last == "auto" else train.channels_last,
        small_maps=saved.small_maps if train.small_maps == "auto" else train.small_maps,
    )


def decide(train: TrainConfig, capability: Capability, *, has_depthwise: bool) -> Decision:
    """Decide from `capability` what is left at auto. ValueError for settings that these devices cannot run.

    `has_depthwise`: the model has depthwise convolutions, which CPUs compute more slowly in bf16 than in fp32 (EfficientNet-Lite0: 0.67 s
    per step against 0.46 s)."""
    precision, layout, small_maps = train.precision, train.channels_last, train.small_maps
    said, warnings = [], []
    on_cpu = capability.device == "cpu"
    if train.cuda_graphs == "on" and on_cpu:
        raise ValueError(
            "train.cuda_graphs=on needs a GPU, and the workers have none; leave it out, or give them one (--cluster.gpus-per-worker 1)"
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
    is_of_use = on_cpu and precision == "bf16" and layout == "on" and not train.compile and train.quantise == "none"
    if small_maps == "auto":
        small_maps = "product" if is_of_use and capability.likes_products else "convolution"
        if small_maps == "product":  # `convolution` is what everybody expects and needs no line
            said.append(f"train.small_maps=auto: product ({capability.name})")
    elif small_maps == "product" and not is_of_use:
        warnings.append(
            "train.small_maps=product changes nothing here: it is for steps on a CPU in bf16 and channels_last, not compiled or quantised"
        )
    decided = dataclasses.replace(train, precision=precision, channels_last=layout, small_maps=small_maps)
    return Decision(train=decided, said=tuple(said), warnings=tuple(warnings))


def settled(
    config: RunConfig,
    capability: Capability,
    *,
    has_depthwise: bool,
    images: Images | None,
    workers: int,
    tell: Callable[[str], None],
) -> RunConfig:
    """`config` with the remaining autos decided from `capability`, each told by `tell`. A run that goes on has none left (`as_started`) but
    `train.cuda_graphs`, which changes no result. Where `images` is None, as in a dry run without data and for texts, what depends on
    them is left."""
    decision = decide(config.train, capability, has_depthwise=has_depthwise)
    for line in (*decision.said, *(f"warning: {warning}" for warning in decision.warnings)):
        tell(line)
    config = dataclasses.replace(config, train=decision.train)
    if images is None:
        return config
    on_gpu = capability.device == "cuda"
    if config.data.augment_backend == "auto":
        backend, why = augment_backend(config.data, images, on_gpu=on_gpu, gpu_bytes=capability.memory_bytes)
        if not augments(config.data):
            backend = "torch"
        else:
            tell(f"data.augment_backend=auto: {backend} ({why})")
        config = replaced(config, "data.augment_backend", backend)
    if config.train.cuda_graphs == "auto":
        is_captured, why = captures(config, images, on_gpu=on_gpu, workers=workers)
        word = "on" if is_captured else "off"
        if why:
            tell(f"train.cuda_graphs=auto: {word} ({why})")
        config = replaced(config, "train.cuda_graphs", word)
    return config


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux: the CPU's instructions are unknown
        return ""


def _gpus() -> list[Capability]:
    """Ask nvidia-smi: it sees all GPUs even from a process that was given none, and creates no CUDA context."""
    command = ["nvidia-smi", "--query-gpu=compute_cap,memory.total,name", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return _gpus_by_torch()
    return parse_gpus(text) or _gpus_by_torch()


def parse_gpus(text: str) -> list[Capability]:
    """Parse nvidia-smi's lines, e.g. `9.0, 143771 MiB, NVIDIA H200`. A line without numbers (an old driver) is ignored; so is a memory that
    is none (`[N/A]`, where it is the host's)."""
    found = []
    for line in text.splitlines():
        numbers, _, rest = line.partition(",")
        memory, _, name = rest.partition(",")
        major, dot, minor = numbers.strip().partition(".")
        mebibytes, _, unit = memory.strip().partition(" ")
        if dot and major.isdigit() and minor.isdigit():
            memory_bytes = int(mebibytes) * 2**20 if mebibytes.isdigit() and unit == "MiB" else None
            found.append(of_gpu(name.strip(), (int(major), int(minor)), memory_bytes))
    return found


def _gpus_by_torch() -> list[Capability]:
    import torch

    found = [
        of_gpu(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index), torch.cuda.mem_get_info(index)[1])
        for index in range(torch.cuda.device_count())
    ]
    if not found:
        raise ValueError(
            "the run uses GPUs, but neither nvidia-smi nor torch finds one on this node; say --train.precision bf16 (or fp32) and "
            "--train.channels-last on instead of auto, or --cluster.gpus-per-worker 0"
        )
    return found
