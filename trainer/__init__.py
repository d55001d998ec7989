"""What is trained: settings, tasks, models, the step, a rank, the driver, runs and their reports. Each is a package of its own; the command
lines (`run`, `evaluate`, `predict`) stand here. Imports point downwards only: drive, rank, learn, report, models, runs, tasks, settings.

`from trainer import finetune, open_run` is the way in from Python (trainer.handle), which is imported when it is asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.handle import Run, RunFailed, RunStopped, finetune, open_run

__all__ = ["Run", "RunFailed", "RunStopped", "finetune", "open_run"]


def __getattr__(name: str) -> Any:
    """Nothing of the package costs the processes of a run anything."""
    if name not in __all__:
        raise AttributeError(f"module 'trainer' has no attribute {name!r}")
    from trainer import handle

    return getattr(handle, name)
