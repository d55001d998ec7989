"""The coordinator of a real run, with one fault. faulty_driver.py starts it in place of cluster.coordinator.CoordinatorActor.

Its plan is a JSON file, named by the environment variable PLAN_VARIABLE, which Ray's processes inherit. A fault happens once, however often
Ray starts the actor again: a file next to the plan records it.
"""

import functools
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.faults.calls import Storages, Strike, all_threads_are
from benchmarks.faults.times import scale_times
from cluster import coordinator

PLAN_VARIABLE = "FINETUNE_FAULT_PLAN"
SILENT_METHODS = frozenset({"close"})


class CoordinatorActor(coordinator.CoordinatorActor):
    """Dies before or after a message, delivers each message twice, or has a storage that fails."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._plan: dict[str, Any] = json.loads(Path(os.environ[PLAN_VARIABLE]).read_text())
        self._done = Path(f"{os.environ[PLAN_VARIABLE]}.coordinator-done")
        self._counts: Counter[str] = Counter()
        self._counting = threading.Lock()
        scale_times(float(self._plan.get("scale", 1.0)), strict=False)
        strike = self._plan.get("coordinator_storage")
        if strike is not None and not self._done.exists():
            all_threads_are("coordinator")
            storages = Storages(self._plan["root"], Strike(kind="coordinator", **strike))
            storages.install()
            self._done.touch()
        super().__init__(*args, **kwargs)

    def around(self, method: str, call: Callable[[], Any]) -> Any:
        """Handle one message, as the plan says."""
        with self._counting:
            self._counts[method] += 1
            number = self._counts[method]
        message = self._plan.get("message", {})
        strikes = message.get("method") == method and message.get("number") == number and not self._done.exists()
        how = message.get("how", "")
        if strikes:
            self._done.touch()
        if strikes and how == "killed before":
            os.kill(os.getpid(), signal.SIGKILL)
        if strikes and how == "lasting":
            time.sleep(float(message["seconds"]))
        if strikes and how == "killed inside":
            threading.Timer(0.002, os.kill, (os.getpid(), signal.SIGKILL)).start()
        result = call()
        if how == "twice" and message["method"] in ("", method):
            result = call()
        if strikes and how == "killed after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result


def _struck(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: CoordinatorActor, *args: Any, **kwargs: Any) -> Any:
        return self.around(name, lambda: method(self, *args, **kwargs))

    return call


for _name in dir(coordinator.CoordinatorActor):
    if not _name.startswith("_") and callable(getattr(coordinator.CoordinatorActor, _name)) and _name not in SILENT_METHODS:
        setattr(CoordinatorActor, _name, _struck(_name, getattr(coordinator.CoordinatorActor, _name)))
