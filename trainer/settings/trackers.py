"""`track`: the experiment trackers that a run is copied into. trainer/drive/trackers.py starts `finetune track` for each."""

import importlib.util
from collections.abc import Iterator
from typing import Literal, get_args

from trainer.settings.words import did_you_mean

Tracker = Literal["tensorboard", "mlflow", "wandb"]
TRACKERS: tuple[Tracker, ...] = get_args(Tracker)


def trackers_of(text: str) -> dict[str, str]:
    """`track` as the place of each tracker, "" for its own default, in order."""
    places: dict[str, str] = {}
    for part in text.split(",") if text else ():
        name, equals, place = (word.strip() for word in part.partition("="))
        if name not in TRACKERS:
            raise ValueError(
                f"track: {name!r} is no tracker;{did_you_mean(name, TRACKERS)} use {', '.join(TRACKERS)}, or several with commas"
            )
        if equals and not place:
            raise ValueError(f"track: {part!r} names no place; write {name}=WHERE, such as mlflow=http://127.0.0.1:5000, or {name} alone")
        if name in places:
            raise ValueError(f"track names {name} twice; give each tracker once")
        places[name] = place
    return places


def lacking_for_trackers(text: str) -> Iterator[str]:
    """What the trackers lack on this machine."""
    names = {part.partition("=")[0].strip() for part in text.split(",")}
    if "wandb" in names and importlib.util.find_spec("wandb") is None:
        yield "track=wandb needs the library wandb: pip install 'ray-finetune[wandb]' (extra `wandb`)"
