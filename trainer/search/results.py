"""What a search has found: the trials in order, the best of them against the settings as they were given, what mattered, what it cost.
Pure. __main__.py hands in what the runs say; page.py draws what comes out, and `to_json` is the file search.json.

Only the validation split chooses. The best of many trials is better there partly by chance, so that number says too much of it. The test
split, which every whole run reads once at its end, chose nothing: there the best is compared with the given settings, sample by sample.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trainer.runs.certainty import Interval, in_percent
from trainer.runs.measures import in_words, shown
from trainer.search.importance import Matters
from trainer.search.space import Axis
from trainer.settings.units import duration, number
from trainer.tasks.info import Measure, TaskInfo

SOUP = "soup"
"""The name of the soup's folder."""
End = Literal["finished", "stopped", "diverged"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """A trial of the search."""

    number: int
    name: str
    values: Mapping[str, Any]
    """Of the settings that were searched, by dotted name."""
    epochs: int
    """The rung that it came to."""
    score: float | None
    """The measure there, of the validation split; None for one that diverged."""
    end: End
    diverged: str = ""
    test: float | None = None
    """The task's headline, of the test split; of those that the search has trained to the end."""
    weights_sha256: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gain:
    """What the best trial is better by than the given settings, on the test split."""

    best: float
    own: float
    interval: Interval | None
    """Of the difference, 95 %; None where the measure is no share of samples."""
    is_paired: bool = False
    """Both were asked about the same samples."""

    @property
    def is_sure(self) -> bool:
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Souped:
    """What the average has come to."""

    members: tuple[str, ...]
    """The trials in it, the best first. One alone is that trial: the others made it worse."""
    tried: int
    """Trials that could have been in it."""
    score: float | None
    """The measure by which trials are chosen, of the validation split."""
    test: float | None = None
    """The task's headline, of the test split; None for a trial alone."""
    weights_sha256: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a search cost."""

    epochs: int
    """Trained by all trials together."""
    whole_epochs: int
    """What all trials would have needed to the end."""
    samples: int
    """In an epoch."""

    @property
    def share(self) -> float:
        return self.epochs / self.whole_epochs


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """All that a search says."""

    info: TaskInfo
    measure: Measure
    """By which the trials were chosen."""
    space: tuple[Axis, ...]
    rungs: tuple[int, ...]
    tried: tuple[Tried, ...]
    """The best first."""
    best: int | None
    """The number of the best trial that was trained to the end; None if none was."""
    gain: Gain | None
    matters: tuple[Matters, ...]
    cost: Cost
    soup: Souped | None = None
    """If one was asked for, and there were two trials to make it of."""

    def trial(self, number: int) -> Tried:
        return next(each for each in self.tried if each.number == number)

    @property
    def winner(self) -> Tried | None:
        return None if self.best is None else self.trial(self.best)

    @property
    def own(self) -> Tried:
        """The trial with the settings as they were given."""
        return self.trial(0)


def value_words(value: Any) -> str:
    """A setting's value, as a flag takes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return " ".join(map(value_words, value))
    return str(value) or '""'


def values_words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value_words(value)}" for key, value in values.items())


def score_words(measure: Measure, score: float | None, digits: int = 2) -> str:
    return "diverged" if score is None else shown(measure.unit, score, digits)


def sentences(search: Search) -> list[str]:
    """What the search says, the most important first."""
    measure, winner, own = search.measure, search.winner, search.own
    told = in_words(measure, "validation")
    ends = sum(each.end == "diverged" for each in search.tried)
    if winner is None:
        return [f"none of the {number(len(search.tried))} trials could be trained to the end: {number(ends)} diverged; lower optim.lr"]
    others = len(search.tried) - 1
    lines = []
    if winner.number == 0:
        lines.append(
            f"The settings as they were given are the best of {number(others + 1)} trials: {told} {score_words(measure, winner.score)}. "
            "The search has found nothing better."
        )
    else:
        lines.append(
            f"Trial {winner.number} is the best of {number(others + 1)}: {told} {score_words(measure, winner.score)}, with the settings as "
            f"they were given {score_words(measure, own.score)}. {_gain_words(search)}"
        )
        lines.append(f"Its settings: {values_words(winner.values)}.")
    if search.soup is not None:
        lines.append(soup_words(search, search.soup))
    if ends:
        lines.append(f"{number(ends)} trial{' has' if ends == 1 else 's have'} diverged.")
    lines.append(
        f"It trained {number(search.cost.epochs)} epochs, {100 * search.cost.share:.0f} % of the {number(search.cost.whole_epochs)} that "
        "all trials would have needed to the end."
    )
    return lines


def soup_words(search: Search, soup: Souped) -> str:
    """What the average of several trials has come to."""
    if len(soup.members) == 1:
        return f"A soup of the {number(soup.tried)} trials that were trained to the end is no better than {soup.members[0]} alone."
    head = search.info.headline
    test = "" if soup.test is None else f", {in_words(head)} {shown(head.unit, soup.test, 2)}"
    score = score_words(search.measure, soup.score)
    return f"The soup of {', '.join(soup.members)}: {in_words(search.measure, 'validation')} {score}{test}."


def _gain_words(search: Search) -> str:
    gain, info = search.gain, search.info
    if gain is None:
        return "What it gains on the test split is not known."
    head = info.headline
    words = (
        f"On the test split, which chose nothing: {head.in_words} {shown(head.unit, gain.best, 2)} against {shown(head.unit, gain.own, 2)}"
    )
    if gain.interval is None:
        return f"{words}."
    low, high = gain.interval
    points = 100 * (gain.best - gain.own)
    if gain.is_sure:
        better = "better" if points > 0 else "worse"
        return f"{words}, {abs(points):.1f} points {better} ({100 * low:.1f} to {100 * high:.1f})."
    return f"{words}: {points:+.1f} points ({in_percent(gain.interval)}), which may be chance."


def time_words(seconds: Mapping[str, float], wall_seconds: float) -> str:
    """The account of all trials' seconds, in a line."""
    total = sum(seconds.values())
    if not total:
        return ""
    parts = [f"{cause.replace('_', ' ')} {100 * each / total:.0f} %" for cause, each in sorted(seconds.items(), key=lambda pair: -pair[1])]
    return f"The trials' runs took {duration(wall_seconds)}: {', '.join(parts)}."


def to_json(search: Search) -> dict[str, Any]:
    """What search.json holds: a function of the runs, not of how long anything took."""

    def tried(each: Tried) -> dict[str, Any]:
        return {
            "trial": each.number,
            "run": each.name,
            "settings": {key: list(value) if isinstance(value, tuple) else value for key, value in each.values.items()},
            "epochs": each.epochs,
            "score": each.score,
            "end": each.end,
            search.info.headline.key: each.test,
            "weights_sha256": each.weights_sha256 or None,
            **({"diverged": each.diverged} if each.diverged else {}),
        }

    gain = search.gain
    cost = {"epochs": search.cost.epochs, "whole_epochs": search.cost.whole_epochs, f"{search.info.unit}_per_epoch": search.cost.samples}
    return {
        "measure": f"validation_{search.measure.name}",
        "best": None if search.winner is None else search.winner.name,
        "own": search.own.name,
        "gain": None
        if gain is None
        else {
            "measure": search.info.headline.key,
            "best": gain.best,
            "own": gain.own,
            "interval": None if gain.interval is None else list(gain.interval),
            "is_paired": gain.is_paired,
        },
        "says": sentences(search),
        "space": {axis.key: axis.to_json() for axis in search.space},
        "rungs": list(search.rungs),
        "trials": [tried(each) for each in search.tried],
        "importance": [{"setting": each.key, "share": each.share, "chance": each.chance} for each in search.matters],
        "soup": None
        if search.soup is None
        else {
            "members": list(search.soup.members),
            "score": search.soup.score,
            search.info.headline.key: search.soup.test,
            "weights_sha256": search.soup.weights_sha256 or None,
        },
        "cost": cost,
    }
