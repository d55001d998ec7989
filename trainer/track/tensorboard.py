"""TensorBoard: event files in a folder, written by tensorboardX, which Ray brings along."""

import math
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.track.place import Options
from trainer.track.recorded import End, Point, Run


class TensorBoard:
    """Writes `FOLDER/events.out.tfevents.*`. A later command adds a file of its own, which TensorBoard shows as one run."""

    def __init__(self, folder: Path) -> None:
        """ValueError if nothing can be written there."""
        from tensorboardX import SummaryWriter

        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Its own names have nothing but the host and the second: a second command would overwrite the first one's file.
            self._writer = SummaryWriter(str(folder), flush_secs=5, filename_suffix=f".{os.getpid()}-{secrets.token_hex(4)}")
        except OSError as error:
            raise ValueError(f"--at {folder} cannot be written ({error.strerror or error}); name another folder") from error

    def open(self, run: Run, known: Mapping[str, Any]) -> Mapping[str, Any]:
        if not known:
            self._writer.add_text("settings", fenced(run.text), 0, walltime=run.started or None)
            self._writer.add_text("command", fenced(run.command), 0, walltime=run.started or None)
        return {"folder": str(self._folder)}

    def log(self, points: Sequence[Point]) -> None:
        for point in points:
            for name, value in point.values.items():
                self._writer.add_scalar(name, value, point.step, walltime=point.time)
        self._writer.flush()

    def end(self, run: Run, end: End, files: Mapping[str, bytes]) -> None:
        from tensorboardX.summary import hparams

        settings = {name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in run.settings.items()}
        results = {f"result/{name}": value for name, value in end.results.items() if math.isfinite(value)}
        for summary in hparams(settings, results):
            self._writer.file_writer.add_summary(summary)
        for name, value in results.items():
            self._writer.add_scalar(name, value, 0, walltime=end.time or None)
        rows = [("status", end.status), ("why", end.why), *((name, f"{value:g}") for name, value in end.results.items())]
        lines = [f"| {cell(name)} | {cell(value)} |" for name, value in rows if value]
        table = "\n".join(["| what | value |", "|---|---|", *lines])
        self._writer.add_text("result", table, 0, walltime=end.time or None)
        self._writer.flush()

    def where(self) -> str:
        return f"tensorboard --logdir {self._folder}"

    def close(self) -> None:
        self._writer.close()


def place_of(options: Options, run_folder: Path | None) -> TensorBoard:
    """In --at, or in the run's own folder. ValueError where that is on an object store."""
    if options.at:
        return TensorBoard(Path(options.at).expanduser().absolute())
    if run_folder is None:
        raise ValueError("the run is on an object store, and TensorBoard reads a folder: say which by --at FOLDER")
    return TensorBoard(run_folder / "tensorboard")


def fenced(text: str) -> str:
    """Text that TensorBoard's Markdown shows as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
