"""Which settings decide a run's weights. They form its automatic name and must not change when it goes on. Called by
trainer.drive.identity and trainer.drive.record.

Marks at the fields decide (dataio.config.Mark). FREE settings do not count. LATER settings count only if they differ from their defaults,
so a new setting renames no existing run. `train.eval_every_epochs` is free, but counts where evaluations choose the weights. A file of
weights counts by its content, and so do a teacher and images without labels. The data's content counts too; the caller adds it.
"""

import hashlib
from pathlib import Path
from typing import Any

from dataio.config import FREE, LATER, PATH, PIN
from dataio.foreign import MAX_SETTINGS_BYTES, read_regular
from trainer.settings.fields import declared, settings
from trainer.settings.sources import OWN, source_sha256
from trainer.settings.texts import is_text, name_in_identity
from trainer.settings.tree import RunConfig
from trainer.settings.weight_files import content_sha256

WEIGHTS = "model.weights"
EVALUATES = "train.eval_every_epochs"
PINNED = ("train.teacher", "data.unlabelled")
"""Settings that the driver pins: they name a place and the hash of what is there (trainer.runs.model_files, dataio.unlabelled)."""

_FREE_IN_FIRST_NAMES = frozenset({"data.max_image_pixels"})


def names_file(weights: str) -> bool:
    """Whether `model.weights` is a file."""
    return weights not in ("imagenet", "none") and not weights.startswith("package:")


def weights_sha256(weights: str) -> str:
    """SHA-256 of the file that `model.weights` names, or of the files that an index names; "" if it names none: weights of a library or a
    package are known by their name. ValueError if there is no such file."""
    if not names_file(weights):
        return ""
    path = Path(weights).expanduser()
    if not path.is_file():
        raise ValueError(f"model.weights={weights}: no such file; weights are imagenet, none, package:efficientnet_lite0, or a file")
    return content_sha256(path)


def description_sha256(weights: str) -> str:
    """SHA-256 of the `config.json` beside the weights file, by which an exported model says what its outputs stand for; "" if there is
    none."""
    if names_file(weights) and (beside := Path(weights).expanduser().with_name("config.json")).is_file():
        return hashlib.sha256(read_regular(beside, MAX_SETTINGS_BYTES)).hexdigest()
    return ""


def deciding_settings(config: RunConfig, weights: str = "") -> dict[str, Any]:
    """The settings that count, by dotted name. `weights` is the SHA-256 of the weights' file; "": they count by their name."""
    known = declared(type(config))
    counted = _that_count(config, weights).items()
    return {key: value for key, value in counted if not (LATER in known[key].notes and value == known[key].default)}


def first_deciding_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that counted in the names of the first releases: a file of weights by its name, without its folder."""
    return {key: value for key, value in deciding_settings(config).items() if key not in _FREE_IN_FIRST_NAMES}


def _chooses(config: RunConfig) -> bool:
    """Whether evaluations decide which weights are kept, or when the run ends. `train.select` is decided once the data are known."""
    return config.train.select == "best" or config.train.patience > 0


def deciding_changes(before: RunConfig, now: RunConfig, weights: tuple[str, str] = ("", "")) -> dict[str, tuple[Any, Any]]:
    """The settings by which two RunConfigs would train different weights, each with its value before and now. Includes defaults. `weights`:
    SHA-256 of the weights' files, before and now; where one is not known, they count by their names."""
    known = weights if all(weights) else ("", "")
    then = _that_count(before, known[0])
    pairs = {key: (then.get(key, value), value) for key, value in _that_count(now, known[1]).items()}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _that_count(config: RunConfig, weights: str) -> dict[str, Any]:
    known = declared(type(config))
    counted = {
        key: Path(value).name if PATH in known[key].notes else value
        for key, value in settings(config).items()
        if FREE not in known[key].notes or (key == EVALUATES and _chooses(config))
    }
    for key in OWN:
        if ":" in str(counted[key]):
            counted[key] = f"{counted[key]} sha256:{source_sha256(counted[key]) or 'missing'}"
    if is_text(config.model):
        counted["model.name"] = name_in_identity(config.model.name)
    for key in PINNED:
        _, is_pinned, sha256 = str(settings(config)[key]).rpartition(PIN)  # wherever it lies now
        if is_pinned:
            counted[key] = f"sha256:{sha256}"
    return counted | {WEIGHTS: f"sha256:{weights}"} if weights else counted
