"""From the runs' summaries to the curve: the error of each run, the law through them, the same class by class, and what all of it says in a
sentence. Pure. __main__.py hands the summaries in; page.py draws what comes out, and `to_json` is the file curve.json.

The error is 1 minus the task's headline measure, which has to be a ratio. Where it is a share of test samples (accuracy, exact match),
their number says how much chance there is in it; for others (mAP, a mean score) the repeats alone do. Nothing here knows how long anything
took, so the same runs give the same file.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trainer.curve.plan import Planned, rule_words
from trainer.curve.power_law import LEVEL, CannotTell, Fit, Foretold, Point, fitted
from trainer.runs.certainty import FEW, interval_of
from trainer.runs.measures import in_words
from trainer.settings.units import number, percent
from trainer.tasks.info import TaskInfo, info_of

Summary = Mapping[str, Any]
LISTED = 3
"""Classes that the sentence names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One run of the curve."""

    run: str
    samples: int
    repeat: int
    error: float
    weights_sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class OfClass:
    """One class by itself."""

    name: str
    tested: int
    points: tuple[Point, ...]
    """Errors: the share of the class's test samples that are not found."""
    outcome: Fit | CannotTell


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """All that the runs say."""

    info: TaskInfo
    runs: tuple[Measured, ...]
    tested: int
    is_share: bool
    """The measure is a share of the test samples."""
    points: tuple[Point, ...]
    outcome: Fit | CannotTell
    classes: tuple[OfClass, ...]
    """Those that gain most first, then those of which nothing can be told. Empty for tasks without classes of their own."""

    @property
    def gaining(self) -> tuple[OfClass, ...]:
        """The classes whose gain lies above 0 by its whole interval, the largest first."""
        return tuple(each for each in self.classes if isinstance(each.outcome, Fit) and each.outcome.gain.low > 0)


def check_measure(summary: Summary) -> None:
    """ValueError if the headline of this run's task makes no learning curve."""
    headline = info_of(summary).headline
    if headline.unit != "ratio" or not headline.higher_is_better:
        raise ValueError(
            f"a curve needs a measure that is a ratio, such as accuracy or mAP, and this task is measured by {headline.in_words}; "
            "choose targets that are labels with --data.targets"
        )


def curve_of(found: Sequence[tuple[Planned, Summary]]) -> Curve:
    """The curve through finished runs. ValueError if their measure makes none."""
    first = found[0][1]
    check_measure(first)
    info = info_of(first)
    runs = tuple(
        Measured(
            run=planned.member.name,
            samples=planned.samples,
            repeat=planned.repeat,
            error=1.0 - float(summary[info.headline.key]),
            weights_sha256=str(summary.get("weights_sha256")),
        )
        for planned, summary in sorted(found, key=lambda pair: (pair[0].samples, pair[0].repeat))
    )
    tested, is_share = int(first.get("test_count") or 0), interval_of(first, info.headline) is not None
    points = _points((run.samples, run.error) for run in runs)
    return Curve(
        info=info,
        runs=runs,
        tested=tested,
        is_share=is_share,
        points=points,
        outcome=fitted(points, tested=tested if is_share else None, unit=info.unit),
        classes=tuple(sorted(_classes(found), key=_by_gain)),
    )


def _points(pairs: Iterator[tuple[int, float]]) -> tuple[Point, ...]:
    errors: dict[int, list[float]] = {}
    for samples, error in pairs:
        errors.setdefault(samples, []).append(error)
    return tuple(Point(samples=samples, errors=tuple(errors[samples])) for samples in sorted(errors))


def _classes(found: Sequence[tuple[Planned, Summary]]) -> Iterator[OfClass]:
    first = found[0][1]
    names, entries, unit = first.get("classes"), first.get("per_class"), info_of(first).unit
    if not isinstance(names, list) or not isinstance(entries, list) or len(names) != len(entries):
        return
    for index, name in enumerate(names):
        tested = int(entries[index].get("support") or 0)
        points = _points(
            (planned.samples, 1.0 - float(summary["per_class"][index]["recall"]))
            for planned, summary in sorted(found, key=lambda pair: (pair[0].samples, pair[0].repeat))
        )
        yield OfClass(name=str(name), tested=tested, points=points, outcome=_of_class(points, tested, unit))


def _of_class(points: Sequence[Point], tested: int, unit: str) -> Fit | CannotTell:
    if tested < FEW:
        return CannotTell(reason=f"{tested} test {unit} say nothing of it; {FEW} are the least")
    return fitted(points, tested=tested, unit=unit)


def _by_gain(one: OfClass) -> tuple[bool, float, str]:
    return isinstance(one.outcome, CannotTell), -one.outcome.gain.error if isinstance(one.outcome, Fit) else 0.0, one.name


# --- in words ---------------------------------------------------------------------------------------------------------------------------


def sentences(curve: Curve) -> list[str]:
    """What the curve says: what twice the labels would bring, and which classes gain most."""
    outcome, unit = curve.outcome, curve.info.unit
    measure = in_words(curve.info.headline)
    if isinstance(outcome, CannotTell):
        return [f"What more labels would bring cannot be told: {outcome.reason}."]
    now, twice, gain = outcome.now, outcome.twice, outcome.gain
    told = [
        f"With {number(now.samples)} labelled {unit} the {measure} is {percent(1 - now.error)}; with twice as many, "
        f"{number(twice.samples)}, it would be {percent(1 - twice.error)} ({LEVEL:.0%} interval of a run: "
        f"{_span(1 - twice.high, 1 - twice.low)}): {_points_words(gain)}."
    ]
    if curve.classes:
        told.append(_about_classes(curve))
    return told


def _about_classes(curve: Curve) -> str:
    gaining = curve.gaining
    if not gaining:
        return (
            "No class by itself gains beyond noise: each has too few test "
            f"{curve.info.unit} or runs for that, and what holds for all together need not hold for one."
        )
    named = ", ".join(f"{each.name} ({_points_words(each.outcome.gain)})" for each in gaining[:LISTED] if isinstance(each.outcome, Fit))
    more = f"; {number(len(gaining) - LISTED)} more gain beyond noise" if len(gaining) > LISTED else ""
    alone = "each by itself: of many classes the one that seems to gain most gains less than it seems"
    return f"Most would be gained by {named}{more} ({LEVEL:.0%} intervals, {alone})."


def _points_words(gain: Foretold) -> str:
    """`+2.3 points, 1.1 to 3.6`."""
    return f"{100 * gain.error:+.1f} points, {100 * gain.low:.1f} to {100 * gain.high:.1f}"


def _span(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def noise_words(curve: Curve) -> str:
    """How far runs of one size differ, and what the interval is made of."""
    outcome, unit = curve.outcome, curve.info.unit
    if isinstance(outcome, CannotTell):
        return ""
    of_what = f"the {number(curve.tested)} test {unit}" if curve.is_share else "the repeats"
    return (
        f"One run on {number(outcome.now.samples)} {unit} is off by {100 * outcome.noise:.2f} points (one standard deviation, from "
        f"{of_what} and {outcome.runs} runs of {outcome.sizes} sizes). The interval is of one run, tested on the same {unit}: it holds "
        "that noise, the curves that fit the points, and what real curves differ from a power law by. It says nothing of other test "
        f"{unit}, nor of labels of another kind than these."
    )


def wanted_words(curve: Curve) -> str:
    """What is needed to say which samples to label next."""
    return (
        f"Which {curve.info.unit} to label next cannot be said without {curve.info.unit} that have no label: with --unlabelled FOLDER the "
        "same command lists in label-next.csv those of which the model is least sure and which differ from each other."
    )


# --- as JSON ----------------------------------------------------------------------------------------------------------------------------


def to_json(curve: Curve) -> dict[str, Any]:
    """curve.json: a function of the runs alone. Numbers of samples are called by what the samples are."""
    unit = curve.info.unit
    return {
        "version": 1,
        "measure": curve.info.headline.name,
        "tested": curve.tested,
        "level": LEVEL,
        "rule": rule_words(unit),
        "said": sentences(curve),
        **_outcome_json(curve.outcome, unit),
        "runs": [_called(asdict(run), unit) for run in curve.runs],
        "classes": [
            {
                "name": each.name,
                "tested": each.tested,
                "points": [{unit: point.samples, "errors": list(point.errors)} for point in each.points],
                **_outcome_json(each.outcome, unit),
            }
            for each in curve.classes
        ],
    }


def _outcome_json(outcome: Fit | CannotTell, unit: str) -> dict[str, Any]:
    if isinstance(outcome, CannotTell):
        return {"cannot_tell": outcome.reason, "fit": None}
    return {"cannot_tell": "", "fit": _called(asdict(outcome), unit)}


def _called(value: dict[str, Any], unit: str) -> dict[str, Any]:
    """With `unit` in the place of the key `samples`, at every depth."""
    return {unit if key == "samples" else key: _called(each, unit) if isinstance(each, dict) else each for key, each in value.items()}
