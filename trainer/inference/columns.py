"""The columns that a task's answers are stored in, for tables that other programs read."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from dataio.schema import Target
from trainer.tasks.heads import HeadTask
from trainer.tasks.multitask import Multitask
from trainer.tasks.task import Task

_RANKED = pa.list_(pa.struct([("class", pa.string()), ("probability", pa.float32())]))


def schema_of(task: Task, *, knows_novelty: bool, of_texts: bool = False) -> pa.Schema:
    """Columns of the answers: `row` and `key` of the sample; for each target its answer, and for classes the probability of that and the
    ranking; `unlike_training`, where the model can tell; of a text `cut`, whether its beginning was answered; `error`, why there is no
    answer. The answer of a task of your own is JSON."""
    fields = [pa.field("row", pa.int64(), nullable=False), pa.field("key", pa.string(), nullable=False)]
    for target in targets_of(task):
        fields += _fields(target)
    if not targets_of(task):
        fields.append(pa.field("answer", pa.string()))
    if knows_novelty:
        fields.append(pa.field("unlike_training", pa.bool_()))
    if of_texts:
        fields.append(pa.field("cut", pa.bool_()))
    return pa.schema([*fields, pa.field("error", pa.string())])


def columns_of(task: Task, answers: Sequence[Mapping[str, Any] | None]) -> dict[str, list[Any]]:
    """The columns of these answers; None for a sample without one."""
    targets = targets_of(task)
    if not targets:
        return {"answer": [None if answer is None else json.dumps(answer, sort_keys=True) for answer in answers]}
    columns: dict[str, list[Any]] = {}
    for target in targets:
        own = [answer if answer is None or "heads" not in answer else answer["heads"][target.name] for answer in answers]
        columns |= _columns(target, own)
    return columns


def targets_of(task: Task) -> tuple[Target, ...]:
    """The targets whose answers' form is known."""
    return task.targets if isinstance(task, HeadTask | Multitask) else ()


def _fields(target: Target) -> list[pa.Field]:
    name = target.name
    match target.kind:
        case "number":
            return [pa.field(name, pa.float64())]
        case "labels":
            return [pa.field(name, pa.list_(pa.string())), pa.field(f"{name}_probability", pa.list_(pa.float32()))]
        case _:
            return [pa.field(name, pa.string()), pa.field(f"{name}_probability", pa.float32()), pa.field(f"{name}_ranking", _RANKED)]


def _columns(target: Target, answers: Sequence[Mapping[str, Any] | None]) -> dict[str, list[Any]]:
    name = target.name
    match target.kind:
        case "number":
            return {name: [None if answer is None else answer["value"] for answer in answers]}
        case "labels":
            given = [None if answer is None else answer["labels"] for answer in answers]
            return {
                name: [None if labels is None else [each["class"] for each in labels] for labels in given],
                f"{name}_probability": [None if labels is None else [each["probability"] for each in labels] for labels in given],
            }
        case _:
            return {
                name: [None if answer is None else answer["predictions"][0]["class"] for answer in answers],
                f"{name}_probability": [None if answer is None else answer["predictions"][0]["probability"] for answer in answers],
                f"{name}_ranking": [None if answer is None else answer["predictions"] for answer in answers],
            }
