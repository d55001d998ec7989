"""Sums over virtual ranks that have the same bits for any number of real ranks: one fixed binary tree.

Called by the training loop with the parts of a virtual rank (its gradients, BatchNorm statistics and loss), each as soon as it is there.
Which virtual rank a rank carries is block(); what the parts mean is the caller's business. Floating-point sums depend on their brackets, so
the brackets are fixed: the tree over V virtual ranks splits at the largest power of two below V, and so on down. A rank carries a
contiguous block and adds up, as it goes, the largest subtrees that lie wholly inside; the other nodes are added from all ranks' subtrees,
each rank one chunk of the vector:

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


def block(virtual_ranks: int, world_size: int, rank: int) -> range:
    """The virtual ranks that a rank carries: contiguous, sizes at most one apart, the larger ones first."""
    if not 1 <= world_size <= virtual_ranks:
        raise ValueError(
            f"workers={world_size} must be between 1 and train.virtual_ranks={virtual_ranks}: each worker carries at least one; "
            f"use at most {virtual_ranks} workers, or start a new run with more virtual ranks"
        )
    assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
    each, longer = divmod(virtual_ranks, world_size)
    start = rank * each + min(rank, longer)
    return range(start, start + each + (rank < longer))


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
        virtual_ranks: int,
        world_size: int,
        rank: int,
        group: Any = None,
        *,
        bucket_bytes: int = BUCKET_BYTES,
        small_bucket_bytes: int = SMALL_BUCKET_BYTES,
        wire: torch.dtype = torch.float32,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.wait_seconds = 0.0
        self._world_size, self._rank, self._group, self._clock = world_size, rank, group, clock
        self.bucket_bytes, self.small_bucket_bytes = bucket_bytes, small_bucket_bytes
        self._carried = block(virtual_ranks, world_size, rank)
        self._leaves = _leaves(virtual_ranks, self._carried)
        self._counts = [len(subtrees(virtual_ranks, block(virtual_ranks, world_size, r))) for r in range(world_size)]
        self._merges = _merges(virtual_ranks, world_size)
        assert wire in (torch.float32, torch.bfloat16), f"sums travel as float32 or bfloat16, not {wire}"
        self._wire = wire
        self._result: Tensor | None = None
        # Of each dtype that travels, the vectors of the subtrees. Parts of the other dtype have their place in them too, but no memory:
        # a bucket knows where it begins.
        self._flats: dict[torch.dtype, list[Tensor]] = {}
        self._views: list[list[Tensor]] = []
        self._buckets: list[_Bucket] = []
        self._bucket_of: list[int] = []  # of a part
        self._next, self._open = self._carried.start, False
        self._arrived: list[dict[int, Tensor] | None] = []  # of each bucket, part -> its value; None once they are taken in
        self._launched = 0
        self._stream: torch.cuda.Stream | None = None
        self._thread: _Thread | None = None

    @property
    def carried(self) -> range:
        """The virtual ranks that this rank adds."""
        return self._carried

    @property
    def is_open(self) -> bool:
        """Between begin() and end()."""
        return self._open

    def lay_out(self, like: Sequence[Tensor], *, exact: int = 0) -> list[Tensor]:
        """Make room for parts shaped and strided as `like`, float32, in the order in which put() is expected to bring them.

        The first `exact` parts travel as float32 whatever the others do. What is returned are views of one float32 vector, into which
        finish() puts the sums. A part lies in one bucket as a whole."""
        assert not self._buckets, "laid out before"
        assert like, "nothing to add up"
        strange = [
            f"{tensor.dtype} on {tensor.device}" for tensor in like if (tensor.dtype, tensor.device) != (torch.float32, like[0].device)
        ]
        assert not strange, f"expected float32 on {like[0].device}, got {strange[0]}"
        if self._wire == torch.float32:
            exact = len(like)
        offsets, sizes, high = [], dict.fromkeys((torch.float32, self._wire), 0), 0
        for dtype, chosen in ((torch.float32, like[:exact]), (self._wire, like[exact:])):
            if not chosen:
                continue
            base = high
            for parts in _cut([dtype.itemsize * tensor.numel() for tensor in chosen], self.bucket_bytes, self.small_bucket_bytes):
                low = high
                for part in parts:
                    offsets.append(high)
                    self._bucket_of.append(len(self._buckets))
                    high += _up(chosen[part].numel(), LINE)
                high = low + _up(high - low, LINE * self._world_size)  # W equal chunks
                self._buckets.append(_Bucket(low=low, high=high, parts=len(parts), dtype=dtype, base=base))
            sizes[dtype] = high - base
        # Zeros, also between the parts: that room is added and sent with the rest.
        places = range(1 + max(leaf.place for leaf in self._leaves))
        self._result = like[0].new_zeros(high)
        for dtype, size in sizes.items():
            self._flats[dtype] = [like[0].new_zeros(size, dtype=dtype) for _ in places]
        if self._wire == torch.float32:
            self._result = self._flats[torch.float32][0]
        bases = [self._buckets[bucket].base for bucket in self._bucket_of]
        dtypes = [self._buckets[bucket].dtype for bucket in self._bucket_of]
        self._views = [
            [
                _view(self._flats[dtype][place], start - base, tensor)
                for dtype, start, base, tensor in zip(dtypes, offsets, bases, like, strict=True)
            ]
            for place in places
        ]
        self._arrived = [None] * len(self._buckets)
        if self._world_size > 1:
            foreign = sum(self._counts) - self._counts[self._rank]
            widest = max((bucket.high - bucket.low) * bucket.dtype.itemsize for bucket in self._buckets) // self._world_size
            self._received = like[0].new_empty(foreign * widest, dtype=torch.uint8)
            if self._received.is_cuda:
                self._stream = torch.cuda.Stream(self._received.device)  # type: ignore[no-untyped-call]
        return [_view(self._result, start, tensor) for start, tensor in zip(offsets, like, strict=True)]

    def begin(self, virtual_rank: int) -> None:
        """`virtual_rank`'s parts follow. The views that lay_out() returned are no longer the last step's sums."""
        assert self._buckets, "lay_out() comes first"
        assert not self._open, "end() of the virtual rank before comes first"
        assert virtual_rank == self._next, f"virtual rank {virtual_rank} came when {self._next} of {self._carried} was due"
        self._open = True
        self._arrived = [{} for _ in self._buckets]

    def put(self, part: int, value: Tensor) -> None:
        """`part` (its number in lay_out()) of the open virtual rank, once, in any order. `value` must not change before end()."""
        assert self._open, "begin() comes first"
        bucket = self._bucket_of[part]
        arrived = self._arrived[bucket]
        assert arrived is not None, f"part {part} came twice"
        assert part not in arrived, f"part {part} came twice"
        view = self._views[0][part]
        assert (value.dtype, value.shape) == (torch.float32, view.shape), (
            f"part {part} is {value.dtype} {tuple(value.shape)}, not {view.shape}"
        )
        arrived[part] = value
        if len(arrived) == self._buckets[bucket].parts:
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
        assert self._next == self._carried.stop, f"virtual ranks {self._next}..{self._carried.stop - 1} were not added"
        self._next, launched, self._launched = self._carried.start, self._launched, 0
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        elif self._thread is not None:
            begin = self._clock()
            self._thread.start(on_exchanged)
            self._thread.join(launched + 1)
            self.wait_seconds += self._clock() - begin
        assert self._result is not None
        if self._wire != torch.float32:
            exact = self._flats[torch.float32][0]
            self._result[: len(exact)].copy_(exact)
            self._result[len(exact) :].copy_(self._flats[self._wire][0])
        return self._result

    def _take_in(self, bucket: int) -> None:
        """Fold a bucket's parts into this rank's subtrees; exchange what is complete."""
        arrived, self._arrived[bucket] = self._arrived[bucket], None
        assert arrived is not None
        leaf, here = self._leaves[self._next - self._carried.start], self._buckets[bucket]
        views = self._views[leaf.place]
        if len(arrived) < here.parts:
            missing = [view for part, view in enumerate(views) if self._bucket_of[part] == bucket and part not in arrived]
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
        flats = [flat[here.low - here.base : here.high - here.base] for flat in self._flats[here.dtype]]
        for left, right in leaf.merges:
            flats[left].add_(flats[right])
        if self._world_size > 1 and self._next == self._carried.stop - 1:
            while self._launched < len(self._buckets) and self._arrived[self._launched] is None:
                self._launch(self._buckets[self._launched])
                self._launched += 1

    def _launch(self, bucket: "_Bucket") -> None:
        if self._stream is None:
            if self._thread is None:
                self._thread = _Thread("tree reduction")
            self._thread.start(partial(self._exchange, bucket))
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            self._exchange(bucket)

    def _exchange(self, bucket: "_Bucket") -> None:
        """The sum over all ranks' subtrees into the first of mine, for one bucket."""
        width = (bucket.high - bucket.low) // self._world_size
        if not width:  # parts without elements
            return
        # My subtrees, each (W, width): a row for each rank that adds it up.
        low, high = bucket.low - bucket.base, bucket.high - bucket.base
        flats = self._flats[bucket.dtype][: self._counts[self._rank]]
        mine = [flat[low:high].view(self._world_size, width) for flat in flats]
        own = mine[0][self._rank]
        peers = [peer for peer in range(self._world_size) if peer != self._rank]
        foreign = sum(self._counts) - len(mine)
        received = iter(self._received[: foreign * width * bucket.dtype.itemsize].view(bucket.dtype).view(foreign, width))
        rows = []  # of each rank, its subtrees' chunks that I add up, each (width,)
        for peer, count in enumerate(self._counts):
            rows.append([each[peer] for each in mine] if peer == self._rank else [next(received) for _ in range(count)])
        self._swap([(peer, row) for peer in peers for row in rows[peer]], [(peer, each[peer]) for peer in peers for each in mine])
        chunks = [row for each in rows for row in each]
        *inner, (left, right) = self._merges
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


def _merges(virtual_ranks: int, world_size: int) -> list[tuple[int, int]]:
    """(left, right) of each addition above the ranks' subtrees, as positions among all ranks' subtrees; the sum goes to the left."""
    carry: list[tuple[Node, int]] = []
    merges: list[tuple[int, int]] = []

    def merge(left: int, right: int) -> int:
        merges.append((left, right))
        return left

    nodes = [node for rank in range(world_size) for node in subtrees(virtual_ranks, block(virtual_ranks, world_size, rank))]
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
