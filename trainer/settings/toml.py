"""Converts TOML files to RunConfig and back: recipes, a user's files, the `config.toml` in a run's folder. Called by the command line and
by everybody who reads a run.

A file may set some settings; the others come from the `base` that it is merged over. This file checks types, trainer.settings.rules checks
values. A relative path (a setting marked PATH that begins with `./` or `../`) is relative to the TOML file and becomes absolute here, so a
saved `config.toml` means the same wherever it is loaded from.
"""

import dataclasses
import difflib
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import tomli_w

from dataio.config import AUTO, PATH
from dataio.foreign import MAX_SETTINGS_BYTES, read_regular
from trainer.settings.fields import Setting, declared, marked, replaced, settings
from trainer.settings.tree import RunConfig, Switch
from trainer.settings.words import did_you_mean

RECIPES_FOLDER = Path(__file__).parents[1] / "recipes"


def recipe_names() -> list[str]:
    """The shipped recipes."""
    return sorted(path.stem for path in RECIPES_FOLDER.glob("*.toml"))


def load(name: str, base: RunConfig) -> RunConfig:
    """`base` with the settings of a shipped recipe, or of a TOML file (a name that ends in `.toml` or contains a `/`)."""
    is_file = name.endswith(".toml") or "/" in name
    path = Path(name).expanduser() if is_file else RECIPES_FOLDER / f"{name}.toml"
    try:
        text = read_regular(path, MAX_SETTINGS_BYTES).decode()
    except OSError as error:
        known = recipe_names()
        if not is_file:
            raise ValueError(
                f"--config {name} is no recipe;{did_you_mean(name, known)} shipped: {', '.join(known)}; a file ends in .toml"
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
    except RecursionError:
        raise ValueError(f"{origin} is nested too deeply; settings are tables of values") from None
    loaded: RunConfig = _merged(base or RunConfig(), table, declared(RunConfig), origin=origin, prefix="")
    if folder is None:
        return loaded
    # Only paths that this text sets are relative to its folder; the base's are already absolute.
    return resolve_paths(loaded, folder, only=[key for key in marked(RunConfig, PATH) if _lookup(table, key) is not None])


def to_toml(config: RunConfig) -> str:
    """All settings as TOML text. `from_toml` returns an equal config."""
    return tomli_w.dumps(dataclasses.asdict(config))


def resolve_paths(config: RunConfig, folder: Path, only: Sequence[str]) -> RunConfig:
    """`config` with the paths of the settings `only` made absolute, relative to `folder`. It also expands `~/`, which neither TOML nor the
    shell does in --data.path=~/images."""
    flat = settings(config)
    for key in only:
        value = flat[key]
        if value in (".", "..") or value.startswith(("./", "../")):
            config = replaced(config, key, os.path.normpath(folder / value))
        elif value.startswith("~/"):
            config = replaced(config, key, str(Path(value).expanduser()))
    return config


def checked_value(value: Any, key: str, *, origin: str) -> Any:
    """A TOML value of the setting `key` as the setting's type. ValueError, which begins with `origin`, for one that it cannot be."""
    return _checked(value, declared(RunConfig)[key].type, origin=origin, key=key)


# --- merging a table into a config ------------------------------------------------------------------------------------------------------


def _merged(base: Any, table: Mapping[str, Any], known: Mapping[str, Setting], *, origin: str, prefix: str) -> Any:
    names = [field.name for field in dataclasses.fields(base)]
    changes: dict[str, Any] = {}
    for key, value in table.items():
        full = prefix + key
        if key not in names:
            raise ValueError(_unknown_key(full, names, origin=origin, prefix=prefix))
        if full in known:
            is_auto = AUTO in known[full].notes and value == "auto"
            changes[key] = -1 if is_auto else _checked(value, known[full].type, origin=origin, key=full)
        elif isinstance(value, Mapping):
            changes[key] = _merged(getattr(base, key), value, known, origin=origin, prefix=f"{full}.")
        else:
            raise ValueError(f"{origin}: {full} = {value!r}, but {full} is a table; write [{full}] and its keys below")
    return dataclasses.replace(base, **changes)


def _checked(value: Any, hint: Any, *, origin: str, key: str) -> Any:
    """A TOML value as the type `hint`. Integers become floats, and true and false become switches; nothing else is converted."""
    if get_origin(hint) is Literal:
        if hint == Switch and isinstance(value, bool):
            return "on" if value else "off"
        if not isinstance(value, str) or value not in get_args(hint):
            options = list(get_args(hint))
            raise ValueError(f"{origin}: {key} = {value!r};{did_you_mean(str(value), options)} it must be one of {', '.join(options)}")
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
    else:  # the most common mistake is the right key in the wrong table
        everywhere = [key for key in declared(RunConfig) if key.rsplit(".", 1)[-1] == leaf]
        guess = f" did you mean {everywhere[0]}?" if everywhere else ""
    where = f"[{prefix.rstrip('.')}]" if prefix else "the top level"
    return f"{origin}: unknown key {full};{guess} keys of {where}: {', '.join(keys)}"


def _lookup(table: Mapping[str, Any], key: str) -> Any:
    value: Any = table
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
