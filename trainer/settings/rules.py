"""Checks the settings' rules. The command line calls `validate`; the driver calls it again when it knows the workers, the data and the
steps.

A rule about one setting is in the `Annotated` of its field (trainer.settings.tree, dataio.config, cluster.config):

- `Ge`, `Gt`, `Le`, `Lt`, `Interval` of annotated_types: a number's range. It never includes infinity or NaN.
- `MinLen(1)`: neither empty nor only spaces.
- a text: the fix, shown when the range is broken.
- a function: reads the value, and raises ValueError if it breaks the rule.
- a `Mark` or a `Before`: not a rule, see dataio.config.
- a `Literal` as the type: the choices.

Rules about several settings are here.
"""

import math
import operator
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, GroupedMetadata, Gt, Le, Lt, MinLen

from dataio.config import Before, Mark
from trainer.settings.augmentation import augmentation_problems
from trainer.settings.fields import Setting, declared, settings
from trainer.settings.identity import names_file
from trainer.settings.texts import adapter_problems, is_text, text_problems
from trainer.settings.tree import RunConfig, TrainConfig
from trainer.settings.unlabelled import unlabelled_problems
from trainer.settings.values import workers_of
from trainer.settings.words import did_you_mean


def worker_count(config: RunConfig) -> int | None:
    """Number of workers asked for, M for a range `N:M`; None for `auto`."""
    asked = workers_of(config.workers)
    return asked and asked[1]


def validate(
    config: RunConfig, *, workers: int | None = None, shape: tuple[int, ...] | None = None, total_steps: int | None = None
) -> None:
    """Raise a ValueError that lists every broken rule: the value, the rule, the fix.

    The command line knows only the config. Call it again once the number of workers, the data's shape ((height, width) of images, (tokens,)
    of texts) and the run's steps are known.
    """
    problems = list(_problems(config, workers=workers, shape=shape, total_steps=total_steps))
    if problems:
        raise ValueError(problems[0] if len(problems) == 1 else "\n  ".join([f"{len(problems)} settings are wrong:", *problems]))


def _problems(config: RunConfig, *, workers: int | None, shape: tuple[int, ...] | None, total_steps: int | None) -> Iterator[str]:
    values = settings(config)
    for key, setting in declared(type(config)).items():
        if problem := field_problem(setting, values[key]):
            yield problem
    data, model, optim, train = config.data, config.model, config.optim, config.train

    if workers is None:
        with suppress(ValueError):  # already reported as a broken rule of its field
            workers = worker_count(config)
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

    yield from augmentation_problems(config, batch_per_virtual_rank=data.batch_size // virtual_ranks if virtual_ranks > 0 else None)
    side = min(shape) if shape else data.image_size
    if side > 0 and data.padding >= side and not is_text(model):
        yield f"data.pad={data.pad} is not below the images' side of {side} pixels: a crop could miss the image; use at most {side // 2}"
    # A run cut short by max_steps is a trial and may end during the warm-up.
    steps = 0 if train.max_steps else total_steps or 0
    if steps > 0 and optim.warmup_steps >= steps and optim.warmup_fraction <= 0:
        fix = f"use at most {steps - 1}, or train longer" if steps > 1 else "use 0"
        yield f"optim.warmup_steps={optim.warmup_steps} does not end before the run's {steps} steps do; {fix}"
    if optim.nesterov and optim.name != "sgd":
        yield f"optim.nesterov=true belongs to SGD, but optim.name={optim.name}; use --optim.no-nesterov or --optim.name sgd"
    elif optim.nesterov and optim.momentum == 0:
        yield "optim.nesterov=true needs momentum, but optim.momentum=0; use --optim.momentum 0.9 or --optim.no-nesterov"
    if train.cuda_graphs == "on" and train.reduction == "ddp" and workers and workers > 1:
        yield (
            f"train.cuda_graphs=on and train.reduction=ddp with {workers} workers: DDP exchanges gradients inside the pass, which is not "
            "recorded; use --train.reduction tree or --train.no-cuda-graphs"
        )
    if train.cuda_graphs == "on" and train.accumulate > 1:
        yield (
            f"train.cuda_graphs=on and train.accumulate={train.accumulate}: a graph's next replay overwrites the gradients that "
            "are to be added up; use --train.accumulate 1 or --train.no-cuda-graphs"
        )
    if ":" in model.name and model.weights != "none" and not names_file(model.weights):
        yield (
            f"model.weights={model.weights} belongs to a library's model, but model.name={model.name} is your own; use --model.weights "
            "none, which keeps what your function returns, or a file"
        )
    if model.widths and model.weights != "none" and not names_file(model.weights):
        yield (
            f"model.weights={model.weights} are of a model whose layers have all their channels, and model.widths gives some fewer; give "
            "the weights that finetune prune wrote, or --model.weights none, or leave model.widths out"
        )
    if optim.loss and optim.label_smoothing:
        yield (
            f"optim.label_smoothing={optim.label_smoothing:g} belongs to the cross-entropy that optim.loss={optim.loss} replaces; "
            "use --optim.label-smoothing 0"
        )
    yield from _balance_problems(config)
    for name in ("teacher_weight", "teacher_temperature"):
        if not train.teacher and getattr(train, name) != getattr(TrainConfig(), name):
            yield f"train.{name} is set, but there is no teacher; give the run that teaches (--train.teacher RUN), or leave it out"
    yield from unlabelled_problems(config)
    yield from text_problems(config)
    yield from adapter_problems(config)
    if model.freeze == "lp-ft" and model.lp_epochs >= train.epochs:
        yield (
            f"model.lp_epochs={model.lp_epochs} leaves nothing of train.epochs={train.epochs} to train the whole model in; "
            "use more epochs, or --model.freeze backbone to train the head alone"
        )


def _balance_problems(config: RunConfig) -> Iterator[str]:
    data, own = config.data, config.optim.loss
    if data.class_weights and data.balance != "none":
        yield (
            f"data.class_weights={data.class_weights} says itself how classes count, and data.balance={data.balance} too; give one of them"
        )
    elif own and (data.class_weights or data.balance != "none"):
        name = f"data.class_weights={data.class_weights}" if data.class_weights else f"data.balance={data.balance}"
        yield f"{name} belongs to the cross-entropy that optim.loss={own} replaces; leave it out, and weigh the classes in your loss"


def _batch_problems(batch_size: int, virtual_ranks: int, name: str) -> Iterator[str]:
    if batch_size % virtual_ranks:
        below, above = batch_size // virtual_ranks * virtual_ranks, (batch_size // virtual_ranks + 1) * virtual_ranks
        use = f"{below} or {above}" if below else f"{above}"
        yield f"data.batch_size={batch_size} is not a multiple of {name}={virtual_ranks}; use {use}"


def field_problem(setting: Setting, value: Any) -> str | None:
    """The rule of its field that a setting's value breaks, as text: the value, the rule, the fix. None if it breaks none."""
    key = setting.key
    if get_origin(setting.type) is Literal and value not in (options := get_args(setting.type)):
        return f"{key}={value!r};{did_you_mean(str(value), options)} it must be one of {', '.join(options)}"
    bounds: list[_Bound] = []
    fix = ""
    for note in setting.notes:
        match note:
            case Ge() | Gt() | Le() | Lt():
                bounds.append(_bound(note))
            case GroupedMetadata():
                bounds += map(_bound, note)
            case MinLen(min_length=1):
                if not value.strip():
                    return f"{key} is empty; give a value, or leave the setting out to get the default"
            case str():
                fix = f"; {note}"
            case Mark() | Before():
                pass
            case _:
                assert callable(note), f"{key}: {note!r} is no rule"
                try:
                    note(value)
                except ValueError as error:
                    return str(error)
    if bounds:
        for number in value if isinstance(value, tuple) else (value,):
            if not ((isinstance(number, int) or math.isfinite(number)) and all(holds(number, limit) for holds, _, limit in bounds)):
                return f"{key}={_number(number)} must be {' and '.join(f'{words} {_number(limit)}' for _, words, limit in bounds)}{fix}"
    return None


_Bound = tuple[Callable[[Any, Any], bool], str, float]


def _bound(note: object) -> _Bound:
    """One end of a range: its comparison in code, in words, and its limit."""
    match note:
        case Ge(ge=limit):
            return operator.ge, "at least", limit  # type: ignore[return-value]
        case Gt(gt=limit):
            return operator.gt, "above", limit  # type: ignore[return-value]
        case Le(le=limit):
            return operator.le, "at most", limit  # type: ignore[return-value]
        case Lt(lt=limit):
            return operator.lt, "below", limit  # type: ignore[return-value]
    raise AssertionError(f"{note!r} is no end of a range")


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
