"""Maps a data set's targets to those that a model was trained on: the names must agree, the order may differ. trainer.rank.finished calls
it, because `trainer.evaluate` takes data that the model was not trained on.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dataio.batch import Targets
from dataio.schema import Target

_SHOWN = 8


def match_targets(learned: Sequence[Target], given: Sequence[Target], *, where: str, device: torch.device) -> Callable[[Targets], Targets]:
    """A function that converts the targets of `where`'s batches to the model's. It drops targets that the model did not learn. ValueError
    if a target is missing or the classes are not the same."""
    columns = {}
    for target in learned:
        found = _counterpart(target, learned, given, where)
        of = where if len(learned) == 1 else f"{where}, target {target.name},"
        mapping = class_mapping(target.classes, found.classes, where=of)
        columns[target.name] = (found.name, _relabelling(target, mapping, device))
    return lambda targets: {name: as_learned(targets[theirs]) for name, (theirs, as_learned) in columns.items()}


def class_mapping(model: Sequence[str], data: Sequence[str], *, where: str) -> list[int]:
    """For each class of the data set, the index of the model's output with the same name. ValueError if the names are not the same."""
    unknown, missing = [name for name in data if name not in model], [name for name in model if name not in data]
    if unknown or missing:
        parts = [
            *([f"the model does not know {_some(unknown)}"] if unknown else []),
            *([f"the data set lacks {_some(missing)}"] if missing else []),
        ]
        raise ValueError(
            f"the classes of {where} are not the model's: {'; '.join(parts)}. The names must be the same: "
            "rename the folders or convert the data with `python -m dataio.convert --classes ...`, or give a data set of these classes"
        )
    places = {name: index for index, name in enumerate(model)}
    return [places[name] for name in data]


def _counterpart(target: Target, learned: Sequence[Target], given: Sequence[Target], where: str) -> Target:
    """The data set's target with the same name. If both have a single target, the name does not matter."""
    same = [other for other in given if other.name == target.name] or (list(given) if len(learned) == len(given) == 1 else [])
    if same and same[0].kind == target.kind:
        return same[0]
    there = ", ".join(f"{other.name} ({other.kind})" for other in given)
    raise ValueError(
        f"the model was trained on the target {target.name} ({target.kind}), and {where} has {there}; "
        "give a data set with a target of that name and kind"
    )


def _relabelling(target: Target, mapping: Sequence[int], device: torch.device) -> Callable[[Tensor], Tensor]:
    if list(mapping) == list(range(len(mapping))):
        return lambda values: values
    to_class = torch.tensor(mapping, device=device)
    if target.kind == "labels":
        order = to_class.argsort()
        return lambda values: values[:, order]
    return lambda labels: torch.where(labels < 0, labels, to_class[labels.clamp(min=0)])  # -1 (unknown) stays


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(repr(name) for name in names[:_SHOWN]) + more
