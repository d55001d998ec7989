"""A finished run's model as its files, without loading it: where it is, and what its description says. Called by trainer.export, which
writes and loads models, by the commands that take one, and by the driver, which imports no torch.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from cluster.storage import join_uri
from dataio.config import PIN
from dataio.foreign import json_of
from trainer.runs.folder import RunFolder, find_run, located
from trainer.settings.tree import ModelConfig, RunConfig

MODEL_FOLDER = "model"
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
"""Of a model of texts."""
_IS = ("file_sha256", "model", "mean", "std", "data_image_size", "classes", "task", "targets", "texts")
"""What a model's answers depend on, of its description."""


def find_model(given: str, storage: str = RunConfig().storage) -> RunFolder:
    """The model folder that a person means: that of a run (its folder, or its name under `storage`), or a model folder itself, wherever it
    was copied to. ValueError if there is neither."""
    try:
        return model_of(find_run(given, storage))
    except ValueError:
        with suppress(ValueError):
            if is_model_folder(folder := located(given)):
                return folder
        raise


def model_of(run: RunFolder) -> RunFolder:
    """The model folder of a run."""
    return RunFolder(storage=run.storage, name=f"{run.name}/{MODEL_FOLDER}")


def is_model_folder(folder: RunFolder) -> bool:
    return {CONFIG_FILE, WEIGHTS_FILE} <= {entry.name for entry in folder.storage.list(folder.name)}


def described(folder: RunFolder) -> Mapping[str, Any]:
    """The content of a model folder's config.json."""
    data = folder.read(CONFIG_FILE)
    if data is None:
        run, _, name = folder.name.rpartition("/")
        raise ValueError(
            f"{join_uri(folder.storage.uri, run)} has no {name}/{CONFIG_FILE}: a run exports its model when it finishes; "
            "let it finish first"
        )
    try:
        description = json_of(data)
        outputs = ("task", "targets") if "task" in description else ("classes",)
        field = ("texts",) if "texts" in description else ("data_image_size", "mean", "std", "fit", "max_image_pixels")
        needed = (*outputs, "model", *field, "file_sha256")
        missing = [key for key in needed if key not in description]
        unknown = set(description.get("model", ())) - {each.name for each in dataclasses.fields(ModelConfig)}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{join_uri(folder.location, CONFIG_FILE)} is damaged ({error}); finish the run again to export it anew") from None
    if missing or unknown:
        what = f"lacks {', '.join(missing)}" if missing else f"has settings that this version does not know: {', '.join(sorted(unknown))}"
        raise ValueError(f"{join_uri(folder.location, CONFIG_FILE)} {what}; use the version of the program that wrote it")
    return dict(description)


def takes_texts(description: Mapping[str, Any]) -> bool:
    """Whether the model that is described so takes texts, and not images."""
    return "texts" in description


def pinned(given: str, storage: str) -> str:
    """`given` (as for `find_model`) as the location of the model folder with the hash of what lies there, so that whoever reads it later
    can tell whether it is still the same model. What has a hash already is returned as it is. ValueError if there is no model."""
    if PIN in given:
        return given
    folder = find_model(given, storage)
    return f"{folder.location}{PIN}{model_sha256(described(folder))}"


def pinned_model(pinned: str) -> RunFolder:
    """The model folder that `pinned` found. ValueError if it is gone or holds another model."""
    location, _, sha256 = pinned.rpartition(PIN)
    folder = located(location)
    if not is_model_folder(folder):
        raise ValueError(f"{location}: there is no model any more; put the same one back, or start another run without it")
    if (found := model_sha256(described(folder))) != sha256:
        raise ValueError(f"{location} holds another model ({found[:12]}) than before ({sha256[:12]}); put the same one back")
    return folder


def model_sha256(description: Mapping[str, Any]) -> str:
    """SHA-256 of what the model's answers depend on. What a later release adds to the description does not count."""
    what = {key: description[key] for key in _IS if key in description}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
