"""The finished model as files that anybody can use: `model/` in the run's folder. Rank 0 writes it at a run's end (`export_model`, called
by trainer.rank.finishing). `trainer.predict`, `trainer.push` and trainer.rank.finished read it.

`config.json` is written last and holds the SHA-256 of `model.safetensors`, so a reader sees a whole model or knows that it does not. The
caller chooses the weights (final or averaged).
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from cluster.storage import Storage, join_uri
from cluster.text import address, json_line, shown
from dataio.config import PIN, Colour, Fit, unpinned
from dataio.schema import Target, fault_of_targets, is_single_label, single_label
from trainer.export.elsewhere import keys_for_timm, opened_elsewhere
from trainer.models.normalise import mean_and_std
from trainer.models.vision import Preprocess
from trainer.runs.folder import RunFolder
from trainer.runs.model_files import CONFIG_FILE, MODEL_FOLDER, WEIGHTS_FILE, described
from trainer.settings.tree import ModelConfig, RunConfig, TaskConfig
from trainer.settings.units import percent
from trainer.settings.values import widths_of
from trainer.tasks.calibration import Temperature, temperatures
from trainer.tasks.info import CLASSIFICATION
from trainer.tasks.make import AUTO, make_task, name_for
from trainer.tasks.novelty import Novelty, Thresholds
from trainer.tasks.task import Task

CARD_FILE = "README.md"
REMEMBERED_FILE = "remembered.safetensors"
"""Features of training images (trainer.tasks.novelty), if the model remembers any."""
_REMEMBERED = "features"


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """A run's model, loaded and ready to use."""

    task: Task
    """What the outputs mean."""
    model: nn.Module  # in eval mode
    preprocess: nn.Module  # (n, 3, H, W) uint8, with H and W from `image_size`, -> the model's input
    image_size: tuple[int, int]  # (height, width) of decoded images
    fit: Fit
    background: Colour
    max_image_pixels: int
    temperatures: Mapping[str, Temperature] = field(default_factory=dict)
    """By target; empty in exports of releases that calibrated nothing, or if nothing could be."""
    novelty: Novelty | None = None


def export_model(
    *,
    storage: Storage,
    run: str,
    tensors: Mapping[str, Tensor],
    config: RunConfig,
    task: Task,
    data_image_size: tuple[int, int],
    summary: Mapping[str, Any],
    enlarged: int = 1,
    calibration: Mapping[str, Any] | None = None,
    novelty: Novelty | None = None,
) -> None:
    """Write `<run>/model/`. `tensors` is a state_dict; `data_image_size` is (height, width) of decoded images. `enlarged`: the model's stem
    acts as if images were this many times as large (trainer.models.stem). `calibration`: the temperatures (trainer.tasks.calibration).
    `novelty`: what the model remembers of its training images.

    `weights_sha256` of `summary` goes into config.json. The model card shows the task's headline (e.g. test_accuracy), test_loss, steps and
    dataset_fingerprint of `summary` if they are given.
    """
    folder = f"{run}/{MODEL_FOLDER}"
    # Copy each tensor: safetensors accepts neither strided views (channels_last) nor two names for the same memory (tied weights).
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    weights = safetensors.torch.save(plain, metadata={"format": "pt"})
    remembered = safetensors.torch.save({_REMEMBERED: novelty.remembered.contiguous()}) if novelty is not None else None
    mean, std = mean_and_std(config)
    description = {
        "model": _model_description(config.model),
        **_task_description(config.task, task),
        "mean": list(mean),
        "std": list(std),
        "data_image_size": list(data_image_size),
        "fit": config.data.fit,
        **({"background": config.data.behind} if config.data.behind else {}),
        "max_image_pixels": config.data.max_image_pixels,
        **({"calibration": calibration} if calibration else {}),
        **({"novelty": _novelty_description(novelty, remembered)} if novelty is not None and remembered is not None else {}),
        "weights_sha256": summary.get("weights_sha256"),
        "file_sha256": hashlib.sha256(weights).hexdigest(),
        **keys_for_timm(
            config.model,
            sees=_seen(config, data_image_size, enlarged),
            outputs=outputs_of(task),
            names=output_names(task),
            mean=mean,
            std=std,
        ),
    }
    storage.write_atomic(f"{folder}/{WEIGHTS_FILE}", weights)
    card = model_card(
        run=run,
        config=config,
        task=task,
        data_image_size=data_image_size,
        summary=summary,
        enlarged=enlarged,
        calibration=calibration,
    )
    storage.write_atomic(f"{folder}/{CARD_FILE}", card.encode())
    if remembered is not None:
        storage.write_atomic(f"{folder}/{REMEMBERED_FILE}", remembered)
    storage.write_atomic(f"{folder}/{CONFIG_FILE}", (json.dumps(description, indent=1, ensure_ascii=False) + "\n").encode())


def load_export(folder: RunFolder, device: torch.device, *, channels_last: bool = True) -> Exported:
    """Load the model that `export_model` wrote into `folder`, a model folder. ValueError if there is none or it is damaged."""
    description = described(folder)
    height, width = description["data_image_size"]
    config = ModelConfig(**description["model"])
    # The run's weights replace all others, so nothing needs to be downloaded.
    blank = dataclasses.replace(config, weights="none")
    task = _task(folder, description)
    model = task.build(blank, seed=0, image_hw=(height, width))
    model.load_state_dict(safetensors.torch.load(verified_weights(folder, description)), strict=True)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    preprocess = Preprocess(
        mean=description["mean"],
        std=description["std"],
        image_size=config.image_size,
        interpolation=config.interpolation,
        channels_last=channels_last,
    )
    model = model.to(device).to(memory_format=layout).eval()
    task.bind(model)
    return Exported(
        task=task,
        model=model,
        preprocess=preprocess.to(device),
        image_size=(height, width),
        fit=description["fit"],
        background=description.get("background", ""),
        max_image_pixels=int(description["max_image_pixels"]),
        temperatures=_temperatures(folder, description),
        novelty=_novelty(folder, description),
    )


def _model_description(model: ModelConfig) -> dict[str, Any]:
    """The settings by which the model is built. Without later ones that are at their defaults: earlier releases know no such key."""
    defaults = ModelConfig()
    later = [key for key in ("widths", "pooling") if getattr(model, key) == getattr(defaults, key)]
    return {key: value for key, value in dataclasses.asdict(model).items() if key not in later}


def _novelty_description(novelty: Novelty, file: bytes) -> dict[str, Any]:
    return {**novelty.thresholds.to_json(), "file_sha256": hashlib.sha256(file).hexdigest()}


def _novelty(folder: RunFolder, description: Mapping[str, Any]) -> Novelty | None:
    file = verified_remembered(folder, description)
    if file is None:
        return None
    try:
        remembered = safetensors.torch.load(file)[_REMEMBERED]
        return Novelty(remembered=remembered, thresholds=Thresholds.from_json(description["novelty"]))
    except (KeyError, ValueError) as error:
        raise ValueError(f"{join_uri(folder.location, CONFIG_FILE)}: {error}; finish the run again to export it anew") from None


def verified_remembered(folder: RunFolder, description: Mapping[str, Any]) -> bytes | None:
    """The content of the file of remembered features, verified by its hash; None if the model remembers none."""
    novelty = description.get("novelty")
    if not novelty:
        return None
    where = join_uri(folder.location, REMEMBERED_FILE)
    data = folder.read(REMEMBERED_FILE)
    if data is None or not isinstance(novelty, Mapping) or hashlib.sha256(data).hexdigest() != novelty.get("file_sha256"):
        raise ValueError(
            f"{where} is {'missing' if data is None else 'damaged'}; copy the whole model folder, or finish the run again to export it anew"
        )
    return data


def _temperatures(folder: RunFolder, description: Mapping[str, Any]) -> dict[str, Temperature]:
    try:
        return temperatures(description.get("calibration"))
    except ValueError as error:
        raise ValueError(f"{join_uri(folder.location, CONFIG_FILE)}: {error}; finish the run again to export it anew") from None


def model_card(
    *,
    run: str,
    config: RunConfig,
    task: Task,
    data_image_size: tuple[int, int],
    summary: Mapping[str, Any],
    enlarged: int = 1,
    calibration: Mapping[str, Any] | None = None,
) -> str:
    """The model card as Markdown: what the model is, how good it is, how to use it."""
    return "\n".join(
        [
            f"# {run}",
            "",
            f"{_what_it_is(task)}, fine-tuned from `{config.model.name}`.",
            "",
            *(f"- **{name}:** {value}" for name, value in _facts(config, task, data_image_size, summary)),
            *(f"- **Confidence{of}:** {value}" for of, value in _confidence(calibration)),
            "",
            "## Use",
            "",
            "```sh",
            "finetune predict model IMAGE...      # model: this folder, or a run's; also: python -m trainer.predict",
            "```",
            "",
            *opened_elsewhere(
                config.model,
                sees=_seen(config, data_image_size, enlarged),
                outputs=outputs_of(task),
                enlarged=enlarged,
                weights_file=WEIGHTS_FILE,
            ),
            f"`{WEIGHTS_FILE}` is a state_dict (safetensors, no pickle). `{CONFIG_FILE}` says how to build the model and prepare an image;",
            "`trainer.models.vision.build_model` and `trainer.models.vision.Preprocess` take it from there.",
            "",
            *_outputs(task),
            "## Limits",
            "",
            *_limits(task),
            "The weights it started from carry their own licence and their own biases.",
            "",
        ]
    )


def _seen(config: RunConfig, data_image_size: tuple[int, int], enlarged: int) -> tuple[int, int]:
    """(height, width) of the images that the library's own network would be given."""
    side = config.model.image_size
    height, width = (side, side) if side else data_image_size
    return height * enlarged, width * enlarged


def outputs_of(task: Task) -> int:
    """Outputs of the network. A task of the user's own may have another number than its targets have."""
    by_targets = sum(1 if target.kind == "number" else len(target.classes) for target in task.targets)
    return int(getattr(task, "outputs", by_targets))


def output_names(task: Task) -> list[str] | None:
    """The classes in the order of the outputs, of a model of one target; None where an output is not a class."""
    classes = task.targets[0].classes if len(task.targets) == 1 else ()
    return list(classes) if classes and len(classes) == outputs_of(task) else None


def _facts(config: RunConfig, task: Task, data_image_size: tuple[int, int], summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    height, width = data_image_size
    headline = task.info.headline
    if (value := summary.get(headline.key)) is not None:
        loss = _optional(summary, "test_loss", ", loss {:.4f}")
        shown = percent(value, 2) if headline.unit == "ratio" else f"{value:.4g}"
        yield f"Test {headline.in_words}", f"{shown}{loss} ({task.info.unit} of the held-out split, none of them trained on)"
    yield "Backbone", f"`{config.model.name}`, stem `{config.model.stem}`, weights `{config.model.weights}`"
    seen = f", resized on the device to {config.model.image_size}x{config.model.image_size} ({config.model.interpolation})"
    if widths := widths_of(config.model.widths):
        yield "Pruned", f"{len(widths)} layers have fewer channels than the backbone's own (`model.widths` of `{CONFIG_FILE}`)"
    yield "Images", f"{width}x{height} RGB" + (seen if config.model.image_size else "")
    mean, std = mean_and_std(config)
    yield "Normalisation", f"mean {list(mean)}, std {list(std)}, of pixel values in [0, 1]"
    yield "Trained on", f"`{_last_part(config.data.path)}`" + _optional(summary, "dataset_fingerprint", " (fingerprint `{}`)")
    steps = _optional(summary, "steps", ", {} steps")
    yield "Training", f"{config.optim.name}, peak lr {config.optim.lr:g}, {config.train.precision}{steps}"
    if config.train.teacher:
        teacher = _last_part(config.train.teacher.partition(PIN)[0].removesuffix(f"/{MODEL_FOLDER}"))
        share = f"{config.train.teacher_weight:g} of the loss, temperature {config.train.teacher_temperature:g}"
        yield "Teacher", f"`{teacher}` ({share})"
    if config.data.unlabelled:
        yield "Images without labels", f"`{_last_part(unpinned(config.data.unlabelled)[0])}` ({config.train.semi})"
    yield "Averaged", f"exponential moving average of the weights, decay {config.train.ema:g}" if config.train.ema else "no"


def _confidence(calibration: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    heads = calibration["heads"] if calibration else {}
    for name, head in heads.items():
        yield (
            f" of `{_inline(name)}`" if len(heads) > 1 else "",
            f"divide the outputs by {head['temperature']:g}, as `predict` does; on average it is then {percent(head['calibrated_ece'], 1)} "
            f"from the share that comes true, {percent(head['ece'], 1)} without (expected calibration error)",
        )


def _what_it_is(task: Task) -> str:
    if task.info.name == CLASSIFICATION.name:
        count = len(task.targets[0].classes)
        return f"An image classifier of {count} class{'' if count == 1 else 'es'}"
    # The names come from the data. In a code span, with the closing character replaced, they stay plain text.
    named = [f"`{_inline(target.name)}` ({_KINDS[target.kind].format(len(target.classes))})" for target in task.targets]
    return f"A model of images (task `{_inline(task.info.name)}`) that says {', '.join(named)}"


def _outputs(task: Task) -> Iterator[str]:
    """The classes of each target."""
    is_only = len(task.targets) == 1
    for target in task.targets:
        if target.classes:
            what = "labels" if target.kind == "labels" else "classes"
            yield f"## {what.capitalize()}{'' if is_only else f' of `{_inline(target.name)}`'}, in the order of the outputs"
            # Names come from the data. As JSON in a code block, with the closing character escaped, they stay plain text.
            names = json_line(list(target.classes)).replace("`", "\\u0060")
            yield from ("", "```json", names, "```", "")


def _limits(task: Task) -> tuple[str, ...]:
    if task.info.name == CLASSIFICATION.name:
        return (
            "The model knows these classes only and names one of them for any image.",
            "The accuracy holds for images like those it was tested on.",
        )
    return (
        "The model knows nothing but these, and says something of any image.",
        "What was measured holds for images like those it was tested on.",
    )


def _task_description(config: TaskConfig, task: Task) -> dict[str, Any]:
    """The task's part of config.json. A classification of one label has the format from before there were other tasks."""
    if task.info.name == CLASSIFICATION.name and is_single_label(task.targets):
        return {"classes": list(task.targets[0].classes)}
    name = name_for(task.targets) if config.name == AUTO else config.name  # resolve `auto` now: its meaning may change later
    return {
        "task": dataclasses.asdict(dataclasses.replace(config, name=name)),
        "targets": [dataclasses.asdict(target) for target in task.targets],
    }


def _task(folder: RunFolder, description: Mapping[str, Any]) -> Task:
    if "task" not in description:
        return make_task(TaskConfig(), single_label(description["classes"]))
    try:
        targets = [Target(**{**target, "classes": tuple(target["classes"])}) for target in description["targets"]]
        config = TaskConfig(**description["task"])
        fault = fault_of_targets(targets)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{join_uri(folder.location, CONFIG_FILE)} describes no task that this version knows ({error}); "
            "use the version of the program that wrote it"
        ) from None
    if fault is not None:
        raise ValueError(f"{join_uri(folder.location, CONFIG_FILE)} is damaged ({fault}); finish the run again to export it anew")
    return make_task(config, targets)


_KINDS = {"label": "one of {} classes", "labels": "any of {} labels", "number": "a number"}


def _inline(text: str) -> str:
    """Text from the data, made safe for a code span."""
    return shown(text).replace("`", "'")


def _last_part(path: str) -> str:
    """A name for the data that does not reveal its full path."""
    return _inline(address(path).rstrip("/").rpartition("/")[2])


def _optional(summary: Mapping[str, Any], key: str, text: str) -> str:
    value = summary.get(key)
    return "" if value is None else text.format(value)


def verified_weights(folder: RunFolder, description: Mapping[str, Any]) -> bytes:
    """The content of a model folder's weights file, verified by its hash before anybody parses it."""
    where = join_uri(folder.location, WEIGHTS_FILE)
    data = folder.read(WEIGHTS_FILE)
    if data is None:
        raise ValueError(f"{where} is missing; finish the run again to export it anew")
    digest = hashlib.sha256(data).hexdigest()
    if digest != description["file_sha256"]:
        raise ValueError(
            f"{where} is damaged: its SHA-256 is {digest[:16]}..., {CONFIG_FILE} says {str(description['file_sha256'])[:16]}...; "
            "finish the run again to export it anew"
        )
    return data
