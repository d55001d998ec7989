"""What a run remembers comes back exactly; totals and curves are what the steps were."""

import json
import math
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.learn.step import Arriving, StepStats
from trainer.rank.guard import Guard
from trainer.rank.history import CURVE_SCHEMA, Curves, History, LossMean, Speed
from trainer.runs.summary import summarise
from trainer.settings.tree import RunConfig


def step(
    number: int,
    *,
    samples: int = 10,
    seconds: float = 0.5,
    wait: float = 0.125,
    losses: tuple[tuple[int, float], ...] = (),
    skipped: bool = False,
) -> StepStats:
    return StepStats(
        steps_done=number,
        epoch=0,
        samples=samples,
        learning_rate=0.1,
        step_seconds=seconds,
        data_wait_seconds=wait,
        losses=losses,
        skipped=skipped,
    )


quarters = st.integers(0, 100).map(lambda value: value / 4)
steps = st.lists(st.tuples(st.integers(0, 100), quarters, quarters, st.none() | quarters), max_size=20)


@settings(deadline=None)
@given(steps, st.integers(0, 20))
def test_totals_are_sums_over_the_steps_and_survive_being_saved_at_any_of_them(told: list[tuple[int, float, float, Any]], cut: int) -> None:
    history = History()
    for number, (samples, seconds, wait, loss) in enumerate(told, start=1):
        losses = () if loss is None else ((number - 2, 9.0), (number - 1, loss))
        history.stepped(step(number, samples=samples, seconds=seconds, wait=wait, losses=losses))
        if number == cut:
            history = History.from_json(history.to_json())
    assert history.steps_done == len(told)
    assert history.samples == sum(samples for samples, *_ in told)
    assert history.step_seconds == sum(seconds for _, seconds, _, _ in told)
    assert history.data_wait_seconds == sum(wait for _, _, wait, _ in told)
    newest = [loss for *_, loss in told if loss is not None]
    assert history.train_loss == newest[-1] if newest else math.isnan(history.train_loss)


def test_evaluations_and_every_float_come_back_to_the_bit() -> None:
    history = History(
        step_seconds=0.1 + 0.2,
        train_loss=1 / 3,
        mean_train_loss=1 / 7,
        evaluations=[{"step": 3, "test_accuracy": 2 / 3, "confusion": [[1, 2], [3, 4]]}],
    )
    assert History.from_json(history.to_json()) == history


CLASSES, EVALUATIONS = 1000, 90


def evaluation_of_many_classes(number: int) -> dict[str, Any]:
    """As a classification writes it (trainer.tasks.classification)."""
    score = {"recall": 0.7318529411764706, "precision": 0.7122641509433962, "f1": 0.7219251336898396, "support": 50}
    return {
        "step": 5004 * number,
        "epoch": float(number),
        "test_loss": 1.0827512741088867,
        "test_accuracy": 0.73184,
        "test_count": 50_000,
        "per_class": [score] * CLASSES,
        "confusion": [[0, 50] * (CLASSES // 2)] * CLASSES,
    }


def test_a_checkpoint_of_many_classes_grows_by_a_line_an_evaluation() -> None:
    """The bounds that docs/fault-tolerance.md states."""
    history = History()
    sizes = []
    for number in range(1, EVALUATIONS + 1):
        history.evaluated(evaluation_of_many_classes(number), 30.0)
        if number in (1, EVALUATIONS):
            sizes.append(len(history.to_json()))
    assert sizes[1] < 5e6
    assert sizes[1] - sizes[0] < 300 * EVALUATIONS
    assert history.evaluations[-1] == evaluation_of_many_classes(EVALUATIONS)
    result = {"evaluation": history.evaluations[-1], "history": {}}
    summary = summarise(config=RunConfig(), status="finished", events=[], result=result, facts={})
    assert summary["confusion"] == history.evaluations[-1]["confusion"]
    assert len(json.dumps(summary, indent=1)) < 8e6  # as the driver writes it
    assert [entry["test_accuracy"] for entry in history.evaluations] == [0.73184] * EVALUATIONS


def test_a_history_that_kept_every_matrix_is_read_and_shrinks() -> None:
    entries = [{"step": step, "test_accuracy": 0.5, "confusion": [[1, 2], [3, 4]], "heads": {"a": {}}} for step in (1, 2, 3)]
    old = json.dumps({"steps_done": 3, "evaluations": entries}).encode()
    assert History.from_json(old).evaluations == [{"step": 1, "test_accuracy": 0.5}, {"step": 2, "test_accuracy": 0.5}, entries[2]]


def test_a_snapshot_is_not_changed_by_the_next_evaluation() -> None:
    history = History()
    history.evaluated({"step": 1, "confusion": [[1]]}, 1.0)
    past = history.copy()
    history.evaluated({"step": 2, "confusion": [[2]]}, 1.0)
    assert past.evaluations == [{"step": 1, "confusion": [[1]]}]


def test_what_came_after_the_snapshot_is_forgotten_with_it() -> None:
    history = History()
    history.stepped(step(1))
    saved = history.to_json()
    history.stepped(step(2))
    history.evaluations.append({"step": 2})
    assert History.from_json(saved).steps_done == 1
    assert History.from_json(saved).evaluations == []


def row(number: int) -> dict[str, float]:
    return dict.fromkeys(CURVE_SCHEMA.names, number + 1 / 3) | {"step": number, "attempt": 1}


@settings(deadline=None)
@given(st.integers(0, 5), st.integers(0, 5))
def test_curves_go_on_after_being_read_back(before: int, after: int) -> None:
    curves, whole = Curves(), Curves()
    for number in range(before + after):
        if number == before:
            curves = Curves.from_parquet(curves.to_parquet())
        curves.add(**row(number))
        whole.add(**row(number))
    assert len(curves) == before + after
    assert curves.to_parquet() == whole.to_parquet()


def test_a_curve_has_the_schema_that_readers_rely_on_even_without_rows(tmp_path: Any) -> None:
    (tmp_path / "curves.parquet").write_bytes(Curves().to_parquet())
    assert pq.read_schema(tmp_path / "curves.parquet").equals(CURVE_SCHEMA)


def test_speed_is_the_median_steps_so_that_one_hiccup_does_not_show() -> None:
    speed = Speed(window=5)
    assert (speed.images_per_second, speed.data_wait_ratio) == (0.0, 0.0)
    for number in range(10):
        speed.stepped(step(number, samples=10, seconds=30.0 if number == 7 else 0.5, wait=0.125))
    assert speed.images_per_second == 20.0
    assert speed.data_wait_ratio == pytest.approx(5 * 0.125 / 32.0)
    for number in range(5):
        speed.stepped(step(number, samples=40, seconds=0.5))
    assert speed.images_per_second == 80.0  # what is older than the window does not count


@given(st.lists(st.booleans(), max_size=30))
def test_each_sample_is_trained_on_or_skipped_and_skipped_steps_are_not_fast_ones(skips: list[bool]) -> None:
    history, speed, without = History(), Speed(), Speed()
    for number, skipped in enumerate(skips, start=1):
        stats = step(number, samples=number, seconds=0.0 if skipped else 0.5 * number, wait=0.0, skipped=skipped)
        history.stepped(stats)
        speed.stepped(stats)
        if not skipped:
            without.stepped(stats)
    assert history.steps_done == len(skips)
    assert history.samples + history.skipped_samples == sum(range(1, len(skips) + 1))
    assert history.skipped_samples == sum(number for number, skipped in enumerate(skips, start=1) if skipped)
    assert speed.images_per_second == without.images_per_second


def test_a_saved_history_holds_the_losses_that_arrived_after_its_step() -> None:
    guard = Guard(spike_factor=0.0, batch_size=1, samples_of=lambda step: 1)
    history = History()
    history.stepped(step(2, losses=((0, 3.0),)))
    guard.check(0, 3.0)
    history.learned([(0, 3.0)], lambda step: 64 - step)
    late = (Arriving(1, torch.tensor(0.1)),)
    saved, proof = history.copy(), guard.proof(late)
    history.stepped(step(3, losses=((1, 0.1), (2, 9.0))))
    history.evaluations.append({"step": 3})
    again = History.from_json(saved.settled(proof(), late, lambda step: 64 - step))
    assert again.steps_done == 2
    assert again.train_loss == torch.tensor(0.1).item()
    assert again.mean_train_loss == (3.0 * 64 + torch.tensor(0.1).item() * 63) / 127
    assert again.evaluations == []
    assert again.guard == {"last_step": 1, "losses": [3.0, torch.tensor(0.1).item()], "judges_all": True}


@settings(max_examples=50)
@given(
    losses=st.lists(st.tuples(st.integers(1, 64), st.floats(0.0, 10.0), st.integers(0, 3)), min_size=1, max_size=30),
    evaluates=st.sets(st.integers(1, 30)),
    saves=st.sets(st.integers(1, 30)),
)
def test_the_training_loss_is_the_mean_over_all_samples_since_the_evaluation_before(
    losses: list[tuple[int, float, int]], evaluates: set[int], saves: set[int]
) -> None:
    """However late losses arrive, and wherever the run goes on from a checkpoint. A loss that an evaluation has waited for counts once."""
    history, late = History(), list[Arriving]()
    evaluated_at, means = 0, []

    def samples_of(step: int) -> int:
        return losses[step][0]

    def mean(first: int, stop: int) -> float:
        return sum(samples * loss for samples, loss, _ in losses[first:stop]) / sum(samples for samples, _, _ in losses[first:stop])

    for number, (samples, loss, waits) in enumerate(losses, start=1):
        late.append(Arriving(number - 1, torch.tensor(loss, dtype=torch.float64)))
        arrived, late = (late, []) if waits == 0 else (late[:-waits], late[-waits:])
        told = step(number, samples=samples, losses=tuple((each.step, each.wait()) for each in arrived))
        history.stepped(told)
        LossMean(history, samples_of).stepped(told)
        if number in evaluates:
            LossMean(history, samples_of).arrived(late)
            means.append((history.mean_train_loss, mean(evaluated_at, number)))
            history.evaluated({"step": number}, 0.0)
            evaluated_at = number
        if number in saves:  # and is killed, and goes on from there
            guard = Guard(spike_factor=0.0, batch_size=1, samples_of=samples_of)
            history, late = History.from_json(history.copy().settled(guard, late, samples_of)), []
    LossMean(history, samples_of).arrived(late)
    if evaluated_at < len(losses):
        means.append((history.mean_train_loss, mean(evaluated_at, len(losses))))
    assert [found for found, _ in means] == pytest.approx([wanted for _, wanted in means])


def test_a_checkpoint_of_before_there_were_guards_is_still_read() -> None:
    old = json.loads(History(steps_done=5, samples=50).to_json())
    del old["guard"], old["skipped_samples"]
    history = History.from_json(json.dumps(old).encode())
    guard = Guard(spike_factor=8.0, batch_size=1, samples_of=lambda step: 1)
    guard.load(history.guard)
    guard.check(5, 1.0)
    assert (history.steps_done, history.skipped_samples, guard.newest_loss) == (5, 0, 1.0)
