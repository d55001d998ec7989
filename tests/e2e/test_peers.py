"""The plain Ray Train peer of benchmarks/peers is a fair one: it trains, and after a SIGKILL it goes on after its last reported epoch."""

from pathlib import Path

import pytest

from benchmarks.peers.contenders import STARTED, Contender, Job
from benchmarks.peers.images import contenders, lay_out
from benchmarks.peers.watch import live
from benchmarks.timm_weights import write_weights


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_plain_ray_train_loop_goes_on_after_the_epoch_that_it_reported(tmp_path: Path) -> None:
    lay_out(tmp_path / "images", {"train": 100, "test": 20})
    job = Job(data=tmp_path / "images", train_samples=100, pretrained=write_weights(tmp_path / "weights.pth"), epochs=3)
    plain = contenders(job, None, "")["plain ray train"]
    place = tmp_path / "place"
    counted = Contender(
        name=plain.name, command=plain.command, accuracies=lambda place: [float(number) for number, _ in enumerate(plain.accuracies(place))]
    )
    first = live(counted, place, timeout_seconds=180, until=1.0)  # killed as soon as it has said two epochs, of which one is reported
    assert len(first.evaluations) == 2
    second = live(plain, place, timeout_seconds=180)
    assert len(second.evaluations) in (1, 2), "the first epoch is not repeated"
    said = (place / "output.log").read_text()
    before, after = said.split(STARTED)[1:]
    assert "epoch 1: test accuracy" in before
    assert "epoch 1: test accuracy" not in after
    assert "epoch 3: test accuracy" in after
