"""The report's curves: losses and measures by epoch, speed by time. Called by sections; plots.py draws them."""

from collections.abc import Sequence

import numpy as np

from trainer.report.files import RunFiles, began, evaluations
from trainer.report.page import NOTHING, Html, number_or_none, section, tag
from trainer.report.plots import MOST_LINES, Line, Values, by_attempt, plot, spans_magnitudes, thinned
from trainer.runs.choice import VALIDATION, validation_key
from trainer.runs.measures import capital, heading, rate_unit
from trainer.tasks.info import Measure

NUMBER_PLOTS = 4  # measures that are not ratios; each has a plot of its own, because their scales differ


class _Figures:
    """The drawings so far."""

    def __init__(self) -> None:
        self.made: list[Html] = []

    def add(self, title: str, *lines: Line, marks: Sequence[float] = (), x: str = "epoch", log: bool = False) -> None:
        drawn = [line for line in lines if len(line[1]) and np.isfinite(line[2]).any()]
        if drawn:
            drawing = plot(drawn, marks=marks, x=x, log=log, ident=f"f{len(self.made)}")
            self.made.append(tag("figure", tag("figcaption", title), drawing))


def curves_section(run: RunFiles) -> Html:
    figures = _Figures()
    epochs = run.curves.get("epoch", np.zeros(0))

    def column(name: str) -> Values:
        return run.curves.get(name, np.full(len(epochs), np.nan))

    tested = _tested(run, "epoch")
    losses = (
        ("training", *thinned(epochs, column("train_loss")), "-"),
        ("test", tested, _tested(run, "test_loss"), "o-"),
        *_validated(run, "validation_loss"),
    )
    log = spans_magnitudes(np.concatenate([line[2] for line in losses]))
    figures.add("Loss (logarithmic)" if log else "Loss", *losses, log=log)
    _add_measures(figures, run)
    figures.add("Learning rate", ("learning rate", *thinned(epochs, column("learning_rate")), "-"))
    _add_speed(figures, run, column("time"), column("images_per_second"), column("attempt"))
    return section("Curves", tag("div", *figures.made, class_="figures")) if figures.made else NOTHING


def _tested(run: RunFiles, key: str) -> Values:
    values = (number_or_none(event.get(key)) for event in evaluations(run.events))
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _validated(run: RunFiles, key: str, factor: float = 1.0, label: str = VALIDATION) -> list[Line]:
    """The line of the validation split, if the run watched it."""
    values, epochs = _tested(run, key), _tested(run, "epoch")
    known = np.isfinite(values)  # where both splits were read at the same epoch, an event lacks the other's
    return [(label, epochs[known], factor * values[known], "o-")] if known.any() else []


def _add_measures(figures: _Figures, run: RunFiles) -> None:
    """All ratios in one plot, every other measure in a plot of its own."""
    epochs = _tested(run, "epoch")

    def line(measure: Measure, label: str) -> Line:
        return label, epochs, (100 if measure.unit == "ratio" else 1) * _tested(run, measure.key), "o-"

    ratios = [measure for measure in run.info.measures if measure.unit == "ratio"]
    if len(ratios) == 1:
        validated = _validated(run, validation_key(ratios[0]), 100)
        title = capital(ratios[0].in_words) if validated else heading(ratios[0])
        figures.add(f"{title}, %", line(ratios[0], "test"), *validated)
    elif ratios:
        more = f" (the first {MOST_LINES} of {len(ratios)})" if len(ratios) > MOST_LINES else ""
        validated = [
            line for each in ratios[:MOST_LINES] for line in _validated(run, validation_key(each), 100, label=each.title)
        ]  # the test split then has a point each
        split = "Validation" if validated else "Test"
        figures.add(f"{split} measures, %{more}", *(validated or (line(each, each.title) for each in ratios[:MOST_LINES])))
    for measure in [measure for measure in run.info.measures if measure.unit != "ratio"][:NUMBER_PLOTS]:
        validated = _validated(run, validation_key(measure))
        figures.add(capital(measure.in_words) if validated else heading(measure), line(measure, "test"), *validated)


def _add_speed(figures: _Figures, run: RunFiles, times: Values, speed: Values, attempt: Values) -> None:
    if not (len(times) and np.isfinite(times).any()):
        return
    begin = float(began(run.events) or np.nanmin(times))
    failed = [event for event in run.events if event.get("event") in ("worker_failed", "attempt_failed", "resumed")]
    scale, name = (60.0, "minutes") if np.nanmax(times) - begin > 300 else (1.0, "seconds")
    marks = [(float(event["time"]) - begin) / scale for event in failed if number_or_none(event.get("time")) is not None]
    rate = rate_unit(run.info.unit)
    figures.add(
        capital(rate) + (" (dashed: failures and restarts)" if marks else ""),
        (rate, *by_attempt((times - begin) / scale, speed, attempt), "-"),
        marks=marks,
        x=f"{name} since the start",
    )
