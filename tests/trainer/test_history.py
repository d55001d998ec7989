"""What a run remembers comes back exactly; totals and curves are what the steps were."""

import math
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.history import CURVE_SCHEMA, Curves, History, Speed
from trainer.loop import StepStats


def step(
    number: int, *, samples: int = 10, seconds: float = 0.5, wait: float = 0.125, losses: tuple[tuple[int, float], ...] = ()
) -> StepStats:
    return StepStats(
        steps_done=number,
        epoch=0,
        samples=samples,
        learning_rate=0.1,
        step_seconds=seconds,
        data_wait_seconds=wait,
        losses=losses,
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
        step_seconds=0.1 + 0.2, train_loss=1 / 3, evaluations=[{"step": 3, "test_accuracy": 2 / 3, "confusion": [[1, 2], [3, 4]]}]
    )
    assert History.from_json(history.to_json()) == history


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
