"""The campaign of the control plane: it sees a run's calls, its faults happen, its judgement is strict. A slice of its trials."""

from collections.abc import Iterator

import pytest

from benchmarks.faults import soak
from benchmarks.faults.calls import Strike
from benchmarks.faults.control import STEPS, Campaign, Outcome, Trial, judge_first, judge_second, may_end, opened, row_of, thinned
from benchmarks.faults.local_ray import MessageStrike

SHA = "5c" * 32
GOOD = {"status": 0, "sha256": SHA, "step": STEPS, "struck": True}


@pytest.fixture(scope="module")
def campaign() -> Iterator[Campaign]:
    with opened(jobs=2, places=["local"], say=print) as campaign:
        yield campaign


def test_a_whole_run_in_one_process_shows_every_call_and_gives_the_same_bits_however_it_goes(campaign: Campaign) -> None:
    death = campaign.undisturbed("local", "death")
    assert death.events["attempt_failed"] == 1
    assert death.events["checkpoint_committed"] >= STEPS / 2
    paths = " ".join(path for _, path in death.calls)
    for part in ("journal.jsonl", "config.toml", "generations/.g0001", "checkpoints", "summary.json", "report.html"):
        assert part in paths, part
    methods = {method for method, _, _ in death.messages}
    assert methods >= {"start_attempt", "order", "register", "ack", "wait_committed", "put_result", "rank_ended", "result", "news", "drain"}
    stopped = campaign.undisturbed("local", "stop")
    assert stopped.events["stop_requested"] == 1
    assert stopped.sha256 == death.sha256


def test_a_trial_in_which_the_storage_refuses_ends_with_one_line_and_goes_on_to_the_same_bits(campaign: Campaign) -> None:
    base = campaign.undisturbed("local", "death")
    first = next(number for number, (_, path) in enumerate(base.calls, start=1) if "journal.jsonl" in path)
    trials = [
        Trial(storage=Strike(kind="driver", how="refused", first=first)),
        Trial(storage=Strike(kind="driver", how="once", first=10**6)),
    ]
    row = row_of("slice", campaign.judge(trials), print)
    assert (row["trials"], row["violations"]) == (1, 0), row["problems"]


def test_a_slice_of_the_trials_whose_runs_all_end_in_the_same_bits(campaign: Campaign) -> None:
    """Fails where a second delivery, a coordinator's death, or one failure or 90 s of a disk cost the run."""
    base = campaign.undisturbed("local", "death")
    looks = [number for number, (call, path) in enumerate(base.calls, start=1) if call == "scandir" and path == "run/checkpoints"]
    going_back = looks[-1]  # after the rank's death
    trials = [
        Trial(message=MessageStrike(how="twice")),
        Trial(message=MessageStrike(how="killed after", method="start_attempt", number=2)),
        Trial(storage=Strike(kind="driver", how="once", first=going_back)),
        Trial(storage=Strike(kind="driver", how="lasting", first=going_back, seconds=3.0)),
    ]
    row = row_of("slice", campaign.judge(trials), print)
    assert (row["trials"], row["violations"]) == (len(trials), 0), row["problems"]


def test_what_counts_as_a_violation() -> None:
    once = Trial(storage=Strike(kind="driver", how="once", first=3))
    refused = Trial(storage=Strike(kind="driver", how="refused", first=3))
    assert not may_end(once)
    assert may_end(refused)
    assert judge_first(once, Outcome(**GOOD), SHA) == ""
    assert "other bits" in judge_first(once, Outcome(**{**GOOD, "sha256": "00" * 32}), SHA)
    assert "other bits" in judge_first(once, Outcome(**{**GOOD, "step": STEPS - 2}), SHA)
    assert "did not end" in judge_first(once, Outcome(**{**GOOD, "status": None}), SHA)
    ended = Outcome(**{**GOOD, "status": 1, "output": "error: the storage refuses it"})
    assert "exit status 1" in judge_first(once, ended, SHA)
    assert judge_first(refused, ended, SHA) == ""
    assert "exit status 1" in judge_first(refused, Outcome(**{**GOOD, "status": 1, "output": "killed"}), SHA)
    bare = Outcome(**{**GOOD, "status": 1, "output": "Traceback (most recent call last):\nerror: x"})
    assert "traceback" in judge_first(refused, bare, SHA)
    assert judge_second(Outcome(**GOOD), SHA) == ""
    assert "the same command" in judge_second(Outcome(**{**GOOD, "status": 1}), SHA)


def test_a_soak_sees_what_grows_and_what_stands_still() -> None:
    def samples(*, growth: float, requests: float) -> list[soak.Sample]:
        return [
            soak.Sample(at=n, rss_bytes=int(1e8 * (1 + growth * n)), loops=10 * n, requests=int(requests * n * n)) for n in range(1, 101)
        ]

    gaps = [0.1] * 1010
    steady = soak.figures(gaps, samples(growth=0.0, requests=0.0), [100, 90_000, 140_000])
    assert soak.problems_of(steady) == []
    assert steady["loop_seconds_p99"] == 0.1
    assert "memory grew" in soak.problems_of(soak.figures(gaps, samples(growth=0.02, requests=0.0), [100]))[0]
    assert "requests per loop grew" in soak.problems_of(soak.figures(gaps, samples(growth=0.0, requests=1.0), [100]))[0]
    assert "checkpoints grew" in soak.problems_of(soak.figures(gaps, samples(growth=0.0, requests=0.0), [100, 200, 300_000]))[0]
    assert "stood still" in soak.problems_of(soak.figures([*gaps, 9.0], samples(growth=0.0, requests=0.0), [100]))[0]


def test_polls_are_thinned_and_nothing_else() -> None:
    messages = [("order", number, "agent") for number in range(1, 481)] + [("ack", number, "rank") for number in range(1, 9)]
    kept = thinned(messages)
    assert sum(method == "order" for method, _, _ in kept) == 24
    assert [one for one in kept if one[0] == "ack"] == messages[480:]
    assert MessageStrike().how == "record"
