"""A driver ends with its own exit status while a thread of it is in one of Ray's calls. Real Ray, real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.leftovers import processes_of

PROJECT = Path(__file__).resolve().parents[2]
# A thread asks Ray one thing after the other, as Ray Train's does while the workers of a fleet start.
DRIVER = """
import sys, threading, time
from dataio.leaving import Leaving, leave_by, leaves
leaving = Leaving()
from pathlib import Path
from cluster.belongings import belongings
from cluster.config import ClusterConfig
from cluster.ray_cluster import ray_cluster

def main():
    import ray
    ray_of_ours = dict(project=Path(sys.argv[1]), address="", in_job=False, cpus=1, on_lost=print, process_ends=PROCESS_ENDS)
    with belongings(leave_by=leave_by) as ours, ray_cluster(ClusterConfig(), folder=ours.folder, **ray_of_ours):
        core, asked = ray._private.worker.global_worker.core_worker, threading.Event()

        def ask():
            while core.get_worker_id():
                asked.set()
                time.sleep(0.001)

        threading.Thread(target=ask, daemon=True).start()
        assert asked.wait(60)
        print(ours.folder, flush=True)
    return 143

leaving.by(main)
"""


@pytest.mark.ray
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("process_ends", "status"), [("leaves()", 143), ("False", 1)], ids=["as commands do", "with ray.shutdown"])
def test_a_thread_in_one_of_rays_calls_does_not_change_the_exit_status(process_ends: str, status: int) -> None:
    """The second case shows that Ray still ends a process so, which is why commands do not shut it down."""
    program = DRIVER.replace("PROCESS_ENDS", process_ends)
    done = subprocess.run(
        [sys.executable, "-c", program, str(PROJECT)], cwd=PROJECT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == status, done.stderr
    assert ("was killed" in done.stderr) == bool(status == 1)
    folder = done.stdout.strip()
    assert not os.path.exists(folder)
    assert processes_of(folder) == set()
