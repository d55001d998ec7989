"""`python -m trainer.report --compare RUN RUN`: two runs on one page. Called by report; what a run's folder holds is read there.

Whether one model is better than the other is McNemar's question, where both answered the same test images: of the images that only one of
them got right, how many would fall to either by chance? (McNemar 1947; exact binomial, two-sided.) Where the images are not the same, or
not all answers are recorded, nothing is claimed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.report.page import NOTHING, Html, number_or_none, page, section, table, tag
from trainer.report.plots import Line, plot, spans_magnitudes, thinned
from trainer.report.sections import Mood, RunFiles, evaluations, verdict
from trainer.runs.progress import summary_rows, time_split
from trainer.settings.fields import settings
from trainer.settings.toml import from_toml
from trainer.settings.units import duration, number, percent

SURE = 0.05
NAMES = ("A", "B")
NOT_SETTINGS = ("run", "storage")  # where a run is, not what it does
_MEASURES = (
    ("Test accuracy", "test_accuracy", "percent"),
    ("Test loss", "test_loss", "number"),
    ("Training loss", "train_loss", "number"),
    ("Images per second", "images_per_second", "number"),
    ("Time", "seconds", "duration"),
    ("Goodput", "goodput", "percent"),
    ("Data wait", "data_wait_ratio", "percent"),
    ("Restarts", "restarts", "number"),
    ("Recovery", "recovery_seconds", "duration"),
    ("Checkpoint stall", "checkpoint_stall_seconds", "duration"),
    ("Quarantined images", "quarantined", "number"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Disagreement:
    """Two models' answers to the same images."""

    both: int
    """Images that both got right."""
    only_first: int
    only_second: int
    neither: int
    chance: float
    """Of a difference as large as this, or larger, between models that are equally good: McNemar's exact two-sided p."""

    @property
    def count(self) -> int:
        return self.both + self.only_first + self.only_second + self.neither


def chance_of(first: int, second: int) -> float:
    """Two-sided exact binomial probability of so uneven a split of first + second images, or a more uneven one, by coin tosses."""
    tosses, fewer = first + second, min(first, second)
    if 2 * fewer >= tosses:
        return 1.0
    # From the largest term down, each from the one before; logarithms, as 2**-tosses is below what a float holds.
    log_term = math.lgamma(tosses + 1) - math.lgamma(fewer + 1) - math.lgamma(tosses - fewer + 1) - tosses * math.log(2.0)
    total = term = 1.0
    for heads in range(fewer, 0, -1):
        term *= heads / (tosses - heads + 1)
        total += term
        if term < 1e-17 * total:
            break
    return min(1.0, 2.0 * math.exp(log_term) * total)


def disagreement(first: RunFiles, second: RunFiles) -> tuple[Disagreement | None, str]:
    """How the two models' answers differ, or why that is not known."""
    one, other = first.predictions, second.predictions
    if one is None or other is None:
        name, run = ("A", first) if one is None else ("B", second)
        return None, f"Of {name}: {run.no_shots or 'there are no predictions.'}"
    if one.about.dataset_fingerprint != other.about.dataset_fingerprint or one.about.split != other.about.split:
        return None, "The two were tested on different data, so that their accuracies do not compare."
    if not (one.is_complete and other.is_complete):
        return None, "Not every answer is recorded, as there are so many."
    if not np.array_equal(one.ids, other.ids):
        return None, "The two could not read the same images."
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
        _measures(first, second),
        _noise(found, unknown),
        _curves(first, second),
        _settings(first, second),
        _classes(first, second),
        _times(first, second),
    )


def conclusion(first: RunFiles, second: RunFiles, found: Disagreement | None, unknown: str) -> tuple[Mood, str]:
    """The first sentence: which is better, and whether that is more than chance."""
    sha = [run.summary.get("weights_sha256") for run in (first, second)]
    if sha[0] and sha[0] == sha[1]:
        return "good", "The two have the same weights, to the last bit."
    accuracy = [number_or_none(run.summary.get("test_accuracy")) for run in (first, second)]
    if accuracy[0] is None or accuracy[1] is None:
        lacking = " and ".join(name for name, value in zip(NAMES, accuracy, strict=True) if value is None)
        return "warn", f"There is no test accuracy of {lacking}, and so nothing to compare by."
    if accuracy[0] == accuracy[1]:
        said = f"Both classify {percent(accuracy[0], 2)} correctly, with different weights"
    else:
        better = int(accuracy[1] > accuracy[0])
        points = 100 * abs(accuracy[1] - accuracy[0])
        said = f"{NAMES[better]} is better by {points:.2f} percentage points ({percent(accuracy[0], 2)} and {percent(accuracy[1], 2)})"
    if found is None:
        return "warn", f"{said}. {unknown}"
    if accuracy[0] == accuracy[1]:
        return "good", f"{said}."
    if found.chance < SURE:
        return "good", f"{said}. That is more than chance: equally good models differ so much {_odds(found.chance)}."
    return "warn", f"{said}. That may be chance: equally good models differ so much {_odds(found.chance)}."


def _odds(chance: float) -> str:
    if chance >= 0.1:
        return f"{percent(chance, 0)} of the time"
    return "less than once in a billion times" if chance < 1e-9 else f"once in {number(round(1 / chance))} times"


def _runs(first: RunFiles, second: RunFiles) -> Html:
    rows = [(name, run.name, tag("span", verdict(run)[1], class_="wrap")) for name, run in zip(NAMES, (first, second), strict=True)]
    return section("The two runs", table(("", "run", "what came out"), rows))


def _measures(first: RunFiles, second: RunFiles) -> Html:
    rows = []
    for name, key, kind in _MEASURES:
        values = [number_or_none(run.summary.get(key)) for run in (first, second)]
        if values[0] is None and values[1] is None:
            continue
        rows.append((name, *(_value(value, kind) for value in values), _difference(values[0], values[1], kind)))
    # Whatever else the summaries' tables tell, as text.
    told = [dict(summary_rows(run.summary)) for run in (first, second)]
    known = {name for name, _, _ in _MEASURES}
    rows += [
        (name, *(words.get(name, "") for words in told), "" if told[0].get(name) == told[1].get(name) else "differs")
        for name in dict.fromkeys([*told[0], *told[1]])
        if name not in known
    ]
    same = {
        "Weights": [run.summary.get("weights_sha256") for run in (first, second)],
        "Data set": [run.summary.get("dataset_fingerprint") for run in (first, second)],
    }
    rows += [
        (name, *(tag("code", str(value)[:12]) if value else "" for value in values), "equal" if values[0] == values[1] else "differs")
        for name, values in same.items()
        if any(values)
    ]
    return section("Results", table(("", "A", "B", "B − A"), rows, numeric=(1, 2, 3))) if rows else NOTHING


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


def _noise(found: Disagreement | None, unknown: str) -> Html:
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
        words = "No image is right in one and wrong in the other."
    else:
        words = (
            f"Of the {number(found.count)} test images, {number(tosses)} are right in one run only. Were the models equally good, each of "
            f"them would fall to A or B like a coin; a split as uneven as {number(found.only_first)} to {number(found.only_second)} then "
            f"has a probability of {found.chance:.2g} (McNemar's exact test, two-sided). Below {SURE:g} is called more than chance. "
            "It is about these two models on these images: another seed gives another model."
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
    add("Test accuracy, %", tested("test_accuracy", 100.0))
    add("Images per second", trained("images_per_second"))
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
    scores = []
    for run in (first, second):
        entries, names = run.summary.get("per_class") or [], run.summary.get("classes") or []
        if len(entries) != len(names) or not entries:
            return NOTHING
        scores.append({str(name): entry for name, entry in zip(names, entries, strict=True) if isinstance(entry, Mapping)})
    shared = [name for name in scores[0] if name in scores[1]]
    rows = []
    for name in shared:
        values = [number_or_none(of[name].get("recall")) for of in scores]
        if values[0] is not None and values[1] is not None:
            rows.append((name, values[0], values[1]))
    if not rows:
        return NOTHING
    rows.sort(key=lambda row: (-abs(row[2] - row[1]), row[0]))
    told = [
        (name, percent(one), percent(other), _difference(one, other, "percent"), number(scores[0][name].get("support")))
        for name, one, other in rows
    ]
    about = tag("p", "The largest difference first. What is compared is the recall: how many images of the class are found.", class_="soft")
    return section("Classes", about, table(("class", "A", "B", "B − A", "images"), told, numeric=(1, 2, 3, 4)))


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
