"""Pretrained weights for a model that is built: from its library, a Python package or a file. Called by trainer.models.vision.

Weights from a library or package are checked by hash, and no file is read in a way that runs code from a pickle. What is decided about a
file of weights (a prefix stripped, its head kept or left out) is logged to `trainer.models`, which trainer.drive.check shows to the user.
"""

import hashlib
import importlib.util
import logging
import os
import pickle
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torchvision.models
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

from dataio.foreign import MAX_SETTINGS_BYTES, json_of, read_regular
from trainer.models.architecture import one_line, timm_architecture
from trainer.settings.identity import names_file
from trainer.settings.packages import PACKAGES, problems_with_package
from trainer.settings.tree import ModelConfig

LOG = logging.getLogger("trainer.models")

_NESTED_UNDER = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights")
"""Where programs put a model's state_dict in their checkpoints."""


class WeightsError(ValueError):
    """Pretrained weights are not available or do not fit the model. The message says what to do."""

    failure_kind = "user"


def fitted_to(
    model: nn.Module, config: ModelConfig, seen: tuple[int, int], *, head: str, outputs: int, names: Sequence[str] | None
) -> dict[str, Tensor] | None:
    """The weights that `config.weights` names, under the tensor names of the unchanged `model`; None for `none`. Without those of the
    classifier `head` if they are not for the model's `outputs`, which have these `names`, where they are known."""
    state = _pretrained_state(config, model, seen)
    if state is None:
        return None
    if names_file(config.weights):
        state = without_prefix(state, list(model.state_dict()), source=config.weights)
        state = with_fitting_head(state, head, outputs=outputs, names=names, source=config.weights)
    return _fit_positions(model, state) if isinstance(model, VisionTransformer) else state


def without_prefix(state: Mapping[str, Tensor], own: Sequence[str], *, source: str) -> dict[str, Tensor]:
    """`state` under the model's `own` names. A file that was saved from something that held the model (DistributedDataParallel, a Lightning
    module, a detector) has a prefix before them, such as `module.` or `model.backbone.`: it is stripped, and what bears another one is left
    out. That is the prefix under which most names are found, at least half of the model's; of two copies of the model the first."""
    known = set(own)
    matched = Counter(prefix for key in state for prefix in _prefixes(key) if key.removeprefix(prefix) in known)
    prefix = max(matched, key=matched.__getitem__, default="")
    if matched[prefix] <= max(matched[""], len(own) / 2):
        return dict(state)
    others = [key for key in state if not key.startswith(prefix)]
    left_out = f"; left out, as not of the model: {_some(others)}" if others else ""
    LOG.info("model.weights=%s: its names begin with %s, which is stripped%s", source, prefix, left_out)
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _prefixes(key: str) -> Iterator[str]:
    """Each beginning of a name that a prefix may be: nothing, or up to a dot."""
    yield ""
    for dot in re.finditer(r"\.", key):
        yield key[: dot.end()]


def with_fitting_head(state: dict[str, Tensor], head: str, *, outputs: int, names: Sequence[str] | None, source: str) -> dict[str, Tensor]:
    """`state`, without the classifier's weights if they were trained for other classes. Says what becomes of them."""
    weight = state.get(f"{head}.weight")
    if weight is None:
        LOG.info("model.weights=%s has no %s: a new head of %d outputs is trained", source, head, outputs)
        return state
    if weight.shape[0] != outputs:
        LOG.info("model.weights=%s: its head has %d outputs, the data need %d: a new one is trained", source, weight.shape[0], outputs)
        return state
    before = output_names(Path(source).expanduser())
    if before is None or names is None:
        LOG.info("model.weights=%s: its head of %d outputs is kept, though nothing says for which classes it was", source, outputs)
        return state
    if before == tuple(names):
        LOG.info("model.weights=%s: its head is kept, as it was trained for the same classes", source)
        return state
    LOG.info("model.weights=%s: its head was trained for other classes (%s): a new one is trained", source, _some(before))
    return {key: value for key, value in state.items() if not key.startswith(f"{head}.")}


def output_names(weights: Path) -> tuple[str, ...] | None:
    """What the outputs of a model that a run exported stand for; None for any other file."""
    description = description_of(weights)
    if description is None:
        return None
    targets = description.get("targets") or [{"name": "label", "classes": description.get("classes", ())}]
    return tuple(name for target in targets for name in (target["classes"] or (target["name"],)))


def description_of(weights: Path) -> Mapping[str, Any] | None:
    """The config.json beside an exported model.safetensors (trainer.export), if it is of this very file."""
    try:
        description = json_of(read_regular(weights.with_name("config.json"), MAX_SETTINGS_BYTES))
    except (OSError, ValueError):
        return None
    is_its_own = isinstance(description, Mapping) and description.get("file_sha256") == _sha256(weights)
    return description if is_its_own else None


def _pretrained_state(config: ModelConfig, model: nn.Module, seen: tuple[int, int]) -> dict[str, Tensor] | None:
    """The weights that `config.weights` names, as they are; None for `none`."""
    source = config.weights
    if source == "none":
        return None
    if source == "imagenet":
        return _timm_state(config, seen) if config.name.startswith("timm/") else _torchvision_state(config)
    if source.startswith("package:"):
        return _package_state(config, model)
    path = Path(source).expanduser()
    if not path.is_file():
        raise WeightsError(f"model.weights={source}: no such file; weights are imagenet, none, package:efficientnet_lite0, or a file")
    return read_state(path, source=source)


def _offline_fix() -> str:
    return (
        "without network use a local file (--model.weights FILE, a state_dict or safetensors), random weights (--model.weights none), or "
        "weights that pip has brought: both --model.name timm/tf_efficientnet_lite0 and --model.weights package:efficientnet_lite0, as in "
        "--config quickstart"
    )


def _torchvision_state(config: ModelConfig) -> dict[str, Tensor]:
    weights = torchvision.models.get_model_weights(config.name).DEFAULT
    name = os.path.basename(weights.url)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / name
    try:
        state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True, map_location="cpu")
    except OSError as error:  # includes URLError: no network, no such host, a full disk
        raise WeightsError(
            f"model.weights=imagenet for {config.name} could not be downloaded from {weights.url} ({error}); {_offline_fix()}"
        ) from error
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:  # a download with a wrong hash, a damaged file
        raise WeightsError(
            f"model.weights=imagenet for {config.name} is damaged ({one_line(error)}); delete {cached} and run again"
        ) from error
    # torch checks a download's hash but not that of a file already cached. The hash is in the file's name.
    expected = re.search(r"-([0-9a-f]{8,})\.pth$", name)
    if expected and cached.is_file() and not _sha256(cached).startswith(expected[1]):
        raise WeightsError(
            f"model.weights=imagenet: {cached} does not have the sha256 its name promises ({expected[1]}...); delete it and run again"
        )
    # Densenet's weights are older than the rule against dots in module names (torchvision/models/densenet.py does the same).
    dotted = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.(?:weight|bias|running_mean|running_var))$")
    state = {dotted.sub(r"\1\2", key): value for key, value in state.items()}
    return {key: value for key, value in state.items() if not key.startswith(("aux1.", "aux2.", "AuxLogits."))}


def _timm_state(config: ModelConfig, seen: tuple[int, int]) -> dict[str, Tensor]:
    try:
        return dict(timm_architecture(config, seen, pretrained=True).state_dict())
    except Exception as error:  # the errors of the hub's client have no common class
        raise WeightsError(
            f"model.weights=imagenet for {config.name} could not be had from the Hugging Face hub ({one_line(error)}); {_offline_fix()}"
        ) from error


def _package_state(config: ModelConfig, model: nn.Module) -> dict[str, Tensor]:
    if problems := list(problems_with_package(config)):
        raise WeightsError("; ".join(problems))
    package = PACKAGES[config.weights.removeprefix("package:")]
    found = importlib.util.find_spec(package.module)
    assert found is not None
    assert found.submodule_search_locations
    path, sha256, fits = Path(found.submodule_search_locations[0]) / package.file, package.sha256, package.fits
    if not path.is_file() or _sha256(path) != sha256:
        raise WeightsError(
            f"model.weights={config.weights}: {path} is missing or not the known one (sha256 {sha256}); reinstall its package"
        )
    theirs, ours = read_state(path, source=config.weights), model.state_dict()
    # The package's names differ, but the order is the same: 296 tensors, all shapes agree, output difference 0.0.
    if [tensor.shape for tensor in theirs.values()] != [tensor.shape for tensor in ours.values()]:
        raise WeightsError(
            f"model.weights={config.weights} does not fit {fits} of this timm version tensor by tensor; pip install 'timm==1.0.31'"
        )
    return dict(zip(ours, theirs.values(), strict=True))


def read_state(path: Path, *, source: str) -> dict[str, Tensor]:
    """Read tensors by name from a safetensors file, or from a state_dict saved with torch.save, without unpickling any object."""
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"model.weights={source} holds more than tensors, and reading it could run code; save it by "
            "torch.save(model.state_dict(), FILE) where it came from"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise WeightsError(
            f"model.weights={source} cannot be read ({one_line(error)}); it must be safetensors or a state_dict saved with torch.save"
        ) from error
    state = _tensors_in(content)
    if state is None:
        raise WeightsError(
            f"model.weights={source} does not hold a state_dict (tensors by name); save one: torch.save(model.state_dict(), FILE)"
        )
    return state


def _tensors_in(content: object) -> dict[str, Tensor] | None:
    """The tensors by name in what was saved, which may be a checkpoint that holds them under one of the usual keys; None if there are
    none."""
    if not isinstance(content, Mapping):
        return None
    for key in _NESTED_UNDER:
        if isinstance(content.get(key), Mapping) and (found := _tensors_in(content[key])) is not None:
            return found
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        return None
    return {str(name): value for name, value in content.items()}


def _fit_positions(model: VisionTransformer, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` with a vision transformer's position embeddings interpolated to the size of the images it will see."""
    if "encoder.pos_embedding" not in state:
        return state
    fitted: dict[str, Tensor] = interpolate_embeddings(model.image_size, model.patch_size, dict(state))
    return fitted


def load_into(model: nn.Module, state: Mapping[str, Tensor], *, may_differ: Sequence[str], source: str) -> None:
    """Copy `state` into the model. A tensor in `may_differ` keeps its value if its shape differs or `state` lacks it."""
    own = model.state_dict()
    skip = {name for name in may_differ if name not in own or name not in state or own[name].shape != state[name].shape}
    if any(name in skip for name in may_differ[:2]):
        skip.update(may_differ[:2])  # a head's bias is useless without its weight
    counters = {name for name in own if name.endswith("num_batches_tracked")}  # absent from weights saved before PyTorch 0.4.1
    missing = [name for name in own if name not in state and name not in skip | counters]
    unexpected = [name for name in state if name not in own and name not in skip]
    reshaped = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and name not in skip and state[name].shape != own[name].shape
    ]
    if missing or unexpected or reshaped:
        problems = [
            f"{what}: {_some(names)}"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
            if names
        ]
        raise WeightsError(
            f"model.weights={source} does not fit the model; {'; '.join(problems)}. Give the model.name (and model.stem) it was saved from"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            if name in state and name not in skip:
                tensor.copy_(state[name])


def _some(names: Sequence[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
