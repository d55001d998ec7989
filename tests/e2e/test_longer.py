"""A finished run of a constant schedule, made longer, ends in the bits of one that was asked for all of it."""

from pathlib import Path

import pytest

from tests.e2e.running import Run

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
CONSTANT = ("--optim.schedule", "constant", "--optim.lr", "0.01", "--data.max-bad-fraction", "0.01")


def test_a_finished_run_made_longer_ends_in_the_bits_of_one_that_was_that_long(tmp_path: Path, images: Path) -> None:
    def run(name: str, epochs: int) -> Run:
        one = Run(*CONSTANT, "--train.epochs", str(epochs), storage=tmp_path, name=name, data=images)
        try:
            assert one.finish() == 0, one.output()
        finally:
            one.kill()
        return one

    whole = run("whole", 2).summary()
    half = run("grown", 1).summary()
    grown = run("grown", 2)
    assert half["weights_sha256"] != whole["weights_sha256"]
    assert grown.summary()["weights_sha256"] == whole["weights_sha256"]
    assert (half["steps"], grown.summary()["steps"]) == (whole["steps"] // 2, whole["steps"])
    assert [event["start_step"] for event in grown.events() if event["event"] == "attempt_started"] == [0, half["steps"]]
    again = run("grown", 2)
    assert "has finished already" in again.output()
