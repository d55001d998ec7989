"""Weights & Biases, by its own library (extra `wandb`), also offline: WANDB_MODE=offline writes a folder; `wandb sync` uploads it later."""

import hashlib
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.track.place import Away, Options
from trainer.track.recorded import End, Point, Run

PROJECT = "finetune"
STEP = "step"
NEEDS = "--to wandb needs the library wandb: pip install 'ray-finetune[wandb]'"


class WandB:
    """A run of a project. Its id follows from the run's place, so that a later command goes on with the same one."""

    def __init__(self, folder: str, project: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(NEEDS) from error
        self._wandb: Any = wandb
        self._folder, self._project = folder, project
        self._run: Any = None

    def open(self, run: Run, known: Mapping[str, Any]) -> Mapping[str, Any]:
        ident = str(known.get("id") or hashlib.sha256(f"{run.location}\n{run.started}".encode()).hexdigest()[:16])
        try:
            self._run = self._wandb.init(
                project=self._project,
                name=run.name,
                id=ident,
                resume="allow",
                dir=self._folder or None,
                config=dict(run.settings),
                job_type=run.task or None,
                settings=self._wandb.Settings(
                    console="off", silent=True, init_timeout=60, disable_git=True, x_disable_stats=True, x_disable_meta=True
                ),  # they would be this process's, not the run's
            )
        except self._wandb.errors.CommError as error:
            raise Away(f"wandb does not answer: {error}") from error
        except self._wandb.errors.UsageError as error:
            raise ValueError(f"wandb refuses: {error}; log in by `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline") from error
        self._run.define_metric("*", step_metric=STEP)
        return {"id": ident}

    def log(self, points: Sequence[Point]) -> None:
        for point in points:  # W&B's own steps must grow; evaluations come after the curves of their steps
            self._run.log({**point.values, STEP: point.step, "time": point.time})

    def end(self, run: Run, end: End, files: Mapping[str, bytes]) -> None:
        self._run.summary.update({f"result/{name}": value for name, value in end.results.items() if math.isfinite(value)})
        self._run.summary.update({"status": end.status, "why": end.why})
        with tempfile.TemporaryDirectory(prefix="finetune-track-") as folder:
            artifact = self._wandb.Artifact(f"run-{self._run.id}", type="run")
            for name, data in files.items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                artifact.add_file(str(path), name=name)
            self._run.log_artifact(artifact)
            self._run.finish(exit_code=0 if end.status == "finished" else 1)
        self._run = None

    def where(self) -> str:
        if self._run is None or self._run.offline:
            return f"{self._folder or os.getcwd()}/wandb (wandb sync uploads it)"
        return str(self._run.url)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


def place_of(options: Options) -> WandB:
    return WandB(options.at, options.project or os.environ.get("WANDB_PROJECT", "") or PROJECT)
