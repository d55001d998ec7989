"""TensorBoard: event files in a folder, in tensorboardX's format, which Ray brings along.

Its SummaryWriter is not used: a thread of its own writes, so that what was told could be lost by a kill, and a full disk ended that thread,
for which the command then waited for ever.
"""

import errno
import math
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster.storage import is_outage
from trainer.track.place import NO_ROOM, Away, Options
from trainer.track.recorded import End, Point, Run


class TensorBoard:
    """Writes `FOLDER/events.out.tfevents.*`, once there is something to write. A later command adds a file of its own, which TensorBoard
    shows as one run."""

    def __init__(self, folder: Path) -> None:
        """ValueError if nothing can be written there."""
        self._folder = folder
        self._file: Any = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise _failed(folder, error) from error

    def open(self, run: Run, known: Mapping[str, Any]) -> Mapping[str, Any]:
        from tensorboardX.summary import text

        if known.get("folder") == str(self._folder) and next(self._folder.glob("events.out.tfevents.*"), None) is not None:
            return known
        when = run.started or time.time()
        self._write([(text("settings", fenced(run.text)), 0, when), (text("command", fenced(run.command)), 0, when)])
        return {"folder": str(self._folder), "begun": time.time()}

    def log(self, points: Sequence[Point]) -> None:
        from tensorboardX.summary import scalar

        self._write([(scalar(name, value), point.step, point.time) for point in points for name, value in point.values.items()])

    def end(self, run: Run, end: End, files: Mapping[str, bytes]) -> None:
        from tensorboardX.summary import hparams, scalar, text

        when = end.time or time.time()
        settings = {name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in run.settings.items()}
        results = {f"result/{name}": value for name, value in end.results.items() if math.isfinite(value)}
        rows = [("status", end.status), ("why", end.why), *((name, f"{value:g}") for name, value in end.results.items())]
        lines = [f"| {cell(name)} | {cell(value)} |" for name, value in rows if value]
        table = "\n".join(["| what | value |", "|---|---|", *lines])
        told = [*hparams(settings, results), *(scalar(name, value) for name, value in results.items()), text("result", table)]
        self._write([(summary, 0, when) for summary in told])

    def where(self) -> str:
        return f"tensorboard --logdir {self._folder}"

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # what it was told is on the disk
                file.close()

    def _write(self, told: Sequence[tuple[Any, int, float]]) -> None:
        """Summaries, each with its step and its Unix time. They are on the disk when this returns. Away for a disk without room."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event

        # Its own names have nothing but the host and the second: a second command would overwrite the first one's file.
        mark = f".{os.getpid()}-{secrets.token_hex(4)}"
        try:
            if self._file is None:
                self._file = EventsWriter(str(self._folder / "events"), mark)
            for summary, step, when in told:
                self._file.write_event(Event(step=step, wall_time=when, summary=summary))
            self._file.flush()
        except OSError as error:
            if self._file is None:
                for path in self._folder.glob(f"events.out.tfevents.*{mark}"):  # begun, and good for nothing
                    path.unlink(missing_ok=True)
            self.close()  # its last record may be cut short, where readers stop: what comes next is in a file of its own
            raise _failed(self._folder, error) from error


def _failed(folder: Path, error: OSError) -> Exception:
    if error.errno in NO_ROOM or is_outage(error):
        return Away(f"{folder} takes nothing now ({error.strerror or error})")
    return ValueError(f"--at {folder} cannot be written ({error.strerror or error}); name another folder")


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
