"""`trainer.run` with faults in its driver's process and its coordinator's; ranks and Ray are real and unchanged.

    python -m benchmarks.faults.faulty_driver --plan FILE -- ARGUMENTS OF trainer.run

The plan is JSON: `root` (the storage's, as its file system names it), `scale` (times that waits are shorter, 1: not), and of these what is
wanted: `record` (a file for the list of the driver's storage calls), `driver_storage` and `coordinator_storage` (fields of calls.Strike),
`message` (fields of local_ray.MessageStrike, without its time limit).
"""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.faults.calls import Storages, Strike
from benchmarks.faults.faulty_coordinator import PLAN_VARIABLE, CoordinatorActor
from benchmarks.faults.times import scale_times
from cluster import launch
from trainer import run as command


def main() -> int:
    match sys.argv[1:]:
        case ["--plan", file, "--", *argv]:
            path = Path(file).resolve()
        case _:
            raise SystemExit(__doc__)
    plan: dict[str, Any] = json.loads(path.read_text())
    os.environ[PLAN_VARIABLE] = str(path)
    for name in ("trainer.drive.drive", "trainer.drive.session"):
        importlib.import_module(name)
    scale_times(float(plan.get("scale", 1.0)), strict=False)
    vars(launch)["CoordinatorActor"] = CoordinatorActor
    storages = Storages(plan["root"], Strike(kind="driver", **plan.get("driver_storage", {})))
    if "record" in plan or "driver_storage" in plan:
        storages.install()
    try:
        return command.main(argv)
    finally:
        storages.stop()
        if "record" in plan:
            Path(plan["record"]).write_text(json.dumps([(seen.call, seen.path) for seen in storages.seen]))


if __name__ == "__main__":
    sys.exit(main())
