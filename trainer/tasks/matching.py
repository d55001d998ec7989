"""Maps a data set's targets to those that a model was trained on: the names must agree, the order may differ, and classes may be lacking.
trainer.rank.finished calls it, because `trainer.evaluate` takes data that the model was not trained on.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dataio.batch import Targets
from dataio.schema import Target

_SHOWN = 8


def match_targets(learned: Sequence[Target], given: Sequence[Target], *, where: str, device: torch.device) -> Callable[[Targets], Targets]:
    """A function that converts the targets of `where`'s batches to the model's. It drops targets that the model did not learn. ValueError
    if a target is missing or has classes that the model does not know."""
    columns = {}
    for target in learned:
        found = _counterpart(target, learned, given, where)
        of = where if len(learned) == 1 else f"{where}, target {target.name},"
        mapping = class_mapping(target.classes, found.classes, where=of)
        columns[target.name] = (found.name, _relabelling(target, mapping, device))
    return lambda targets: {name: as_learned(targets[theirs]) for name, (theirs, as_learned) in columns.items()}


def class_mapping(model: Sequence[str], data: Sequence[str], *, where: str) -> list[int]:
    """For each class of the data set, the index of the model's output with the same name. ValueError if the model does not know one."""
    places = {name: index for index, name in enumerate(model)}
    if unknown := [name for name in data if name not in places]:
        raise ValueError(
            f"the classes of {where} are not the model's: the model does not know {_some(unknown)}; it knows {_some(model)}. "
            "Names must be the same: rename the folders or convert the data with `python -m dataio.convert --classes ...`, "
            "or leave these images out"
        )
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
    if list(mapping) == list(range(len(target.classes))):
        return lambda values: values
    to_class = torch.tensor(mapping, device=device)
    if target.kind == "labels":

        def placed(values: Tensor) -> Tensor:  # (n, classes of the data) -> (n, classes of the model); the others are unknown
            known = torch.full((len(values), len(target.classes)), int(target.missing), dtype=values.dtype, device=values.device)
            known[:, to_class] = values
            return known

        return placed
    return lambda labels: torch.where(labels < 0, labels, to_class[labels.clamp(min=0)])  # -1 (unknown) stays


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(repr(name) for name in names[:_SHOWN]) + more
