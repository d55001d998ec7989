"""What other libraries need to open an exported model, and how a person tells them to: keys of config.json that timm reads, and a section
of the model card. trainer.export.model_folder writes both.

A model opens there as long as its tensors are the library's own. The stems that replace the first convolution (trainer.models.stem) and
pruned models (trainer.models.narrow) are opened by this program alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from trainer.models.architecture import torchvision_options
from trainer.settings.tree import ModelConfig

Library = Literal["timm", "torchvision"]
_OWN_STEMS = ("article", "centre_crop", "phase_mean")


def library_of(config: ModelConfig) -> Library | None:
    """The library that opens the model by name and state_dict; None if only this program does."""
    if _why_not(config):
        return None
    return "timm" if config.name.startswith("timm/") else "torchvision"


def _why_not(config: ModelConfig) -> str:
    """Why no library opens the model by its name, as a sentence's end; "" if one does."""
    if ":" in config.name:
        return "its network is your own"
    if config.widths:
        return "its layers are narrower than the library's (`model.widths`)"
    return f"its first layers (stem `{config.stem}`) are not the library's" if config.stem in _OWN_STEMS else ""


def keys_for_timm(
    config: ModelConfig,
    *,
    sees: tuple[int, int],
    outputs: int,
    names: Sequence[str] | None,
    mean: Sequence[float],
    std: Sequence[float],
) -> dict[str, Any]:
    """The keys by which `timm.create_model("local-dir:FOLDER")` finds architecture, weights and preparation; none for a model of another
    library. `sees`: (height, width) of the images that the library's own network is to be given."""
    if library_of(config) != "timm":
        return {}
    import timm

    name = config.name.removeprefix("timm/")
    known = timm.get_pretrained_cfg(name)
    is_fixed = bool(known is not None and known.fixed_input_size)
    return {
        "architecture": name,
        "num_classes": outputs,
        **({"label_names": list(names)} if names is not None else {}),
        **({"model_args": {"img_size": list(sees)}} if is_fixed and tuple(known.input_size[1:]) != tuple(sees) else {}),
        "pretrained_cfg": {
            "input_size": [3, *sees],
            "fixed_input_size": is_fixed,
            "interpolation": config.interpolation,
            "crop_pct": 1.0,
            "mean": list(mean),
            "std": list(std),
            "num_classes": outputs,
            **({"first_conv": known.first_conv, "classifier": known.classifier} if known is not None else {}),
        },
    }


def opened_elsewhere(config: ModelConfig, *, sees: tuple[int, int], outputs: int, enlarged: int, weights_file: str) -> list[str]:
    """Lines of Markdown: how to open the model without this program. `enlarged`: the stem acts as if images were this many times as large,
    by repeating pixels (or interpolating them, for `folded_bilinear`)."""
    library = library_of(config)
    if library is None:
        return [f"Only this program opens it: {_why_not(config)}.", ""]
    if library == "timm":
        code = [
            "import timm",
            "",
            'model = timm.create_model("local-dir:model", pretrained=True).eval()  # model: this folder',
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
        ]
    else:
        options = "".join(f", {name}={value!r}" for name, value in _options(config, sees).items())
        code = [
            "import safetensors.torch, torchvision",
            "",
            f'model = torchvision.models.get_model("{config.name}", num_classes={outputs}{options}).eval()',
            f'model.load_state_dict(safetensors.torch.load_file("model/{weights_file}"))  # model: this folder',
        ]
    height, width = sees
    resizing = "bilinear" if config.stem == "folded_bilinear" else "nearest"
    enlarging = f" The images are first enlarged {enlarged} times (`{resizing}`), as its first layer does here." if enlarged > 1 else ""
    return [
        f"Without this program, by {library} (it takes images of {width}x{height}, normalised as above).{enlarging}",
        "",
        "```python",
        *code,
        "```",
        "",
    ]


def _options(config: ModelConfig, sees: tuple[int, int]) -> Mapping[str, Any]:
    """The constructor's arguments, as for a model whose weights are loaded afterwards."""
    options = torchvision_options(config, sees)
    return {name: False if name == "init_weights" else value for name, value in options.items()}
