"""Parsers for settings whose text has a format. Their ValueErrors name the value, the rule and the fix.

Each function is also a rule in the `Annotated` of its setting (trainer.settings.tree). Called by rules.py, trainer.tasks.make and
trainer.tasks.multitask too.
"""

import math
import re
from collections.abc import Mapping

from dataio.config import module_and_function
from trainer.settings.words import did_you_mean

TASKS = ("auto", "classification", "multilabel", "multitask")


def workers_of(text: str) -> tuple[int, int] | None:
    """`workers` as (fewest, most); None for `auto`."""
    if text == "auto":
        return None
    numbers = [int(number) for number in text.split(":")] if re.fullmatch(r"\d+(:\d+)?", text) else []
    if not numbers or numbers[0] < 1:
        raise ValueError(f"workers={text} is not a number of workers; give a whole number from 1 up, a range such as 1:4, or auto")
    if numbers[-1] < numbers[0]:
        raise ValueError(f"workers={text} is an empty range: the fewest come first; give --workers {numbers[-1]}:{numbers[0]}")
    return numbers[0], numbers[-1]


def run_name(text: str) -> str:
    """`run`, which names a folder. An empty one gets an automatic name later."""
    if text and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text):
        raise ValueError(f"run={text!r} is not a folder's name; use letters, digits, '.', '_' and '-', a letter or digit first")
    return text


def task_of(text: str) -> str | tuple[str, str]:
    """`task.name`: one of TASKS, or (module, class) of a user's own task."""
    if text in TASKS:
        return text
    module, colon, name = text.partition(":")
    if not colon:
        raise ValueError(f"task.name={text!r};{did_you_mean(text, TASKS)} it must be one of {', '.join(TASKS)}, or module:Class")
    if not all(word.isidentifier() for word in (*module.split("."), name)):
        raise ValueError(f"task.name={text!r} names no class; write module:Class, such as my_package.my_task:MyTask")
    return module, name


def loss_of(text: str) -> tuple[str, str] | None:
    """`optim.loss` as (module, function); None for ""."""
    try:
        return module_and_function(text) if text else None
    except ValueError as error:
        raise ValueError(f"optim.loss={error}") from None


def model_of(text: str) -> str | tuple[str, str]:
    """`model.name`: a library's name, or (module, function) of a user's own. A colon in a folder's name would be taken for the latter."""
    if text.startswith("hf/") and ":" in text:
        raise ValueError(
            f"model.name={text}: a folder of a model with a colon in its name cannot be named; rename it, or make a link to it"
        )
    try:
        return module_and_function(text) if ":" in text else text
    except ValueError as error:
        raise ValueError(f"model.name={error}") from None


def loss_weights(text: str) -> dict[str, float]:
    """`task.weights` as the weight of each named head, in order."""
    weights: dict[str, float] = {}
    for part in text.split(",") if text else ():
        name, equals, number = (word.strip() for word in part.rpartition("="))
        if not equals or not name:
            raise ValueError(f"task.weights={text!r}: {part!r} is no NAME=WEIGHT; write them separated by commas, such as age=0.5,sex=1")
        try:
            weight = float(number)
        except ValueError:
            raise ValueError(f"task.weights={text!r}: {number!r} is no number; give {name} a weight above 0, such as {name}=1") from None
        if not 0 < weight < math.inf:
            raise ValueError(f"task.weights={text!r}: {name}={number} must be above 0 and finite; 1 is the default")
        if name in weights:
            raise ValueError(f"task.weights={text!r} names {name} twice; give each head one weight")
        weights[name] = weight
    return weights


def widths_of(text: str) -> dict[str, int]:
    """`model.widths` as the channels of each named layer, in order."""
    widths: dict[str, int] = {}
    for part in text.split(",") if text else ():
        name, equals, number = (word.strip() for word in part.rpartition("="))
        if not equals or not name or not re.fullmatch(r"[1-9][0-9]{0,8}", number):
            raise ValueError(
                f"model.widths: {part!r} is no LAYER=CHANNELS; write them separated by commas, such as layer1.0.conv1=32,layer1.0.conv2=48"
            )
        if name in widths:
            raise ValueError(f"model.widths names {name} twice; give each layer one width")
        widths[name] = int(number)
    return widths


def widths_text(widths: Mapping[str, int]) -> str:
    """`model.widths` for these channels; `widths_of` reads it."""
    return ",".join(f"{name}={width}" for name, width in widths.items())
