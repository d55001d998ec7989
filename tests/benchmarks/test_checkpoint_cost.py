"""What the benchmark of a checkpoint's price says of given times."""

from pathlib import Path

import pytest
from torch import nn

from benchmarks.checkpoint import AFTER, WITHOUT, lengthened, lengthening


def test_steps_are_compared_with_those_of_the_same_turn_however_many_were_watched() -> None:
    # the second turn's machine is twice as slow
    taken = {WITHOUT: [(4.0, 40), (8.0, 40)], AFTER: [(4.1, 40), (12.2, 60)]}
    found = lengthened(taken)
    assert found["lengthening"][AFTER]["extra_seconds"]["low"] == pytest.approx(0.1)
    assert found["lengthening"][AFTER]["extra_seconds"]["high"] == pytest.approx(0.2)
    (claim,) = found["targets"]
    assert (claim["measured"], claim["met"]) == (pytest.approx(0.002), True)
    assert lengthened(taken | {AFTER: [(5.0, 40), (10.0, 40)]})["targets"][0]["met"] is True, "10 steps of 500 are 2 %"
    assert lengthened(taken | {AFTER: [(6.0, 40), (12.0, 40)]})["targets"][0]["met"] is False


def test_the_measurement_watches_the_steps_until_the_checkpoint_is_staged(tmp_path: Path) -> None:
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    found = lengthening(small, tmp_path, turns=1, steps=2)
    for row in found["lengthening"].values():
        assert row["steps_watched"]["least"] >= 2
        assert row["extra_seconds"]["pairs"] == 1
