"""Sums over virtual ranks that have the same bits for any number of real ranks: one fixed binary tree.

Called by the training loop with flat float32 vectors (gradients, BatchNorm statistics). Which virtual rank a rank carries is block();
what is in a vector is the caller's business. Floating-point sums depend on their brackets, so the brackets are fixed: the tree over V
virtual ranks splits at the largest power of two below V, and so on down. A rank carries a contiguous block and adds up, as it goes, the
largest subtrees that lie wholly inside; the other nodes are added from all ranks' subtrees, each rank one chunk of the vector:

    V=8, W=3   rank 0: 0 1 2 -> (0+1), 2      rank 1: 3 4 5 -> 3, (4+5)      rank 2: 6 7 -> (6+7)
               all_to_all of chunks, then ((0+1)+(2+3)) + ((4+5)+(6+7)) for one's own chunk, then all_gather

For a vector of n floats a rank with k subtrees sends k*n*(W-1)/W floats, then n*(W-1)/W. With k = 1 (V and W powers of two) that is the
volume of a ring all-reduce; k <= 2*log2(V). Memory: at most 2*log2(V) + 1 buffers of n floats for the carry, log2 of the block's size where
it is one subtree (none where V = 1), and for the exchange K*n/W floats, K the number of all ranks' subtrees, and k*n more if k > 1. All
are kept between steps."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Node = tuple[int, int]
"""A subtree: the virtual ranks from the first to before the second."""

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
    """add() the vectors of this rank's virtual ranks in order, then finish() for the sum over all virtual ranks, on every rank.

    The sum lives in a buffer of the reducer until the next add(). With one virtual rank it is the vector that was added."""

    def __init__(self, virtual_ranks: int, world_size: int, rank: int, group: Any = None) -> None:
        self._virtual_ranks, self._world_size, self._rank, self._group = virtual_ranks, world_size, rank, group
        self._carried = block(virtual_ranks, world_size, rank)
        self._nodes = [subtrees(virtual_ranks, block(virtual_ranks, world_size, r)) for r in range(world_size)]
        self._next = self._carried.start
        self._carry: list[tuple[Node, Tensor]] = []
        self._free: list[Tensor] = []  # padded buffers, all of one size
        self._received: Tensor | None = None
        self._numel = 0

    @property
    def carried(self) -> range:
        """The virtual ranks that this rank adds."""
        return self._carried

    def add(self, virtual_rank: int, flat: Tensor) -> None:
        """`flat`: (n,) float32, the same n for all. It is not kept, unless it is the only one, and not changed."""
        self._expect(virtual_rank, flat)
        if self._virtual_ranks == 1:
            self._carry = [((0, 1), flat)]
        elif self._is_right(virtual_rank):
            self._carry[-1][1][: flat.numel()].add_(flat)
            self._added(virtual_rank)
        else:
            buffer = self._buffer(flat)
            buffer[: flat.numel()].copy_(flat)
            self._carry.append(((virtual_rank, virtual_rank + 1), buffer))
        self._next += 1

    def skip(self, virtual_rank: int, like: Tensor) -> None:
        """Add zeros shaped as `like` for a virtual rank with no samples, without making them."""
        self._expect(virtual_rank, like)
        if self._virtual_ranks == 1:
            self._carry = [((0, 1), torch.zeros_like(like))]
        elif self._is_right(virtual_rank):
            self._carry[-1][1].add_(0.0)  # not nothing: -0.0 + 0.0 is 0.0
            self._added(virtual_rank)
        else:
            self._carry.append(((virtual_rank, virtual_rank + 1), self._buffer(like).zero_()))
        self._next += 1

    def finish(self) -> Tensor:
        """The sum (n,) over all virtual ranks; a collective if there is more than one rank."""
        assert self._next == self._carried.stop, f"virtual ranks {self._next}..{self._carried.stop - 1} were not added"
        mine = [tensor for _, tensor in self._carry]
        self._carry, self._next = [], self._carried.start
        if self._virtual_ranks == 1:
            return mine[0]
        self._free.extend(mine)
        if self._world_size > 1:
            self._exchange(mine)
        return mine[0][: self._numel]

    def _exchange(self, mine: list[Tensor]) -> None:
        """Sum over all ranks' subtrees into mine[0]."""
        width = mine[0].numel() // self._world_size
        counts = [len(nodes) for nodes in self._nodes]
        # sent: for each receiving rank the chunk of each of my subtrees, (W, k, width); with k = 1 that is the buffer as it is.
        sent = mine[0] if len(mine) == 1 else torch.stack([tensor.view(self._world_size, width) for tensor in mine], dim=1).view(-1)
        if self._received is None or self._received.numel() != sum(counts) * width or self._received.device != sent.device:
            self._received = sent.new_empty(sum(counts) * width)
        receive_sizes, send_sizes = [count * width for count in counts], [len(mine) * width] * self._world_size
        dist.all_to_all_single(self._received, sent, receive_sizes, send_sizes, self._group)
        rows = self._received.view(-1, width)  # (all subtrees, width), from left to right in the tree
        carry: list[tuple[Node, Tensor]] = []
        for node, row in zip((node for nodes in self._nodes for node in nodes), rows, strict=True):
            carry.append((node, row))
            fold(self._virtual_ranks, carry, Tensor.add_)
        ((node, chunk),) = carry
        assert node == (0, self._virtual_ranks)
        dist.all_gather_into_tensor(mine[0], chunk, self._group)

    def _expect(self, virtual_rank: int, flat: Tensor) -> None:
        assert virtual_rank == self._next, f"virtual rank {virtual_rank} came when {self._next} of {self._carried} was due"
        assert (flat.dim(), flat.dtype) == (1, torch.float32), f"expected a flat float32 vector, got {flat.dtype} {tuple(flat.shape)}"
        if self._carry:
            assert flat.numel() == self._numel, f"vectors of {self._numel} and of {flat.numel()} elements in one sum"
        self._numel = flat.numel()

    def _is_right(self, virtual_rank: int) -> bool:
        """The subtree on the left of this leaf is its sibling: add to it in place, with no buffer of its own."""
        parents = _parents(self._virtual_ranks)
        return bool(self._carry) and parents[virtual_rank, virtual_rank + 1] == parents.get(self._carry[-1][0], ())

    def _added(self, virtual_rank: int) -> None:
        node, tensor = self._carry.pop()
        self._carry.append(((node[0], virtual_rank + 1), tensor))
        fold(self._virtual_ranks, self._carry, self._merge)

    def _merge(self, left: Tensor, right: Tensor) -> Tensor:
        self._free.append(right)
        return left.add_(right)

    def _buffer(self, like: Tensor) -> Tensor:
        # Padded to a multiple of W so that chunks are equal. What is in the padding is never read.
        padded = -(-like.numel() // self._world_size) * self._world_size
        if self._free and (self._free[-1].numel() != padded or self._free[-1].device != like.device):
            self._free.clear()
        return self._free.pop() if self._free else like.new_zeros(padded)


def tree_sum(values: Sequence[T], merge: Callable[[T, T], T]) -> T:
    """The same tree over values that are all here; what finish() computes, for those who need it of other things than vectors."""
    carry: list[tuple[Node, T]] = []
    for index, value in enumerate(values):
        carry.append(((index, index + 1), value))
        fold(len(values), carry, merge)
    ((_, total),) = carry
    return total


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
