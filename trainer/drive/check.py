"""Builds the run's model once before anything is started for it: what is wrong with its name or its weights is found in seconds, and
downloaded weights are in the library's cache when the ranks want them.

run.py starts it as soon as the settings are known. It happens in a process forked from the zygote, so that the driver never imports torch.
"""

import socket
import traceback
from multiprocessing.connection import Connection

from cluster.zygote import Zygote
from trainer.settings.tree import ModelConfig


class ModelCheck:
    """A check that is under way."""

    def __init__(self, zygote: Zygote, model: ModelConfig, *, classes: int, seed: int, image_size: tuple[int, int]) -> None:
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        with theirs:
            self._forked = zygote.fork("trainer.drive.check:build_and_tell", [theirs.fileno()])
        self._connection.send((model, classes, seed, image_size))

    def wait(self) -> bool:
        """Whether the built model has depthwise convolutions. Raises the ValueError or OSError that says why it cannot be built."""
        try:
            kind, text = self._connection.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"the process that builds the model once ended with status {self._forked.wait(10.0)}") from None
        finally:
            self._connection.close()
        if kind != "built":
            raise {"value": ValueError, "os": OSError}.get(kind, RuntimeError)(text)
        return bool(text)


def build_and_tell(descriptors: list[int]) -> None:
    """What the forked process calls."""
    from trainer.models.vision import build_model, has_depthwise

    connection = Connection(descriptors[0])
    model, classes, seed, image_size = connection.recv()
    try:
        built = build_model(model, classes=classes, seed=seed, image_hw=image_size)
    except ValueError as error:
        connection.send(("value", str(error)))
    except OSError as error:
        connection.send(("os", str(error)))
    except Exception:
        connection.send(("bug", traceback.format_exc()))
    else:
        connection.send(("built", "depthwise" if has_depthwise(built) else ""))
