"""Builds the run's model once before the driver starts anything for it. Called by trainer/drive/start.py; stages.py makes the Question.

This finds a wrong task, model name or weights in seconds, puts downloaded weights into the library's cache before the ranks want them, and
tells the driver the run's task. start.py begins the check as soon as it knows the settings. The check runs in a process forked from the
zygote, so that the driver never imports torch.
"""

import logging
import socket
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Literal

from cluster.zygote import Zygote
from dataio.manifest import image_hw
from dataio.schema import Target
from trainer.settings.texts import is_text
from trainer.settings.tree import ModelConfig, TaskConfig
from trainer.tasks.info import TaskInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """The model to build."""

    task: TaskConfig
    targets: tuple[Target, ...]
    label_smoothing: float
    model: ModelConfig
    shape: tuple[int, ...]
    """(height, width) of the images, (tokens,) of the longest text."""
    seed: int
    loss: str = ""
    """`optim.loss`"""
    augment: str = ""
    """`data.augment`"""
    layer_decay: float = 1.0
    """`optim.layer_decay`"""
    teacher: str = ""
    """`train.teacher`, with the hash of the model there"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """Facts about the model that was built."""

    has_depthwise: bool
    """The model has depthwise convolutions. On a CPU this decides what train.precision=auto becomes."""
    task: TaskInfo
    weights_bytes: int
    """Of its parameters and buffers: a checkpoint holds them, some of them more than once."""
    resting_bytes: int = 0
    """Of its parameters that are never trained, because adapters are: the optimiser keeps nothing for them."""
    notes: tuple[str, ...] = ()
    """What was decided about its weights, for the user."""
    norm_momentum: float = 0.0
    """The smallest momentum of its BatchNorms, if all of the model begins at random; 0: it does not, or has none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """Why nothing was built. `message` is the text of a ValueError or OSError, or a bug's traceback."""

    kind: Literal["value", "os", "bug"]
    message: str

    def error(self) -> Exception:
        return {"value": ValueError, "os": OSError, "bug": RuntimeError}[self.kind](self.message)


class ModelCheckDied(OSError):
    """The process that checks the model ended without an answer. Like a rank's death it says nothing against the model."""

    failure_kind = "infrastructure"


class ModelCheck:
    """A check in progress."""

    def __init__(self, zygote: Zygote, question: Question) -> None:
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        with theirs:
            self._forked = zygote.fork("trainer.drive.check:answer", [theirs.fileno()])
        self._connection.send(question)

    def wait(self) -> Checked:
        """Wait for the result. Raises the ValueError or OSError that says why the model cannot be built."""
        found = self.answer()
        if isinstance(found, Refused):
            raise found.error()
        return found

    def answer(self) -> Checked | Refused:
        """Wait for the result, whichever it is."""
        try:
            found: Checked | Refused = self._connection.recv()
        except (EOFError, OSError):
            status = self._forked.wait(10.0)
            raise ModelCheckDied(
                f"the process that builds the model once, to check it, ended with status {status}; mostly the node has too little memory. "
                "Give the same command again"
            ) from None
        finally:
            self._connection.close()
        return found


class _Notes(logging.Handler):
    """Keeps what the building of the model says of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        logger = logging.getLogger("trainer.models")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def begins_at_random(model: ModelConfig) -> bool:
    """Whether no weights are known to be in it. A model of the user's own may come with some."""
    return model.weights == "none" and ":" not in model.name


def answer(descriptors: list[int]) -> None:
    """Entry point of the forked process: reads one question and sends one answer."""
    connection = Connection(descriptors[0])
    connection.send(built(connection.recv()))


def built(question: Question) -> Checked | Refused:
    """Build the model that `question` asks for, in this process."""
    from trainer.learn.depth import depths_of
    from trainer.learn.own import try_own
    from trainer.learn.teacher import try_teacher
    from trainer.models.adapters import resting
    from trainer.models.vision import has_depthwise, head_of, least_momentum
    from trainer.tasks.make import make_task

    notes = _Notes()
    try:
        task = make_task(question.task, question.targets, label_smoothing=question.label_smoothing, holds_texts=is_text(question.model))
        model = task.build(question.model, shape=question.shape, seed=question.seed)
        size = image_hw(question.shape) if len(question.shape) == 2 else (1, 1)  # of texts nothing looks at an image
        if question.loss or question.augment:
            outputs = head_of(model)[1].weight.shape[0]
            try_own(task, loss=question.loss, augment=question.augment, outputs=outputs, image_hw=size)
        if question.layer_decay != 1:
            depths_of(model, question.model.name, head_of(model)[0])
        if question.teacher:
            try_teacher(question.teacher, task, image_hw=size)
        weights_bytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        rest = resting(model)
        return Checked(
            has_depthwise=has_depthwise(model),
            task=task.info,
            weights_bytes=weights_bytes,
            resting_bytes=sum(parameter.nbytes for name, parameter in model.named_parameters() if name in rest),
            notes=tuple(notes.lines),
            norm_momentum=least_momentum(model) if begins_at_random(question.model) else 0.0,
        )
    except ValueError as error:
        return Refused(kind="value", message=str(error))
    except OSError as error:
        return Refused(kind="os", message=str(error))
    except Exception:
        return Refused(kind="bug", message=traceback.format_exc())
