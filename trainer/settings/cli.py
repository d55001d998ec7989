"""Parses the command line into a RunConfig. Called by `trainer.run` and benchmarks, and by `trainer.preview`, which has flags of its own
beside the settings; the other commands (predict, evaluate, report, runs) use its `fail`.

Settings are merged in this order, later ones winning: the defaults of `trainer.settings.tree`, each `--config` in turn, the flags. A first
word that is no flag is the data: DIR means `--data.path DIR`, with the recipe `dir_recipe` where no `--config` names another. This
file reads no environment variable and looks at no model or data set. Some rules need the number of workers, the data's image size or the
number of steps; whoever learns these calls `validate` again with them. A relative path in a flag is relative to the working directory and
becomes absolute here.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NoReturn, TypeVar, get_args

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from cluster.text import shown
from dataio.config import AUTO, PATH
from trainer.settings.fields import declared, marked, replaced, settings
from trainer.settings.photos import RECIPE
from trainer.settings.programs import program
from trainer.settings.rules import validate
from trainer.settings.say import complain
from trainer.settings.texts import PREFIX, refuse_texts
from trainer.settings.toml import load, recipe_names, resolve_paths
from trainer.settings.tree import RunConfig, Switch

DIR_RECIPE = RECIPE
"""The recipe for images that are given as DIR, without any `--config`."""
TEXT_RECIPE = "texts"
"""The recipe for texts that are given as DIR, without any `--config`."""

Action = Literal["run", "dry_run", "print_config"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Invocation:
    """The parsed command line."""

    config: RunConfig
    recipes: tuple[str, ...]
    """Names of the recipes, and stems of the files, given with `--config`, in order; that of DIR where it was taken."""
    takes_dir_recipe: bool = False
    """The user gave DIR and no `--config`."""
    action: Action
    from_recipes: frozenset[str] = frozenset()
    """The settings, by dotted name, that nobody but a shipped recipe has set."""
    given: frozenset[str] = frozenset()
    """The settings that flags have set, DIR included."""


@dataclass(frozen=True, kw_only=True)
class SettingsLine:
    """What every command line of a run's settings has."""

    takes_texts: ClassVar[bool] = False
    """The command works for models of texts, too."""

    run: Annotated[RunConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    config: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A shipped recipe (article, quickstart, best, photos, texts, text-quickstart) or a TOML file; later ones win, flags win over all."""


Line = TypeVar("Line", bound=SettingsLine)


@dataclass(frozen=True, kw_only=True)
class _CommandLine(SettingsLine):
    """Fine-tune a pretrained model of images or of texts.

    DIR, as the first word: your images, in a folder for each class (or any other source that --data.path takes); it then uses the recipe
    photos unless --config names another. Or your texts, with --model.name hf/FOLDER: then it uses the recipe texts. Without any argument:
    ResNet-18 with ImageNet weights on CIFAR-10, on all devices here.

    A flag such as --data.flip turns a true-or-false setting on, and --data.no-flip turns it off; --data.flip true and false work too.
    """

    takes_texts = True
    profile: tyro.conf.FlagCreatePairsOff[bool] = False
    """Short for --train.profile."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Say what would run (steps, memory, cost), then stop."""
    print_config: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the resolved settings as TOML, then stop. The output can be given to --config."""


def parse(argv: Sequence[str]) -> Invocation:
    """Parse `argv` (without the program's name). A user's mistake ends the program with status 2 and a short message."""
    try:
        return _parse(argv)
    except ValueError as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    """End the program as for a wrong command line: `message` on stderr, status 2, no traceback."""
    complain(f"error: {message}")
    raise SystemExit(2)


def parse_line(argv: Sequence[str], kind: type[Line], *, prog: str) -> tuple[Invocation, Line]:
    """Parse a command line that has a run's settings among its own flags (`kind`, which has defaults for all of them). The invocation's
    action is `run`. ValueError for settings that are wrong."""
    directory, argv = _directory(argv)
    names = _config_names(argv)
    if takes_dir_recipe := bool(directory) and not names:
        names = [dir_recipe(argv)]
    config, from_recipes = RunConfig(), frozenset[str]()
    for name in names:
        before, config = config, load(name, config)
        changed = {key for key, value in settings(config).items() if value != settings(before)[key]}
        from_recipes = from_recipes | changed if name in recipe_names() else from_recipes - changed
    if directory:
        config = replaced(config, "data.path", directory)
    line = tyro.cli(kind, prog=prog, args=list(_in_tyros_words(argv)), default=kind(run=config), registry=_REGISTRY)
    config = resolve_paths(line.run, Path.cwd(), only=marked(RunConfig, PATH))
    config = replaced(config, "model.weights", _weights_in(config.model.weights))
    if not kind.takes_texts:
        refuse_texts(config.model, prog)
    given = _given(argv) | ({"data.path"} if directory else set())
    invocation = Invocation(
        config=config,
        recipes=tuple(Path(name).stem for name in names),
        action="run",
        takes_dir_recipe=takes_dir_recipe,
        from_recipes=from_recipes - given,
        given=given,
    )
    return invocation, line


def dir_recipe(argv: Sequence[str]) -> str:
    """The recipe for data that are given as DIR: that of photographs, or of texts where a flag names a model of texts."""
    before = ""
    for word in argv:
        flag, _, value = word.partition("=")
        if (before == "model.name" and word.startswith(PREFIX)) or (_key_of(flag) == "model.name" and value.startswith(PREFIX)):
            return TEXT_RECIPE
        before = _key_of(word)
    return DIR_RECIPE


def check(config: RunConfig) -> None:
    """ValueError for settings that break a rule, or that no TOML file can hold."""
    _check_text(config)
    validate(config)


def _parse(argv: Sequence[str]) -> Invocation:
    invocation, line = parse_line(argv, _CommandLine, prog=program("run"))
    if line.dry_run and line.print_config:
        raise ValueError("--dry-run and --print-config are two different questions; give one of them")
    config = replaced(invocation.config, "train.profile", True) if line.profile else invocation.config
    check(config)
    action: Action = "dry_run" if line.dry_run else "print_config" if line.print_config else "run"
    return replace(invocation, config=config, action=action)


def _directory(argv: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The data that the first words name, "" if the command line begins with a flag; and the flags. ValueError if they name none, or
    two."""
    words = list(takewhile(lambda word: not word.startswith("-"), argv))
    if not words:
        return "", argv
    word = words[0]
    is_there = os.path.exists(os.path.expanduser(word))
    if not (is_there and not word.endswith(".toml")) and "://" not in word and word != RunConfig().data.path:
        is_recipe = word in recipe_names() or word.endswith(".toml")
        hint = f"did you mean --config {word}?" if is_recipe else "give the folder that holds your images, or the file of your texts."
        raise ValueError(f"{word}: there is no such folder or file; {hint} Settings are flags, such as --train.epochs 3")
    if len(words) > 1:
        raise ValueError(f"{' '.join(words)}: one folder or file holds the samples of a run; settings are flags, such as --train.epochs 3")
    if any(_key_of(flag.partition("=")[0]) == "data.path" for flag in argv):
        raise ValueError(f"{word} and --data.path both say where the samples are; give one of them")
    return (os.path.abspath(os.path.expanduser(word)) if is_there else word), argv[1:]


def _weights_in(weights: str) -> str:
    """The weights file of a run's folder, or of a model folder; any other `model.weights` as it is."""
    for inside in ("model/model.safetensors", "model.safetensors"):
        if (file := Path(weights).expanduser() / inside).is_file():
            return os.path.abspath(file)
    return weights


def _check_text(config: RunConfig) -> None:
    """ValueError for a setting that no TOML file can hold."""
    for key, value in settings(config).items():
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(
                f"{key}={shown(value)} is not UTF-8 text, as settings are; give a path of UTF-8 characters, such as a symbolic link"
            )


def _config_names(argv: Sequence[str]) -> list[str]:
    """Values of `--config`, needed before tyro runs because they are its defaults. tyro sees them too, and reports a missing value."""
    names = []
    for position, word in enumerate(argv):
        if word == "--config" and position + 1 < len(argv) and not argv[position + 1].startswith("-"):
            names.append(argv[position + 1])
        elif word.startswith("--config="):
            names.append(word.removeprefix("--config="))
    return names


def _in_tyros_words(argv: Sequence[str]) -> Iterator[str]:
    """Rewrite `--data.no-flip` as `--data.flip=false`, and `--train.checkpoint-every auto` with the number that `auto` stands for. tyro
    accepts the first only for flags without a value, and the second for no number."""
    known = declared(RunConfig)
    before = ""
    for word in argv:
        flag, equals, value = word.partition("=")
        key = _key_of(flag)
        positive = key.replace(".no_", ".", 1)
        if key not in known and positive in known and known[positive].type in (bool, Switch) and not equals:
            word = f"--{positive}=false"
        elif equals and value == "auto" and key in known and AUTO in known[key].notes:
            word = f"{flag}=-1"
        elif word == "auto" and before in known and AUTO in known[before].notes:
            word = "-1"
        before = key
        yield word


def _given(argv: Sequence[str]) -> frozenset[str]:
    """The settings that the flags name, by dotted name: `--data.no-flip` names data.flip."""
    known = declared(RunConfig)
    keys = (_key_of(word.partition("=")[0]) for word in argv)
    return frozenset(name for key in keys for name in (key, key.replace(".no_", ".", 1)) if name in known)


def _key_of(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_") if flag.startswith("--") else ""


# --- settings that may be written as a flag or as a word --------------------------------------------------------------------------------

_REGISTRY = ConstructorRegistry()


@_REGISTRY.primitive_rule
def _boolean(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Accept `--data.flip`, `--data.flip true` and `--data.flip=False`. `_in_tyros_words` handles `--data.no-flip`."""
    return _word({"true": True, "false": False}, shown=("true", "false")) if info.type is bool else None


@_REGISTRY.primitive_rule
def _switch(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Accept `--train.channels-last` and `--train.channels-last off`, and also true and false for on and off."""
    meanings = {"auto": "auto", "on": "on", "off": "off", "true": "on", "false": "off"}
    return _word(meanings, shown=get_args(Switch)) if get_args(info.type) == get_args(Switch) else None


def _word(meanings: dict[str, Any], *, shown: Sequence[str]) -> PrimitiveConstructorSpec[Any]:
    """A flag that one of the words in `meanings` may follow; alone it means `true`. Errors and help list only the words `shown`."""

    def read(words: list[str]) -> Any:
        if len(words) > 1:  # tyro passes all words up to the next flag
            raise ValueError(f"{' '.join(words)!r} is more than one word; settings are given as flags, such as --train.epochs 3")
        word = words[0].lower() if words else "true"
        if word not in meanings:
            raise ValueError(f"invalid choice {words[0]!r}; it must be one of {', '.join(shown)}")
        return meanings[word]

    return PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar=f"[{{{','.join(shown)}}}]",
        instance_from_str=read,
        is_instance=lambda value: value in meanings.values(),
        str_from_instance=lambda value: [next(word for word, meaning in meanings.items() if meaning == value)],
    )
