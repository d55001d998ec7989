"""Builds the run's model once before anything is started for it: what is wrong with its task, its name or its weights is found in seconds,
downloaded weights are in the library's cache when the ranks want them, and the driver learns what the run's task is.

trainer/drive/start.py starts it as soon as the settings are known. It happens in a process forked from the zygote, so that the driver never
imports torch.
"""

import socket
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Literal

from cluster.zygote import Zygote
from dataio.schema import Target
from trainer.settings.tree import ModelConfig, TaskConfig
from trainer.tasks.info import TaskInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is to be built."""

    task: TaskConfig
    targets: tuple[Target, ...]
    label_smoothing: float
    model: ModelConfig
    image_size: tuple[int, int]
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """What was built."""

    has_depthwise: bool
    """Whether the model has depthwise convolutions, which decides what train.precision=auto is on a CPU."""
    task: TaskInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """Why nothing was built: a ValueError or an OSError, which say it all, or a bug, with its traceback."""

    kind: Literal["value", "os", "bug"]
    message: str

    def error(self) -> Exception:
        return {"value": ValueError, "os": OSError, "bug": RuntimeError}[self.kind](self.message)


class ModelCheck:
    """A check that is under way."""

    def __init__(self, zygote: Zygote, question: Question) -> None:
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        with theirs:
            self._forked = zygote.fork("trainer.drive.check:answer", [theirs.fileno()])
        self._connection.send(question)

    def wait(self) -> Checked:
        """What was built. Raises the ValueError or OSError that says why it cannot be."""
        try:
            found: Checked | Refused = self._connection.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"the process that builds the model once ended with status {self._forked.wait(10.0)}") from None
        finally:
            self._connection.close()
        if isinstance(found, Refused):
            raise found.error()
        return found


def answer(descriptors: list[int]) -> None:
    """What the forked process calls: one question, one answer."""
    connection = Connection(descriptors[0])
    connection.send(_built(connection.recv()))


def _built(question: Question) -> Checked | Refused:
    from trainer.models.vision import has_depthwise
    from trainer.tasks.make import make_task

    try:
        task = make_task(question.task, question.targets, label_smoothing=question.label_smoothing)
        model = task.build(question.model, image_hw=question.image_size, seed=question.seed)
        return Checked(has_depthwise=has_depthwise(model), task=task.info)
    except ValueError as error:
        return Refused(kind="value", message=str(error))
    except OSError as error:
        return Refused(kind="os", message=str(error))
    except Exception:
        return Refused(kind="bug", message=traceback.format_exc())
