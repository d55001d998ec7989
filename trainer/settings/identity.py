"""Which settings decide a run's weights: what its name is made of, and what must stay the same when it goes on. Called by the driver.

The rules stand at the fields, as marks (dataio.config.Mark): FREE settings do not count; a LATER one, added after runs were first named,
counts when it has another value than its default. So a new setting renames nobody's run. The data's content counts too; the caller adds it.
"""

from pathlib import Path
from typing import Any

from dataio.config import FREE, LATER, PATH
from trainer.settings.fields import declared, settings
from trainer.settings.tree import RunConfig


def deciding_settings(config: RunConfig) -> dict[str, Any]:
    """By dotted name. Files are known by their names, wherever they lie."""
    known = declared(type(config))
    return {key: value for key, value in _that_count(config).items() if not (LATER in known[key].notes and value == known[key].default)}


def deciding_changes(before: RunConfig, now: RunConfig) -> dict[str, tuple[Any, Any]]:
    """The settings in which two RunConfigs would train other weights, each with its value before and now, defaults included."""
    then = _that_count(before)
    return {key: (then[key], value) for key, value in _that_count(now).items() if then[key] != value}


def _that_count(config: RunConfig) -> dict[str, Any]:
    known = declared(type(config))
    return {
        key: Path(value).name if PATH in known[key].notes else value
        for key, value in settings(config).items()
        if FREE not in known[key].notes
    }
