"""Command line and TOML files -> RunConfig. Called by `trainer.run`; the small commands (`report`, `predict`) share its way to fail.

Settings are merged in this order, the later winning: the defaults of `trainer.settings.tree`, each `--config` in turn, the flags.
Nothing is
read from the environment, no model or data set is looked at: rules that need the number of workers, the data's image size or the number
of steps are checked by whoever learns these, by calling `validate` again with them.

A relative path in a TOML file (`data.path` or `model.weights` beginning with `./` or `../`) is relative to that file; the same in a flag
is relative to the working directory. Both become absolute here: a saved `config.toml` means the same wherever it is loaded from.
"""

import dataclasses
import difflib
import math
import os
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import tomli_w
import tyro

from trainer.settings.fields import settings as settings
from trainer.settings.tree import RunConfig

RECIPES_FOLDER = Path(__file__).parents[1] / "recipes"
PROG = "python -m trainer.run"

Action = Literal["run", "dry_run", "print_config"]

# Relative to the file that holds them; and ~ is expanded, which neither TOML does nor the shell in --data.path=~/images.
_PATH_KEYS = ("data.path", "model.weights")
_AUTO_KEYS = ("train.checkpoint_every",)  # the word `auto` is kept as -1, so that the setting is a number
_SWITCH_KEYS = ("train.channels_last",)  # on, off or auto; true and false as before, and as flags of their own


@dataclass(frozen=True, kw_only=True, slots=True)
class Invocation:
    """What one command line asks for."""

    config: RunConfig
    recipes: tuple[str, ...]
    """Names of the recipes and stems of the files given with `--config`, in order."""
    action: Action


@dataclass(frozen=True, kw_only=True)
class _CommandLine:
    """Fine-tune a pretrained image model. Without arguments: ResNet-18 with ImageNet weights on CIFAR-10, on all devices here."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    config: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A shipped recipe (article, quickstart, best) or a TOML file; later ones win, flags win over all."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Say what would run (steps, memory, cost), then stop."""
    print_config: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the resolved settings as TOML, then stop. The output can be given to --config."""


def parse(argv: Sequence[str], *, prog: str = PROG) -> Invocation:
    """The settings `argv` (without the program's name) asks for; a user's mistake ends the program with status 2 and a short message."""
    try:
        return _parse(argv, prog=prog)
    except ValueError as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    """End the program the way a wrong command line does: `message` on stderr, status 2, no traceback."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _parse(argv: Sequence[str], *, prog: str) -> Invocation:
    argv = _normalised(argv)
    if argv and not argv[0].startswith("-"):
        hint = f"did you mean --config {argv[0]}?" if argv[0] in recipe_names() or argv[0].endswith(".toml") else f"see {prog} --help"
        raise ValueError(f"{argv[0]}: settings are given as flags, such as --train.epochs 3; {hint}")
    names = _config_names(argv)
    config = RunConfig()
    for name in names:
        config = load(name, config)
    line = tyro.cli(_CommandLine, prog=prog, args=argv, default=_CommandLine(run=config))
    if line.dry_run and line.print_config:
        raise ValueError("--dry-run and --print-config are two different questions; give one of them")
    config = _resolve_paths(line.run, Path.cwd())
    validate(config)
    action: Action = "dry_run" if line.dry_run else "print_config" if line.print_config else "run"
    return Invocation(config=config, recipes=tuple(Path(name).stem for name in names), action=action)


def recipe_names() -> list[str]:
    """The shipped recipes."""
    return sorted(path.stem for path in RECIPES_FOLDER.glob("*.toml"))


def load(name: str, base: RunConfig) -> RunConfig:
    """`base` with the settings of a shipped recipe or of a TOML file (anything that ends in `.toml` or holds a `/`)."""
    is_file = name.endswith(".toml") or "/" in name
    path = Path(name).expanduser() if is_file else RECIPES_FOLDER / f"{name}.toml"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        known = recipe_names()
        if not is_file:
            raise ValueError(
                f"--config {name} is no recipe;{_did_you_mean(name, known)} shipped: {', '.join(known)}; a file ends in .toml"
            ) from None
        raise ValueError(
            f"--config {name} cannot be read ({error.strerror}); give a TOML file or one of the recipes {', '.join(known)}"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--config {name} is not UTF-8 text ({error.reason} at byte {error.start}); TOML files are UTF-8") from None
    return from_toml(text, base=base, origin=name, folder=path.absolute().parent)


def from_toml(text: str, *, base: RunConfig | None = None, origin: str = "TOML", folder: Path | None = None) -> RunConfig:
    """`base` (or the defaults) with the settings in `text`. `origin` names the text in errors; paths are relative to `folder`, if given."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{origin} is not valid TOML: {error}") from None
    loaded: RunConfig = _merged(base or RunConfig(), table, origin=origin, prefix="")
    if folder is None:
        return loaded
    # Only paths that this text sets are relative to it; the base's are already absolute.
    return _resolve_paths(loaded, folder, only=[key for key in _PATH_KEYS if _lookup(table, key) is not None])


def to_toml(config: RunConfig) -> str:
    """All settings as TOML text; `from_toml` gives back an equal config."""
    return tomli_w.dumps(dataclasses.asdict(config))


# --- merging a table into a config ------------------------------------------------------------------------------------------------------


def _merged(base: Any, table: Mapping[str, Any], *, origin: str, prefix: str) -> Any:
    hints = get_type_hints(type(base))
    changes: dict[str, Any] = {}
    for key, value in table.items():
        full = prefix + key
        if key not in hints:
            raise ValueError(_unknown_key(full, list(hints), origin=origin, prefix=prefix))
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise ValueError(f"{origin}: {full} = {value!r}, but {full} is a table; write [{full}] and its keys below")
            changes[key] = _merged(getattr(base, key), value, origin=origin, prefix=f"{full}.")
        else:
            changes[key] = _checked(value, hints[key], origin=origin, key=full)
    return dataclasses.replace(base, **changes)


def _checked(value: Any, hint: Any, *, origin: str, key: str) -> Any:
    """`value` of a TOML file as the type `hint`; an integer is a good float, nothing else is converted."""
    if key in _AUTO_KEYS and value == "auto":
        return -1
    if get_origin(hint) is Literal:
        if key in _SWITCH_KEYS and isinstance(value, bool):
            return "on" if value else "off"
        if not isinstance(value, str) or value not in get_args(hint):
            options = list(get_args(hint))
            raise ValueError(f"{origin}: {key} = {value!r};{_did_you_mean(str(value), options)} it must be one of {', '.join(options)}")
        return value
    if get_origin(hint) is tuple:
        items = get_args(hint)
        if not isinstance(value, list) or len(value) != len(items):
            raise ValueError(f"{origin}: {key} = {value!r}; it must be a list of {len(items)} numbers, such as [0.5, 0.5, 0.5]")
        return tuple(_checked(item, hint, origin=origin, key=key) for item, hint in zip(value, items, strict=True))
    rules = {
        bool: "true or false, without quotes",
        int: "a whole number, without quotes",
        float: "a number, without quotes",
        str: "text in quotes",
    }
    is_right = isinstance(value, bool) == (hint is bool) and isinstance(value, (int, float) if hint is float else hint)
    if not is_right:
        raise ValueError(f"{origin}: {key} = {value!r} is {_type_name(value)}; it must be {rules[hint]}")
    return float(value) if hint is float else value


def _type_name(value: Any) -> str:
    names = {bool: "a boolean", int: "a whole number", float: "a number with a fraction", str: "text", list: "a list", dict: "a table"}
    return names.get(type(value), f"a {type(value).__name__}")


def _unknown_key(full: str, keys: list[str], *, origin: str, prefix: str) -> str:
    leaf = full.removeprefix(prefix)
    close = difflib.get_close_matches(leaf.replace("-", "_"), keys, n=1)
    if close:
        guess = f" did you mean {prefix}{close[0]}?"
    else:  # the right key in the wrong table is the most common slip
        everywhere = [key for key in settings(RunConfig()) if key.rsplit(".", 1)[-1] == leaf]
        guess = f" did you mean {everywhere[0]}?" if everywhere else ""
    where = f"[{prefix.rstrip('.')}]" if prefix else "the top level"
    return f"{origin}: unknown key {full};{guess} keys of {where}: {', '.join(keys)}"


def _did_you_mean(word: str, options: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, options, n=1)
    return f" did you mean {close[0]}?" if close else ""


def _lookup(table: Mapping[str, Any], key: str) -> Any:
    value: Any = table
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _replaced(config: RunConfig, key: str, value: Any) -> RunConfig:
    head, _, rest = key.partition(".")
    changes: dict[str, Any] = {head: _replaced(getattr(config, head), rest, value) if rest else value}
    return dataclasses.replace(config, **changes)


def _resolve_paths(config: RunConfig, folder: Path, only: Sequence[str] = _PATH_KEYS) -> RunConfig:
    flat = settings(config)
    for key in only:
        value = flat[key]
        if value in (".", "..") or value.startswith(("./", "../")):
            config = _replaced(config, key, os.path.normpath(folder / value))
        elif value.startswith("~/"):
            config = _replaced(config, key, str(Path(value).expanduser()))
    return config


# --- the command line -------------------------------------------------------------------------------------------------------------------


def _config_names(argv: Sequence[str]) -> list[str]:
    """Values of `--config`; needed before tyro runs, as they are its defaults. tyro sees them too and reports a missing value."""
    names = []
    for position, word in enumerate(argv):
        if word == "--config" and position + 1 < len(argv) and not argv[position + 1].startswith("-"):
            names.append(argv[position + 1])
        elif word.startswith("--config="):
            names.append(word.removeprefix("--config="))
    return names


def _normalised(argv: Sequence[str]) -> list[str]:
    """`--data.flip false`, `--train.checkpoint-every auto` and `--profile`, which tyro would not take, in the words that it takes."""
    booleans = {key for key, value in settings(RunConfig()).items() if isinstance(value, bool)}
    words = list(
        _switches(
            "--train.profile" if word == "--profile" else word for word in _split_equals(argv, {*booleans, *_AUTO_KEYS, *_SWITCH_KEYS})
        )
    )
    for position in range(len(words) - 1, 0, -1):
        key, value = _key_of(words[position - 1]), words[position].lower()
        if key in booleans and value in ("true", "false"):
            table, _, leaf = key.rpartition(".")
            words[position - 1 : position + 1] = [f"--{table}.{'' if value == 'true' else 'no-'}{leaf.replace('_', '-')}"]
        elif key in _AUTO_KEYS and value == "auto":
            words[position] = "-1"
    return words


def _switches(words: Iterable[str]) -> Iterator[str]:
    """`--train.channels-last`, `--train.no-channels-last` and `--train.channels-last true` as `--train.channels-last on` or `off`."""
    awaited = ""
    for word in words:
        if awaited:
            value = {"true": "on", "false": "off"}.get(word.lower(), word)
            yield "on" if word.startswith("--") else value
            awaited = ""
            if not word.startswith("--"):
                continue
        key = _key_of(word)
        if key in _SWITCH_KEYS:
            awaited = key
            yield word
        elif key.replace(".no_", ".", 1) in _SWITCH_KEYS:
            yield from (word.replace(".no-", ".", 1).replace(".no_", ".", 1), "off")
        else:
            yield word
    if awaited:
        yield "on"


def _split_equals(argv: Sequence[str], keys: set[str]) -> Iterator[str]:
    for word in argv:
        flag, equals, value = word.partition("=")
        if equals and _key_of(flag) in keys:
            yield flag
            yield value
        else:
            yield word


def _key_of(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_") if flag.startswith("--") else ""


# --- rules ------------------------------------------------------------------------------------------------------------------------------


def worker_count(config: RunConfig) -> int | None:
    """Number of workers asked for, of a range `N:M` the larger; None for `auto`."""
    value = config.workers
    if value == "auto":
        return None
    numbers = [int(number) for number in value.split(":")] if re.fullmatch(r"\d+(:\d+)?", value) else []
    if not numbers or numbers[0] < 1:
        raise ValueError(f"workers={value} is not a number of workers; give a whole number from 1 up, a range such as 1:4, or auto")
    if numbers[-1] < numbers[0]:
        raise ValueError(f"workers={value} is an empty range: the fewest come first; give --workers {numbers[-1]}:{numbers[0]}")
    return numbers[-1]


def validate(
    config: RunConfig, *, workers: int | None = None, image_size: tuple[int, int] | None = None, total_steps: int | None = None
) -> None:
    """ValueError with every broken rule: the value, the rule, the fix.

    The command line knows only the config; call again with the number of workers, the data's (height, width) and the run's steps.
    """
    problems = list(_problems(config, workers=workers, image_size=image_size, total_steps=total_steps))
    if problems:
        raise ValueError(problems[0] if len(problems) == 1 else "\n  ".join([f"{len(problems)} settings are wrong:", *problems]))


def _problems(config: RunConfig, *, workers: int | None, image_size: tuple[int, int] | None, total_steps: int | None) -> Iterator[str]:
    yield from _field_problems(config)
    data, model, optim, train = config.data, config.model, config.optim, config.train

    try:
        workers = worker_count(config) if workers is None else workers
    except ValueError as error:
        yield str(error)
    if config.run and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.run):
        yield f"run={config.run!r} is not a folder's name; use letters, digits, '.', '_' and '-', a letter or digit first"

    virtual_ranks = train.virtual_ranks or workers or 0
    if data.batch_size > 0 and virtual_ranks > 0:
        name = "train.virtual_ranks" if train.virtual_ranks else "workers"
        yield from _batch_problems(data.batch_size, virtual_ranks, name)
        each = data.batch_size // virtual_ranks
        if data.batch_size % virtual_ranks == 0 and train.accumulate > 0 and each % train.accumulate:
            fits = max(parts for parts in range(1, train.accumulate) if each % parts == 0)
            yield (
                f"train.accumulate={train.accumulate} does not cut the {each} images of a virtual rank into equal micro-batches; "
                f"use {fits}, or another data.batch_size"
            )
    if workers and train.virtual_ranks > 0 and workers > train.virtual_ranks:
        yield (
            f"workers={workers} is more than train.virtual_ranks={train.virtual_ranks}, so some would have nothing to do; "
            f"use --workers {train.virtual_ranks} or fewer, or --train.virtual-ranks {workers} (which changes the results)"
        )

    side = min(image_size) if image_size else data.image_size
    if side > 0 and data.pad >= side:
        yield f"data.pad={data.pad} is not below the images' side of {side} pixels: a crop could miss the image; use at most {side // 2}"
    # A run cut short by max_steps is a trial: it may well end during the warm-up.
    steps = 0 if train.max_steps else total_steps or 0
    if steps > 0 and optim.warmup_steps >= steps:
        fix = f"use at most {steps - 1}, or train longer" if steps > 1 else "use 0"
        yield f"optim.warmup_steps={optim.warmup_steps} does not end before the run's {steps} steps do; {fix}"
    if optim.nesterov and optim.name != "sgd":
        yield f"optim.nesterov=true belongs to SGD, but optim.name={optim.name}; use --optim.no-nesterov or --optim.name sgd"
    elif optim.nesterov and optim.momentum == 0:
        yield "optim.nesterov=true needs momentum, but optim.momentum=0; use --optim.momentum 0.9 or --optim.no-nesterov"
    if train.cuda_graphs and not train.compile:
        yield "train.cuda_graphs=true replays a compiled step, but train.compile=false; add --train.compile or leave it out"
    if train.cuda_graphs and train.accumulate > 1:
        yield (
            f"train.cuda_graphs=true and train.accumulate={train.accumulate}: a graph's next replay overwrites the gradients that "
            "are to be added up; use --train.accumulate 1 or --train.no-cuda-graphs"
        )
    if model.freeze == "lp-ft" and model.lp_epochs >= train.epochs:
        yield (
            f"model.lp_epochs={model.lp_epochs} leaves nothing of train.epochs={train.epochs} to train the whole model in; "
            "use more epochs, or --model.freeze backbone to train the head alone"
        )


def _batch_problems(batch_size: int, virtual_ranks: int, name: str) -> Iterator[str]:
    if batch_size % virtual_ranks:
        below, above = batch_size // virtual_ranks * virtual_ranks, (batch_size // virtual_ranks + 1) * virtual_ranks
        use = f"{below} or {above}" if below else f"{above}"
        yield f"data.batch_size={batch_size} is not a multiple of {name}={virtual_ranks}; use {use}"


def _field_problems(config: RunConfig) -> Iterator[str]:
    flat = settings(config)
    for key, options in _choices(RunConfig).items():
        if flat[key] not in options:
            yield f"{key}={flat[key]!r};{_did_you_mean(str(flat[key]), options)} it must be one of {', '.join(options)}"
    for key, (low, high, fix) in _RANGES.items():
        for value in flat[key] if isinstance(flat[key], tuple) else (flat[key],):
            if not (math.isfinite(value) and low(value) and high(value)):
                yield f"{key}={_number(value)} must be {_rule(low, high)}{fix and '; ' + fix}"
                break
    for key in ("storage", "data.path", "data.root", "model.name", "model.weights", "cluster.metrics_host"):
        if not flat[key].strip():
            yield f"{key} is empty; give a value, or leave the setting out to get the default"


def _choices(cls: type, prefix: str = "") -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for name, hint in get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            found |= _choices(hint, f"{prefix}{name}.")
        elif get_origin(hint) is Literal:
            found[prefix + name] = get_args(hint)
    return found


@dataclass(frozen=True, slots=True)
class _Bound:
    """One end of a range; `limit` None is no end."""

    sign: Literal[">=", ">", "<=", "<", ""]
    limit: float | None = None

    def __call__(self, value: float) -> bool:
        match self.sign, self.limit:
            case ">=", float() | int() as limit:
                return value >= limit
            case ">", float() | int() as limit:
                return value > limit
            case "<=", float() | int() as limit:
                return value <= limit
            case "<", float() | int() as limit:
                return value < limit
        return True


def _rule(low: _Bound, high: _Bound) -> str:
    words = {">=": "at least", ">": "above", "<=": "at most", "<": "below"}
    return " and ".join(f"{words[bound.sign]} {_number(bound.limit)}" for bound in (low, high) if bound.limit is not None)


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


_ANY = _Bound("")
_FROM_0, _FROM_1, _ABOVE_0 = _Bound(">=", 0), _Bound(">=", 1), _Bound(">", 0)
_TO_1, _BELOW_1 = _Bound("<=", 1), _Bound("<", 1)

_RANGES: dict[str, tuple[_Bound, _Bound, str]] = {
    "data.batch_size": (_FROM_1, _ANY, "100 is the default"),
    "data.image_size": (_FROM_0, _ANY, "0 takes the size that all images share"),
    "data.pad": (_FROM_0, _ANY, "0 turns the random crop off"),
    "data.mean": (_FROM_0, _TO_1, "pixel values are scaled to [0, 1] before"),
    "data.std": (_ABOVE_0, _ANY, "the images are divided by it"),
    "data.shuffle_window": (_FROM_0, _ANY, "0 shuffles the whole data set"),
    "data.max_bad_fraction": (_FROM_0, _TO_1, "it is a fraction of the samples, 0.01 being one in a hundred"),
    "data.test_fraction": (_ABOVE_0, _BELOW_1, "it is a fraction of the samples, 0.1 being one in ten"),
    "data.max_image_pixels": (_FROM_1, _ANY, ""),
    "model.image_size": (_FROM_0, _ANY, "0 keeps the data's size"),
    "model.lp_epochs": (_FROM_1, _ANY, "--model.freeze none trains everything from the start"),
    "optim.lr": (_ABOVE_0, _ANY, "0.02 is the default"),
    "optim.momentum": (_FROM_0, _BELOW_1, "0.9 is usual"),
    "optim.weight_decay": (_FROM_0, _ANY, "0 turns it off"),
    "optim.warmup_steps": (_FROM_0, _ANY, "0 has no warm-up"),
    "optim.final_lr_fraction": (_FROM_0, _TO_1, "it is a fraction of optim.lr"),
    "optim.head_lr_factor": (_ABOVE_0, _ANY, "1 trains the head as fast as the rest"),
    "optim.label_smoothing": (_FROM_0, _BELOW_1, "0 turns it off, 0.1 is usual"),
    "optim.clip_norm": (_FROM_0, _ANY, "0 does not clip"),
    "task.threshold": (_ABOVE_0, _BELOW_1, "0.5 is the default"),
    "train.epochs": (_FROM_1, _ANY, ""),
    "train.max_steps": (_FROM_0, _ANY, "0 runs all epochs"),
    "train.seed": (_FROM_0, _Bound("<", 2**63), ""),
    "train.accumulate": (_FROM_1, _ANY, "1 does not cut the batch"),
    "train.virtual_ranks": (_FROM_0, _ANY, "0 takes --workers"),
    "train.checkpoint_every": (_Bound(">=", -1), _ANY, "0 takes one an epoch, auto (or -1) what measurements say"),
    "train.spike_factor": (_FROM_0, _ANY, "0 looks for NaN and infinity only, 10 is the default"),
    "train.verify_every": (_FROM_0, _ANY, "0 compares no weights, 100 is the default"),
    "train.eval_every_epochs": (_FROM_1, _ANY, ""),
    "train.ema": (_FROM_0, _BELOW_1, "0 turns it off, 0.999 is usual"),
    "cluster.gpus_per_worker": (_Bound(">=", -1), _ANY, "-1 takes one where there are GPUs"),
    "cluster.cpus_per_worker": (_FROM_0, _ANY, "0 shares the CPUs evenly"),
    "cluster.threads_per_worker": (_FROM_0, _ANY, "0 takes the CPUs of a worker"),
    "cluster.discovery_port": (_FROM_0, _Bound("<=", 65535), "0 takes a free port"),
    "cluster.keep_checkpoints": (_Bound(">=", 2), _ANY, "with one, a single damaged checkpoint would lose the run"),
    "cluster.heartbeat_seconds": (_ABOVE_0, _Bound("<=", 2.0), "1 is the default; who is silent for 5 s is taken for lost"),
    "cluster.object_store_limit_bytes": (_FROM_0, _ANY, ""),
    "cluster.hang_seconds": (_ABOVE_0, _ANY, "60 is the default"),
    "cluster.start_seconds": (_ABOVE_0, _ANY, "600 is the default"),
    "cluster.placement_seconds": (_ABOVE_0, _ANY, "300 is the default"),
    "cluster.grow_after_seconds": (_FROM_0, _ANY, "0 grows at once"),
    "cluster.storage_retry_seconds": (_FROM_0, _ANY, "0 tries once"),
    "cluster.stop_grace_seconds": (_FROM_0, _ANY, ""),
    "cluster.faults.max_failures": (_FROM_0, _ANY, "0 gives up at the first failure"),
    "cluster.faults.max_failures_without_progress": (_FROM_0, _ANY, ""),
    "cluster.faults.max_preemptions": (_FROM_0, _ANY, "0 gives up at the first one"),
    "cluster.faults.max_hangs": (_FROM_0, _ANY, "0 gives up at the first one"),
    "cluster.faults.max_rollbacks": (_FROM_0, _ANY, "0 gives up at the first NaN or spike"),
    "cluster.faults.straggler_ratio": (_Bound(">", 1), _ANY, "1 is as fast as the others, 1.5 is the default"),
    "cluster.faults.straggler_steps": (_FROM_1, _ANY, "20 is the default"),
    "cluster.mtbf_hours": (_ABOVE_0, _ANY, "24 is the default"),
    "cluster.faults.backoff_seconds": (_FROM_0, _ANY, ""),
}
