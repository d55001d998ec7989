"""The end of a command whose local Ray has died: what is written of it, without Ray. Made by start.py; ray_cluster.py calls it in a thread.

Ray's calls in the main thread would take a minute to fail, or end the process without a word. So the command ends here, at once: a sentence
for the user, `run_failed` in the journal. There is no summary and no report; the next command goes on from the newest checkpoint."""

import threading
from collections.abc import Callable

from trainer.drive.signals import Phase, Signals, tell
from trainer.drive.stages import Begun

RECORD_SECONDS = 10.0
"""How long the storage may take for the last event."""
NEXT = "the same command goes on from the newest checkpoint"


class WithoutRay:
    """Ends the command. `leave(status)` does not return."""

    def __init__(self, signals: Signals, leave: Callable[[int], object]) -> None:
        self._signals, self._leave = signals, leave
        self._begun: Begun | None = None

    def begun(self, begun: Begun) -> Begun:
        """The run is this driver's from now on, and so is its end."""
        self._begun = begun
        return begun

    def end(self, name: str) -> None:
        """The process `name` of the local Ray has died."""
        died = f"the {name} of this run's Ray died, and its workers with it"
        tell(f"error: {died}; {NEXT}")
        if self._begun is not None and self._signals.phase in (Phase.SETTING_UP, Phase.RESUMING, Phase.TRAINING):
            # In a thread: the storage may be silent. Later phases write down another end, or have done so.
            record = threading.Thread(target=_record, args=(self._begun, died), name="last-event", daemon=True)
            record.start()
            record.join(RECORD_SECONDS)
        self._leave(1)


def _record(begun: Begun, died: str) -> None:
    try:
        if begun.store.newest_generation() > begun.generation:
            return  # the run is another driver's by now
    except OSError:
        pass  # most likely it is still this one's
    begun.journal.write("run_failed", kind="infrastructure", rank=None, message=died, reason=NEXT)
    begun.journal.flush(RECORD_SECONDS)
