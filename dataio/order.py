"""The order of training: which samples belong to (epoch, step, virtual rank), as a pure function of seed and data set.

Called by the loader for every batch, and by anyone who wants to know what a step saw. Nothing is stored: each position of the epoch's
permutation is computed on demand (a keyed Feistel network with cycle walking). So a data set of a billion rows needs the same few
kilobytes as one of fifty thousand, and training can start at any step. The loader reads the samples, `codecs/image/augment.py` augments
them.

An epoch's samples rarely make whole batches. A last batch of one image moves the weights as far as a full one, and BatchNorm cannot
normalise it. On Fashion-MNIST in batches of 32 (benchmarks/remainder.py), 64 images end in a test loss of 2.1, but 33, 65 and 97 in 133,
278 and 305, each of four seeds above 9. `Order.spread` makes the same number of batches, whose sizes differ by one sample at most: 2.4, 2.3
and 1.8. Giving a step the weight of its images does as well (2.0 to 2.4), but not with four virtual ranks: 14, where spreading gives 2.3.
`spreads` says where it is of use.

With `window=0` one permutation covers all samples. With `window>0`, blocks of `group` samples (the row groups of the files) are permuted,
consecutive blocks make windows, and samples are permuted inside their window: a lane reads the data a few row groups at a time.
"""

import hashlib
import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

ROUNDS = 8
SORTED_BELOW = 512
# Odd constants of the splitmix64 finaliser (Steele, Lea, Flood 2014).
_MIX_A = np.uint64(0xBF58476D1CE4E5B9)
_MIX_B = np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """Decides which virtual rank sees which sample in which step.

    The positions 0..count-1 of an epoch are cut into one contiguous lane for each virtual rank (sizes differ by at most one). Step s of a
    lane is its s-th piece. Workers play no part here: they only choose which lanes they carry (`blocks_of_virtual_ranks`).

    Without `spread` all pieces have `batch_size / virtual_ranks` positions, but for the lane's last, which may be short or empty. With it
    all pieces of all lanes have q or q + 1 positions, and so do the steps' sums differ by one at most: what is left of each lane after q
    positions a step is dealt out one by one, step after step, and the next lane goes on where the one before ended. Both are the same
    order if `batch_size` divides `count`.
    """

    seed: int
    fingerprint: str
    """Fingerprint of the data set's content: other data have another order."""
    count: int
    """Samples in the split."""
    batch_size: int
    """Samples in a step, over all virtual ranks."""
    virtual_ranks: int
    window: int = 0
    """Samples shuffled together, rounded up to whole groups; 0 shuffles all."""
    group: int = 512
    """Samples in a row group (all groups but the last are full)."""
    spread: bool = False
    """Spread the remainder over the epoch instead of leaving a short last step."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"a training split of {self.count} samples has no order; the data set needs at least one training sample")
        if self.virtual_ranks < 1:
            raise ValueError(f"train.virtual_ranks={self.virtual_ranks} is not positive; use 1 or more")
        if self.window < 0:
            raise ValueError(f"data.shuffle_window={self.window} is negative; use 0 to shuffle the whole data set")
        if self.batch_size < 1 or self.batch_size % self.virtual_ranks:
            below = self.batch_size // self.virtual_ranks * self.virtual_ranks
            choices = f"{below} or {below + self.virtual_ranks}" if below > 0 else f"{self.virtual_ranks}"
            raise ValueError(
                f"data.batch_size={self.batch_size} is not a multiple of train.virtual_ranks={self.virtual_ranks}; use {choices}"
            )
        assert self.group > 0

    @property
    def batch_per_virtual_rank(self) -> int:
        return self.batch_size // self.virtual_ranks

    @property
    def steps_per_epoch(self) -> int:
        longest_lane = -(-self.count // self.virtual_ranks)
        return -(-longest_lane // self.batch_per_virtual_rank)

    def batch_count(self, step_in_epoch: int) -> int:
        """Samples of this step over all virtual ranks: the divisor of a mean over the batch."""
        return self.count_before(step_in_epoch + 1, range(self.virtual_ranks)) - self.count_before(step_in_epoch, range(self.virtual_ranks))

    def batch_sizes(self, virtual_ranks: range) -> frozenset[int]:
        """The sizes of all steps of an epoch over these virtual ranks together, but for those of a short last step."""
        if not self.spread:
            return frozenset({self.batch_per_virtual_rank * len(virtual_ranks)})
        least, dealt = divmod(self._lane_ends(virtual_ranks.stop) - self._lane_ends(virtual_ranks.start), self.steps_per_epoch)
        return frozenset({least, least + (dealt > 0)})

    def count_before(self, step_in_epoch: int, virtual_ranks: range) -> int:
        """Samples of these virtual ranks in the steps of an epoch before `step_in_epoch`."""
        short, longer_lanes = divmod(self.count, self.virtual_ranks)
        if not self.spread:
            longer = min(virtual_ranks.stop, longer_lanes) - min(virtual_ranks.start, longer_lanes)
            taken = step_in_epoch * self.batch_per_virtual_rank
            return longer * min(short + 1, taken) + (len(virtual_ranks) - longer) * min(short, taken)
        steps = self.steps_per_epoch
        every = short // steps  # q
        first, end = (self._lane_ends(rank) - rank * every * steps for rank in (virtual_ranks.start, virtual_ranks.stop))
        return every * len(virtual_ranks) * step_in_epoch + _dealt(end, step_in_epoch, steps) - _dealt(first, step_in_epoch, steps)

    def _lane_ends(self, lanes: int) -> int:
        """Positions of the first `lanes` lanes together."""
        short, longer_lanes = divmod(self.count, self.virtual_ranks)
        return lanes * short + min(lanes, longer_lanes)

    def samples(self, epoch: int, step_in_epoch: int, virtual_rank: int) -> Ids:
        """Sample ids (n,) int64, n <= batch_per_virtual_rank."""
        return self.lane(epoch, range(step_in_epoch, step_in_epoch + 1), virtual_rank)[0]

    def lane(self, epoch: int, steps: range, virtual_rank: int) -> list[Ids]:
        """`samples` for consecutive steps of an epoch, for hardly more time than one step: the calls cost time, not the samples."""
        assert 0 <= virtual_rank < self.virtual_ranks, virtual_rank
        assert 0 <= steps.start < steps.stop <= self.steps_per_epoch, steps
        start, own = self._lane_ends(virtual_rank), range(virtual_rank, virtual_rank + 1)
        cuts = [start + self.count_before(step, own) for step in range(steps.start, steps.stop + 1)]
        ids = self.at(epoch, np.arange(cuts[0], cuts[-1], dtype=np.int64))
        return [ids[low - cuts[0] : high - cuts[0]] for low, high in itertools.pairwise(cuts)]

    def at(self, epoch: int, positions: Ids) -> Ids:
        """Sample ids at any positions of an epoch's permutation; the shape stays the same."""
        if self.window == 0:
            return permuted(positions, self.count, self._key(epoch, "samples"))
        return self._windowed(epoch, positions)

    def _windowed(self, epoch: int, positions: Ids) -> Ids:
        # A slot is a place in the permuted row of blocks. A short last block sits in a randomly drawn slot, and all positions behind that
        # slot shift by the number of missing samples: positions and slots are computed from each other without a table.
        group = self.group
        full_blocks, tail = divmod(self.count, group)
        blocks = full_blocks + (tail > 0)
        lacking = group - tail if tail else 0
        tail_slot = int.from_bytes(self._key(epoch, "tail")[:8], "little") % blocks if tail else blocks
        blocks_per_window = min(-(-self.window // group), blocks)
        window_samples = blocks_per_window * group
        tail_window = tail_slot // blocks_per_window

        window_of = np.where(positions >= (tail_window + 1) * window_samples - lacking, positions + lacking, positions) // window_samples
        ids = np.empty_like(positions)
        for window in np.unique(window_of).tolist():  # a batch touches one or two
            chosen = window_of == window
            start = window * window_samples - (lacking if window > tail_window else 0)
            stop = min((window + 1) * window_samples - (lacking if window >= tail_window else 0), self.count)
            inside = start + permuted(positions[chosen] - start, stop - start, self._key(epoch, f"window {window}"))
            after_tail = inside >= tail_slot * group + tail
            slot, offset = np.divmod(np.where(after_tail, inside + lacking, inside), group)
            block = np.full_like(slot, full_blocks)
            full = slot != tail_slot
            block[full] = permuted(slot[full] - (slot[full] > tail_slot), full_blocks, self._key(epoch, "blocks"))
            ids[chosen] = block * group + offset
        return ids

    def _key(self, epoch: int, purpose: str) -> bytes:
        text = f"order 1\n{self.seed}\n{self.fingerprint}\n{epoch}\n{purpose}"
        return hashlib.blake2b(text.encode(), digest_size=8 * ROUNDS).digest()


def spreads(*, count: int, batch_size: int, virtual_ranks: int) -> bool:
    """Whether an epoch's remainder is to be spread: without it, some virtual rank's last batch would be under half of the others. A last
    batch of at least half does no harm that can be measured, and so most runs keep the order that they had: in benchmarks/remainder.py last
    batches of 1, 4 and 8 of 32 ruined 12 of 12, 3 of 4 and 1 of 4 runs, those of 16 and 24 none."""
    if virtual_ranks < 1 or batch_size < 1:  # Order refuses them
        return False
    each, shortest_lane = batch_size // virtual_ranks, count // virtual_ranks
    steps = -(-count // batch_size)
    return steps > 1 and 2 * (shortest_lane - (steps - 1) * each) < each


def _dealt(cards: int, steps: int, players: int) -> int:
    """How many of `cards` samples, dealt out one by one to `players` steps in turn, the first `steps` of them get."""
    rounds, more = divmod(cards, players)
    return rounds * steps + min(more, steps)


def blocks_of_virtual_ranks(virtual_ranks: int, workers: int, rank: int) -> range:
    """The virtual ranks that worker `rank` of `workers` carries: contiguous blocks whose sizes differ by at most one."""
    if workers > virtual_ranks:
        raise ValueError(
            f"{workers} workers cannot share train.virtual_ranks={virtual_ranks}; use at most {virtual_ranks} workers or more virtual ranks"
        )
    assert 0 <= rank < workers, (rank, workers)
    size, larger = divmod(virtual_ranks, workers)
    start = rank * size + min(rank, larger)
    return range(start, start + size + (rank < larger))


def permuted(positions: Ids, count: int, key: bytes) -> Ids:
    """A keyed permutation of 0..count-1, evaluated at `positions` (n,): a Feistel network over the next power of two. Values outside walk
    along their cycle until they fall inside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"); two passes on average."""
    if count <= SORTED_BELOW:
        # Eight rounds over three bits favour some permutations (chi2 1751, expected 119); sorting by a hash without ties does not.
        by_hash = np.argsort(mixed(np.arange(count, dtype=np.uint64), np.frombuffer(key, dtype="<u8")[0]))
        return by_hash[positions].astype(np.int64, copy=False)
    bits = (count - 1).bit_length()
    values = _feistel(positions.astype(np.uint64), bits=bits, key=key)
    outside = np.flatnonzero(values >= count)
    while outside.size:
        walked = _feistel(values[outside], bits=bits, key=key)
        values[outside] = walked
        outside = outside[walked >= count]
    return values.astype(np.int64)


def _feistel(values: npt.NDArray[np.uint64], *, bits: int, key: bytes) -> npt.NDArray[np.uint64]:
    # Halves of bits//2 and bits - bits//2 alternate: each round changes one half by a function of the other, so each is its own inverse.
    low_bits = np.uint64(bits - bits // 2)
    low_mask = np.uint64((1 << int(low_bits)) - 1)
    high_mask = np.uint64((1 << bits // 2) - 1)
    high, low = values >> low_bits, values & low_mask
    for turn, round_key in enumerate(np.frombuffer(key, dtype="<u8")):
        if turn % 2:
            low = low ^ (mixed(high, round_key) & low_mask)
        else:
            high = high ^ (mixed(low, round_key) & high_mask)
    return (high << low_bits) | low


def mixed(values: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    """A keyed hash of each value, without ties: two values have the same one just when they are equal."""
    hashed = (values ^ key) * _MIX_A
    hashed ^= hashed >> np.uint64(31)
    hashed *= _MIX_B
    hashed ^= hashed >> np.uint64(33)
    return hashed
