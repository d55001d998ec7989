"""An event has one sentence, whoever tells it."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.report_runs import MULTILABEL, MULTITASK, write_pictured
from tests.trainer.test_report import page_of
from trainer.runs.events import KINDS, LONGEST, is_followed, is_told_whole, is_unusual, plainly, words_of
from trainer.runs.measures import capital
from trainer.runs.watch import RunTracker

PROJECT = Path(__file__).resolve().parents[2]
TOLD: list[dict[str, Any]] = [
    {"event": "attempt_failed", "attempt": 1, "rank": 1, "kind": "infrastructure", "message": "gone.\nx", "last_step": 7, "lost_steps": 1},
    {"event": "checkpoint_corrupt", "path": "checkpoints/step-8", "reason": "sha256 differs"},
    {"event": "resumed", "step": 1200, "path": "x"},
    {"event": "attempt_started", "attempt": 2, "workers": 1, "start_step": 40},
    {"event": "hang", "kind": "stuck", "ranks": [0, 3], "seconds": 300.0},
    {"event": "straggler", "rank": 1, "step": 50, "own_seconds": 0.2, "others_seconds": 0.1},
    {"event": "run_stopped", "step": 57, "signal": "SIGTERM"},
    {"event": "predictions_not_written", "attempt": 1, "message": "no space left"},
    {"event": "of_a_newer_program", "what": 1.23456789},
]
SENTENCES = [
    "attempt 1 failed on rank 1 at step 7 (infrastructure): gone; 1 step lost",
    "checkpoint checkpoints/step-8 is damaged: sha256 differs",
    "going on from the checkpoint of step 1,200",
    "attempt 2: 1 worker, from step 40",
    "ranks 0, 3 made no progress for 5:00 min (stuck)",
    "step 50: rank 1 is slow, 0.2 s a step of its own; the others 0.1 s",
    "stopped at step 57 by SIGTERM",
    "predictions_not_written: no space left  attempt=1",
    "of_a_newer_program: what=1.23457",
]


def test_watch_and_report_say_the_same(tmp_path: Path) -> None:
    events = [{"time": 1_700_000_000.0 + index, **event} for index, event in enumerate(TOLD)]
    tracker = RunTracker("pets")
    assert [tracker.take(event).split("  ", 1)[1] for event in events] == SENTENCES
    text = re.sub(r"\s+", " ", page_of(write_pictured(tmp_path / "pets", events=events)).text)
    for event, sentence in zip(TOLD, SENTENCES, strict=True):
        words = capital(sentence) if words_of(event) else sentence.partition(": ")[2]
        assert " ".join(f"{event['event'].replace('_', ' ')} {words}".split()) in text


def test_every_event_in_the_table_is_one_that_a_program_writes() -> None:
    source = "\n".join(
        path.read_text() for room in ("cluster", "trainer") for path in (PROJECT / room).rglob("*.py") if path.name != "events.py"
    )
    assert [name for name in KINDS if not re.search(rf'"{name}"', source)] == []


def test_an_evaluation_is_told_in_the_measures_of_its_task() -> None:
    event = {"event": "evaluation", "step": 40, "test_loss": 0.5, "test_accuracy": 0.875, "test_map": 0.5, "test_micro_f1": 0.25}
    assert words_of(event) == "step 40: test accuracy 87.5 %, loss 0.5000"
    assert words_of(event, MULTILABEL) == "step 40: test mAP 50.0 %, test micro F1 25.0 %, loss 0.5000"
    assert words_of({"event": "evaluation", "step": 40}, MULTILABEL) == "step 40: test mAP ?, loss nan"
    numbers = {"event": "evaluation", "step": 40, "test_loss": 0.5, "test_score": 0.5, "test_weight_mae": 3.91234}
    assert words_of(numbers, MULTITASK) == "step 40: test score 50.0 %, test weight MAE 3.912, loss 0.5000"


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=400), lambda inner: st.lists(inner, max_size=3)
)


@given(
    name=st.sampled_from([*KINDS, "new_kind"]),
    fields=st.dictionaries(
        st.sampled_from(["step", "seconds", "ranks", "own_seconds", "message", "test_loss", "rank", "workers"]), _values
    ),
)
def test_an_event_of_any_shape_is_put_into_words(name: str, fields: dict[str, Any]) -> None:
    event = {"time": 0.0, "event": name, **fields}
    assert len(plainly(event)) <= LONGEST
    assert isinstance(words_of(event), str)
    assert is_followed(event) in (True, False)
    assert is_unusual(event) in (True, False)
    line = RunTracker("pets").take(event)
    assert bool(line) == is_followed(event)
    assert line.isprintable()


@pytest.mark.parametrize(
    ("text", "is_whole"), [("short", True), ("two\nlines", False), ("x" * LONGEST, True), ("x" * (LONGEST + 1), False)]
)
def test_what_has_no_room_on_a_line_is_known_to_have_none(text: str, is_whole: bool) -> None:
    assert is_told_whole({"event": "stacks", "text": text}) == is_whole
