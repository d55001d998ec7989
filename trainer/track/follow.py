"""Brings a tracker up to date with a run, and goes on until the run ends.

What the tracker was told is kept in the run's folder (`trackers/NAME.json`), after each time that it took something. A command that was
killed, a run that goes on, or a second command later tell it the rest; points that it took just before a kill are told again, with the same
values.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from cluster.journal import JournalReader
from cluster.storage import is_outage
from dataio.foreign import json_of
from trainer.runs.folder import RunFolder
from trainer.runs.status import look
from trainer.track.place import NO_ROOM, Away, Place
from trainer.track.recorded import FILES, MODEL, Run, curve_points, end_of, evaluation_points, run_of

FOLDER = "trackers"
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0
EVERY_SECONDS = 5.0
OVER = ("finished", "failed", "stopped", "killed")
POINTS_AT_ONCE = 500
ENDS = ("run_finished", "run_stopped", "run_failed")


@dataclass(kw_only=True)
class Cursor:
    """What a tracker has been told."""

    known: dict[str, Any] = field(default_factory=dict)
    """What its `open` returned."""
    curves: int = -1
    """Newest step of the curves."""
    evaluations: int = -1
    ended: str = ""
    """The end that it was told, and when that was: one that goes on ends again."""

    def to_json(self) -> bytes:
        return json.dumps(vars(self), indent=1, sort_keys=True).encode()


class Follower:
    """One run and one tracker."""

    def __init__(
        self,
        folder: RunFolder,
        name: str,
        place: Place,
        *,
        say: Callable[[str], None],
        with_model: bool = False,
        patience_seconds: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """`name` of the tracker. `patience_seconds`: how long a tracker may be away once the run has ended."""
        self._folder, self._path, self._place = folder, f"{FOLDER}/{name}.json", place
        self._say, self._with_model, self._patience = say, with_model, patience_seconds
        self._clock, self._sleep = clock, sleep
        self._cursor = self._read()
        self._journal = JournalReader(folder.storage, folder.name)
        self._away_since: float | None = None

    def follow(self, *, once: bool = False) -> str:
        """Tell the tracker all there is, then what comes, until the run has ended (`once`: only what there is). Returns the run's status.
        Away if the tracker does not answer, ValueError if it refuses; the same call goes on."""
        run = self._patiently(lambda: run_of(self._folder, self._journal.read()), once)
        known = self._patiently(lambda: self._place.open(run, self._cursor.known), once)
        if self._cursor.known != known:  # at first, or where somebody removed the tracker's run
            self._cursor = Cursor(known=dict(known))
        self._write()
        self._say(f"{run.name} -> {self._place.where()}")
        while True:
            status = look(self._folder, is_live=False)
            is_over = status is not None and status.status in OVER  # before the journal is read: what it has then is all
            self._patiently(self._tell, once)
            if is_over and status is not None:
                self._patiently(partial(self._tell_end, run, status.status, status.note), once)
                return status.status
            if once:
                return status.status if status is not None else "unknown"
            self._sleep(EVERY_SECONDS)

    # Inside

    def _tell(self) -> None:
        evaluations = evaluation_points(self._journal.read(), self._cursor.evaluations)
        for points, name in ((curve_points(self._folder, self._cursor.curves), "curves"), (evaluations, "evaluations")):
            for start in range(0, len(points), POINTS_AT_ONCE):
                batch = points[start : start + POINTS_AT_ONCE]
                self._place.log(batch)
                setattr(self._cursor, name, batch[-1].step)
                self._cursor.ended = ""  # what goes on ends anew
                self._write()

    def _tell_end(self, run: Run, status: str, why: str) -> None:
        ends = [event for event in self._journal.read() if event["event"] in ENDS]
        last = ends[-1] if ends else {}
        when = float(last.get("time", 0.0)) or time.time()
        mark = f"{status} {when:.3f}" if last else status
        if self._cursor.ended == mark:
            return
        names = FILES + (MODEL if self._with_model and status == "finished" else ())
        files = {name: data for name in names if (data := self._folder.read(name)) is not None}
        self._place.end(run, end_of(self._folder, status, why, when), files)
        self._cursor.ended = mark
        self._write()

    def _patiently(self, tell: Callable[[], Any], once: bool) -> Any:
        """Try until the tracker answers. Away after `patience_seconds`, which begin when the run has ended (`once`: at once)."""
        pause, since = FIRST_PAUSE_SECONDS, None
        while True:
            try:
                done = tell()
            except OSError as error:  # the tracker's, or the storage's that holds the run
                if not isinstance(error, Away) and not is_outage(error):
                    raise
                if self._away_since is None:
                    self._away_since = self._clock()
                    self._say(f"{error}; trying again, the run goes on without")
                status = look(self._folder, is_live=False)
                if once or (status is not None and status.status in OVER):
                    since = self._clock() if since is None else since
                    if self._clock() - since >= self._patience:
                        raise Away(str(error)) from error
                self._sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            else:
                if self._away_since is not None:
                    self._say(f"the tracker answers again, after {self._clock() - self._away_since:.0f} s")
                    self._away_since = None
                return done

    def _read(self) -> Cursor:
        data = self._folder.read(self._path)
        try:
            found = json_of(data or b"{}")
            return Cursor(**found) if isinstance(found, Mapping) else Cursor()
        except (ValueError, TypeError):
            self._say(f"{self._folder.location}/{self._path} cannot be read; the tracker is told all again")
            return Cursor()

    def _write(self) -> None:
        try:
            self._folder.write(self._path, self._cursor.to_json())
        except OSError as error:
            where, why = f"{self._folder.location}/{self._path}", error.strerror or error
            if is_outage(error) or error.errno in NO_ROOM:
                raise Away(f"{where} cannot be written now ({why})") from error
            raise ValueError(f"{where} cannot be written ({why}), where it is noted what a tracker has; track a copy of the run") from error
