"""The finished model as files that anybody can use: `model/` in the run's folder. Rank 0 writes it at a run's end (`export_model`, called
by trainer.rank.finishing). `trainer.predict`, `trainer.push` and trainer.rank.finished read it.

`config.json` is written last and holds the SHA-256 of `model.safetensors`, so a reader sees a whole model or knows that it does not. The
caller chooses the weights (final or averaged).
"""

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from cluster.storage import Storage, join_uri
from cluster.text import address, json_line, shown
from dataio.codecs.text.form import tokenizer_bytes, tokenizer_file
from dataio.config import PIN, Colour, Fit, TooLong, unpinned
from dataio.manifest import TextInfo, image_hw
from dataio.schema import Target, fault_of_targets, is_single_label, single_label
from trainer.export.elsewhere import keys_for_timm, opened_elsewhere
from trainer.models.normalise import mean_and_std
from trainer.models.vision import Preprocess
from trainer.runs.folder import RunFolder
from trainer.runs.measures import one_of
from trainer.runs.model_files import CONFIG_FILE, MODEL_FOLDER, TOKENIZER_FILE, WEIGHTS_FILE, described, takes_texts
from trainer.settings.texts import ADAPTERS, PREFIX, check_libraries, description_of, is_text, model_place, pooling_of
from trainer.settings.tree import ModelConfig, RunConfig, TaskConfig
from trainer.settings.units import percent
from trainer.settings.values import widths_of
from trainer.tasks.calibration import Temperature, temperatures
from trainer.tasks.info import CLASSIFICATION
from trainer.tasks.make import AUTO, make_task, name_for
from trainer.tasks.novelty import Novelty, Thresholds
from trainer.tasks.task import Task
from trainer.tasks.text import UNIT as TEXTS

CARD_FILE = "README.md"
REMEMBERED_FILE = "remembered.safetensors"
"""Features of training images (trainer.tasks.novelty), if the model remembers any."""
_REMEMBERED = "features"


@dataclass(frozen=True, kw_only=True, slots=True)
class TextExport:
    """How a model of texts is given them."""

    architecture: Mapping[str, Any]
    """Its encoder's config.json."""
    tokenizer: bytes
    """The content of its tokenizer.json."""
    max_tokens: int
    too_long: TooLong

    @property
    def tokenizer_sha256(self) -> str:
        return hashlib.sha256(self.tokenizer).hexdigest()

    def described(self) -> dict[str, Any]:
        """As config.json says it, beside which the tokenizer lies."""
        return {
            "architecture": dict(self.architecture),
            "tokenizer_sha256": self.tokenizer_sha256,
            "max_tokens": self.max_tokens,
            "too_long": self.too_long,
        }


def text_export(config: RunConfig, texts: TextInfo | None) -> TextExport | None:
    """Of a run on texts, from its model's folder; None of one on images. ValueError if the folder is not what it was."""
    if texts is None:
        return None
    tokenizer = tokenizer_bytes(tokenizer_file(config.data.tokenizer))
    found = TextExport(
        architecture=description_of(model_place(config.model.name)),
        tokenizer=tokenizer,
        max_tokens=texts.max_tokens,
        too_long=texts.too_long,
    )
    if found.tokenizer_sha256 != texts.tokenizer_sha256:
        raise ValueError(f"data.tokenizer={config.data.tokenizer} is not the tokenizer any more that made the data's tokens; put it back")
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """A run's model, loaded and ready to use."""

    task: Task
    """What the outputs mean."""
    model: nn.Module  # in eval mode
    preprocess: nn.Module  # (n, 3, H, W) uint8, with H and W from `image_size`, or (n, T) int32 of texts -> the model's input
    image_size: tuple[int, int]  # (height, width) of decoded images; (0, 0) of texts
    fit: Fit
    background: Colour
    max_image_pixels: int
    temperatures: Mapping[str, Temperature] = field(default_factory=dict)
    """By target; empty in exports of releases that calibrated nothing, or if nothing could be."""
    novelty: Novelty | None = None
    texts: TextExport | None = None
    """How texts become tokens; None for a model of images."""


def export_model(
    *,
    storage: Storage,
    run: str,
    tensors: Mapping[str, Tensor],
    config: RunConfig,
    task: Task,
    data_image_size: tuple[int, ...],
    summary: Mapping[str, Any],
    enlarged: int = 1,
    calibration: Mapping[str, Any] | None = None,
    novelty: Novelty | None = None,
    texts: TextExport | None = None,
) -> None:
    """Write `<run>/model/`. `tensors` is a state_dict; `data_image_size` is (height, width) of decoded images, and (tokens,) of texts, of
    which `texts` says how they become that. `enlarged`: the model's stem
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
    description = {
        "model": _model_description(config.model),
        **_task_description(config.task, task),
        **({"texts": texts.described()} if texts is not None else _images_description(config, image_hw(data_image_size))),
        **({"calibration": calibration} if calibration else {}),
        **({"novelty": _novelty_description(novelty, remembered)} if novelty is not None and remembered is not None else {}),
        "weights_sha256": summary.get("weights_sha256"),
        "file_sha256": hashlib.sha256(weights).hexdigest(),
        **(_keys_for_timm(config, task, image_hw(data_image_size), enlarged) if texts is None else {}),
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
    if texts is not None:
        storage.write_atomic(f"{folder}/{TOKENIZER_FILE}", texts.tokenizer)
    storage.write_atomic(f"{folder}/{CONFIG_FILE}", (json.dumps(description, indent=1, ensure_ascii=False) + "\n").encode())


def load_export(folder: RunFolder, device: torch.device, *, channels_last: bool = True, may_be_of_texts: bool = False) -> Exported:
    """Load the model that `export_model` wrote into `folder`, a model folder. ValueError if there is none or it is damaged, or if it takes
    texts and the caller knows images alone."""
    description = described(folder)
    if takes_texts(description):
        if not may_be_of_texts:
            raise ValueError(
                f"{folder.location} is a model of texts, and this does not work for them yet; run, evaluate, predict, export and report do"
            )
        return _load_of_texts(folder, description, device)
    height, width = description["data_image_size"]
    config = ModelConfig(**description["model"])
    # The run's weights replace all others, so nothing needs to be downloaded.
    blank = dataclasses.replace(config, weights="none")
    task = _task(folder, description)
    model = task.build(blank, seed=0, shape=(height, width))
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


def _load_of_texts(folder: RunFolder, description: Mapping[str, Any], device: torch.device) -> Exported:
    check_libraries(folder.location)
    from trainer.models.text import Tokens  # here: it imports transformers

    said, tokenizer = description["texts"], verified_tokenizer(folder, description)
    try:
        texts = TextExport(
            architecture=said["architecture"], tokenizer=tokenizer, max_tokens=int(said["max_tokens"]), too_long=said["too_long"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{join_uri(folder.location, CONFIG_FILE)} is damaged ({error}); finish the run again to export it anew") from None
    task = _task(folder, description)
    with tempfile.TemporaryDirectory(prefix="finetune-model-") as place:  # as the architecture is looked for
        Path(place, CONFIG_FILE).write_text(json.dumps(texts.architecture))
        blank = dataclasses.replace(ModelConfig(**description["model"]), name=f"{PREFIX}{place}", weights="none")
        model = task.build(blank, seed=0, shape=(texts.max_tokens,))
    model.load_state_dict(safetensors.torch.load(verified_weights(folder, description)), strict=True)
    model = model.to(device).eval()
    task.bind(model)
    return Exported(
        task=task,
        model=model,
        preprocess=Tokens(),
        image_size=(0, 0),
        fit="refuse",
        background="",
        max_image_pixels=0,
        temperatures=_temperatures(folder, description),
        texts=texts,
    )


def _images_description(config: RunConfig, image_size: tuple[int, int]) -> dict[str, Any]:
    mean, std = mean_and_std(config)
    return {
        "mean": list(mean),
        "std": list(std),
        "data_image_size": list(image_size),
        "fit": config.data.fit,
        **({"background": config.data.behind} if config.data.behind else {}),
        "max_image_pixels": config.data.max_image_pixels,
    }


def _keys_for_timm(config: RunConfig, task: Task, image_size: tuple[int, int], enlarged: int) -> dict[str, Any]:
    mean, std = mean_and_std(config)
    return keys_for_timm(
        config.model,
        sees=_seen(config, image_size, enlarged),
        outputs=outputs_of(task),
        names=output_names(task),
        mean=mean,
        std=std,
    )


def _model_description(model: ModelConfig) -> dict[str, Any]:
    """The settings by which the model is built. Without later ones that are at their defaults: earlier releases know no such key."""
    defaults = ModelConfig()
    later = [key for key in ("widths", "pooling") if getattr(model, key) == getattr(defaults, key)]
    later += [key.removeprefix("model.") for key in ADAPTERS]  # they are merged into the weights
    settings = {key: value for key, value in dataclasses.asdict(model).items() if key not in later}
    if is_text(model):  # the folder that it began from is no matter, and its path nobody's
        settings |= {"name": f"{PREFIX}{Path(model.name).name}", "weights": Path(model.weights).name}
    return settings


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


def verified_tokenizer(folder: RunFolder, description: Mapping[str, Any]) -> bytes:
    """The content of the tokenizer's file of a model of texts, verified by its hash."""
    data, said = folder.read(TOKENIZER_FILE), description["texts"]
    if data is None or not isinstance(said, Mapping) or hashlib.sha256(data).hexdigest() != said.get("tokenizer_sha256"):
        what = "missing" if data is None else "damaged"
        raise ValueError(f"{join_uri(folder.location, TOKENIZER_FILE)} is {what}; copy the whole model folder, or finish the run again")
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
    data_image_size: tuple[int, ...],
    summary: Mapping[str, Any],
    enlarged: int = 1,
    calibration: Mapping[str, Any] | None = None,
) -> str:
    """The model card as Markdown: what the model is, how good it is, how to use it."""
    what = "TEXT" if is_text(config.model) else "IMAGE"
    return "\n".join(
        [
            f"# {run}",
            "",
            f"{_what_it_is(task)}, fine-tuned from `{_model_description(config.model)['name']}`.",
            "",
            *(f"- **{name}:** {value}" for name, value in _facts(config, task, data_image_size, summary)),
            *(f"- **Confidence{of}:** {value}" for of, value in _confidence(calibration)),
            "",
            "## Use",
            "",
            "```sh",
            f"finetune predict model {what}...      # model: this folder, or a run's; also: python -m trainer.predict",
            "```",
            "",
            *(_text_files() if is_text(config.model) else _image_files(config, task, image_hw(data_image_size), enlarged)),
            *_outputs(task),
            "## Limits",
            "",
            *_limits(task),
            "The weights it started from carry their own licence and their own biases.",
            "",
        ]
    )


def _image_files(config: RunConfig, task: Task, data_image_size: tuple[int, int], enlarged: int) -> list[str]:
    return [
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
    ]


def _text_files() -> list[str]:
    return [
        f"`{WEIGHTS_FILE}` is a state_dict (safetensors, no pickle): the encoder under `encoder.`, as transformers names its tensors,",
        f"and the linear layer `head`. `{CONFIG_FILE}` holds the encoder's own configuration (`texts.architecture`), `{TOKENIZER_FILE}`",
        "the tokenizer.",
        "`--model.name hf/FOLDER` trains on from here.",
        "",
    ]


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


def _facts(config: RunConfig, task: Task, data_image_size: tuple[int, ...], summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    headline = task.info.headline
    if (value := summary.get(headline.key)) is not None:
        loss = _optional(summary, "test_loss", ", loss {:.4f}")
        shown = percent(value, 2) if headline.unit == "ratio" else f"{value:.4g}"
        yield f"Test {headline.in_words}", f"{shown}{loss} ({task.info.unit} of the held-out split, none of them trained on)"
    if is_text(config.model):
        given = pooling_of(config.model, description_of(model_place(config.model.name)))
        yield "Encoder", f"`{_inline(Path(config.model.name).name)}`, of which the head is given the {given} of the tokens"
        if config.model.lora_rank:
            yield "Adapters", f"LoRA of rank {config.model.lora_rank}, merged into the weights"
        yield "Texts", f"{data_image_size[0]} tokens at most"
    else:
        yield from _facts_of_images(config, image_hw(data_image_size))
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


def _facts_of_images(config: RunConfig, data_image_size: tuple[int, int]) -> Iterator[tuple[str, str]]:
    height, width = data_image_size
    yield "Backbone", f"`{config.model.name}`, stem `{config.model.stem}`, weights `{config.model.weights}`"
    seen = f", resized on the device to {config.model.image_size}x{config.model.image_size} ({config.model.interpolation})"
    if widths := widths_of(config.model.widths):
        yield "Pruned", f"{len(widths)} layers have fewer channels than the backbone's own (`model.widths` of `{CONFIG_FILE}`)"
    yield "Images", f"{width}x{height} RGB" + (seen if config.model.image_size else "")
    mean, std = mean_and_std(config)
    yield "Normalisation", f"mean {list(mean)}, std {list(std)}, of pixel values in [0, 1]"


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
        what = "A text" if task.info.unit == TEXTS else "An image"
        return f"{what} classifier of {count} class{'' if count == 1 else 'es'}"
    # The names come from the data. In a code span, with the closing character replaced, they stay plain text.
    named = [f"`{_inline(target.name)}` ({_KINDS[target.kind].format(len(target.classes))})" for target in task.targets]
    return f"A model of {task.info.unit} (task `{_inline(task.info.name)}`) that says {', '.join(named)}"


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
    one = one_of(task.info.unit)
    if task.info.name == CLASSIFICATION.name:
        return (
            f"The model knows these classes only and names one of them for any {one}.",
            f"The accuracy holds for {task.info.unit} like those it was tested on.",
        )
    return (
        f"The model knows nothing but these, and says something of any {one}.",
        f"What was measured holds for {task.info.unit} like those it was tested on.",
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
        return make_task(TaskConfig(), single_label(description["classes"]), holds_texts=takes_texts(description))
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
    return make_task(config, targets, holds_texts=takes_texts(description))


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
