"""Sums over virtual ranks whose bits are the same for any number of real ranks: one fixed binary tree.

Called by trainer/learn (build.py, gradients.py) with the parts of a virtual rank (its gradients, BatchNorm statistics and loss), each as
soon as it exists. The caller decides which virtual ranks a rank carries, and what the parts mean; it passes in the ranks' blocks.
Floating-point sums depend on their brackets, so the brackets are fixed: the tree over V virtual ranks splits at the largest power of two
below V, and so on recursively. A rank carries a contiguous block and adds up the largest subtrees that lie wholly inside it. The remaining
nodes are added from all ranks' subtrees; each rank adds one chunk of the vector. The bits do not depend on where the blocks are cut:

    V=8, W=3   rank 0: 0 1 2 -> (0+1), 2      rank 1: 3 4 5 -> 3, (4+5)      rank 2: 6 7 -> (6+7)
               each rank sends every other its chunk, adds ((0+1)+(2+3)) + ((4+5)+(6+7)) for its own chunk, and sends that sum to all

The parts lie in one flat vector, cut into buckets in the order in which they are expected. The brackets hold for each element by itself, so
they do not depend on buckets. A bucket of the rank's last virtual rank is exchanged as soon as its parts are there, in parallel with the
rest of the backward pass: on a GPU in a separate stream, on a CPU in a separate thread. Only finish() waits. Buckets are exchanged in their
own order, which is the same on all ranks whatever order the parts came in.

With `wire=torch.bfloat16` half the bytes travel. A sum that a rank sends must then equal the sum that another rank would compute alone from
the same leaves. So every node of the tree is rounded to bf16, including the leaves and the root, sent or not: a parent is
bf16(float32(left) + float32(right)). An addition of two bf16 vectors does exactly that, so the vectors are stored in bf16. An element is
rounded 1 + log2(V) times, each time by at most 2**-9 of the node's value. Parts that must not be rounded (`exact`: a loss, statistics that
change by less than that in a step) travel as float32 in separate buckets.

For a vector of n floats a rank with k subtrees sends k*n*(W-1)/W floats, then n*(W-1)/W. With k = 1 (V and W powers of two) that is the
volume of a ring all-reduce; k <= 2*log2(V). Memory: one vector of n floats for each subtree held at one time (1 if V = W, at most
2*log2(V) + 1), and for the exchange the bytes that one bucket receives. All of it is kept between steps."""

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Node = tuple[int, int]
"""A subtree, as a half-open range of virtual ranks."""

BUCKET_BYTES = 25 * 2**20
SMALL_BUCKET_BYTES = 2**20
"""The first bucket is small so that the exchange begins early, the last one because nothing runs in parallel with it. (DDP uses 25 MiB, and
1 MiB for the first.)
"""
LINE = 16
"""Floats in 64 bytes. Parts and chunks begin at multiples of it, for kernels that read many floats at a time."""

T = TypeVar("T")


def subtrees(virtual_ranks: int, carried: range) -> list[Node]:
    """The largest subtrees of the tree over `virtual_ranks` that lie wholly in `carried`, from left to right."""

    def inside(low: int, high: int) -> list[Node]:
        if high <= carried.start or low >= carried.stop:
            return []
        if carried.start <= low and high <= carried.stop:
            return [(low, high)]
        middle = _split(low, high)
        return inside(low, middle) + inside(middle, high)

    return inside(0, virtual_ranks)


def fold(virtual_ranks: int, carry: list[tuple[Node, T]], merge: Callable[[T, T], T]) -> None:
    """Merge the last two of `carry` while they are the two halves of one subtree. Called after each append, this builds the tree."""
    parents = _parents(virtual_ranks)
    while len(carry) > 1 and parents.get(carry[-1][0]) == parents.get(carry[-2][0], ()):
        (_, right), (left_node, left) = carry.pop(), carry.pop()
        carry.append((parents[left_node], merge(left, right)))


class TreeReducer:
    """Call lay_out() once. In each step call begin(), put() and end() for each of this rank's virtual ranks in order, then finish() for the
    sums.

    Only finish() waits for other ranks; `wait_seconds` is how long the host has waited in it so far (on a GPU the stream waits, not the
    host). All ranks must lay out the same parts in the same order, with the same bucket sizes."""

    def __init__(
        self,
        blocks: Sequence[range],
        rank: int,
        group: Any = None,
        *,
        bucket_bytes: int = BUCKET_BYTES,
        small_bucket_bytes: int = SMALL_BUCKET_BYTES,
        wire: torch.dtype = torch.float32,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`blocks`: for each rank the virtual ranks that it carries, at least one; together all of them, in order."""
        assert [v for each in blocks for v in each] == list(range(blocks[-1].stop)), f"not all virtual ranks in order, once: {blocks}"
        assert all(blocks), f"a rank carries no virtual rank: {blocks}"
        self.wait_seconds = 0.0
        self._rank, self._group, self._clock = rank, group, clock
        self.bucket_bytes, self.small_bucket_bytes = bucket_bytes, small_bucket_bytes
        assert wire in (torch.float32, torch.bfloat16), f"sums travel as float32 or bfloat16, not {wire}"
        self._wire = wire
        self._plan = _plan(blocks, rank)
        self._layout: _Layout | None = None
        self._next, self._open = self._plan.carried.start, False
        self._arrived: list[dict[int, Tensor] | None] = []  # for each bucket, part -> its value; None once they are added
        self._launched = 0
        self._thread: _Thread | None = None

    @property
    def carried(self) -> range:
        """The virtual ranks that this rank adds."""
        return self._plan.carried

    @property
    def is_open(self) -> bool:
        """True between begin() and end()."""
        return self._open

    def lay_out(self, like: Sequence[Tensor], *, exact: int = 0) -> list[Tensor]:
        """Allocate memory for parts with the shapes and strides of `like`, float32, in the order in which put() is expected to bring them.

        The first `exact` parts always travel as float32. Returns views of one float32 vector, into which finish() writes the sums. A
        part lies in one bucket as a whole."""
        assert self._layout is None, "laid out before"
        assert like, "nothing to add up"
        strange = [
            f"{tensor.dtype} on {tensor.device}" for tensor in like if (tensor.dtype, tensor.device) != (torch.float32, like[0].device)
        ]
        assert not strange, f"expected float32 on {like[0].device}, got {strange[0]}"
        if self._wire == torch.float32:
            exact = len(like)
        world_size = len(self._plan.counts)
        buckets: list[_Bucket] = []
        bucket_of: list[int] = []
        offsets, sizes, high = [], dict.fromkeys((torch.float32, self._wire), 0), 0
        for dtype, chosen in ((torch.float32, like[:exact]), (self._wire, like[exact:])):
            if not chosen:
                continue
            base = high
            for parts in _cut([dtype.itemsize * tensor.numel() for tensor in chosen], self.bucket_bytes, self.small_bucket_bytes):
                low = high
                for part in parts:
                    offsets.append(high)
                    bucket_of.append(len(buckets))
                    high += _up(chosen[part].numel(), LINE)
                high = low + _up(high - low, LINE * world_size)  # W equal chunks
                buckets.append(_Bucket(low=low, high=high, parts=len(parts), dtype=dtype, base=base))
            sizes[dtype] = high - base
        # Zeros, also between the parts: the gaps are added and sent with the rest.
        places = range(1 + max(leaf.place for leaf in self._plan.leaves))
        flats = {dtype: [like[0].new_zeros(size, dtype=dtype) for _ in places] for dtype, size in sizes.items()}
        result = flats[torch.float32][0] if self._wire == torch.float32 else like[0].new_zeros(high)
        at = [buckets[bucket] for bucket in bucket_of]
        received = None
        if world_size > 1:
            foreign = sum(self._plan.counts) - self._plan.counts[self._rank]
            widest = max((bucket.high - bucket.low) * bucket.dtype.itemsize for bucket in buckets) // world_size
            received = like[0].new_empty(foreign * widest, dtype=torch.uint8)
        stream = torch.cuda.Stream(received.device) if received is not None and received.is_cuda else None  # type: ignore[no-untyped-call]
        self._layout = _Layout(
            result=result,
            flats=flats,
            views=[
                [
                    _view(flats[bucket.dtype][place], start - bucket.base, tensor)
                    for bucket, start, tensor in zip(at, offsets, like, strict=True)
                ]
                for place in places
            ],
            buckets=buckets,
            bucket_of=bucket_of,
            received=received,
            stream=stream,
        )
        self._arrived = [None] * len(buckets)
        return [_view(result, start, tensor) for start, tensor in zip(offsets, like, strict=True)]

    def begin(self, virtual_rank: int) -> None:
        """`virtual_rank`'s parts follow. The views that lay_out() returned no longer hold the last step's sums."""
        assert self._layout is not None, "lay_out() comes first"
        assert not self._open, "end() of the virtual rank before comes first"
        assert virtual_rank == self._next, f"virtual rank {virtual_rank} came when {self._next} of {self._plan.carried} was due"
        self._open = True
        self._arrived = [{} for _ in self._layout.buckets]

    def put(self, part: int, value: Tensor) -> None:
        """Add `part` (its number in lay_out()) of the open virtual rank: once, in any order. `value` must not change before end()."""
        layout = self._layout
        assert layout is not None, "lay_out() comes first"
        assert self._open, "begin() comes first"
        bucket = layout.bucket_of[part]
        arrived = self._arrived[bucket]
        assert arrived is not None, f"part {part} came twice"
        assert part not in arrived, f"part {part} came twice"
        view = layout.views[0][part]
        assert (value.dtype, value.shape) == (torch.float32, view.shape), (
            f"part {part} is {value.dtype} {tuple(value.shape)}, not {view.shape}"
        )
        arrived[part] = value
        if len(arrived) == layout.buckets[bucket].parts:
            self._take_in(bucket)

    def end(self) -> None:
        """No more parts from this virtual rank. Missing parts count as zeros (no samples, or an unused parameter)."""
        for bucket, arrived in enumerate(self._arrived):
            if arrived is not None:
                self._take_in(bucket)
        self._next, self._open = self._next + 1, False

    def finish(self, on_exchanged: Callable[[], None] = lambda: None) -> Tensor:
        """Complete the sums over all virtual ranks. They are in the views of lay_out() until the next begin(); returns the vector behind
        these views.

        (n,) float32, with zeros between the parts. A collective if there is more than one rank, begun in put() and end().
        `on_exchanged`: called on a CPU, from the exchange's thread, as soon as this rank no longer waits for another one, even if the
        caller has not yet got there."""
        assert not self._open, "end() comes first"
        layout, carried = self._layout, self._plan.carried
        assert layout is not None, "lay_out() comes first"
        assert self._next == carried.stop, f"virtual ranks {self._next}..{carried.stop - 1} were not added"
        self._next, launched, self._launched = carried.start, self._launched, 0
        if layout.stream is not None:
            torch.cuda.current_stream(layout.stream.device).wait_stream(layout.stream)
        elif self._thread is not None:
            begin = self._clock()
            self._thread.start(on_exchanged)
            self._thread.join(launched + 1)
            self.wait_seconds += self._clock() - begin
        if self._wire != torch.float32:
            exact = layout.flats[torch.float32][0]
            layout.result[: len(exact)].copy_(exact)
            layout.result[len(exact) :].copy_(layout.flats[self._wire][0])
        return layout.result

    def _take_in(self, bucket: int) -> None:
        """Add a bucket's parts to this rank's subtrees; exchange the buckets that are complete."""
        arrived, self._arrived[bucket] = self._arrived[bucket], None
        layout, plan = self._layout, self._plan
        assert arrived is not None
        assert layout is not None
        leaf, here = plan.leaves[self._next - plan.carried.start], layout.buckets[bucket]
        views = layout.views[leaf.place]
        if len(arrived) < here.parts:
            missing = [view for part, view in enumerate(views) if layout.bucket_of[part] == bucket and part not in arrived]
            if leaf.adds:
                torch._foreach_add_(missing, 0.0)  # not a no-op: -0.0 + 0.0 is 0.0
            else:
                torch._foreach_zero_(missing)
        if arrived:
            into, values = [views[part] for part in arrived], list(arrived.values())
            if leaf.adds:
                if here.dtype != torch.float32:  # a leaf is rounded before it is added, just as a stored leaf is
                    values = [value.to(here.dtype) for value in values]
                torch._foreach_add_(into, values)
            else:
                torch._foreach_copy_(into, values)
        flats = [flat[here.low - here.base : here.high - here.base] for flat in layout.flats[here.dtype]]
        for left, right in leaf.merges:
            flats[left].add_(flats[right])
        if layout.received is not None and self._next == plan.carried.stop - 1:
            while self._launched < len(layout.buckets) and self._arrived[self._launched] is None:
                self._launch(layout.stream, partial(self._exchange, layout, layout.received, layout.buckets[self._launched]))
                self._launched += 1

    def _launch(self, stream: torch.cuda.Stream | None, exchange: Callable[[], None]) -> None:
        if stream is None:
            if self._thread is None:
                self._thread = _Thread("tree reduction")
            self._thread.start(exchange)
            return
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            exchange()

    def _exchange(self, layout: "_Layout", room: Tensor, bucket: "_Bucket") -> None:
        """Write the sum over all ranks' subtrees into this rank's first one, for one bucket. `room`: bytes for what other ranks send."""
        counts = self._plan.counts
        world_size = len(counts)
        width = (bucket.high - bucket.low) // world_size
        if not width:  # parts without elements
            return
        # This rank's subtrees, each (W, width): one row for each rank that adds it up.
        low, high = bucket.low - bucket.base, bucket.high - bucket.base
        flats = layout.flats[bucket.dtype][: counts[self._rank]]
        mine = [flat[low:high].view(world_size, width) for flat in flats]
        own = mine[0][self._rank]
        peers = [peer for peer in range(world_size) if peer != self._rank]
        foreign = sum(counts) - len(mine)
        received = iter(room[: foreign * width * bucket.dtype.itemsize].view(bucket.dtype).view(foreign, width))
        rows = []  # for each rank, the chunks of its subtrees that this rank adds up, each (width,)
        for peer, count in enumerate(counts):
            rows.append([each[peer] for each in mine] if peer == self._rank else [next(received) for _ in range(count)])
        self._swap([(peer, row) for peer in peers for row in rows[peer]], [(peer, each[peer]) for peer in peers for each in mine])
        chunks = [row for each in rows for row in each]
        *inner, (left, right) = self._plan.merges
        for into, other in inner:
            chunks[into].add_(chunks[other])
        torch.add(chunks[left], chunks[right], out=own)  # `own` is one of the chunks, and is already in the sum
        # A peer sends the sum only after it has received this rank's chunk of it, so the sum may overwrite that chunk.
        if own.is_cuda:
            dist.all_gather_into_tensor(mine[0].view(-1), own, self._group)
        else:
            self._swap([(peer, mine[0][peer]) for peer in peers], [(peer, own) for peer in peers])

    def _swap(self, receive: Sequence[tuple[int, Tensor]], send: Sequence[tuple[int, Tensor]]) -> None:
        """Receive and send (rank, tensor) pairwise: with gloo this takes half the time of its all_to_all and all_gather."""
        pairs = [dist.P2POp(dist.irecv, tensor, group=self._group, group_peer=peer) for peer, tensor in receive]
        pairs += [dist.P2POp(dist.isend, tensor, group=self._group, group_peer=peer) for peer, tensor in send]
        for work in dist.batch_isend_irecv(pairs):
            work.wait()


def tree_sum(values: Sequence[T], merge: Callable[[T, T], T]) -> T:
    """The same tree over values that are all in this process: what finish() computes. For tests, and for values other than tensors."""
    carry: list[tuple[Node, T]] = []
    for index, value in enumerate(values):
        carry.append(((index, index + 1), value))
        fold(len(values), carry, merge)
    ((_, total),) = carry
    return total


@dataclass(frozen=True, kw_only=True, slots=True)
class _Bucket:
    """Elements `low` (inclusive) to `high` (exclusive) of the sums' vector, which hold `parts` parts. The values to add lie in the
    vectors of `dtype`, whose first element corresponds to the sums' element `base`."""

    low: int
    high: int
    parts: int
    dtype: torch.dtype
    base: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Leaf:
    """What to do with a virtual rank: copy or add it into vector `place`; then, for each (left, right) of `merges`, left += right."""

    place: int
    adds: bool
    merges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """What follows from the blocks alone."""

    carried: range
    leaves: tuple[_Leaf, ...]
    """One for each virtual rank that this rank carries."""
    counts: tuple[int, ...]
    """For each rank, the number of subtrees that it sends."""
    merges: tuple[tuple[int, int], ...]
    """The additions above the ranks' subtrees."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """The memory, and where each part lies in it."""

    result: Tensor  # (n,) float32
    flats: dict[torch.dtype, list[Tensor]]
    """For each dtype that travels, the vectors of the subtrees. Each vector holds only the buckets of its dtype; a bucket knows its own
    start."""
    views: list[list[Tensor]]
    """For each vector, each part's view in it."""
    buckets: list[_Bucket]
    bucket_of: list[int]
    """The bucket of each part."""
    received: Tensor | None
    """Bytes for what other ranks send of one bucket; None if no other rank sends."""
    stream: torch.cuda.Stream | None
    """For the exchange, on a GPU."""


class _Thread:
    """Runs jobs one after the other, in parallel with the caller. It does not keep the process alive: it may wait for a rank that is
    gone."""

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._results: SimpleQueue[BaseException | None] = SimpleQueue()
        threading.Thread(target=_work, args=(self._jobs, self._results), name=name, daemon=True).start()
        weakref.finalize(self, self._jobs.put, None)

    def start(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)

    def join(self, jobs: int) -> None:
        """Wait for the next `jobs` jobs; raise the first error."""
        for _ in range(jobs):
            error = self._results.get()
            if error is not None:
                raise error


def _work(jobs: "SimpleQueue[Callable[[], None] | None]", results: "SimpleQueue[BaseException | None]") -> None:
    failure: BaseException | None = None
    while (job := jobs.get()) is not None:
        try:
            if failure is None:  # after a failure the ranks no longer agree on what comes next
                job()
        except BaseException as error:
            failure = error
        results.put(failure)
        del job  # it keeps the reducer alive


def _leaves(virtual_ranks: int, carried: range) -> list[_Leaf]:
    """A rank's plan. Its growing subtrees are vectors 0, 1, ... from left to right."""
    carry: list[tuple[Node, int]] = []
    leaves = []
    for virtual_rank in carried:
        place = len(carry)
        merges: list[tuple[int, int]] = []

        def merge(left: int, right: int, merges: list[tuple[int, int]] = merges) -> int:
            merges.append((left, right))
            return left

        carry.append(((virtual_rank, virtual_rank + 1), place))
        fold(virtual_ranks, carry, merge)
        # A right sibling is added in place to the left one, so it needs no vector.
        adds = bool(merges)
        leaves.append(_Leaf(place=place - adds, adds=adds, merges=tuple(merges[1:])))
    return leaves


def _plan(blocks: Sequence[range], rank: int) -> _Plan:
    virtual_ranks = blocks[-1].stop
    nodes = [subtrees(virtual_ranks, each) for each in blocks]
    return _Plan(
        carried=blocks[rank],
        leaves=tuple(_leaves(virtual_ranks, blocks[rank])),
        counts=tuple(map(len, nodes)),
        merges=tuple(_merges(virtual_ranks, [node for each in nodes for node in each])),
    )


def _merges(virtual_ranks: int, nodes: Sequence[Node]) -> list[tuple[int, int]]:
    """(left, right) of each addition above the ranks' subtrees `nodes`, as positions among them; the left one takes the sum."""
    carry: list[tuple[Node, int]] = []
    merges: list[tuple[int, int]] = []

    def merge(left: int, right: int) -> int:
        merges.append((left, right))
        return left

    for position, node in enumerate(nodes):
        carry.append((node, position))
        fold(virtual_ranks, carry, merge)
    assert carry == [((0, virtual_ranks), 0)]
    return merges


def _cut(sizes: Sequence[int], limit: int, small: int) -> list[range]:
    """Group parts of `sizes` bytes into buckets of `limit` bytes, exceeded by at most one part; the first and the last are `small`. No
    part is cut."""
    last, held = len(sizes), 0
    while last > 0 and held + sizes[last - 1] <= small:
        last -= 1
        held += sizes[last]
    if last == 0:
        return [range(len(sizes))]
    buckets: list[range] = []
    start = held = 0
    for part in range(last):
        held += sizes[part]
        if part + 1 == last or held >= (limit if buckets else small):
            buckets.append(range(start, part + 1))
            start, held = part + 1, 0
    return [*buckets, range(last, len(sizes))] if last < len(sizes) else buckets


def _view(flat: Tensor, offset: int, like: Tensor) -> Tensor:
    """A view for `like` in `flat`, with its strides (channels_last); gaps and overlaps in its storage are not copied."""
    strides = torch.empty_like(like, device="meta").stride()
    return flat[offset : offset + like.numel()].as_strided(like.shape, strides)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _split(low: int, high: int) -> int:
    """Where a subtree splits: at the largest power of two below its size."""
    return low + (1 << ((high - low - 1).bit_length() - 1))


@lru_cache(maxsize=64)
def _parents(virtual_ranks: int) -> dict[Node, Node]:
    parents: dict[Node, Node] = {}

    def visit(low: int, high: int) -> None:
        if high - low > 1:
            middle = _split(low, high)
            parents[low, middle] = parents[middle, high] = (low, high)
            visit(low, middle)
            visit(middle, high)

    visit(0, virtual_ranks)
    return parents
