"""Runs that are killed, stopped and damaged end in the same bits, or say why not. Real Ray, real processes, real signals."""

import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import torchvision
from safetensors.torch import save_file

from cluster.ledger import read_ledger
from tests.e2e.conftest import TRAIN_IMAGES
from tests.e2e.running import Run, processes_of_session
from trainer.tasks.predictions import PREDICTIONS_FILE, Predictions

EPOCHS = 8
STEPS_PER_EPOCH = TRAIN_IMAGES // 20
STEPS = EPOCHS * STEPS_PER_EPOCH
COMMON = ["--workers", "2", "--train.epochs", str(EPOCHS), "--train.checkpoint-every", "5", "--data.max-bad-fraction", "0.01"]

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def uninterrupted(storage: Path, images: Path) -> Run:
    run = Run(*COMMON, storage=storage, name="uninterrupted", data=images)
    assert run.finish() == 0, run.output()
    return run


def assert_each_sample_once_an_epoch(run: Run) -> None:
    seen = Counter((record.epoch, sample) for record in read_ledger(run.folder / "ledger") for sample in record.ids)
    assert seen == Counter((epoch, sample) for epoch in range(EPOCHS) for sample in range(TRAIN_IMAGES))


def test_a_run_ends_with_numbers_a_model_and_a_report(uninterrupted: Run) -> None:
    summary = uninterrupted.summary()
    assert summary["status"] == "finished"
    assert (summary["steps"], summary["workers"], summary["restarts"]) == (STEPS, 2, 0)
    assert summary["samples_seen"] == EPOCHS * TRAIN_IMAGES
    assert summary["quarantined"] == 1  # the file that is no image
    assert sum(map(sum, summary["confusion"])) == summary["test_count"] == 60
    assert summary["test_accuracy"] == sum(summary["confusion"][c][c] for c in range(10)) / 60
    assert abs(sum(summary["accounting"].values()) - summary["seconds"]) < 0.5
    found = Predictions.from_parquet((uninterrupted.folder / PREDICTIONS_FILE).read_bytes())
    assert found.is_complete
    assert found.confusion(10).tolist() == summary["confusion"]
    assert [(rank["steps"], rank["images"]) for rank in summary["ranks"]] == [(STEPS, EPOCHS * TRAIN_IMAGES / 2)] * 2
    for name in ("config.toml", "journal.jsonl", "curves.parquet", "report.html", "model/model.safetensors", "model/config.json"):
        assert (uninterrupted.folder / name).exists(), name
    assert_each_sample_once_an_epoch(uninterrupted)


def test_a_worker_killed_in_mid_epoch_changes_no_bit_and_loses_no_sample(uninterrupted: Run, storage: Path, images: Path) -> None:
    run = Run(*COMMON, storage=storage, name="killed", data=images)
    run.wait_for("checkpoint_committed", step=30)  # in the middle of the third epoch
    run.kill_worker(rank=1)
    assert run.finish() == 0, run.output()
    assert run.summary()["weights_sha256"] == uninterrupted.summary()["weights_sha256"]
    assert (run.folder / PREDICTIONS_FILE).read_bytes() == (uninterrupted.folder / PREDICTIONS_FILE).read_bytes()
    assert run.summary()["restarts"] == 1
    assert run.summary()["recovery_seconds"] > 0
    failed = run.wait_for("attempt_failed")
    assert failed["kind"] == "infrastructure"
    assert run.wait_for("resumed")["step"] >= 30
    assert f"attempt 1 failed on rank {failed['rank']} at step" in run.output()
    assert "(raylet)" not in run.output()  # our line is all there is
    assert_each_sample_once_an_epoch(run)


def test_a_run_whose_worker_dies_whose_rank_stops_and_whose_coordinator_dies_ends_in_the_same_bits(
    uninterrupted: Run, storage: Path, images: Path
) -> None:
    run = Run(*COMMON, storage=storage, name="hit", data=images)
    run.wait_for("checkpoint_committed", step=10)
    # Of this session's processes one of Ray's own workers: an agent, and its rank with it.
    agent, _ = [pid for pid in processes_of_session(run.process.pid) if "RayTrainWorker" in command_of(pid)]
    os.kill(agent, signal.SIGKILL)
    run.wait_for("first_step", attempt=2)

    run.kill_worker(rank=0, number=signal.SIGSTOP)
    hang = run.wait_for("hang")
    assert (hang["kind"], hang["ranks"]) == ("stopped", [0])
    run.wait_for("first_step", attempt=3)
    stacks = [event for event in run.events() if event["event"] == "stacks"]
    assert sorted(event["rank"] for event in stacks) == [0, 1]
    assert all("train_rank" in event["text"] for event in stacks)

    # Of this session's processes: the coordinator, while the ranks train on. It is stopped, so the driver kills it.
    (coordinator,) = [pid for pid in processes_of_session(run.process.pid) if "CoordinatorActor" in command_of(pid)]
    os.kill(coordinator, signal.SIGSTOP)
    hung = run.wait_for("coordinator_hung")
    assert (hung["kind"], hung["pid"]) == ("stopped", coordinator)
    run.wait_for("coordinator_restarted")
    assert run.finish() == 0, run.output()
    summary = run.summary()
    assert summary["weights_sha256"] == uninterrupted.summary()["weights_sha256"]
    assert (summary["hangs"], summary["restarts"]) == (1, 2)
    assert summary["accounting"]["hang"] >= 4
    assert "the ranks trained on" in run.output()
    assert_each_sample_once_an_epoch(run)


def test_ctrl_c_commits_and_says_how_to_go_on_and_damage_falls_back_or_refuses(uninterrupted: Run, storage: Path, images: Path) -> None:
    run = Run(*COMMON, "--cluster.heartbeat-seconds", "0.2", storage=storage, name="stopped", data=images)
    run.wait_for("checkpoint_committed", step=10)
    run.signal(signal.SIGINT)
    assert run.finish() == 128 + signal.SIGINT, run.output()
    stopped = run.wait_for("run_stopped")
    assert f"step {stopped['step']} of {STEPS} is saved" in run.output()
    assert "python -m trainer.run" in run.output()
    newest = run.checkpoints()[-1]
    assert newest.name.startswith(f"step-{stopped['step']:08d}")
    assert run.summary()["status"] == "stopped"

    # One flipped bit in the newest checkpoint: the one before is taken, and that is said.
    flip_one_bit(newest / "model.safetensors")
    before = run.checkpoints()[-2]
    again = Run(*COMMON, storage=storage, name="stopped", data=images)
    assert again.finish() == 0, again.output()
    assert again.wait_for("checkpoint_corrupt")["path"].endswith(newest.name)
    assert again.wait_for("resumed")["step"] == int(before.name[5:13])
    assert "is damaged" in again.output()
    assert again.summary()["weights_sha256"] == uninterrupted.summary()["weights_sha256"]
    assert_each_sample_once_an_epoch(again)

    # In all of them: no start from zero.
    (again.folder / "summary.json").unlink()
    for checkpoint in again.checkpoints():
        flip_one_bit(checkpoint / "optimizer.safetensors")
    refused = Run(*COMMON, storage=storage, name="stopped", data=images)
    assert refused.finish() == 2, refused.output()
    assert "none is intact" in refused.output()
    assert not any(event["event"] == "attempt_started" for event in refused.new_events())


def test_what_only_the_workers_can_find_ends_the_run_at_once(storage: Path, images: Path) -> None:
    # The driver's check finds good weights; they are damaged before the workers read them.
    weights = storage / "good.safetensors"
    save_file(torchvision.models.shufflenet_v2_x0_5(weights=None).state_dict(), weights)
    run = Run(*COMMON, "--model.weights", str(weights), storage=storage, name="late", data=images)
    run.wait_for("run_started")
    weights.write_bytes(b"not a safetensors file")
    assert run.finish() == 1, run.output()
    assert f"rank 0: WeightsError: model.weights={weights} holds on " in run.output()
    assert "another file" in run.output()
    assert "Traceback" not in run.output()
    assert sum(event["event"] == "attempt_started" for event in run.events()) == 1


def test_weights_that_cannot_be_read_cost_no_cluster(storage: Path, images: Path) -> None:
    weights = storage / "weights.safetensors"
    weights.write_bytes(b"not a safetensors file")
    run = Run(*COMMON, "--model.weights", str(weights), storage=storage, name="broken-weights", data=images)
    assert run.finish() == 2, run.output()
    assert f"error: model.weights={weights} cannot be read" in run.output()
    assert "Traceback" not in run.output()
    assert "Ray" not in run.output()
    assert not run.folder.exists()


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def flip_one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0b100
    path.write_bytes(data)
