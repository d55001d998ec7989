"""`python -m trainer.report --compare RUN RUN`: two runs on one page. Called by the command line; files.py reads the runs' folders.

The runs are compared by their task's headline measure. Runs of different tasks are shown next to each other, and called different. If both
models gave one class to each of the same test images, McNemar's test says whether one model is better: among the images that only one of
them got right, how likely is so uneven a split by chance? (McNemar 1947; exact binomial, two-sided.) If some answers are not recorded, the
page claims no more than the difference; if the test images differ, or may differ, it names no winner at all.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.report.files import RunFiles, evaluations
from trainer.report.page import NOTHING, Html, number_or_none, page, section, table, tag
from trainer.report.panels.classes import entries_of
from trainer.report.plots import Line, plot, spans_magnitudes, thinned
from trainer.report.verdict import Mood, verdict
from trainer.runs.certainty import NOT_MEASURED, class_warnings, interval_words
from trainer.runs.measures import capital, heading, in_words, one_of, rate_unit, shown
from trainer.runs.progress import summary_rows, time_split
from trainer.settings.fields import settings
from trainer.settings.toml import from_toml
from trainer.settings.units import duration, number, percent
from trainer.tasks.info import Measure, TaskInfo

SURE = 0.05
NAMES = ("A", "B")
MEASURE_PLOTS = 6
NOT_SETTINGS = ("run", "storage")  # the location of a run, not its behaviour


@dataclass(frozen=True, kw_only=True, slots=True)
class Disagreement:
    """Two models' answers to the same images."""

    both: int
    """Number of images that both got right."""
    only_first: int
    only_second: int
    neither: int
    chance: float
    """McNemar's exact two-sided p: the probability of a difference as large as this, or larger, between equally good models."""

    @property
    def count(self) -> int:
        return self.both + self.only_first + self.only_second + self.neither


def chance_of(first: int, second: int) -> float:
    """Two-sided exact binomial probability that first + second coin tosses split as unevenly as this, or more so."""
    tosses, fewer = first + second, min(first, second)
    if 2 * fewer >= tosses:
        return 1.0
    # Start with the largest term; each further term follows from the last. Logarithms, because 2**-tosses underflows a float.
    log_term = math.lgamma(tosses + 1) - math.lgamma(fewer + 1) - math.lgamma(tosses - fewer + 1) - tosses * math.log(2.0)
    total = term = 1.0
    for heads in range(fewer, 0, -1):
        term *= heads / (tosses - heads + 1)
        total += term
        if term < 1e-17 * total:
            break
    return min(1.0, 2.0 * math.exp(log_term) * total)


def disagreement(first: RunFiles, second: RunFiles) -> tuple[Disagreement | None, str]:
    """How the two models' answers differ, or why that is unknown."""
    one, other = first.predictions, second.predictions
    if one is None or other is None:
        name, run = ("A", first) if one is None else ("B", second)
        return None, f"Of {name}: {run.no_thumbnails or 'there are no predictions.'}"
    if different := different_tests(first, second):
        return None, different
    if not (one.is_complete and other.is_complete):
        return None, "Not every answer is recorded, as there are so many."
    if not np.array_equal(one.ids, other.ids):
        return None, f"The two could not read the same {first.info.unit}."
    if not (one.is_classification and other.is_classification):
        return None, "Whether it is more than chance is not known: the test is for answers of one class."
    right, right_other = one.labels == one.answers, other.labels == other.answers
    only_first, only_second = int((right & ~right_other).sum()), int((~right & right_other).sum())
    return (
        Disagreement(
            both=int((right & right_other).sum()),
            only_first=only_first,
            only_second=only_second,
            neither=int((~right & ~right_other).sum()),
            chance=chance_of(only_first, only_second),
        ),
        "",
    )


def different_tests(first: RunFiles, second: RunFiles) -> str:
    """Why numbers of the two do not compare: they were, or may have been, tested on different data. "" if the data are the same. Two data
    sets with one test split and different training data compare."""
    if len({run.predictions.about.split for run in (first, second) if run.predictions is not None}) > 1:
        return "The two were tested on different splits."
    sets, tests = ([run.summary.get(key) for run in (first, second)] for key in ("dataset_fingerprint", "test_fingerprint"))
    if (all(sets) and sets[0] == sets[1]) or (all(tests) and tests[0] == tests[1]):
        return ""
    if all(tests):
        return f"The two were tested on different data ({_short_hash(tests[0])} and {_short_hash(tests[1])})."
    if all(sets):
        return (
            f"The two were tested on different data, or may have been: their data sets differ ({_short_hash(sets[0])} and "
            f"{_short_hash(sets[1])}), and not both recorded what their test split is."
        )
    return "It is not recorded what data the two were tested on: they may be different."


def _short_hash(value: object) -> str:
    return str(value)[:12]


def render_comparison(first: RunFiles, second: RunFiles) -> str:
    """The page; A is the first run, B the second."""
    found, unknown = disagreement(first, second)
    mood, sentence = conclusion(first, second, found, unknown)
    return page(
        f"{first.name} and {second.name}: comparison",
        tag(
            "header",
            tag("p", "Comparison"),
            tag("h1", tag("span", f"A {first.name}", class_="first"), " and ", tag("span", f"B {second.name}", class_="second")),
            tag("p", sentence, class_=f"verdict {mood}"),
        ),
        _runs(first, second),
        _results(first, second),
        _noise(found, unknown, first.info.unit),
        _curves(first, second),
        _settings(first, second),
        _classes(first, second),
        _times(first, second),
    )


def conclusion(first: RunFiles, second: RunFiles, found: Disagreement | None, unknown: str) -> tuple[Mood, str]:
    """The first sentence: which run is better, and whether that is more than chance."""
    sha = [run.summary.get("weights_sha256") for run in (first, second)]
    if sha[0] and sha[0] == sha[1]:
        return "good", "The two have the same weights, to the last bit."
    one, other = first.info, second.info
    if (one.name, one.headline) != (other.name, other.headline):
        return "warn", f"The two are of different tasks, A of {_task(one)} and B of {_task(other)}: no number says which is better."
    measure = one.headline
    values = [number_or_none(run.summary.get(measure.key)) for run in (first, second)]
    if values[0] is None or values[1] is None:
        lacking = " and ".join(name for name, value in zip(NAMES, values, strict=True) if value is None)
        return "warn", f"There is no {in_words(measure)} of {lacking}, and so nothing to compare by."
    if different := different_tests(first, second):
        return "warn", f"{different} No number says which is better."
    said = _which_is_better(one, values[0], values[1])
    if found is None:
        return "warn", f"{said}. {unknown}"
    if values[0] == values[1]:
        return "good", f"{said}."
    if found.chance < SURE:
        return "good", f"{said}. That is more than chance: equally good models differ so much {_odds(found.chance)}."
    return "warn", f"{said}. That may be chance: equally good models differ so much {_odds(found.chance)}."


def _task(info: TaskInfo) -> str:
    return f"{info.name} ({in_words(info.headline)})"


def _which_is_better(info: TaskInfo, first: float, second: float) -> str:
    measure = info.headline
    both = [shown(measure.unit, value, 2) for value in (first, second)]
    is_classification = info.name == "classification"
    if first == second:
        how = f"classify {both[0]} correctly" if is_classification else f"have a {in_words(measure)} of {both[0]}"
        return f"Both {how}, with different weights"
    better = NAMES[int((second > first) == measure.higher_is_better)]
    gap = abs(second - first)
    by = f"{100 * gap:.2f} percentage points" if measure.unit == "ratio" else number(gap)
    which = "" if is_classification else f"{in_words(measure)} "
    return f"{better} is better by {by} ({which}{both[0]} and {both[1]})"


def _odds(chance: float) -> str:
    if chance >= 0.1:
        return f"{percent(chance, 0)} of the time"
    return "less than once in a billion times" if chance < 1e-9 else f"once in {number(round(1 / chance))} times"


def _runs(first: RunFiles, second: RunFiles) -> Html:
    rows = [(name, run.name, tag("span", verdict(run)[1], class_="wrap")) for name, run in zip(NAMES, (first, second), strict=True)]
    return section("The two runs", table(("", "run", "what came out"), rows))


def _measures(first: RunFiles, second: RunFiles) -> list[Measure]:
    """The measures of both tasks, each once."""
    return list(dict.fromkeys((*first.info.measures, *second.info.measures)))


def _compared(first: RunFiles, second: RunFiles) -> list[tuple[str, str, str]]:
    """(title, key of the summary, kind) of the numbers to show with a difference."""
    samples = first.info.unit
    has_means = all(number_or_none(run.summary.get("mean_train_loss")) is not None for run in (first, second))  # not of older releases
    return [
        *((heading(measure), measure.key, "percent" if measure.unit == "ratio" else "number") for measure in _measures(first, second)),
        ("Test loss", "test_loss", "number"),
        ("Training loss", "mean_train_loss" if has_means else "train_loss", "number"),
        (capital(rate_unit(samples)), "images_per_second", "number"),
        ("Time", "seconds", "duration"),
        ("Goodput", "goodput", "percent"),
        ("Data wait", "data_wait_ratio", "percent"),
        ("Restarts", "restarts", "number"),
        ("Recovery", "recovery_seconds", "duration"),
        ("Checkpoint stall", "checkpoint_stall_seconds", "duration"),
        (f"Quarantined {samples}", "quarantined", "number"),
    ]


def _results(first: RunFiles, second: RunFiles) -> Html:
    rows = []
    compared, different = _compared(first, second), different_tests(first, second)
    intervals = {each.key: [interval_words(run.summary, each) for run in (first, second)] for each in _measures(first, second)}
    for name, key, kind in compared:
        values = [number_or_none(run.summary.get(key)) for run in (first, second)]
        if values[0] is None and values[1] is None:
            continue
        told: list[object] = [_value(value, kind) for value in values]
        if key in intervals:
            told = [_with_interval(str(text), words) for text, words in zip(told, intervals[key], strict=True)]
        is_tested = key == "test_loss" or key in intervals
        rows.append((name, *told, "other data" if is_tested and different else _difference(values[0], values[1], kind)))
    # The other rows of the summaries' tables, as text.
    others = [dict(summary_rows(run.summary)) for run in (first, second)]
    known = {name for name, _, _ in compared}
    rows += [
        (name, *(words.get(name, "") for words in others), "" if others[0].get(name) == others[1].get(name) else "differs")
        for name in dict.fromkeys([*others[0], *others[1]])
        if name not in known
    ]
    same = {
        "Weights": [run.summary.get("weights_sha256") for run in (first, second)],
        "Data set": [run.summary.get("dataset_fingerprint") for run in (first, second)],
        "Test data": [run.summary.get("test_fingerprint") for run in (first, second)],
    }
    rows += [
        (name, *(tag("code", _short_hash(value)) if value else "" for value in values), "equal" if values[0] == values[1] else "differs")
        for name, values in same.items()
        if any(values)
    ]
    if not rows:
        return NOTHING
    explained = "Below a share: its 95 % interval, which is how far chance moves it with so many test samples (Wilson)."
    told_of = tag("p", explained, class_="soft") if any(any(words) for words in intervals.values()) else NOTHING
    return section("Results", table(("", "A", "B", "B − A"), rows, numeric=(1, 2, 3)), told_of, *_warnings(first, second))


def _with_interval(text: str, interval: str) -> object:
    return tag("span", text, tag("span", interval, class_="interval")) if text and interval else text


def _warnings(first: RunFiles, second: RunFiles) -> list[Html]:
    """On classes with no or few test images; once where they are the same of both."""
    said = [class_warnings(run.summary, run.info.unit) for run in (first, second)]
    if said[0] == said[1]:
        notes = said[0]
    else:
        notes = [f"{name}: {words}" for name, sentences in zip(NAMES, said, strict=True) for words in sentences]
    return [tag("ul", *(tag("li", note) for note in notes), class_="notes")] if notes else []


def _value(value: float | None, kind: str) -> str:
    if value is None:
        return ""
    return percent(value, 2) if kind == "percent" else duration(value) if kind == "duration" else number(value)


def _difference(first: float | None, second: float | None, kind: str) -> str:
    if first is None or second is None:
        return ""
    if first == second:
        return "equal"
    change = second - first
    sign = "+" if change > 0 else "−"
    if kind == "percent":
        return f"{sign}{100 * abs(change):.2f} points"
    size = duration(abs(change)) if kind == "duration" else number(float(f"{abs(change):.4g}"))
    return f"{sign}{size}" + (f" ({sign}{percent(abs(change / first))})" if first else "")


def _noise(found: Disagreement | None, unknown: str, unit: str) -> Html:
    if found is None:
        return section("More than chance?", tag("p", unknown))
    rows = (
        ("Both right", number(found.both)),
        ("Only A right", number(found.only_first)),
        ("Only B right", number(found.only_second)),
        ("Both wrong", number(found.neither)),
    )
    tosses = found.only_first + found.only_second
    if not tosses:
        words = f"No {one_of(unit)} is right in one and wrong in the other."
    else:
        words = (
            f"Of the {number(found.count)} test {unit}, {number(tosses)} are right in one run only. Were the models equally good, each of "
            f"them would fall to A or B like a coin; a split as uneven as {number(found.only_first)} to {number(found.only_second)} then "
            f"has a probability of {found.chance:.2g} (McNemar's exact test, two-sided). Below {SURE:g} is called more than chance. "
            f"It is about these two models on these {unit}: another seed gives another model."
        )
    return section("More than chance?", tag("p", words), table((), rows, numeric=(1,)))


def _curves(first: RunFiles, second: RunFiles) -> Html:
    runs = tuple(zip(NAMES, (first, second), strict=True))
    figures: list[Html] = []

    def add(title: str, lines: Sequence[Line], *, log: bool = False) -> None:
        drawn = [line for line in lines if np.isfinite(line[2]).any()]
        if drawn:
            drawing = plot(drawn, marks=(), x="epoch", log=log, ident=f"c{len(figures)}")
            figures.append(tag("figure", tag("figcaption", title), drawing))

    def trained(column: str) -> list[Line]:
        return [
            (name, *thinned(run.curves["epoch"], run.curves[column]), "-") for name, run in runs if {"epoch", column} <= run.curves.keys()
        ]

    def tested(key: str, factor: float) -> list[Line]:
        lines: list[Line] = []
        for name, run in runs:
            events = evaluations(run.events)
            points = [(number_or_none(event.get("epoch")), number_or_none(event.get(key))) for event in events]
            known = np.array([(x, factor * y) for x, y in points if x is not None and y is not None], dtype=np.float64).reshape(-1, 2)
            lines.append((name, known[:, 0], known[:, 1], "o-"))
        return lines

    losses = trained("train_loss")
    add("Training loss", losses, log=bool(losses) and spans_magnitudes(np.concatenate([line[2] for line in losses])))
    add("Test loss", tested("test_loss", 1.0))
    for measure in _measures(first, second)[:MEASURE_PLOTS]:
        is_ratio = measure.unit == "ratio"
        add(f"{heading(measure)}, %" if is_ratio else heading(measure), tested(measure.key, 100.0 if is_ratio else 1.0))
    add(capital(rate_unit(first.info.unit)), trained("images_per_second"))
    return section("Curves", tag("div", *figures, class_="figures")) if figures else NOTHING


def _settings(first: RunFiles, second: RunFiles) -> Html:
    known = []
    for name, run in zip(NAMES, (first, second), strict=True):
        try:
            known.append(settings(from_toml(run.config_text, origin=f"{run.location}/config.toml")))
        except ValueError as error:
            return section("Settings that differ", tag("p", f"Those of {name} cannot be read: {error}"))
    different = [key for key in known[0] if known[0][key] != known[1].get(key) and key not in NOT_SETTINGS]
    rows: list[tuple[object, ...]] = [
        (tag("code", key), *(tag("span", _setting(values[key]), class_="wrap") for values in known)) for key in different
    ]
    one, other = (run.summary.get("versions") for run in (first, second))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        changed = [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
        rows += [(f"version of {name}", str(one.get(name, "")), str(other.get(name, ""))) for name in changed]
    told = table(("", "A", "B"), rows) if rows else tag("p", "None: but for their names, the two were told the same.")
    return section("Settings that differ", told)


def _setting(value: Any) -> str:
    return '""' if value == "" else str(value)


def _classes(first: RunFiles, second: RunFiles) -> Html:
    """Classes by recall, or labels by average precision: those that both runs have, the largest difference first."""
    unit = first.info.unit
    if different_tests(first, second):
        return NOTHING
    recalls = [_per_class(run) for run in (first, second)]
    if all(recalls):
        about = f"the recall: how many {unit} of the class are found"
        return _side_by_side("Classes", ("class", unit), recalls, "recall", about)
    labels = [{str(entry.get("name")): entry for entry in entries_of(run.summary.get("labels"))} for run in (first, second)]
    about = f"the average precision: how well the label's {unit} are ranked before all others"
    return _side_by_side("Labels", ("label", unit), labels, "average_precision", about)


def _per_class(run: RunFiles) -> dict[str, Mapping[str, Any]]:
    """Entries by class name; empty if names and entries do not match."""
    entries, names = run.summary.get("per_class") or [], run.summary.get("classes") or []
    if len(entries) != len(names):
        return {}
    return {str(name): entry for name, entry in zip(names, entries, strict=True) if isinstance(entry, Mapping)}


def _side_by_side(title: str, head: tuple[str, str], scores: Sequence[Mapping[str, Mapping[str, Any]]], key: str, about: str) -> Html:
    rows: list[tuple[str, float | None, float | None]] = []
    for name in [name for name in scores[0] if name in scores[1]]:
        one, other = (number_or_none(of[name].get(key)) if of[name].get("support") != 0 else None for of in scores)
        rows.append((name, one, other))
    if not any(one is not None and other is not None for _, one, other in rows):
        return NOTHING
    rows.sort(key=lambda row: (1.0 if row[1] is None or row[2] is None else -abs(row[2] - row[1]), row[0]))
    told = [
        (name, _measured(one), _measured(other), _difference(one, other, "percent"), number(scores[0][name].get("support")))
        for name, one, other in rows
    ]
    explained = tag("p", f"The largest difference first. What is compared is {about}.", class_="soft")
    return section(title, explained, table((head[0], "A", "B", "B − A", head[1]), told, numeric=(1, 2, 3, 4)))


def _measured(value: float | None) -> str:
    return NOT_MEASURED if value is None else percent(value)


def _times(first: RunFiles, second: RunFiles) -> Html:
    splits = [{cause: seconds for cause, seconds, _ in time_split(run.summary)} for run in (first, second)]
    if not all(splits):
        return NOTHING
    causes = sorted({*splits[0], *splits[1]}, key=lambda cause: -max(split.get(cause, 0.0) for split in splits))
    rows = [
        (
            tag("span", cause, class_="nobreak"),
            *(duration(split.get(cause, 0.0)) for split in splits),
            _difference(splits[0].get(cause, 0.0), splits[1].get(cause, 0.0), "duration"),
        )
        for cause in causes
    ]
    return section("Where the time went", table(("", "A", "B", "B − A"), rows, numeric=(1, 2, 3)))
