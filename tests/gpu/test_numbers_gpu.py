"""On a GPU: losses and verdicts that come late are waited for by those who must, and by nobody else."""

import math
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cluster.failures import BadNumbers
from cluster.interval import AUTO, IntervalChooser, SharedInterval
from cluster.verify import WeightsCheck, WeightsHash
from trainer.learn.step import SLOTS_AT_ONCE, Arriving, Slots
from trainer.rank.guard import Guard

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False here"),
]


@pytest.fixture(scope="module", autouse=True)
def used_before() -> None:
    """What runs for the first time may wait for the device: a kernel's module is loaded, pinned memory is taken. So all of it runs once."""
    torch.cuda._sleep(1000)  # type: ignore[attr-defined]
    value = torch.full((), math.nan, device="cuda")
    Arriving(0, value, None, torch.cuda.Stream()).wait()
    value.add_(1.0)
    own = torch.randn(1000, 1000, device="cuda")
    check = WeightsCheck([own], world_size=1)
    first = check.start(1)
    own[3, 3] = math.inf
    first.wait()
    check.poll()
    torch.cuda.synchronize()


@pytest.fixture
def busy() -> Iterator[Tensor]:
    """A value on the device that is there after about a second of other work, queued already."""
    torch.cuda._sleep(2_000_000_000)  # type: ignore[attr-defined]  # cycles
    yield torch.full((), 2.5, device="cuda")
    torch.cuda.synchronize()


def test_a_late_loss_holds_up_only_the_thread_that_waits_for_it(busy: Tensor) -> None:
    arriving = Arriving(3, busy, None, torch.cuda.Stream())
    assert not arriving.is_here()
    guard = Guard(spike_factor=0.0, batch_size=1, samples_of=lambda step: 1)
    proof, judged = guard.proof([arriving]), []
    thread = threading.Thread(target=lambda: judged.append(proof()))
    thread.start()
    busy.add_(1.0)  # a later step's work: queued, not waited for, and not what arrives
    assert thread.is_alive()
    assert not judged
    thread.join()
    assert judged[0].newest_loss == 2.5


def test_a_late_nan_is_raised_where_it_is_waited_for() -> None:
    torch.cuda._sleep(500_000_000)  # type: ignore[attr-defined]
    arriving = Arriving(3, torch.full((), math.nan, device="cuda"), None, torch.cuda.Stream())
    with pytest.raises(BadNumbers, match="step 3"):
        Guard(spike_factor=0.0, batch_size=1, samples_of=lambda step: 1).proof([arriving])()


def test_the_hash_of_weights_on_a_gpu_finds_every_flipped_bit_and_does_not_depend_on_time() -> None:
    own = [torch.randn(64, 128, 3, 3, device="cuda").to(memory_format=torch.channels_last), torch.randn(7, device="cuda")]
    fingerprint = WeightsHash(own)
    clean = int(fingerprint.hash())
    assert all(int(fingerprint.hash()) == clean for _ in range(5))
    for tensor in own:
        words = tensor.as_strided((tensor.numel(),), (1,)).view(torch.int32)
        for element, bit in ((0, 0), (words.numel() - 1, 30), (words.numel() // 2, 12)):
            words[element] ^= 1 << bit
            assert int(fingerprint.hash()) != clean
            words[element] ^= 1 << bit
    assert int(fingerprint.hash()) == clean


def test_a_check_sees_the_weights_of_its_step_and_not_those_of_later_ones() -> None:
    own = [torch.randn(1000, 1000, device="cuda")]
    check = WeightsCheck(own, world_size=1)
    torch.cuda._sleep(500_000_000)  # type: ignore[attr-defined]
    good = check.start(1)
    own[0][3, 3] = math.inf
    bad = check.start(2)
    assert not good.is_here()
    check.poll()  # nothing is here, and nobody waits
    assert check.verified_steps == -1
    good.wait()
    with pytest.raises(BadNumbers, match="step 1: after 2 steps"):
        bad.wait()


def test_a_rank_alone_on_a_gpu_takes_its_own_proposal() -> None:
    chooser = IntervalChooser(workers=1, steps_per_epoch=1000)
    interval = SharedInterval(AUTO, start_step=0, steps_per_epoch=1000, chooser=chooser, device=torch.device("cuda"))
    chooser.stepped(0.3)
    chooser.saved(0.01)
    interval.saved(50)
    assert (interval.steps, interval.due(188), interval.due(189)) == (139, False, True)


def test_losses_of_many_steps_arrive_as_they_were_in_places_that_are_used_again() -> None:
    slots, late, found = Slots(), [], []
    for step in range(1000):
        late.append(Arriving(step, torch.full((), float(step), device="cuda") * 3, slots=slots))
        while len(late) > 20:
            found.append(late.pop(0).wait())
    found += [each.wait() for each in late]
    assert found == [3.0 * step for step in range(1000)]
    assert len(slots._free[torch.float32]) == SLOTS_AT_ONCE
