"""Where a run's seconds went, from any journal: nothing twice, nothing missing."""

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.trainer.report_runs import MULTILABEL
from trainer.runs.progress import summary_rows
from trainer.runs.status import SUMMARY_BYTES, first_members
from trainer.runs.summary import Span, accounting, restarts, sessions, summarise, timeline, wall_seconds
from trainer.settings.tree import RunConfig, TrainConfig
from trainer.tasks.info import CLASSIFICATION, info_of

HISTORY = ("step_seconds", "data_wait_seconds", "checkpoint_stall_seconds", "evaluation_seconds")


class Story:
    """A run told by its parts: writes the journal and keeps the true account. A unit of time is a second."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.now = 1000.0
        self.truth = {"start_up": 0.0, "recovery": 0.0, "training": 0.0, "lost_work": 0.0}
        self.kept = 0.0  # seconds of training that led to the present state
        self.step = 0
        self.saved = {0: 0.0}
        self.attempt = 0
        self.waiting_for = "start_up"
        self.waited = 0.0

    def passes(self, seconds: float) -> None:
        self.now += seconds

    def event(self, name: str, **fields: Any) -> None:
        self.events.append({"time": self.now, "event": name, **fields})

    def driver_starts(self, *, off: float, imports: float) -> None:
        self.passes(off)
        started = self.now
        self.passes(imports)
        self.event("run_started", process_started=started)
        self.waiting_for, self.waited = "start_up", imports

    def attempt_starts(self, *, seconds: float, back_to: int) -> None:
        self.attempt += 1
        self.truth["lost_work"] += self.kept - self.saved[back_to]
        self.step, self.kept = back_to, self.saved[back_to]
        self.saved = {step: kept for step, kept in self.saved.items() if step <= back_to}
        self.passes(seconds / 2)
        self.event("attempt_started", attempt=self.attempt, workers=1, start_step=back_to)
        self.passes(seconds / 2)
        self.event("training_started", attempt=self.attempt, step=back_to)
        self.truth[self.waiting_for] += self.waited + seconds

    def trains(self, seconds: float, *, commits: bool) -> None:
        self.passes(seconds)
        self.step += 1
        self.kept += seconds
        self.truth["training"] += seconds
        if commits:
            self.saved[self.step] = self.kept
            self.event("checkpoint_committed", step=self.step)
        else:
            self.event("evaluation", step=self.step)

    def fails(self, *, backoff: float, drained: bool) -> None:
        self.event("attempt_failed", attempt=self.attempt)
        if drained:  # all ranks had staged it
            self.passes(backoff / 2)
            self.saved[self.step] = self.kept
            self.event("checkpoint_committed", step=self.step)
            self.passes(backoff / 2)
        else:
            self.passes(backoff)
        self.waiting_for, self.waited = "recovery", backoff

    def ends(self, seconds: float) -> None:
        self.event("run_finished")
        self.passes(seconds)
        self.event("report_written")


seconds = st.integers(0, 40).map(lambda quarters: quarters / 4)  # exact in binary: sums are equal, not nearly equal


@st.composite
def stories(draw: st.DrawFn) -> Story:
    story = Story()
    drivers = draw(st.integers(1, 3))
    for driver in range(drivers):
        story.driver_starts(off=draw(seconds), imports=draw(seconds))
        attempts = draw(st.integers(1, 3))
        for attempt in range(attempts):
            newest = max(story.saved)
            damaged = draw(st.booleans())
            back_to = draw(st.sampled_from(sorted(story.saved))) if damaged and story.attempt else newest
            story.attempt_starts(seconds=draw(seconds), back_to=back_to)
            for _ in range(draw(st.integers(0, 4))):
                story.trains(draw(seconds), commits=draw(st.booleans()))
            if attempt + 1 < attempts:
                story.fails(backoff=draw(seconds), drained=draw(st.booleans()))
        if driver + 1 == drivers:
            story.ends(draw(seconds))
        # An earlier driver was killed: no event says so.
    return story


@settings(deadline=None, max_examples=300)
@given(stories(), st.lists(st.integers(0, 4), min_size=4, max_size=4))
def test_every_second_of_any_run_is_counted_once(story: Story, shares: list[int]) -> None:
    whole = max(1, shares[0] + shares[2] + shares[3])
    history = dict(zip(HISTORY, (share * story.kept / whole for share in shares), strict=True))
    history["data_wait_seconds"] = min(history["data_wait_seconds"], history["step_seconds"])
    parts = accounting(story.events, history)
    assert all(value >= 0 for value in parts.values()), parts
    assert sum(parts.values()) == pytest.approx(wall_seconds(story.events), abs=1e-9)
    for cause in ("start_up", "recovery", "lost_work"):
        assert parts[cause] == pytest.approx(story.truth[cause], abs=1e-9), cause
    assert parts["steps"] + parts["data_wait"] == pytest.approx(history["step_seconds"], abs=1e-9)
    assert parts["checkpoint_stall"] == pytest.approx(history["checkpoint_stall_seconds"], abs=1e-9)
    assert parts["evaluation"] == pytest.approx(history["evaluation_seconds"], abs=1e-9)
    agree(story.events, parts)


def agree(events: list[dict[str, Any]], parts: dict[str, float]) -> None:
    """The timeline has no gaps, and says what the account says."""
    told = timeline(events)
    totals = dict.fromkeys(("start_up", "compile", "recovery", "resize", "hang", "training", "lost_work", "other"), 0.0)
    for spans, session in zip(told, sessions(events), strict=True):
        began = session[0].get("process_started", session[0]["time"])
        edges = [began, *(span.end for span in spans)]
        assert [span.begin for span in spans] == edges[:-1]
        assert edges[-1] == session[-1]["time"]
        assert all(span.seconds > 0 for span in spans)
        for span in spans:
            totals[span.cause] += span.seconds
    for cause in ("start_up", "compile", "recovery", "resize", "hang"):
        assert totals[cause] == pytest.approx(parts[cause], abs=1e-6), cause
    assert totals["lost_work"] >= parts["lost_work"] - 1e-6
    in_steps = ("steps", "data_wait", "exchange_wait", "checkpoint_stall", "evaluation")
    rest = sum(parts[cause] for cause in (*in_steps, "lost_work", "other"))
    assert totals["training"] + totals["lost_work"] + totals["other"] == pytest.approx(rest, abs=1e-6)


NAMES = (
    "run_started",
    "attempt_started",
    "training_started",
    "checkpoint_committed",
    "attempt_failed",
    "attempt_paused",
    "hang",
    "run_stopped",
    "run_failed",
    "other",
)
junk = st.lists(
    st.builds(
        lambda name, gap, step: {"event": name, "gap": gap, "step": step, "start_step": step, "attempt": 1, "seconds": 3.0 * step},
        st.sampled_from(NAMES),
        st.floats(0, 100),
        st.integers(0, 5),
    ),
    max_size=25,
)


@settings(deadline=None, max_examples=300)
@given(junk, st.lists(st.floats(0, 1000), min_size=4, max_size=4))
@example([{"event": "run_started", "gap": 0.0, "step": 0, "start_step": 0, "attempt": 1}], [5.0, 1.0, 0.0, 0.0])
@example(
    [
        {"event": name, "gap": gap, "step": 0, "start_step": 0, "attempt": 1}
        for name, gap in (("run_started", 0.0), ("training_started", 0.0), ("run_stopped", 1.0), ("training_started", 0.0))
    ],
    [0.0, 0.0, 0.0, 1.0],
)
def test_a_journal_and_a_history_that_contradict_each_other_still_add_up(events: list[dict[str, Any]], seconds_of: list[float]) -> None:
    now = 0.0
    for event in events:
        now += event.pop("gap")
        event["time"] = now
    history = dict(zip(HISTORY, seconds_of, strict=True)) | {"samples": 10}
    parts = accounting(events, history)
    wall = wall_seconds(events)
    assert all(value >= 0 for value in parts.values()), parts
    assert sum(parts.values()) == pytest.approx(wall, abs=1e-6)
    agree(events, parts)
    summary = summarise(config=RunConfig(), status="finished", events=events, result={"history": history}, facts={})
    assert summary["goodput"] is None or 0 <= summary["goodput"] <= 1


def at(time: float, event: str, **fields: Any) -> dict[str, Any]:
    return {"time": time, "event": event, **fields}


KILLED_ONCE = [
    at(100, "run_started", process_started=95.0),
    at(104, "attempt_started", attempt=1, start_step=0),
    at(110, "training_started"),
    at(130, "checkpoint_committed", step=20),
    at(137, "attempt_failed", kind="infrastructure"),
    at(139, "attempt_started", attempt=2, start_step=20),
    at(141, "training_started"),
    at(151, "checkpoint_committed", step=30),
    at(152, "run_finished"),
    at(153, "report_written"),
]
HISTORY_KILLED_ONCE = {
    "step_seconds": 25.0,
    "data_wait_seconds": 2.0,
    "checkpoint_stall_seconds": 1.0,
    "evaluation_seconds": 3.0,
    "samples": 600,
    "train_loss": 0.5,
}


def test_a_killed_worker_costs_recovery_and_lost_work() -> None:
    assert accounting(KILLED_ONCE, HISTORY_KILLED_ONCE) == {
        "steps": 23.0,
        "data_wait": 2.0,
        "checkpoint_stall": 1.0,
        "evaluation": 3.0,
        "exchange_wait": 0.0,
        "start_up": 15.0,
        "compile": 0.0,
        "recovery": 4.0,
        "resize": 0.0,
        "hang": 0.0,
        "lost_work": 7.0,
        "other": 58.0 - 23 - 2 - 1 - 3 - 15 - 4 - 7,
    }


def test_the_timeline_says_when_the_seconds_were_lost() -> None:
    spans = (
        (95, 110, "start_up"),
        (110, 130, "training"),
        (130, 137, "lost_work"),
        (137, 141, "recovery"),
        (141, 152, "training"),
        (152, 153, "other"),
    )
    assert timeline(KILLED_ONCE) == [[Span(*map(float, span[:2]), str(span[2])) for span in spans]]


def test_a_failure_on_the_way_back_belongs_to_the_recovery() -> None:
    events = [*KILLED_ONCE[:6], at(140, "attempt_failed"), at(143, "attempt_started", attempt=3, start_step=20)]
    parts = accounting([*events, at(145, "training_started"), *KILLED_ONCE[7:]], {})
    assert (parts["recovery"], parts["lost_work"]) == (8.0, 7.0)
    parts = accounting(events, {})  # and where it never got there
    assert parts["recovery"] == 6.0


def test_compiling_is_told_apart_from_steps_and_from_starting() -> None:
    begun = at(4.0, "training_started")
    events = [at(0.0, "run_started"), at(1.0, "attempt_started", start_step=0), begun, at(11.0, "compiled", seconds=6.5)]
    end = [at(31.0, "checkpoint_committed", step=10), at(32.0, "run_finished")]
    parts = accounting([*events, *end], {"step_seconds": 20.0})
    assert (parts["start_up"], parts["compile"], parts["steps"], parts["lost_work"]) == (4.0, 6.5, 20.0, 0.0)
    assert sum(parts.values()) == pytest.approx(32.0)
    failed = [at(21.0, "attempt_failed"), at(22.0, "attempt_started", start_step=0), at(23.0, "training_started")]
    again = [at(27.0, "compiled", seconds=3.5), at(37.0, "checkpoint_committed", step=10), at(38.0, "run_finished")]
    parts = accounting([*events, *failed, *again], {"step_seconds": 10.0})
    assert (parts["compile"], parts["recovery"], parts["lost_work"]) == (10.0, 2.0, 10.5)
    profile = {"verdict": "compute-bound"}
    told = [*events, at(12.0, "profiled", profile={"verdict": "old"}), at(13.0, "profiled", profile=profile), *end]
    summary = summarise(config=RunConfig(), status="finished", events=told, result=None, facts={})
    assert (summary["compile_seconds"], summary["profile"]) == (6.5, profile)
    assert ("Profile", "compute-bound") in summary_rows(summary)
    assert ("Compiling", "6.5 s") in summary_rows(summary)


def test_a_damaged_checkpoint_makes_more_work_lost() -> None:
    events = [event if event.get("attempt") != 2 else {**event, "start_step": 0} for event in KILLED_ONCE]
    assert accounting(events, {})["lost_work"] == 27.0  # from the first step on


def test_the_night_between_two_drivers_is_nobodys_time_but_what_the_first_did_not_save_is_lost() -> None:
    night = 30_000.0
    second = [
        at(night, "run_started", process_started=night - 4),
        at(night + 2, "attempt_started", attempt=2, start_step=20),
        at(night + 6, "training_started"),
        at(night + 16, "run_finished"),
    ]
    events = [*KILLED_ONCE[:4], at(135, "evaluation"), *second]  # killed with its node: nothing says that it ended
    assert [len(session) for session in sessions(events)] == [5, 4]
    assert wall_seconds(events) == (135 - 95) + 20
    parts = accounting(events, {})
    assert (parts["start_up"], parts["recovery"], parts["lost_work"]) == (15.0 + 10.0, 0.0, 5.0)
    assert restarts(events) == 0
    assert restarts(KILLED_ONCE) == 1


def test_a_hang_counts_from_its_last_sign_of_life() -> None:
    events = [*KILLED_ONCE[:4], at(136, "hang", seconds=5.0, kind="stopped", ranks=[1]), *KILLED_ONCE[4:]]
    parts = accounting(events, HISTORY_KILLED_ONCE)
    assert (parts["hang"], parts["lost_work"], parts["recovery"]) == (6.0, 1.0, 4.0)
    assert sum(parts.values()) == 58.0


def test_a_change_of_the_number_of_workers_is_no_restart_and_has_its_own_seconds() -> None:
    events = [
        *KILLED_ONCE[:4],
        at(131, "attempt_paused", kind="grow", step=20),
        at(137, "attempt_started", attempt=2, start_step=20, workers=4),
        at(141, "training_started"),
        *KILLED_ONCE[7:],
    ]
    parts = accounting(events, {})
    assert (parts["resize"], parts["recovery"], parts["lost_work"]) == (10.0, 0.0, 1.0)
    assert restarts(events) == 0
    summary = summary_of(events=events)
    assert (summary["resized"], summary["preemptions"]) == (1, 0)


def test_a_preempted_node_that_another_replaces_is_no_change_of_the_number_of_workers() -> None:
    events = [
        at(0, "run_started"),
        at(1, "attempt_started", attempt=1, start_step=0, workers=2),
        at(5, "attempt_paused", kind="preempted", step=3),
    ]
    events += [at(7, "attempt_started", attempt=2, start_step=3, workers=2), at(9, "run_finished")]
    summary = summary_of(events=events)
    assert (summary["resized"], summary["preemptions"], summary["restarts"]) == (0, 1, 0)


def test_a_failure_that_was_not_retried_is_no_restart() -> None:
    events = [*KILLED_ONCE[:5], at(138, "run_failed", kind="user")]
    assert restarts(events) == 0


def summary_of(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "config": RunConfig(run="r", train=TrainConfig(virtual_ranks=4)),
        "status": "finished",
        "events": KILLED_ONCE,
        "result": {"history": HISTORY_KILLED_ONCE, "steps_done": 30, "evaluation": {"test_accuracy": 0.75}, "weights_sha256": "ab"},
        "facts": {"workers": 2, "steps_per_epoch": 12, "dataset_fingerprint": "cd", "quarantined": 3},
        **changes,
    }
    return summarise(**arguments)


def test_the_summary_has_the_keys_that_other_tools_rely_on() -> None:
    summary = summary_of()
    relied_on = {
        "run": "r",
        "status": "finished",
        "steps": 30,
        "epochs": 2.5,
        "workers": 2,
        "virtual_ranks": 4,
        "restarts": 1,
        "resized": 0,
    }
    relied_on |= {"samples_seen": 600, "quarantined": 3, "train_loss": 0.5, "test_accuracy": 0.75, "images_per_second": 24.0}
    relied_on |= {"goodput": 23 / 58, "data_wait_ratio": 0.08, "checkpoint_stall_seconds": 1.0, "recovery_seconds": 4.0, "seconds": 58.0}
    relied_on |= {"weights_sha256": "ab", "dataset_fingerprint": "cd", "resized": 0}
    assert {key: summary[key] for key in relied_on} == relied_on
    assert sum(summary["accounting"].values()) == summary["seconds"]
    json.dumps(summary, allow_nan=False)


def test_the_summary_has_all_that_the_evaluation_of_any_task_says() -> None:
    labels = [{"name": "boot", "average_precision": 0.5}] * 2000
    entry = {"step": 30, "epoch": 2.5, "test_loss": 0.25, "test_map": 0.5, "test_micro_f1": 0.75, "test_count": 100, "labels": labels}
    result = {"history": HISTORY_KILLED_ONCE, "steps_done": 30, "evaluation": entry}
    for task in (MULTILABEL, MULTILABEL.to_json()):
        summary = summary_of(result=result, facts={"task": task})
        assert {key: summary[key] for key in entry.keys() - {"step", "epoch"}} == {
            key: value for key, value in entry.items() if key not in ("step", "epoch")
        }
        assert info_of(json.loads(json.dumps(summary))) == MULTILABEL
        assert summary.keys() >= summary_of().keys()
        assert (summary["test_accuracy"], summary["confusion"], summary["per_class"]) == (None, None, None)
        assert summary_rows(summary)[:3] == [("Test mAP", "50.00 %"), ("Test micro F1", "75.00 %"), ("Test loss", "0.2500")]
        # The list of runs reads the beginning only.
        begun = first_members(json.dumps(summary, indent=1)[:SUMMARY_BYTES])
        assert begun.keys() >= {"test_map", "test_micro_f1", "task", "goodput", "seconds"}
        assert "labels" not in begun
    assert info_of(summary_of()) == CLASSIFICATION


def test_without_a_result_the_summary_knows_what_the_journal_knows() -> None:
    summary = summary_of(result=None, status="failed", events=KILLED_ONCE[:5])
    assert (summary["steps"], summary["epochs"], summary["checkpoints"]) == (20, 20 / 12, 1)
    assert (summary["goodput"], summary["accounting"], summary["test_accuracy"]) == (None, None, None)
    assert summary["seconds"] == 42.0


def test_an_empty_journal_has_no_seconds() -> None:
    assert wall_seconds([]) == 0.0
    assert set(accounting([], {}).values()) == {0.0}
