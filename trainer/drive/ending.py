"""The four ways in which a driver's session ends: finished, stopped, taken over, failed. Called by drive.py, which gets the exit status.

Three of them write summary.json and the report. trainer.runs.summary computes the summary, trainer.report the report."""

import json
import math
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.controller import RunFailed
from cluster.redact import redact, redacted
from cluster.versions import versions
from trainer.drive.session import Session
from trainer.runs.progress import final_table, predict_command
from trainer.runs.summary import summarise


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """What is known at the end, with one method for each way to end."""

    session: Session
    result: Mapping[str, Any] | None
    """Rank 0's result of the newest attempt; None if the attempt did not end well."""
    workers: int
    signal: int
    """Number of the signal that ended the run; 0: none."""

    def finished(self) -> int:
        session = self.session
        session.journal.write("run_finished", steps=session.total_steps)
        summary, report = self.write_summary("finished")
        folder = f"{session.storage.uri}/{session.config.run}"
        session.console.print(final_table(summary, report=report, predict=predict_command(folder)), soft_wrap=True)
        return 0

    def stopped(self) -> int:
        session = self.session
        commit = session.store.newest_valid(lambda path, reason: None)
        name = signal.Signals(self.signal).name if self.signal else ""
        session.journal.write("run_stopped", step=commit.step if commit else 0, signal=name)
        summary, report = self.write_summary("stopped")
        session.console.print(final_table(summary, report=report), soft_wrap=True)
        if commit:
            done = f"step {commit.step:,} of {session.total_steps:,} is saved. The same command goes on from there"
        else:
            done = "nothing was saved yet. The same command starts again"
        session.console.print(f"stopped: {done}:\n  {redact(session.decided.command)}", soft_wrap=True, markup=False, highlight=False)
        return 128 + self.signal if self.signal else 1

    def taken_over(self) -> int:
        """Write only to the journal: the summary and the report now belong to the other process."""
        session, run = self.session, self.session.config.run
        claim = json.loads(session.storage.read(f"{run}/generations/g{session.store.newest_generation():04d}"))
        other = f"process {claim['pid']} on {claim['host']}"
        session.journal.write("run_taken_over", by=other, generation=session.generation)
        print(
            f"error: run {run} was taken over by {other}, which goes on from the newest checkpoint; this process ends. "
            "To have both, give one of them another --run NAME",
            file=sys.stderr,
        )
        return 1

    def failed(self, error: RunFailed) -> int:
        failure = error.failure
        self.session.journal.write("run_failed", kind=failure.kind, rank=failure.rank, message=failure.message, reason=error.reason)
        self.write_summary("failed")
        if failure.kind == "user" and not failure.is_explained:
            print(failure.traceback, file=sys.stderr)
        print(f"error: {error}", file=sys.stderr)
        if (step := self.session.committed_step()) >= 0:
            print(f"step {step} is saved; once the cause is mended the same command goes on from there", file=sys.stderr)
        return 1

    def write_summary(self, status: str) -> tuple[dict[str, Any], str | None]:
        """Write summary.json and the report. Returns the summary and the report's address, None if they could not be written."""
        from trainer.report.sections import write_report  # imports take half a second; training should not wait for them

        session, dataset = self.session, self.session.decided.dataset
        summary = summarise(config=session.config, status=status, events=session.events(), result=self.result, facts=self._facts())
        if summary["accounting"]:
            session.journal.write("account", seconds=summary["accounting"], goodput=summary["goodput"])
        try:
            encoded = json.dumps(redacted(finite(summary)), indent=1, allow_nan=False).encode()
            session.storage.write_atomic(f"{session.config.run}/summary.json", encoded)
            return summary, str(write_report(f"{session.storage.uri}/{session.config.run}", dataset))
        except OSError as error:  # most likely a full disk: the result is still printed, and the checkpoints are untouched
            print(f"warning: summary.json and report.html could not be written: {error}", file=sys.stderr)
            return summary, None

    def _facts(self) -> dict[str, Any]:
        """Facts for the summary that only the driver knows."""
        session, manifest = self.session, self.session.decided.dataset.manifest
        return {
            "workers": self.workers,
            "threads": session.resources.threads_per_worker,
            "steps_per_epoch": session.steps_per_epoch,
            "classes": list(manifest.classes),
            "dataset_fingerprint": manifest.fingerprint,
            "quarantined": manifest.quarantined + session.status().quarantined,
            "versions": versions(),
            "command": session.decided.command,
            "task": session.decided.task.to_json(),
        }


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
