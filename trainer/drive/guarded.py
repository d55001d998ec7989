"""What the commands beside the run have in common: signals interrupt them, a refusal is a sentence, and each has its exit status."""

import signal
from collections.abc import Callable

from trainer.drive.signals import Phase, Signals, tell
from trainer.settings.cli import fail
from trainer.settings.say import complain


def guarded(work: Callable[[Signals], int], *, stopped: str, goes_on: str = "") -> int:
    """Do `work(signals)` and return its exit status. While it works, SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt: the user is told
    `SIGNAL: stopped`, as `stopped` words it, and the status is 128 + signal. Status 1, with its text and `goes_on`, for an OSError; 2
    (SystemExit) with its text for a ValueError."""
    signals = Signals()
    with signals.heard():
        signals.enter(Phase.SETTING_UP)
        try:
            return work(signals)
        except ValueError as error:
            fail(str(error))
        except OSError as error:
            complain(f"error: {error}{goes_on}")
            return 1
        except KeyboardInterrupt:
            tell(f"{signals.name or 'SIGINT'}: {stopped}")
            return 128 + (signals.number or signal.SIGINT)
