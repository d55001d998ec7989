"""What decides every trial of a search and every rung: its folder remembers it, so that a search that goes on is the same one
(trainer.series.command.same_job). Called by __main__.py."""

from collections.abc import Sequence
from typing import Any

from trainer.search.space import Space
from trainer.settings.identity import deciding_settings
from trainer.settings.tree import RunConfig

RECORD_FILE = ".series/search.json"


def record_of(config: RunConfig, space: Space, seed: int, rungs: Sequence[int], eta: int, fingerprint: str) -> dict[str, Any]:
    """As JSON. Neither the number of trials nor of jobs: the first may grow, and results are kept whatever the second is."""
    return {
        "settings": {key: list(value) if isinstance(value, tuple) else value for key, value in deciding_settings(config, "").items()},
        "space": {axis.key: axis.to_json() for axis in space},
        "search seed": seed,
        "epochs": list(rungs),
        "eta": eta,
        "data": fingerprint,
    }
