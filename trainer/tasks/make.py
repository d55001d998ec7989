"""Makes the task for a run's settings and data. Called in every rank (trainer.learn.build), in the model check (trainer.drive.check), in
the dry run, and when an exported model is loaded (trainer.export)."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from dataio.schema import Target
from trainer.settings.tree import TaskConfig
from trainer.settings.values import task_of
from trainer.tasks.classification import Classification
from trainer.tasks.multilabel import Multilabel
from trainer.tasks.multitask import Multitask
from trainer.tasks.task import Task
from trainer.tasks.text import TextClassification, TextMultilabel, TextMultitask

AUTO = "auto"
BUILT_IN: dict[str, Callable[..., Task]] = {"classification": Classification, "multilabel": Multilabel, "multitask": Multitask}
OF_TEXTS: dict[str, Callable[..., Task]] = {"classification": TextClassification, "multilabel": TextMultilabel, "multitask": TextMultitask}
_MEMBERS = sorted({*Task.__annotations__, *(name for name in vars(Task) if not name.startswith("_"))})


def make_task(config: TaskConfig, targets: Sequence[Target], *, label_smoothing: float = 0.0, holds_texts: bool = False) -> Task:
    """Make the task. `holds_texts`: the samples are texts, and not images. ValueError if it does not exist or does not fit the targets."""
    if not targets:
        raise ValueError("the data have no target, so there is nothing to learn; convert them with a label")
    name = name_for(targets) if config.name == AUTO else config.name
    asked = task_of(name)
    built_in = OF_TEXTS if holds_texts else BUILT_IN
    found = built_in[asked] if isinstance(asked, str) else _imported(*asked)
    try:
        task = found(config, tuple(targets), label_smoothing=label_smoothing)
    except TypeError as error:
        raise ValueError(f"task.name={name} is not made as a task is, NAME(config, targets, label_smoothing=0.0): {error}") from error
    missing = [member for member in _MEMBERS if not hasattr(task, member)]
    if missing:
        raise ValueError(
            f"task.name={name} is no task: it lacks {', '.join(missing)} (trainer.tasks.task says what each is); "
            "inherit from trainer.tasks.image.ImageTask, which has some of them"
        )
    return task


def name_for(targets: Sequence[Target]) -> str:
    """The task's name that `auto` stands for."""
    match [target.kind for target in targets]:
        case ["label"]:
            return "classification"
        case ["labels"]:
            return "multilabel"
        case _:
            return "multitask"


def _imported(module_name: str, class_name: str) -> Callable[..., Task]:
    """A user's own task class, called like a built-in one."""
    name = f"task.name={module_name}:{class_name}"
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"{name}: {module_name} cannot be imported ({error}); a module is named as in an import statement, from the folder in which "
            "the program is started or from what is installed"
        ) from error
    found: Any = getattr(module, class_name, None)
    if not callable(found):
        there = [key for key, value in vars(module).items() if isinstance(value, type) and value.__module__ == module.__name__]
        raise ValueError(f"{name}: {module_name} has no class {class_name}; its classes are {', '.join(there) or 'none'}")
    return found  # type: ignore[no-any-return]  # make_task checks that it makes a task
