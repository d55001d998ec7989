"""The checkpoint interval: Daly's estimate against a search for the least time lost, the chooser's limits, two real ranks that agree."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import assume, given
from hypothesis import strategies as st

from cluster.interval import (
    AUTO,
    IntervalChooser,
    SharedInterval,
    mean_time_between_failures,
    observed_failures,
    optimal_interval_seconds,
    steps_between,
)


def wall_per_work(interval: float, stall: float, mtbf: float) -> float:
    """Expected wall time for a second of work with exponential failures and no restart time (Daly 2006, equation 20)."""
    return mtbf * math.expm1((interval + stall) / mtbf) / interval


@given(stall=st.floats(1e-4, 100.0), mtbf=st.floats(60.0, 1e7))
def test_no_interval_loses_much_less_time_than_the_one_proposed(stall: float, mtbf: float) -> None:
    assume(stall < mtbf / 20)
    proposed = optimal_interval_seconds(stall, mtbf)
    best = min(wall_per_work(proposed * 1.05**power, stall, mtbf) for power in range(-60, 61))
    assert wall_per_work(proposed, stall, mtbf) - 1 <= (best - 1) * 1.005 + 1e-12
    young = math.sqrt(2 * stall * mtbf)
    assert abs(proposed - young) <= stall + young * 0.2


@given(stall=st.floats(0, 1e4), mtbf=st.floats(1e-3, 1e7))
def test_the_estimate_is_never_negative_and_never_above_the_time_between_failures(stall: float, mtbf: float) -> None:
    assert 0 <= optimal_interval_seconds(stall, mtbf) <= mtbf * (1 + 1e-9)
    assert optimal_interval_seconds(2 * mtbf, mtbf) == mtbf


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="must be at least 0"):
        optimal_interval_seconds(-1.0, 10.0)
    with pytest.raises(ValueError, match="above 0"):
        optimal_interval_seconds(1.0, 0.0)


def chooser_of(stall: float, step: float, *, steps_per_epoch: int = 10**9, write: float | None = None, **more: Any) -> IntervalChooser:
    chooser = IntervalChooser(**({"workers": 1, "steps_per_epoch": steps_per_epoch} | more))
    for _ in range(5):
        chooser.stepped(step)
        chooser.saved(stall)
        if write is not None:
            chooser.staged(write)
    return chooser


@given(
    stall=st.floats(1e-6, 10.0),
    step=st.floats(1e-4, 10.0),
    steps_per_epoch=st.integers(1, 10**7),
    workers=st.integers(1, 64),
    write=st.none() | st.floats(0, 100.0),
)
def test_a_proposal_is_within_an_epoch_stalls_at_most_a_hundredth_and_overlaps_no_write(
    stall: float, step: float, steps_per_epoch: int, workers: int, write: float | None
) -> None:
    chooser = chooser_of(stall, step, steps_per_epoch=steps_per_epoch, workers=workers, write=write)
    steps = chooser.propose()
    assert 1 <= steps <= steps_per_epoch
    if steps < steps_per_epoch:
        assert stall / (stall + steps * step) <= 0.01 * (1 + 1e-9)
        assert steps * step >= (write or 0.0) * (1 - 1e-9)
        assert steps * step >= optimal_interval_seconds(stall, chooser.mtbf_seconds) * (1 - 1e-9)


def test_the_figures_of_a_day_between_failures() -> None:
    # sqrt(2 * 0.01 s * 24 h) = 41.6 s; a fourth of the time between failures is half the interval.
    assert chooser_of(0.01, 0.3).propose() == 139
    assert chooser_of(0.01, 0.3, workers=4).propose() == pytest.approx(139 / 2, abs=1)
    assert chooser_of(0.0, 0.3).propose() == 1  # what costs nothing is done always
    assert IntervalChooser(workers=1, steps_per_epoch=1000).propose() == 50  # nothing measured yet
    assert IntervalChooser(workers=1, steps_per_epoch=7).propose() == 7


@given(failures=st.integers(0, 50), more=st.integers(1, 50), hours=st.floats(0, 1000))
def test_failures_make_the_interval_shorter_and_quiet_hours_make_it_longer(failures: int, more: int, hours: float) -> None:
    def proposed(failures: int, hours: float) -> int:
        return chooser_of(0.01, 1e-3, failures=failures, observed_seconds=hours * 3600).propose()

    assert proposed(failures + more, hours) <= proposed(failures, hours) <= proposed(failures, hours + 10)
    assert mean_time_between_failures(100.0, 0.0, 0) == 100.0  # the prior alone
    assert mean_time_between_failures(100.0, 900.0, 99) == 10.0  # hardly the prior


def test_a_journal_says_how_often_a_run_failed_and_how_long_it_ran() -> None:
    def events(*told: tuple[float, str, dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"time": time, "event": event, **more} for time, event, more in told]

    killed_driver = [(0.0, "run_started", {}), (10.0, "attempt_started", {}), (40.0, "evaluation", {})]
    resumed = [
        (100.0, "run_started", {}),
        (110.0, "attempt_started", {}),
        (130.0, "attempt_failed", {"kind": "infrastructure"}),
        (135.0, "attempt_started", {}),
        (145.0, "attempt_failed", {"kind": "numbers"}),
        (150.0, "attempt_started", {}),
        (155.0, "attempt_paused", {"kind": "preempted"}),
        (200.0, "attempt_started", {}),
        (203.0, "attempt_paused", {"kind": "grow"}),
        (210.0, "attempt_started", {}),
        (211.0, "run_stopped", {}),
        (300.0, "run_started", {}),
        (310.0, "attempt_started", {}),
        (317.0, "evaluation", {}),
    ]
    assert observed_failures([]) == (0, 0.0)
    assert observed_failures(events(*killed_driver)) == (0, 30.0)
    # The driver, the worker, the preemption.
    assert observed_failures(events(*killed_driver, *resumed)) == (3, 30.0 + 20.0 + 10.0 + 5.0 + 3.0 + 1.0 + 7.0)


# --- when to save ---------------------------------------------------------------------------------------------------------------------


@given(every=st.integers(0, 60), steps_per_epoch=st.integers(1, 2000), start=st.integers(0, 500))
def test_a_fixed_interval_is_counted_from_the_runs_first_step_whatever_was_saved(every: int, steps_per_epoch: int, start: int) -> None:
    interval = SharedInterval(every, start_step=start, steps_per_epoch=steps_per_epoch)
    wanted = every or min(steps_per_epoch, 500)
    assert interval.steps == wanted == steps_between(every, steps_per_epoch)
    for done in range(start + 1, start + 150):
        assert interval.due(done) == (done % wanted == 0)
        if done % 7 == 0:
            interval.saved(done)


def test_a_rank_alone_follows_its_measurements_and_counts_from_its_last_save() -> None:
    chooser = IntervalChooser(workers=1, steps_per_epoch=1000)
    interval = SharedInterval(AUTO, start_step=30, steps_per_epoch=1000, chooser=chooser)
    saves = []
    for done in range(31, 500):
        chooser.stepped(0.3)
        if interval.due(done) or done == 100:  # an epoch's end
            chooser.saved(0.01)
            interval.saved(done)
            saves.append(done)
    assert saves == [80, 100, 239, 378]


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    chooser = IntervalChooser(workers=2, steps_per_epoch=1000) if rank == 0 else None
    interval = SharedInterval(AUTO, start_step=0, steps_per_epoch=1000, chooser=chooser, world_size=2)
    saves, known = [], []
    loss = torch.zeros(1)
    for done in range(1, 400):
        dist.all_reduce(loss)  # a step's own collective, between the broadcast and its end
        if chooser is not None:
            chooser.stepped(0.3)
        due = interval.due(done)
        known.append(interval.steps)
        if due or done in (100, 260):
            if chooser is not None:
                chooser.saved(0.01 if done < 200 else 0.0025)
            interval.saved(done)
            saves.append(done)
    dist.barrier()
    dist.destroy_process_group()
    torch.save((saves, known), f"{folder}/{rank}.pt")


def test_two_real_ranks_save_after_the_same_steps_although_only_one_measures(tmp_path: Path) -> None:
    mp.spawn(rank_main, (str(tmp_path),), nprocs=2)
    (saves, known), other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert (saves, known) == other
    assert saves[:3] == [50, 100, 198]  # 50 to begin with, for want of measurements; 98 for half a day between failures
    assert len(set(known)) >= 2
