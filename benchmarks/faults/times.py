"""Makes the product's waits shorter in this process, so that an outage of 90 s takes a trial three.

control.py uses it in its forks, faulty_driver.py and faulty_coordinator.py in real runs."""

import sys

from cluster import storage

SCALED = (
    *("_FIRST_WAIT_SECONDS", "_LONGEST_WAIT_SECONDS", "COMMIT_PAUSE_SECONDS", "FIRST_PAUSE_SECONDS", "LONGEST_PAUSE_SECONDS"),
    *("EXIT_SECONDS", "JOURNAL_SECONDS", "UPLOAD_PAUSE_SECONDS", "TAKEN_OVER_POLL_SECONDS", "CLUSTER_POLL_SECONDS", "SETTLE_SECONDS"),
    *("DRAIN_SECONDS", "FLEET_END_SECONDS", "ACCOUNT_SECONDS", "REMOTE_ACCOUNT_SECONDS", "REFUSAL_PATIENCE_SECONDS"),
)
"""Names of constants in cluster and trainer."""
SHORTER = {"CALL_SECONDS": 4.0, "PATIENCE_SECONDS": 4.0}
"""A call's own time limit is shortened less: under load a healthy call takes a second."""
RETRY_SECONDS = 20.0


def scale_times(scale: float, *, strict: bool = True) -> None:
    """Shorten the waits of all modules that are imported, `scale` times. `strict`: RuntimeError for a constant that no module has."""
    if scale == 1.0:
        return
    found = set()
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("cluster", "trainer"):
            for key in (*SCALED, *SHORTER):
                if isinstance(getattr(module, key, None), float):
                    setattr(module, key, SHORTER.get(key) or getattr(module, key) / scale)
                    found.add(key)
    storage.open_storage.__defaults__ = (RETRY_SECONDS / scale,)  # for the report, which opens the storage by itself
    if strict and (missing := {*SCALED, *SHORTER} - found):
        raise RuntimeError(f"no module has {', '.join(sorted(missing))} any more: correct SCALED in {__file__}")
