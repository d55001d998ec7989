"""What a search was begun with, as its folder remembers it: a search that goes on must be the same one. Called by __main__.py."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.storage import Storage
from dataio.foreign import json_of
from trainer.search.space import Space
from trainer.settings.identity import deciding_settings
from trainer.settings.tree import RunConfig

PLAN_FILE = ".series/search.json"
_MOST_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What decides every trial and every rung. Neither the number of trials nor of jobs: the first may grow, and results are kept whatever
    the second is."""

    values: dict[str, Any]

    @classmethod
    def of(cls, config: RunConfig, space: Space, seed: int, rungs: Sequence[int], eta: int, fingerprint: str) -> "Plan":
        settings = {key: list(value) if isinstance(value, tuple) else value for key, value in deciding_settings(config, "").items()}
        return cls(
            values={
                "settings": settings,
                "space": {axis.key: axis.to_json() for axis in space},
                "search seed": seed,
                "epochs": list(rungs),
                "eta": eta,
                "data": fingerprint,
            }
        )

    @property
    def text(self) -> str:
        return json.dumps(self.values, sort_keys=True)


def agreed(storage: Storage, plan: Plan) -> None:
    """Write the plan into a new search's folder, or compare it with that of the search there. ValueError that names what differs."""
    try:
        before = storage.read(PLAN_FILE)
    except FileNotFoundError:
        if storage.list(""):
            raise ValueError(
                f"{storage.address} holds something that is no search; give another --run NAME, or leave it out for a name of its own"
            ) from None
        storage.write_atomic(PLAN_FILE, plan.text.encode())
        return
    try:
        known = json_of(before)
    except ValueError as error:
        raise ValueError(f"{storage.address}/{PLAN_FILE} is damaged ({error}); give another --run NAME") from None
    ours = json.loads(plan.text)
    if known == ours:
        return
    differs = _different(known if isinstance(known, dict) else {}, ours)
    raise ValueError(
        f"the search in {storage.address} was begun with other {', '.join(differs)}; give another --run NAME, or leave it out: each "
        "search has a name of its own"
    )


def _different(known: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    found = []
    for key, value in ours.items():
        if key == "settings" and isinstance(known.get(key), dict):
            found += [name for name in {**value, **known[key]} if value.get(name) != known[key].get(name)]
        elif known.get(key) != value:
            found.append(key)
    return sorted(found) or ["settings"]
