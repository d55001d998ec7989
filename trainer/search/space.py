"""Where a search looks: settings, and which values each may have. Read from TOML, beside the recipes (trainer/recipes/spaces) or the user's
own; __main__.py calls it. Pure but for the reading.

    [optim.lr]                          # each table is a setting
    times = [0.125, 8.0]                # multiples of the value that the run has, evenly by their logarithm
    [optim.weight_decay]
    low = 1e-5                          # numbers between the two: by their logarithm, or evenly with scale = "linear"
    high = 1e-2
    [optim.label_smoothing]
    values = [0.0, 0.05, 0.1]           # one of these

Trial 0 has the run's own settings. The others lie at the points of a Halton sequence whose digits are permuted by the seed (Braaten and
Weller 1979): they cover the space more evenly than chance does, more trials leave those before as they are, and trial n is a function of
the space, the seed and n.
"""

import hashlib
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dataio.config import FREE
from dataio.foreign import MAX_SETTINGS_BYTES, read_regular
from trainer.settings.fields import declared, replaced, settings
from trainer.settings.texts import is_of_other_samples, is_text
from trainer.settings.toml import RECIPES_FOLDER, checked_value
from trainer.settings.tree import RunConfig
from trainer.settings.words import did_you_mean

SPACES_FOLDER = RECIPES_FOLDER / "spaces"
DIGITS = 3
"""Significant digits of a number that was drawn: nobody wants to read more, and none would change the result."""
NOT_SEARCHED = {
    "train.epochs": "the search chooses how long each trial is trained",
    "train.max_steps": "the search chooses how long each trial is trained",
    "train.patience": "the search ends the bad trials itself",
    "train.seed": "a seed that did well by chance is no better setting",
    "train.init_seed": "a seed that did well by chance is no better setting",
    "data.choice_seed": "trials that are scored on other samples do not compare",
    "data.fold": "trials that are scored on other samples do not compare",
    "data.part": "trials that learn from other samples do not compare",
    "train.select": "trials that are scored in different ways do not compare",
    "train.select_measure": "trials that are scored in different ways do not compare",
}
_FINEST = 2.0**-40
_NAMED = ("values", "times", "low", "high", "scale")


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """A setting that is searched. Either `values`, or the numbers from `low` to `high`."""

    key: str
    """Dotted name of the setting."""
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    scale: Literal["log", "linear"] = "log"
    whole: bool = False
    """Numbers are rounded to whole ones."""

    def at(self, place: float) -> Any:
        """The value at `place`, in [0, 1)."""
        if self.values:
            return self.values[min(int(place * len(self.values)), len(self.values) - 1)]
        is_log = self.scale == "log"
        found = self.low * (self.high / self.low) ** place if is_log else self.low + place * (self.high - self.low)
        if self.whole:
            return round(found)
        return min(self.high, max(self.low, float(f"{found:.{DIGITS}g}")))

    def place(self, value: Any) -> float | None:
        """Where a value lies on the axis, from 0 to 1: the inverse of `at`. None for one that is not on it."""
        if self.values:
            return (self.values.index(value) + 0.5) / len(self.values) if value in self.values else None
        if isinstance(value, bool) or not isinstance(value, int | float) or (self.scale == "log" and value <= 0):
            return None
        if self.scale == "log":
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def to_json(self) -> dict[str, Any]:
        if self.values:
            return {"values": list(self.values)}
        return {"low": self.low, "high": self.high, "scale": self.scale}


Space = tuple[Axis, ...]


def space_names() -> list[str]:
    """The shipped spaces."""
    return sorted(path.stem for path in SPACES_FOLDER.glob("*.toml"))


def default_space(base: RunConfig) -> str:
    """The shipped space of a search that names none."""
    return "texts" if is_text(base.model) else "rates"


def load_space(name: str, base: RunConfig) -> Space:
    """A shipped space or a TOML file (a name that ends in `.toml` or contains a `/`), for a run with the settings `base`. ValueError that
    says what is wrong with it."""
    is_file = name.endswith(".toml") or "/" in name
    path = Path(name).expanduser() if is_file else SPACES_FOLDER / f"{name}.toml"
    known = space_names()
    try:
        text = read_regular(path, MAX_SETTINGS_BYTES).decode()
    except OSError as error:
        if not is_file:
            raise ValueError(
                f"--space {name} is no space;{did_you_mean(name, known)} shipped: {', '.join(known)}; a file ends in .toml"
            ) from None
        raise ValueError(
            f"--space {name} cannot be read ({error.strerror}); give a TOML file or one of the spaces {', '.join(known)}"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--space {name} is not UTF-8 text ({error.reason} at byte {error.start}); TOML files are UTF-8") from None
    return space_of(text, base, origin=name)


def space_of(text: str, base: RunConfig, *, origin: str) -> Space:
    """The axes that the TOML `text` describes, in its order. `origin` names it in errors (ValueError)."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{origin} is not valid TOML: {error}") from None
    except RecursionError:
        raise ValueError(f"{origin} is nested too deeply; a space is a table for each setting") from None
    axes = tuple(_axes(table, base, origin=origin, prefix=""))
    if not axes:
        raise ValueError(f"{origin} names no setting to search; write a table such as [optim.lr] with times = [0.125, 8.0]")
    return axes


def point(trial: int, seed: int, axes: Sequence[Axis]) -> list[float]:
    """Where trial `trial` (from 1) lies on each axis, in [0, 1)."""
    return [_radical_inverse(trial, base, _permutation(base, seed, axis.key)) for base, axis in zip(_primes(len(axes)), axes, strict=True)]


def trial_config(base: RunConfig, axes: Sequence[Axis], trial: int, seed: int) -> RunConfig:
    """The settings of a trial."""
    if trial == 0:
        return base
    for axis, place in zip(axes, point(trial, seed, axes), strict=True):
        base = replaced(base, axis.key, axis.at(place))
    return base


def values_of(config: RunConfig, axes: Sequence[Axis]) -> dict[str, Any]:
    """What the settings have on the axes."""
    known = settings(config)
    return {axis.key: known[axis.key] for axis in axes}


def _radical_inverse(number: int, base: int, permutation: Sequence[int]) -> float:
    """The digits of `number`, permuted, in reverse order behind the point."""
    found, weight = 0.0, 1.0 / base
    while weight > _FINEST:
        number, digit = divmod(number, base)
        found += permutation[digit] * weight
        weight /= base
    return min(found, 1.0 - _FINEST)


def _permutation(base: int, seed: int, key: str) -> list[int]:
    """A function of its arguments on every machine and in every release of Python."""
    return sorted(range(base), key=lambda digit: hashlib.sha256(f"{seed} {key} {digit}".encode()).digest())


def _primes(count: int) -> list[int]:
    found: list[int] = []
    number = 2
    while len(found) < count:
        if all(number % prime for prime in found):
            found.append(number)
        number += 1
    return found


# --- reading ----------------------------------------------------------------------------------------------------------------------------


def _axes(table: Mapping[str, Any], base: RunConfig, *, origin: str, prefix: str) -> list[Axis]:
    known = declared(RunConfig)
    found: list[Axis] = []
    for key, value in table.items():
        full = prefix + key
        if full in known:
            found.append(_axis(full, value, base, origin=origin))
        elif not any(name.startswith(f"{full}.") for name in known):
            raise ValueError(f"{origin}: {full} is no setting;{did_you_mean(full, tuple(known))} names are those of the command line")
        elif not isinstance(value, Mapping):
            raise ValueError(f"{origin}: {full} = {value!r}, but {full} is a table of settings; write [{full}.SETTING]")
        else:
            found += _axes(value, base, origin=origin, prefix=f"{full}.")
    return found


def _axis(key: str, value: Any, base: RunConfig, *, origin: str) -> Axis:
    setting, where = declared(RunConfig)[key], f"{origin}: [{key}]"
    if key in NOT_SEARCHED:
        raise ValueError(f"{where} cannot be searched: {NOT_SEARCHED[key]}; leave it out, and give it as a flag if it is to be another")
    if is_of_other_samples(key, base.model):
        takes = "texts" if is_text(base.model) else "images"
        raise ValueError(
            f"{where} cannot be searched: model.name={base.model.name} takes {takes}, of which {key} says nothing; leave it out"
        )
    if FREE in setting.notes:
        raise ValueError(f"{where} cannot be searched: it does not change what the model learns; leave it out")
    if not isinstance(value, Mapping):
        raise ValueError(f"{origin}: {key} = {value!r} is one value; write [{key}] with values = [...], times = [...], or low and high")
    if unknown := [name for name in value if name not in _NAMED]:
        raise ValueError(f"{where}: {unknown[0]} is unknown;{did_you_mean(unknown[0], _NAMED)} a table has {', '.join(_NAMED)}")
    kinds = [kind for kind in ("values", "times", "low") if kind in value]
    if len(kinds) != 1 or ("low" in value) != ("high" in value) or ("scale" in value and "low" not in value):
        raise ValueError(f"{where} has {', '.join(value) or 'nothing'}; it must have values, or times, or low and high (and perhaps scale)")
    if kinds == ["values"]:
        return _chosen(key, value["values"], where=where)
    if setting.type not in (int, float):
        raise ValueError(f"{where}: {key} is no number; write values = [...]")
    return _ranged(key, value, base, where=where, whole=setting.type is int)


def _chosen(key: str, values: Any, *, where: str) -> Axis:
    if not isinstance(values, list) or len(values) < 2:
        raise ValueError(f"{where}: values = {values!r} leaves nothing to choose; give a list of two or more")
    checked = tuple(checked_value(each, key, origin=where) for each in values)
    if any(each in checked[:number] for number, each in enumerate(checked)):
        raise ValueError(f"{where}: values = {values!r} has one of them twice; give each once")
    return Axis(key=key, values=checked)


def _ranged(key: str, value: Mapping[str, Any], base: RunConfig, *, where: str, whole: bool) -> Axis:
    scale = value.get("scale", "log")
    if scale not in ("log", "linear"):
        raise ValueError(f'{where}: scale = {scale!r}; it must be "log" or "linear"')
    if "times" in value:
        times = value["times"]
        if not isinstance(times, list) or len(times) != 2 or not all(_is_number(each) for each in times):
            raise ValueError(f"{where}: times = {times!r}; it must be two multiples, such as [0.125, 8.0]")
        own = settings(base)[key]
        if own <= 0:
            raise ValueError(f"{where}: times are multiples of {key}, which is {own:g} in this run; write low and high")
        # rounded: the product has noise in its last bits
        low, high = (float(f"{own * each:.{DIGITS + 3}g}") for each in times)
    else:
        low, high = value["low"], value["high"]
        if not (_is_number(low) and _is_number(high)):
            raise ValueError(f"{where}: low = {low!r}, high = {high!r}; they must be numbers")
    if not low < high:
        raise ValueError(f"{where}: from {low:g} to {high:g} there is nothing to choose; the smaller number comes first")
    if scale == "log" and low <= 0:
        raise ValueError(f'{where}: {low:g} has no logarithm; begin above 0, or write scale = "linear"')
    if whole and (low != int(low) or high != int(high)):
        raise ValueError(f"{where}: {key} is a whole number, and so must be {low:g} and {high:g}")
    return Axis(key=key, low=float(low), high=float(high), scale=scale, whole=whole)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
