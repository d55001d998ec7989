"""The weights for the library that the network comes from, timm or torchvision (`--to safetensors`): its own names of tensors in one file,
which that library opens without this program. Called by trainer.formats.command.
"""

import json
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.export.elsewhere import library_of
from trainer.export.model_folder import Exported, outputs_of
from trainer.formats.graph import enlarged_by, graph_of, takes_of
from trainer.formats.made import INPUT, Made
from trainer.models.architecture import torchvision_options
from trainer.settings.tree import ModelConfig

WEIGHTS_FILE = "model.safetensors"


def make_weights(exported: Exported, config: ModelConfig) -> Made:
    """ValueError if the network is no library's."""
    if exported.texts is not None:
        raise ValueError(
            "--to safetensors gives weights to timm or torchvision, and this is a model of texts, whose weights lie in the run's model/ "
            "under the names of transformers; use --to onnx or --to torch"
        )
    library = library_of(config)
    if library is None:
        if ":" in config.name:
            what = "a network of your own"
        else:
            what = "a pruned one" if config.widths else f"one whose first layers (model.stem={config.stem}) are not theirs"
        raise ValueError(f"--to safetensors gives weights to timm or torchvision, and this is {what}; use --to onnx or --to torch")
    times = enlarged_by(exported)
    example = graph_of(exported, is_prepared_inside=False).example[INPUT]
    height, width = (side * times for side in example.shape[-2:])
    outputs = outputs_of(exported.task)
    bilinear = config.stem == "folded_bilinear"
    data = safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in exported.model.state_dict().items()},
        metadata={"format": "pt"},
    )
    network, code = _built(library, config, outputs=outputs, sees=(height, width))
    network.load_state_dict(safetensors.torch.load(data), strict=True)
    network.eval()

    def ask(images: Tensor) -> Tensor:
        given = exported.preprocess(images)
        if times > 1:
            given = F.interpolate(given, scale_factor=times, mode="bilinear" if bilinear else "nearest")
        answered: Tensor = network(given)
        return answered

    takes = takes_of(exported, example, is_prepared_inside=False)
    if times > 1:
        takes |= {
            "shape": [takes["shape"][0], 3, height, width],
            "enlarged": {"times": times, "by": "bilinear" if bilinear else "nearest", "when": "after all else"},
        }
    return Made(
        format="safetensors",
        files={WEIGHTS_FILE: data},
        main=WEIGHTS_FILE,
        takes=takes,
        ask=ask,
        code=code,
        about={"library": library, "architecture": config.name.removeprefix("timm/")},
    )


def _built(library: str, config: ModelConfig, *, outputs: int, sees: tuple[int, int]) -> tuple[nn.Module, tuple[str, ...]]:
    """The library's own network, with random weights, and the code that builds it and loads the file."""
    with torch.random.fork_rng(devices=[]):
        if library == "timm":
            import timm

            name = config.name.removeprefix("timm/")
            known = timm.get_pretrained_cfg(name)
            is_fixed = bool(known is not None and known.fixed_input_size and tuple(known.input_size[1:]) != sees)
            options: dict[str, Any] = {"img_size": sees} if is_fixed else {}
            network = timm.create_model(name, pretrained=False, num_classes=outputs, **options)
            build = f"timm.create_model({json.dumps(name)}, num_classes={outputs}{_written(options)}).eval()"
        else:
            import torchvision

            options = {key: False if key == "init_weights" else value for key, value in torchvision_options(config, sees).items()}
            network = torchvision.models.get_model(config.name, num_classes=outputs, **options)
            build = f"torchvision.models.get_model({json.dumps(config.name)}, num_classes={outputs}{_written(options)}).eval()"
    code = (
        f"import safetensors.torch, torch, {library}",
        "",
        f"model = {build}",
        f'model.load_state_dict(safetensors.torch.load_file("{WEIGHTS_FILE}"))',
        "with torch.inference_mode():",
        "    outputs = model(images)  # images: a tensor as described above",
    )
    return network, code


def _written(options: dict[str, Any]) -> str:
    return "".join(f", {name}={value!r}" for name, value in options.items())
