"""Reads settings' declarations from their fields: dotted name, type, default and rules. Called by the other modules of this package, and by
trainer.report.compare.

A field has a type and a default. Its `Annotated` holds everything else about the setting: ranges, hints for errors, marks
(trainer.settings.rules, trainer.settings.identity). Notes on a table's field, such as `RunConfig.cluster`, apply to all of its settings.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from dataio.config import Before, Mark


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A setting as its field declares it."""

    key: str
    """Dotted name, e.g. `data.batch_size`."""
    type: Any
    """Without `Annotated`."""
    default: Any
    notes: tuple[Any, ...]
    """The contents of `Annotated`, those of enclosing tables first."""

    @property
    def before(self) -> Any:
        """What a run has that does not name the setting, because it was begun before there was one (dataio.config.Before)."""
        return next((note.value for note in self.notes if isinstance(note, Before)), self.default)


def declared(config: type) -> dict[str, Setting]:
    """All settings of a tree of dataclasses by dotted name, in declaration order."""
    return _declared(config, prefix="", notes=())


def settings(config: Any, prefix: str = "") -> dict[str, Any]:
    """All settings' values by dotted name: {"data.batch_size": 100, ...}."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= settings(value, f"{prefix}{field.name}.")
        else:
            flat[prefix + field.name] = value
    return flat


def marked(config: type, mark: Mark) -> list[str]:
    """Dotted names of the settings that have the mark."""
    return [key for key, setting in declared(config).items() if mark in setting.notes]


def replaced(config: Any, key: str, value: Any) -> Any:
    """`config` with another value for the setting with this dotted name."""
    head, _, rest = key.partition(".")
    return dataclasses.replace(config, **{head: replaced(getattr(config, head), rest, value) if rest else value})


def as_begun(saved: Any) -> Any:
    """The settings that a run was started with, from those that its release wrote down."""
    values = settings(saved)
    for key, setting in declared(type(saved)).items():
        if setting.before != setting.default == values[key]:
            saved = replaced(saved, key, setting.before)
    return saved


def with_autos_of(config: Any, known: Mapping[str, Any]) -> Any:
    """`config` with each setting that it leaves at auto as in `known`, by dotted name: the settings that the run was started with. A
    setting that is not named there has what was done before there was it."""
    values = settings(config)
    for key, setting in declared(type(config)).items():
        if setting.before != setting.default == values[key]:
            config = replaced(config, key, known.get(key, setting.before))
    return config


def _declared(config: type, *, prefix: str, notes: tuple[Any, ...]) -> dict[str, Setting]:
    found: dict[str, Setting] = {}
    hints = get_type_hints(config, include_extras=True)
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        hint, *own = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        key = prefix + field.name
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            found |= _declared(hint, prefix=f"{key}.", notes=(*notes, *own))
        else:
            found[key] = Setting(key=key, type=hint, default=field.default, notes=(*notes, *own))
    return found
