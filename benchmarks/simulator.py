"""How long a data-parallel step takes on 1 to 1,024 GPUs: all-reduce, buckets overlapping backward, stragglers, checkpoints, failures.

Called by benchmarks.scaling, which prints and draws the results. It measures nothing: it calculates with figures from elsewhere, and names
the source of each. `TABLES` are published measurements, `fitted()` the constants derived from some of their rows, `validation()` the
results for all other rows. An assumption without a published source is a field of `Setup` whose docstring says "assumed".

    all-reduce   of S bytes over k nodes of g GPUs: the fastest of the network's courses, each a few constants (`Course`)
    buckets      e_j = max(e_{j-1}, ready_j) + T(S_j);  step = forward + max(backward, e_last) + optimiser + straggler
    failures     ETTR = 1 - Ts/Tc - (Tc/2 + Tr)/MTTF at the best interval, Tc = sqrt(2 * Ts * MTTF); n GPUs fail n times as often as one
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cluster.reduce import BUCKET_BYTES, SMALL_BUCKET_BYTES, subtrees
from dataio.order import blocks_of_virtual_ranks

RESULTS = Path(__file__).parent / "results"
MIB = 2**20
DDP_BUCKET_BYTES, DDP_FIRST_BUCKET_BYTES = 25 * MIB, MIB  # torch's defaults


# -- published measurements -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Times of one all-reduce of float32, by size."""

    what: str
    source: str
    nodes: int
    microseconds: Mapping[float, float]
    """MiB -> time. From nccl-tests' column "in-place", since gradients are reduced in place; the other has some first touches in it."""
    gpus_per_node: int = 8


_ISSUE_309 = "https://github.com/NVIDIA/nccl-tests/issues/309"
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def _table(what: str, source: str, nodes: int, *microseconds: float, sizes: Sequence[float] = _SIZES) -> Table:
    return Table(what=what, source=source, nodes=nodes, microseconds=dict(zip(sizes, microseconds, strict=True)))


_MB = 1e6 / MIB
TABLES = {
    # The two figures of the project's notes, which do not say who measured them, or how.
    "h200": _table("8 x H200, measured; from the project's notes", "notes", 1, 160.0, 255.0, sizes=(22.3 * _MB, 44.7 * _MB)),
    # XLA's cost model for sm_90: the tensor's bytes over the runtime of one collective, measured by XLA's own generator.
    "xla": _table(
        "8 x sm_90 (H100), the table in XLA's cost model",
        "https://github.com/openxla/xla/blob/main/xla/service/gpu/model/collective_interpolator_data.h (2025, with sm_90 alone)",
        1,
        *(46.7, 48.7, 65.6, 112.7, 152.0, 232.6, 404.4, 687.1, 1286.3, 2462.0, 4836.0),
    ),
    # Below: nccl-tests runs as posted by users. H100 SXM, 8 NICs of 400 Gb/s a node, InfiniBand.
    "nvls": _table(
        "8 x H100, one process",
        "https://github.com/NVIDIA/nccl-tests/issues/290",
        1,
        *(614.3, 1134.8, 2181.4, 4043.6),
        sizes=(128, 256, 512, 1024),
    ),
    "a2": _table("2 nodes, cluster A", _ISSUE_309, 2, 82.98, 93.52, 111.9, 150.5, 202.7, 269.7, 469.6, 751.2, 1290.4, 2371.3, 4503.5),
    "a4": _table("4 nodes, cluster A", _ISSUE_309, 4, 93.26, 156.4, 174.2, 256.7, 286.3, 455.5, 615.5, 1043.6, 2204.7, 3617.5, 6532.2),
    "a8": _table("8 nodes, cluster A", _ISSUE_309, 8, 115.7, 143.3, 203.8, 321.4, 373.5, 508.2, 709.2, 1149.5, 2028.1, 3509.4, 7414.5),
    "b2": _table("2 nodes, cluster B", _ISSUE_309, 2, 71.47, 76.62, 94.22, 131.4, 183.8, 267.7, 466.3, 749.2, 1276.0, 2355.1, 4470.2),
    "b4": _table("4 nodes, cluster B", _ISSUE_309, 4, 82.21, 132.2, 154.0, 202.4, 258.3, 370.3, 574.4, 1013.1, 1772.4, 3111.7, 5802.8),
    "c2": _table(
        "2 nodes, cluster C (Nebius)",
        "https://github.com/dstackai/dstack/blob/master/examples/clusters/nebius/README.md",
        2,
        *(77.82, 97.67, 114.66, 156.03, 200.98, 276.45, 480.0, 756.21, 1303.37, 2373.42, 4513.82),
    ),
}
FIT: dict[str, tuple[float, ...]] = {"xla": (1, 4, 16, 64, 256, 1024), "a2": (1, 4, 8, 16, 32, 64, 128), "a8": (1, 4, 8, 16, 32, 64, 128)}
"""Sizes in MiB of the rows that `fitted()` uses. All others are held out: XLA's other sizes, both other clusters, four nodes."""
VALID_MIB = {1: (16, 64), 2: (8, 64), 4: (8, 64), 8: (8, 64)}
"""nodes -> sizes in MiB for which the courses are claimed to hold. ResNet-18's gradients are 43 MiB. The range was chosen after seeing the
errors; `validation` shows all of them. Below the range, protocols change and clusters differ (up to 24 %); above it, NVLS is up to 22 %
faster than these courses say. No published times were found above 8 nodes: there the courses are extrapolated."""


# -- the network ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """One way to reduce over k nodes of g GPUs; NCCL has several (protocols, rings, trees) and takes the fastest.

    The time is base + hops * hop plus the data: 2(g-1)/g * S through NVLink, 2(k-1)/k * S/g through each NIC; hops = 2 * log2(k), up and
    down a tree of nodes. `phases` says how to combine these: "serial" adds them (the formula of the project's notes); in "pipelined" the
    slower one hides the other; in "relayed" (small messages) every hop waits for the whole message: hops * (hop + S/nic), no NVLink term.
    """

    base_seconds: float
    hop_seconds: float = 0.0
    nvlink_bytes_per_second: float = math.inf
    nic_bytes_per_second: float = math.inf
    phases: Literal["serial", "pipelined", "relayed"] = "serial"

    def seconds(self, size: float, gpus_per_node: int, nodes: int) -> float:
        g, k = gpus_per_node, nodes
        hops = 2 * math.log2(k)
        inside = 2 * (g - 1) / g * size / self.nvlink_bytes_per_second
        between = 2 * (k - 1) / k * (size / g) / self.nic_bytes_per_second
        match self.phases:
            case "serial":
                data = inside + between
            case "pipelined":
                data = max(inside, between)
            case "relayed":
                data = hops * size / self.nic_bytes_per_second
        return self.base_seconds + hops * self.hop_seconds + data


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """Courses inside a node and between nodes, with separate constants, because NCCL runs other algorithms between nodes."""

    inside: tuple[Course, ...]
    """The first one is for large messages; the same holds for `between`."""
    between: tuple[Course, ...]
    gpus_per_node: int = 8

    def shape(self, gpus: int) -> tuple[int, int]:
        """(GPUs a node, nodes); a partly filled node counts as full."""
        if gpus < 1:
            raise ValueError(f"gpus={gpus} must be at least 1")
        nodes = -(-gpus // self.gpus_per_node)
        return (gpus, 1) if nodes == 1 else (self.gpus_per_node, nodes)

    def all_reduce_seconds(self, size: float, gpus: int) -> float:
        """Time for `size` bytes; 0 for one GPU."""
        g, k = self.shape(gpus)
        if gpus == 1:
            return 0.0
        return min(course.seconds(size, g, k) for course in (self.inside if k == 1 else self.between))


_NOTES = Course(base_seconds=59e-6, hop_seconds=5e-6, nvlink_bytes_per_second=367e9, nic_bytes_per_second=0.73 * 50e9)
NOTES = Network(inside=(_NOTES,), between=(_NOTES,))
"""Exactly the project's notes. They give the hop's 5 us as assumed."""


@lru_cache(maxsize=1)
def fitted() -> Network:
    """Constants from the rows in FIT, by least squares of the relative error; plus 59 us, the notes' a0 for H200 with large messages.

    XLA's table gives NVLink's bandwidth but not that a0: its times are those of an executable around the collective, some 30 us longer.
    """
    large = fit_course(Course(base_seconds=0, nvlink_bytes_per_second=400e9), _rows("xla", least=16))
    return Network(
        inside=(replace(large, base_seconds=_NOTES.base_seconds), fitted_small()),
        between=(
            fit_course(
                Course(base_seconds=0, nvlink_bytes_per_second=400e9, nic_bytes_per_second=30e9, phases="pipelined"),
                _rows("a2", least=8) + _rows("a8", least=8),
            ),
            fit_course(Course(base_seconds=0, nic_bytes_per_second=200e9, phases="relayed"), _rows("a2", most=4) + _rows("a8", most=4)),
        ),
    )


def fitted_small() -> Course:
    return fit_course(Course(base_seconds=0, nvlink_bytes_per_second=300e9), _rows("xla", most=4))


def fitted_to_xla() -> Network:
    """XLA's own H100 node, with the a0 of its own rows: checks the form of the model on the held-out rows."""
    large = fit_course(Course(base_seconds=0, nvlink_bytes_per_second=400e9), _rows("xla", least=16))
    return Network(inside=(large,), between=())


Row = tuple[float, int, int, float]
"""(bytes, GPUs a node, nodes, seconds)."""


def _rows(name: str, *, least: float = 0, most: float = math.inf) -> list[Row]:
    table = TABLES[name]
    return [(size * MIB, table.gpus_per_node, table.nodes, 1e-6 * table.microseconds[size]) for size in FIT[name] if least <= size <= most]


def fit_course(start: Course, rows: Sequence[Row]) -> Course:
    """The course of `start`'s form with the least sum of squared relative errors. The constants decide which of two phases is slower. So
    they are fitted for the choice that the previous constants imply, until that choice no longer changes."""
    course = start
    seconds = np.array([row[3] for row in rows])
    for _ in range(20):
        columns = np.array([_terms(course, size, g, k) for size, g, k, _ in rows])  # (rows, 4)
        used: np.ndarray[Any, Any] = np.abs(columns).sum(axis=0) > 0
        found = np.zeros(4)
        found[used] = np.linalg.lstsq(columns[:, used] / seconds[:, None], np.ones(len(rows)), rcond=None)[0]
        assert (found[used] > 0).all(), f"{start.phases}: no such course, {found}"
        after = replace(
            course,
            base_seconds=float(found[0]),
            hop_seconds=float(found[1]),
            nvlink_bytes_per_second=float(1 / found[2]) if used[2] else math.inf,
            nic_bytes_per_second=float(1 / found[3]) if used[3] else math.inf,
        )
        if after == course:
            break
        course = after
    return course


def _terms(course: Course, size: float, g: int, k: int) -> tuple[float, float, float, float]:
    """The factors of base, hop, 1/nvlink and 1/nic in `course.seconds`."""
    hops, inside, between = 2 * math.log2(k), 2 * (g - 1) / g * size, 2 * (k - 1) / k * size / g
    match course.phases:
        case "serial":
            return (1.0, hops, inside, between)
        case "pipelined":
            by_nvlink = inside / course.nvlink_bytes_per_second >= between / course.nic_bytes_per_second
            return (1.0, hops, inside * by_nvlink, between * (not by_nvlink))
        case "relayed":
            return (1.0, hops, 0.0, hops * size)


# -- the ordered tree (cluster/reduce.py) ---------------------------------------------------------------------------------------------


def tree_seconds(network: Network, size: float, gpus: int, setup: "Setup") -> float:
    """The ordered tree reduction of a bucket of `size` bytes, by the messages that TreeReducer sends. 0 for one GPU.

    1. Each rank sends to every other rank its chunk, S/n, of every subtree that it holds: n - 1 messages from GPU to GPU. The part that
       crosses nodes, S * (n-g)/n, goes through the GPU's own NIC; in a ring only S/g * 2(k-1)/k does.
    2. Each rank adds the subtrees' chunks for its own chunk: one kernel for each, over S/n bytes.
    3. All-gather, by NCCL: half the data of an all-reduce.
    """
    if gpus == 1:
        return 0.0
    g, k = network.shape(gpus)
    bulk = (network.inside if k == 1 else network.between)[0]
    held = _subtrees_of_a_rank(setup.virtual_ranks_per_gpu * gpus, gpus)
    chunk, chunks = size / gpus, held * gpus
    inside = held * (g - 1) * chunk / bulk.nvlink_bytes_per_second
    between = held * (gpus - g) * chunk / bulk.nic_bytes_per_second if k > 1 else 0.0
    messages = held * (gpus - 1) * setup.message_seconds
    swap = bulk.base_seconds + max(messages, inside, between)
    adding = (chunks - 1) * max(setup.kernel_seconds, 3 * chunk / setup.memory_bytes_per_second)  # reads two, writes one
    # The same courses, with half the hops and half the data of an all-reduce.
    gather = min((course.base_seconds + course.seconds(size, g, k)) / 2 for course in (network.inside if k == 1 else network.between))
    return swap + adding + gather


@lru_cache(maxsize=256)
def _subtrees_of_a_rank(virtual_ranks: int, gpus: int) -> int:
    """The largest number of subtrees in any rank."""
    return max(len(subtrees(virtual_ranks, blocks_of_virtual_ranks(virtual_ranks, gpus, rank))) for rank in range(gpus))


# -- the model's gradients ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Gradients:
    """Parts in the order in which the reducer gets them; all float32."""

    sizes: tuple[int, ...]
    """Bytes."""
    ready: tuple[float, ...]
    """Fraction of the backward pass that is done when each part is ready, 0 to 1, not decreasing."""

    def __post_init__(self) -> None:
        assert len(self.sizes) == len(self.ready) > 0
        assert all(before <= after for before, after in zip(self.ready, self.ready[1:], strict=False)), "ready must not decrease"

    @property
    def total_bytes(self) -> int:
        return sum(self.sizes)


@lru_cache(maxsize=4)
def resnet18(*, classes: int = 10, image_size: int = 32, statistics: bool = False) -> Gradients:
    """torchvision's ResNet-18 with the article's stem. Backward time is divided by the layers' FLOPs, from a forward pass on the meta
    device with hooks: the gradients of inputs and of weights; for the first layer those of weights only.

    `statistics` puts in front what the tree also reduces (the loss and BatchNorm's running statistics), ready from the start.
    """
    import torch
    from torch import nn

    from trainer.models.vision import build_model
    from trainer.settings.tree import ModelConfig

    model = build_model(ModelConfig(weights="none", stem="article"), classes=classes, seed=0, image_hw=(image_size, image_size)).to("meta")
    order: list[tuple[nn.Module, float]] = []  # in execution order, with the FLOPs of a forward pass

    def ran(module: nn.Module, _: object, out: torch.Tensor) -> None:
        flops = 0.0
        if isinstance(module, nn.Conv2d):
            flops = 2.0 * out.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            flops = 2.0 * out.numel() * module.in_features
        order.append((module, flops))

    leaves = [module for module in model.modules() if not list(module.children())]
    handles = [module.register_forward_hook(ran) for module in leaves]
    model.eval()(torch.empty(1, 3, image_size, image_size, device="meta"))
    for handle in handles:
        handle.remove()
    first = next(module for module, flops in order if flops)
    cost = [flops * (1 if module is first else 2) for module, flops in order]
    done = dict(zip((id(module) for module, _ in reversed(order)), np.cumsum(cost[::-1]) / sum(cost), strict=True))
    owner = {id(p): module for module in leaves for p in module.parameters(recurse=False)}
    parameters = list(reversed(list(model.parameters())))
    ready = np.maximum.accumulate([done[id(owner[id(p)])] for p in parameters])  # handed over in this order, whichever is ready first
    extra = [4, *(4 * b.numel() for b in model.buffers() if b.dim())] if statistics else []
    return Gradients(
        sizes=(*extra, *(4 * p.numel() for p in parameters)), ready=(*(0.0 for _ in extra), *(min(1.0, float(at)) for at in ready))
    )


def ddp_buckets(sizes: Sequence[int], bucket_bytes: int = DDP_BUCKET_BYTES, first_bytes: int = DDP_FIRST_BUCKET_BYTES) -> list[range]:
    """Buckets as DistributedDataParallel fills them: the part that reaches the limit closes a bucket; the first bucket is smaller."""
    buckets: list[range] = []
    start = held = 0
    for part, size in enumerate(sizes):
        held += size
        if held >= (bucket_bytes if buckets else min(first_bytes, bucket_bytes)):
            buckets.append(range(start, part + 1))
            start, held = part + 1, 0
    return [*buckets, range(start, len(sizes))] if start < len(sizes) else buckets


def tree_buckets(sizes: Sequence[int], bucket_bytes: int = BUCKET_BYTES, small_bytes: int = SMALL_BUCKET_BYTES) -> list[range]:
    """Buckets as TreeReducer fills them: like DDP's, and small parts at the end are a bucket of their own."""
    small_bytes = min(small_bytes, bucket_bytes)
    last, held = len(sizes), 0
    while last and held + sizes[last - 1] <= small_bytes:
        last -= 1
        held += sizes[last]
    head = ddp_buckets(sizes[:last], bucket_bytes, small_bytes)
    return [*head, range(last, len(sizes))] if last < len(sizes) else head


# -- stragglers and failures ----------------------------------------------------------------------------------------------------------


def slowest_bound(gpus: int) -> float:
    """sqrt(2 ln n): an upper bound of the expected maximum of n standard normal draws, and its limit for large n."""
    return math.sqrt(2 * math.log(gpus))


def slowest_drawn(
    gpus: int, *, steps: int = 2000, seed: int = 0, shape: Literal["normal", "lognormal"] = "normal", sigma: float = 1.0
) -> float:
    """The mean over `steps` of the maximum of n draws minus their mean, in units of `sigma`; `steps` * n draws.

    "lognormal": factors exp(N(0, s)) with mean 1 and standard deviation `sigma`, relative to the step: a tail towards slow steps.
    """
    random = np.random.default_rng(seed)
    if gpus == 1:
        return 0.0  # nobody to wait for
    if shape == "normal":
        return float(random.standard_normal((steps, gpus)).max(axis=1).mean())
    spread = math.sqrt(math.log1p(sigma**2))
    return float((np.exp(random.normal(-(spread**2) / 2, spread, (steps, gpus))).max(axis=1).mean() - 1) / sigma) if sigma else 0.0


def lost_to_failures(interval_seconds: float, stall_seconds: float, recovery_seconds: float, mttf_seconds: float) -> float:
    """Fraction of the time that checkpoints and failures take: Ts/Tc + (Tc/2 + Tr)/MTTF, to first order."""
    return stall_seconds / interval_seconds + (interval_seconds / 2 + recovery_seconds) / mttf_seconds


def best_interval_seconds(stall_seconds: float, mttf_seconds: float) -> float:
    """Young's sqrt(2 * Ts * MTTF), which minimises `lost_to_failures`. (The product uses Daly's refinement, cluster/interval.py.)"""
    return math.sqrt(2 * stall_seconds * mttf_seconds)


def measured_stall_seconds(results: Path = RESULTS) -> tuple[float, str]:
    """(median stall of a checkpoint, its source): from benchmarks/results/checkpoint.json, else that file's value on 2 cores in 2026."""
    path = results / "checkpoint.json"
    if path.is_file():
        return float(json.loads(path.read_text())["seconds"]["stall"]["median"]), f"measured: {path.name}"
    return 0.012, f"default: {path.name} is missing"


def measured_recovery_seconds(results: Path = RESULTS, fault: str = "node lost") -> tuple[float, str]:
    """(detection plus recovery in the campaign's row that begins with `fault`, its source): from benchmarks/results/faults.json.

    Measured with two workers on one machine's CPU: it does not include the costs of a real node's loss, above all a new node's start."""
    path = results / "faults.json"
    if path.is_file():
        for row in json.loads(path.read_text())["rows"]:
            if row["fault"].startswith(fault) and row["recovery_seconds"]:
                found = (row["detection_seconds"] or {"median": 0.0})["median"] + row["recovery_seconds"]["median"]
                return float(found), f"measured: {path.name}, {row['fault']!r}"
    return 18.0, f"default: {path.name} has no row {fault!r}"


# -- a step, and a run ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What to simulate. "Assumed" fields have no measurement behind them."""

    network: Network = field(default_factory=fitted)
    method: Literal["all_reduce", "tree"] = "all_reduce"
    """NCCL's all-reduce, which DDP uses, or the ordered tree."""
    overlap: bool = True
    """Buckets overlap the backward pass; if False, one all-reduce of all gradients follows it."""
    bf16: bool = False
    """Gradients cross the network as bf16 (all-reduce only: the tree's partial sums are float32)."""
    bucket_bytes: int = DDP_BUCKET_BYTES
    small_last: bool = False
    """Up to 1 MiB at the end is a bucket of its own, as in the tree: nothing overlaps the last bucket."""
    images_per_gpu: int = 512
    images_per_second: float = 75_000.0
    """One GPU's speed at `images_per_gpu`: the middle of what the notes expect of an H200 (60 to 90 thousand). An estimate, not a
    measurement."""
    floor_seconds: float = 0.6e-3
    """Assumed: time of a step without images (launches, the update); it does not shrink with the batch."""
    optimizer_seconds: float = 52e-6
    """Momentum and weights read and written, gradients read: 5 x 44.7 MB at the notes' 4.3 TB/s. Part of the step's time above."""
    memory_bytes_per_second: float = 4.3e12
    """H200, from the notes."""
    virtual_ranks_per_gpu: int = 1
    message_seconds: float = 1e-6
    """Assumed: time of host and NIC for each message of the tree's exchange."""
    kernel_seconds: float = 2.5e-6
    """Assumed: time of a small kernel that follows another one in a stream."""
    sigma: float = 0.0
    """Standard deviation of a GPU's step time, relative to that time."""
    straggler: Literal["bound", "normal", "lognormal"] = "bound"
    """sqrt(2 ln n), or random draws."""
    mttf_hours: float = math.inf
    """For one GPU. 50,000: Llama 3's 419 unexpected interruptions in 54 days of 16,384 H100 (arXiv 2407.21783, table 5)."""
    stall_seconds: float = 0.012
    recovery_seconds: float = 18.0
    """See `measured_stall_seconds` and `measured_recovery_seconds`."""

    def compute_seconds(self, images: float) -> float:
        """Time of a step on one GPU alone."""
        full = self.images_per_gpu / self.images_per_second
        floor = min(self.floor_seconds, full)
        return floor + (full - floor) * images / self.images_per_gpu

    def reduce_seconds(self, size: float, gpus: int) -> float:
        """Time for one bucket, casts to bf16 and back included: 4 bytes read and 2 written, then 2 and 4."""
        if self.method == "tree":
            return tree_seconds(self.network, size, gpus, self)
        if self.bf16 and gpus > 1:
            return self.network.all_reduce_seconds(size / 2, gpus) + 3 * size / self.memory_bytes_per_second
        return self.network.all_reduce_seconds(size, gpus)


LLAMA_MTTF_HOURS = 50_000.0
BUCKETS_MIB = (1, 2, 4, 8, 16, 25, 50)


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulated:
    """A run on `gpus` GPUs; times are for one step."""

    gpus: int
    images_per_gpu: float
    compute_seconds: float
    exposed_seconds: float
    """Communication that the backward pass does not hide."""
    straggler_seconds: float
    step_seconds: float
    ettr: float
    """Effective training time ratio: the fraction left by checkpoints and failures."""
    checkpoint_interval_seconds: float
    """inf without failures."""
    images_per_second: float
    efficiency: float
    """Images a second, relative to `gpus` times one GPU that never fails."""


def exposed_seconds(gradients: Gradients, buckets: Sequence[range], seconds: Sequence[float], backward_seconds: float) -> float:
    """Time from the end of the backward pass to the end of the last bucket: e_j = max(e_{j-1}, ready_j) + T_j."""
    end = 0.0
    for parts, takes in zip(buckets, seconds, strict=True):
        end = max(end, backward_seconds * gradients.ready[parts[-1]]) + takes
    return max(0.0, end - backward_seconds)


def simulate(gpus: int, setup: Setup, *, global_batch: int = 0) -> Simulated:
    """Weak scaling (`setup.images_per_gpu` each), or strong scaling with `global_batch` images divided among the GPUs.

    ValueError if there is less than one image for each GPU."""
    if global_batch and global_batch < gpus:
        raise ValueError(
            f"global_batch={global_batch} must be at least gpus={gpus}: each GPU needs an image; use fewer GPUs or a larger batch"
        )
    images = global_batch / gpus if global_batch else float(setup.images_per_gpu)
    compute = setup.compute_seconds(images)
    exposed = _exposed(gpus, setup, compute)
    straggler = setup.sigma * compute * _slowest(gpus, setup)
    step = compute + exposed + straggler
    stays, interval = 1.0, math.inf
    if math.isfinite(setup.mttf_hours):
        mttf = setup.mttf_hours * 3600 / gpus
        interval = best_interval_seconds(setup.stall_seconds, mttf)
        stays = max(0.0, 1 - lost_to_failures(interval, setup.stall_seconds, setup.recovery_seconds, mttf))
    alone = (images * gpus if global_batch else images) / setup.compute_seconds(images * gpus if global_batch else images)
    done = gpus * images / step * stays
    return Simulated(
        gpus=gpus,
        images_per_gpu=images,
        compute_seconds=compute,
        exposed_seconds=exposed,
        straggler_seconds=straggler,
        step_seconds=step,
        ettr=stays,
        checkpoint_interval_seconds=interval,
        images_per_second=done,
        efficiency=done / (gpus * alone),
    )


def best_bucket(gpus: int, setup: Setup) -> tuple[int, Simulated]:
    """(MiB, run) of the size in BUCKETS_MIB with the shortest step, the largest of equals. A size to try, not to adopt: the model ignores
    that NCCL's blocks take GPU resources from the backward pass, and it is least accurate for many small messages."""
    runs = [(mib, simulate(gpus, replace(setup, bucket_bytes=mib * MIB))) for mib in reversed(BUCKETS_MIB)]
    return min(runs, key=lambda run: run[1].step_seconds)


def _exposed(gpus: int, setup: Setup, compute_seconds: float) -> float:
    gradients = resnet18(statistics=setup.method == "tree")
    if gpus == 1:
        return 0.0
    at_once = setup.reduce_seconds(gradients.total_bytes, gpus)
    if not setup.overlap:
        return at_once
    cut = tree_buckets if setup.method == "tree" or setup.small_last else ddp_buckets
    buckets = cut(gradients.sizes, setup.bucket_bytes)
    seconds = [setup.reduce_seconds(sum(gradients.sizes[parts.start : parts.stop]), gpus) for parts in buckets]
    return exposed_seconds(gradients, buckets, seconds, max(0.0, compute_seconds - setup.optimizer_seconds) * 2 / 3)


def _slowest(gpus: int, setup: Setup) -> float:
    if setup.straggler == "bound":
        return slowest_bound(gpus)
    return _drawn(gpus, setup.straggler, setup.sigma)


@lru_cache(maxsize=256)
def _drawn(gpus: int, shape: Literal["normal", "lognormal"], sigma: float) -> float:
    return slowest_drawn(gpus, shape=shape, sigma=sigma)


# -- validation -----------------------------------------------------------------------------------------------------------------------


def validation() -> list[dict[str, Any]]:
    """Every published row against the model: {"table", "what", "source", "nodes", "mib", "seconds", "ours", "error", "role", "claimed"}.

    `role`: "fitted" (used to fit the constants), "held out", or "a0" for the notes' two times, from which they derived the a0 used here
    (`anchors_left_out` works without them). `claimed`: the size lies in VALID_MIB. XLA's rows are compared with the course that has their
    own a0 (`fitted_to_xla`), all others with `fitted()`.
    """
    rows = []
    for name, table in TABLES.items():
        network = fitted_to_xla() if name == "xla" else fitted()
        least, most = VALID_MIB[table.nodes]
        for mib, microseconds in table.microseconds.items():
            course = network
            if name == "xla" and mib < least:
                course = Network(inside=(*network.inside, fitted_small()), between=())
            ours = course.all_reduce_seconds(mib * MIB, table.nodes * table.gpus_per_node)
            rows.append(
                {
                    "table": name,
                    "what": table.what,
                    "source": table.source,
                    "nodes": table.nodes,
                    "mib": mib,
                    "seconds": 1e-6 * microseconds,
                    "ours": ours,
                    "error": ours / (1e-6 * microseconds) - 1,
                    "role": "a0" if name == "h200" else "fitted" if mib in FIT.get(name, ()) else "held out",
                    "claimed": least <= mib <= most,
                }
            )
    return rows


def anchors_left_out() -> list[dict[str, float]]:
    """Each of the notes' two times, predicted from the other one and XLA's bandwidth: {"mib", "seconds", "ours", "error"}."""
    (one, other), large = TABLES["h200"].microseconds.items(), fitted().inside[0]
    rows = []
    for (mib, microseconds), (seen_mib, seen) in ((one, other), (other, one)):
        base = 1e-6 * seen - (large.seconds(seen_mib * MIB, 8, 1) - large.base_seconds)
        ours = replace(large, base_seconds=base).seconds(mib * MIB, 8, 1)
        rows.append({"mib": mib, "seconds": 1e-6 * microseconds, "ours": ours, "error": ours / (1e-6 * microseconds) - 1})
    return rows


def band_errors() -> dict[tuple[int, float], float]:
    """(nodes, MiB) -> how far the model lies outside of the range of the held-out tables, relative to the nearer end; 0 inside. Only
    claimed sizes between nodes: there, clusters of the same parts differ by up to 27 %, and a model can match only one of them. (So an
    error here is weaker than the error of each row, which `validation` has.)"""
    held: dict[tuple[int, float], list[dict[str, Any]]] = {}
    for row in validation():
        if row["claimed"] and row["nodes"] > 1 and row["role"] == "held out":
            held.setdefault((row["nodes"], row["mib"]), []).append(row)
    errors = {}
    for key, rows in held.items():
        low, high, ours = min(row["seconds"] for row in rows), max(row["seconds"] for row in rows), rows[0]["ours"]
        errors[key] = min(0.0, ours / low - 1) + max(0.0, ours / high - 1)
    return errors


NOTED_EFFICIENCY = {"fp32, no overlap, 8 GPUs": 0.964, "fp32, overlapped, 8 GPUs": 0.992, "fp32, overlapped, 64 nodes": 0.978}
"""The notes' efficiencies at 512 images a GPU. The notes computed them with this model's formulas, so they check the arithmetic, not the
hardware. They do not give their assumptions for buckets and images a second; the small last bucket is used here because it comes
closest."""


def efficiencies(network: Network) -> dict[str, float]:
    """The model's values for NOTED_EFFICIENCY: no stragglers, no failures, 75,000 images/s, a small last bucket."""
    base = Setup(network=network, small_last=True)
    cases = {"fp32, no overlap, 8 GPUs": (8, False), "fp32, overlapped, 8 GPUs": (8, True), "fp32, overlapped, 64 nodes": (512, True)}
    return {name: simulate(gpus, replace(base, overlap=overlap)).efficiency for name, (gpus, overlap) in cases.items()}
