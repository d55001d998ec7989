"""One attempt of the real Ray Train: what the driver learns of a rank that raised."""

import json
import subprocess
import sys

import pytest

from tests.e2e.running import PROJECT

SCRIPT = """
import dataclasses, json, sys
from pathlib import Path
from cluster.config import ClusterConfig
from cluster.launch import Attempt, Resources, ray_cluster

def work(settings):
    def look_up(table):
        return table["learning rate"]
    look_up({})

with ray_cluster(ClusterConfig(), project=Path(sys.argv[1]), address="", in_job=False, cpus=2):
    attempt = Attempt(work, {}, name="raises", resources=Resources(workers=2, cpus_per_worker=1.0, gpus_per_worker=0, threads_per_worker=1))
    assert attempt.wait(200)
    print(json.dumps(dataclasses.asdict(attempt.failure())))
"""


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_an_exception_on_a_rank_reaches_the_driver_with_its_traceback() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(PROJECT)], cwd=PROJECT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    failure = json.loads(done.stdout.splitlines()[-1])
    assert (failure["kind"], failure["message"]) == ("user", "KeyError: 'learning rate'")
    assert failure["rank"] in (0, 1)
    assert failure["traceback"].startswith("Traceback (most recent call last):")
    assert "in look_up" in failure["traceback"]
