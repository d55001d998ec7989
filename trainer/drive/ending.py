"""The four ways in which a driver's session ends: finished, stopped, taken over, failed. Called by drive.py, which gets the exit status.

Three of them write summary.json, then the end into the journal, then the report, in this order. A command that is killed in between, or
whose report fails, has lost nothing: given again it completes what is missing (start.show_finished, by `complete`). farewell.py tells
Prometheus. trainer.runs.summary computes the summary, trainer.report the report, which is imported last: whatever is wrong with it, the end
is written by then.
"""

import json
import math
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from cluster.controller import RunFailed
from cluster.journal import Journal, read_journal
from cluster.metrics import TAKEN_OVER
from cluster.redact import redacted
from cluster.storage import join_uri
from cluster.versions import versions
from dataio.balance import known_class_counts
from dataio.parquet import Dataset
from trainer.drive.farewell import tell_state, wait_for_prometheus
from trainer.drive.session import Session
from trainer.drive.signals import Phase, Signals, farewell, tell
from trainer.runs.folder import RunFolder
from trainer.runs.progress import final_table, pasteable, predict_command
from trainer.runs.summary import summarise
from trainer.settings.say import complain
from trainer.tasks.info import info_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """What is known at the end, with one method for each way to end."""

    session: Session
    result: Mapping[str, Any] | None
    """Rank 0's result of the newest attempt; None if the attempt did not end well."""
    workers: int
    signals: Signals

    def finished(self) -> int:
        session = self.session
        steps = (self.result or {}).get("steps_done", session.total_steps)  # fewer where the evaluations ended it
        summary = self._record("finished", "run_finished", steps=steps)
        told = tell_state(session, "finished")
        report = self._report()
        folder = self._folder.location
        session.console.print(final_table(summary, report=report, predict=predict_command(folder, info_of(summary).unit)), soft_wrap=True)
        wait_for_prometheus(session, self.signals, told)
        return 128 + self.signals.number if self.signals.cuts_short else 0

    def stopped(self) -> int:
        session, number = self.session, self.signals.number
        step = session.saved_step()
        name = signal.Signals(number).name if number else ""
        summary = self._record("stopped", "run_stopped", step=max(0, step), signal=name)
        told = tell_state(session, "stopped")
        session.console.print(final_table(summary, report=self._report()), soft_wrap=True)
        if step >= 0:
            done = f"step {step:,} of {session.total_steps:,} is saved. The same command goes on from there"
        else:
            done = "nothing was saved yet. The same command starts again"
        session.console.print(f"stopped: {done}:\n  {pasteable(session.decided.command)}", soft_wrap=True, markup=False, highlight=False)
        wait_for_prometheus(session, self.signals, told)
        return 128 + number if number else 1

    def taken_over(self) -> int:
        """Write only to the journal: the summary and the report now belong to the other process."""
        session, run = self.session, self.session.config.run
        try:
            claim = session.patiently("the newer claim", lambda: session.store.claim(session.store.newest_generation()))
            other = f"process {claim.pid} on {claim.host}" if claim.host else "another process"  # its note was cut short
        except OSError:
            other = "another process"
        session.journal.write("run_taken_over", by=other, generation=session.generation)
        told = tell_state(session, TAKEN_OVER)
        complain(
            f"error: run {run} was taken over by {other}, which goes on from the newest checkpoint; this process ends. "
            "To have both, give one of them another --run NAME"
        )
        wait_for_prometheus(session, self.signals, told)
        return 1

    def failed(self, error: RunFailed) -> int:
        failure = error.failure
        self._record("failed", "run_failed", kind=failure.kind, rank=failure.rank, message=failure.message, reason=error.reason)
        told = tell_state(self.session, "failed")
        self._report()
        if failure.kind == "user" and not failure.is_explained:
            complain(failure.traceback)
        complain(f"error: {error}")
        if (step := self.session.saved_step()) >= 0:
            if failure.kind == "numbers" and failure.step is not None:
                complain(f"step {step} is saved, but the same command would diverge from there again")
            else:
                complain(f"step {step} is saved; once the cause is mended the same command goes on from there")
        wait_for_prometheus(self.session, self.signals, told)
        return 1

    def _record(self, status: str, event: str, **fields: Any) -> dict[str, Any]:
        """Write summary.json, then the run's last event. Returns the summary."""
        session = self.session
        ended = {"time": time.time(), "event": event, **fields}
        events = [*session.last_events(), ended]
        summary = summarise(config=session.config, status=status, events=events, result=self.result, facts=self._facts())
        try:
            encoded = json.dumps(redacted(finite(summary)), indent=1, allow_nan=False).encode()
            session.patiently("summary.json", lambda: session.storage.write_atomic(f"{session.config.run}/summary.json", encoded))
        except OSError as error:  # most likely a full disk: the result is still printed, and the checkpoints are untouched
            complain(f"warning: summary.json could not be written: {error}")
        session.journal.write(event, **fields)
        if summary["accounting"]:
            session.journal.write("account", seconds=summary["accounting"], goodput=summary["goodput"])
        return summary

    def _report(self) -> str | None:
        """Write the report. Returns its address; None if it was not written, which the user was told."""
        session = self.session
        try:
            self.signals.enter(Phase.REPORTING)
            return written_report(self._folder, session.decided.dataset, session.journal)
        except KeyboardInterrupt:
            tell(farewell(Phase.REPORTING, self.signals.name))
            return None
        finally:
            self.signals.enter(Phase.OVER)

    @property
    def _folder(self) -> RunFolder:
        return RunFolder(storage=self.session.storage, name=self.session.config.run)

    def _facts(self) -> dict[str, Any]:
        """Facts for the summary that only the driver knows."""
        session, manifest = self.session, self.session.decided.dataset.manifest
        return {
            "workers": self.workers,
            "threads": session.resources.threads_per_worker,
            "steps_per_epoch": session.steps_per_epoch,
            "classes": list(manifest.classes),
            "train_counts": list(known_class_counts(session.decided.dataset)) or None,
            "dataset_fingerprint": manifest.fingerprint,
            "test_fingerprint": manifest.fingerprint_of("test"),
            "quarantined": manifest.quarantined + session.quarantined(),
            "versions": versions(),
            "command": session.decided.command,
            "task": session.decided.task.to_json(),
        }


def written_report(folder: RunFolder, dataset: Dataset, journal: Journal | None = None) -> str | None:
    """Write a run's report. Returns its address; None if that failed, which the user and the journal are told: no report, however broken
    its data, its images or its code, makes a run fail."""
    try:
        from trainer.report.sections import make_report  # imports take half a second; training should not wait for them

        report = make_report(folder, dataset)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        if journal is not None:
            journal.write("report_failed", message=reason)
        complain(f"warning: report.html could not be written ({reason}); the run itself is complete")
        return None
    if report.problems and journal is not None:
        journal.write("report_incomplete", problems=list(report.problems))
    return report.location


def complete(folder: RunFolder, summary: Mapping[str, Any], dataset: Dataset, console: Console) -> str | None:
    """Write what a finished run lacks because its command was killed or its report failed: its last event, its report. Returns the
    report's address."""
    events = read_journal(folder.storage, folder.name)
    ends = [event["event"] for event in events if event["event"] in ("run_started", "run_finished")]
    if ends[-1:] == ["run_started"]:
        journal = Journal.open(folder.storage, folder.name, writer=f"driver-{os.getpid()}-{int(time.time())}")
        # At the time of its last sign of life: a run does not last until somebody looks at it.
        journal.write("run_finished", steps=summary.get("steps"), time=max(event["time"] for event in events))
    if folder.storage.exists(f"{folder.name}/report.html"):
        return join_uri(folder.location, "report.html")
    console.print("its report is missing and is written now")
    return written_report(folder, dataset)


def finite(value: Any) -> Any:
    """`value` with null in place of NaN and infinity, which JSON does not have."""
    match value:
        case float() if not math.isfinite(value):
            return None
        case dict():
            return {key: finite(item) for key, item in value.items()}
        case list() | tuple():
            return [finite(item) for item in value]
    return value
