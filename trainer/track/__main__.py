"""The command line `finetune track RUN --to TRACKER` (`python -m trainer.track`): copies a run into TensorBoard, MLflow or W&B. See the
package."""

from dataio.leaving import Leaving
from dataio.terminal import prepare_output

if __name__ == "__main__":
    leaving = Leaving()
    prepare_output(survive=True)

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from trainer.runs.folder import RunFolder, find_run
from trainer.settings.cli import fail
from trainer.settings.programs import program
from trainer.settings.say import complain, say
from trainer.settings.trackers import Tracker
from trainer.settings.tree import RunConfig
from trainer.track.follow import Follower
from trainer.track.place import Away, Options, Place


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Copy a run into an experiment tracker: settings, curves, evaluations, results, report. A run that is under way is followed until it
    ends. Killed, stopped or given again, the command goes on with the same run of the tracker. Exit status: 0 the tracker has all; 1 it
    does not answer; 2 it refuses; 130 Ctrl-C. The run is left alone by all of that."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder (path or URI), or its name under --storage."""
    to: Tracker
    """tensorboard writes a folder; mlflow speaks to a tracking server; wandb needs the extra `wandb` (no network: WANDB_MODE=offline)."""
    at: str = ""
    """tensorboard: folder of the event files (RUN/tensorboard). mlflow: the server, http://HOST:5000 (MLFLOW_TRACKING_URI). wandb: where
    its files lie (here)."""
    project: str = ""
    """mlflow: the experiment; wandb: the project (both: finetune)."""
    model: tyro.conf.FlagCreatePairsOff[bool] = False
    """Keep the finished model there, too."""
    once: tyro.conf.FlagCreatePairsOff[bool] = False
    """Copy what there is, and end, though the run goes on."""
    patience: float = 600.0
    """Seconds that a tracker may be away once the run has ended."""
    storage: str = RunConfig().storage
    """Folder or URI that holds the runs' folders."""


def main(argv: Sequence[str]) -> int:
    """Follow a run. Returns the exit status; SystemExit(2) for wrong arguments and for what the tracker refuses."""
    arguments = tyro.cli(Arguments, prog=program("track"), args=argv)
    try:
        if not (math.isfinite(arguments.patience) and arguments.patience >= 0):
            raise ValueError(f"--patience {arguments.patience:g} is not a number of seconds from 0 up")
        folder = find_run(arguments.run, arguments.storage)
        place = place_of(arguments, folder)
        follower = Follower(folder, arguments.to, place, say=complain, with_model=arguments.model, patience_seconds=arguments.patience)
        try:
            status = follower.follow(once=arguments.once)
        finally:
            place.close()
    except Away as error:
        complain(f"error: {error}; the same command goes on")
        return 1
    except ValueError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename} cannot be read: {error.strerror}" if error.filename is not None else str(error))
    except KeyboardInterrupt:
        complain("no longer tracking; the run is left as it is, and the same command goes on")
        return 130
    say(f"{folder.name}: {status}; {arguments.to} has all of it")
    return 0


def place_of(arguments: Arguments, folder: RunFolder) -> Place:
    """The tracker that is asked for. ValueError if it cannot be used."""
    options = Options(at=arguments.at, project=arguments.project)
    match arguments.to:
        case "tensorboard":
            from trainer.track import tensorboard

            is_here = folder.storage.is_local
            return tensorboard.place_of(options, Path(folder.storage.at(folder.name)) if is_here else None)
        case "mlflow":
            from trainer.track import mlflow

            return mlflow.place_of(options)
        case _:
            from trainer.track import wandb

            return wandb.place_of(options)


if __name__ == "__main__":
    leaving.by(lambda: main(sys.argv[1:]))
