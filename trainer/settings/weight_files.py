"""Files that weights lie in: one, or several that an index names, as transformers saves a large model. Called by trainer.settings.identity
and trainer.models.text. Imports no torch.
"""

import hashlib
from pathlib import Path

from dataio.foreign import MAX_SETTINGS_BYTES, json_of, read_regular

INDEX_FILE = "model.safetensors.index.json"
_INDEX_ENDING = ".safetensors.index.json"


def is_index(weights: Path) -> bool:
    """Whether the file is no weights itself, but names those that are."""
    return weights.name.endswith(_INDEX_ENDING)


def files_of(weights: Path) -> tuple[Path, ...]:
    """The files that hold the weights, in order of their names: those of an index, which lie beside it, or the one that `weights` is.
    ValueError if an index cannot be read, or if a file that it names is not there."""
    if not is_index(weights):
        return (weights,)
    try:
        found = json_of(read_regular(weights, MAX_SETTINGS_BYTES))
        names = sorted(set(found["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{weights} cannot be read as an index of weights ({error}); save the model with transformers") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{weights} names {name!r:.60}; weights lie beside their index, in files that end in .safetensors")
        if not (weights.parent / name).is_file():
            raise ValueError(f"{weights} names {name}, which is not there; copy the whole folder of the model")
    if not names:
        raise ValueError(f"{weights} names no file of weights; save the model with transformers")
    return tuple(weights.parent / name for name in names)


def content_sha256(weights: Path) -> str:
    """SHA-256 of the file; of an index that of its own content and the hashes of the files that it names."""
    if not is_index(weights):
        return _sha256(weights)
    files = files_of(weights)
    said = [_sha256(weights), *(f"{file.name} {_sha256(file)}" for file in files)]
    return hashlib.sha256("\n".join(said).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
