"""Sums over virtual ranks that have the same bits for any number of real ranks: one fixed binary tree.

Called by the training loop with the parts of a virtual rank (its gradients, BatchNorm statistics and loss), each as soon as it is there.
Which virtual ranks a rank carries, and what the parts mean, is the caller's business: it hands in the ranks' blocks. Floating-point sums
depend on their brackets, so the brackets are fixed: the tree over V virtual ranks splits at the largest power of two below V, and so on
down. A rank carries a contiguous block and adds up, as it goes, the largest subtrees that lie wholly inside; the other nodes are added from
all ranks' subtrees, each rank one chunk of the vector. The bits do not depend on where the blocks are cut:

    V=8, W=3   rank 0: 0 1 2 -> (0+1), 2      rank 1: 3 4 5 -> 3, (4+5)      rank 2: 6 7 -> (6+7)
               everyone sends everyone its chunk, then ((0+1)+(2+3)) + ((4+5)+(6+7)) for one's own chunk, then sends the sum to everyone

The parts lie in one flat vector, cut into buckets in the order in which they are expected. The brackets are those of single elements: they
know nothing of buckets. A bucket of the rank's last virtual rank is exchanged as soon as its parts are there, beside the rest of the
backward pass: on a GPU in a stream of its own, on a CPU in a thread of its own. Only finish() waits. Buckets are exchanged in their order,
which is the same on all ranks whatever order the parts came in.

With `wire=torch.bfloat16` half the bytes travel. A sum that a rank sends must then be one that another rank would have made of the same
leaves by itself, so that every node of the tree is rounded to bf16, the leaves and the root too, sent or not: a parent is
bf16(float32(left) + float32(right)). That is what an addition of two bf16 vectors does, so that the vectors are kept in bf16. An element
is rounded 1 + log2(V) times, each by at most 2**-9 of the node's value. Parts that must not be rounded (`exact`: a loss, statistics that
change by less than that in a step) travel as float32 in buckets of their own.

For a vector of n floats a rank with k subtrees sends k*n*(W-1)/W floats, then n*(W-1)/W. With k = 1 (V and W powers of two) that is the
volume of a ring all-reduce; k <= 2*log2(V). Memory: one vector of n floats for each subtree that is kept at one time (1 where V = W, at
most 2*log2(V) + 1), and for the exchange what a bucket receives. All are kept between steps."""

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
"""A subtree: the virtual ranks from the first to before the second."""

BUCKET_BYTES = 25 * 2**20
SMALL_BUCKET_BYTES = 2**20
"""The first bucket is small so that the exchange begins early, the last because nothing runs beside it. (DDP's: 25 and, the first, 1 MiB.)
"""
LINE = 16
"""Floats in 64 bytes: parts and chunks begin at such multiples, for kernels that read many floats at a time."""

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
    """Merge the last two of `carry` while they are the two halves of one subtree. Applied after each append, it is the tree."""
    parents = _parents(virtual_ranks)
    while len(carry) > 1 and parents.get(carry[-1][0]) == parents.get(carry[-2][0], ()):
        (_, right), (left_node, left) = carry.pop(), carry.pop()
        carry.append((parents[left_node], merge(left, right)))


class TreeReducer:
    """lay_out() once; then in each step begin(), put() and end() for each of this rank's virtual ranks in order, and finish() for the sums.

    finish() is the only call that waits for other ranks; `wait_seconds` is how long the host has waited in it so far (on a GPU the stream
    waits, not the host). All ranks must lay out the same parts in the same order, with the same bucket sizes."""

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
        """`blocks`: of each rank, the virtual ranks that it carries, at least one; together all of them, in order."""
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
        self._arrived: list[dict[int, Tensor] | None] = []  # of each bucket, part -> its value; None once they are taken in
        self._launched = 0
        self._thread: _Thread | None = None

    @property
    def carried(self) -> range:
        """The virtual ranks that this rank adds."""
        return self._plan.carried

    @property
    def is_open(self) -> bool:
        """Between begin() and end()."""
        return self._open

    def lay_out(self, like: Sequence[Tensor], *, exact: int = 0) -> list[Tensor]:
        """Make room for parts shaped and strided as `like`, float32, in the order in which put() is expected to bring them.

        The first `exact` parts travel as float32 whatever the others do. What is returned are views of one float32 vector, into which
        finish() puts the sums. A part lies in one bucket as a whole."""
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
        # Zeros, also between the parts: that room is added and sent with the rest.
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
        """`virtual_rank`'s parts follow. The views that lay_out() returned are no longer the last step's sums."""
        assert self._layout is not None, "lay_out() comes first"
        assert not self._open, "end() of the virtual rank before comes first"
        assert virtual_rank == self._next, f"virtual rank {virtual_rank} came when {self._next} of {self._plan.carried} was due"
        self._open = True
        self._arrived = [{} for _ in self._layout.buckets]

    def put(self, part: int, value: Tensor) -> None:
        """`part` (its number in lay_out()) of the open virtual rank, once, in any order. `value` must not change before end()."""
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
        """No more parts from this virtual rank: those that did not come are zeros (no samples, or a parameter that was not used)."""
        for bucket, arrived in enumerate(self._arrived):
            if arrived is not None:
                self._take_in(bucket)
        self._next, self._open = self._next + 1, False

    def finish(self, on_exchanged: Callable[[], None] = lambda: None) -> Tensor:
        """The sums over all virtual ranks are in the views of lay_out() until the next begin(); the vector that these are views of.

        (n,) float32; between the parts are zeros. A collective if there is more than one rank, begun in put() and end(). `on_exchanged`:
        called, on a CPU and from the exchange's thread, as soon as this rank waits for no other any more, even if the caller does not get
        there."""
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
        """Fold a bucket's parts into this rank's subtrees; exchange what is complete."""
        arrived, self._arrived[bucket] = self._arrived[bucket], None
        layout, plan = self._layout, self._plan
        assert arrived is not None
        assert layout is not None
        leaf, here = plan.leaves[self._next - plan.carried.start], layout.buckets[bucket]
        views = layout.views[leaf.place]
        if len(arrived) < here.parts:
            missing = [view for part, view in enumerate(views) if layout.bucket_of[part] == bucket and part not in arrived]
            if leaf.adds:
                torch._foreach_add_(missing, 0.0)  # not nothing: -0.0 + 0.0 is 0.0
            else:
                torch._foreach_zero_(missing)
        if arrived:
            into, values = [views[part] for part in arrived], list(arrived.values())
            if leaf.adds:
                if here.dtype != torch.float32:  # a leaf is rounded before it is added, as it is where it is kept
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
        """The sum over all ranks' subtrees into the first of mine, for one bucket. `room`: bytes, for what other ranks send."""
        counts = self._plan.counts
        world_size = len(counts)
        width = (bucket.high - bucket.low) // world_size
        if not width:  # parts without elements
            return
        # My subtrees, each (W, width): a row for each rank that adds it up.
        low, high = bucket.low - bucket.base, bucket.high - bucket.base
        flats = layout.flats[bucket.dtype][: counts[self._rank]]
        mine = [flat[low:high].view(world_size, width) for flat in flats]
        own = mine[0][self._rank]
        peers = [peer for peer in range(world_size) if peer != self._rank]
        foreign = sum(counts) - len(mine)
        received = iter(room[: foreign * width * bucket.dtype.itemsize].view(bucket.dtype).view(foreign, width))
        rows = []  # of each rank, its subtrees' chunks that I add up, each (width,)
        for peer, count in enumerate(counts):
            rows.append([each[peer] for each in mine] if peer == self._rank else [next(received) for _ in range(count)])
        self._swap([(peer, row) for peer in peers for row in rows[peer]], [(peer, each[peer]) for peer in peers for each in mine])
        chunks = [row for each in rows for row in each]
        *inner, (left, right) = self._plan.merges
        for into, other in inner:
            chunks[into].add_(chunks[other])
        torch.add(chunks[left], chunks[right], out=own)  # whichever chunk `own` was, it is in the sum by now
        # All of a peer's chunk of mine has reached it by the time that it sends the sum, so that the sum may come to the same place.
        if own.is_cuda:
            dist.all_gather_into_tensor(mine[0].view(-1), own, self._group)
        else:
            self._swap([(peer, mine[0][peer]) for peer in peers], [(peer, own) for peer in peers])

    def _swap(self, receive: Sequence[tuple[int, Tensor]], send: Sequence[tuple[int, Tensor]]) -> None:
        """Receive and send (rank, tensor). By pairs: with gloo that takes half the time of its all_to_all and all_gather."""
        pairs = [dist.P2POp(dist.irecv, tensor, group=self._group, group_peer=peer) for peer, tensor in receive]
        pairs += [dist.P2POp(dist.isend, tensor, group=self._group, group_peer=peer) for peer, tensor in send]
        for work in dist.batch_isend_irecv(pairs):
            work.wait()


def tree_sum(values: Sequence[T], merge: Callable[[T, T], T]) -> T:
    """The same tree over values that are all here: what finish() computes, for tests and for other things than tensors."""
    carry: list[tuple[Node, T]] = []
    for index, value in enumerate(values):
        carry.append(((index, index + 1), value))
        fold(len(values), carry, merge)
    ((_, total),) = carry
    return total


@dataclass(frozen=True, kw_only=True, slots=True)
class _Bucket:
    """Elements `low` to before `high` of the sums' vector; `parts` of them lie there. What is added up lies in the vectors of `dtype`,
    whose first element is the sums' element `base`."""

    low: int
    high: int
    parts: int
    dtype: torch.dtype
    base: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Leaf:
    """What is done with a virtual rank: put into, or added to, vector `place`; then each (left, right) of `merges`: left += right."""

    place: int
    adds: bool
    merges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """What follows from the blocks alone."""

    carried: range
    leaves: tuple[_Leaf, ...]
    """Of each virtual rank that this rank carries."""
    counts: tuple[int, ...]
    """Of each rank, the subtrees that it sends."""
    merges: tuple[tuple[int, int], ...]
    """Above the ranks' subtrees."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """The memory, and where each part lies in it."""

    result: Tensor  # (n,) float32
    flats: dict[torch.dtype, list[Tensor]]
    """Of each dtype that travels, the vectors of the subtrees. Parts of the other dtype have their place among the buckets too, but no
    memory here: a bucket knows where it begins."""
    views: list[list[Tensor]]
    """Of each vector, each part's room in it."""
    buckets: list[_Bucket]
    bucket_of: list[int]
    """Of each part."""
    received: Tensor | None
    """Bytes, for what other ranks send of one bucket; None where there are none."""
    stream: torch.cuda.Stream | None
    """For the exchange, on a GPU."""


class _Thread:
    """Does jobs one after the other, beside the caller. It does not keep the process alive: it may wait for a rank that is gone."""

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._results: SimpleQueue[BaseException | None] = SimpleQueue()
        threading.Thread(target=_work, args=(self._jobs, self._results), name=name, daemon=True).start()
        weakref.finalize(self, self._jobs.put, None)

    def start(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)

    def join(self, jobs: int) -> None:
        """Wait for the next `jobs` jobs; the first error is raised."""
        for _ in range(jobs):
            error = self._results.get()
            if error is not None:
                raise error


def _work(jobs: "SimpleQueue[Callable[[], None] | None]", results: "SimpleQueue[BaseException | None]") -> None:
    failure: BaseException | None = None
    while (job := jobs.get()) is not None:
        try:
            if failure is None:  # after it, the ranks no longer agree on what comes next
                job()
        except BaseException as error:
            failure = error
        results.put(failure)
        del job  # it holds the reducer


def _leaves(virtual_ranks: int, carried: range) -> list[_Leaf]:
    """The plan of a rank: its subtrees, while they grow, are vectors 0, 1, ... from left to right."""
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
        # A right sibling is added to the left one in place and needs no vector of its own.
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
    """(left, right) of each addition above the ranks' subtrees `nodes`, as positions among them; the sum goes to the left."""
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
    """Parts of `sizes` bytes into buckets of `limit` bytes or one part more; the first and the last are `small`. No part is cut."""
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
    """Room for `like` in `flat`, with its strides (channels_last); gaps and overlaps in its storage are not copied."""
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
