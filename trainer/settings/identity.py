"""Which settings decide a run's weights. They form its automatic name and must not change when it goes on. Called by
trainer.drive.identity.

Marks at the fields decide (dataio.config.Mark). FREE settings do not count. LATER settings were added after runs were first named, and
count only if they differ from their defaults, so a new setting renames no existing run. The data's content counts too; the caller adds it.
"""

from pathlib import Path
from typing import Any

from dataio.config import FREE, LATER, PATH
from trainer.settings.fields import declared, settings
from trainer.settings.tree import RunConfig


def deciding_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that count, by dotted name. A file counts by its name, without its folder."""
    known = declared(type(config))
    return {key: value for key, value in _that_count(config).items() if not (LATER in known[key].notes and value == known[key].default)}


def deciding_changes(before: RunConfig, now: RunConfig) -> dict[str, tuple[Any, Any]]:
    """The settings by which two RunConfigs would train different weights, each with its value before and now. Includes defaults."""
    then = _that_count(before)
    return {key: (then[key], value) for key, value in _that_count(now).items() if then[key] != value}


def _that_count(config: RunConfig) -> dict[str, Any]:
    known = declared(type(config))
    return {
        key: Path(value).name if PATH in known[key].notes else value
        for key, value in settings(config).items()
        if FREE not in known[key].notes
    }
