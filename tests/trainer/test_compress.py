"""The table of a compression says what the stages' answers say, and what is wrong with a command is refused before a run. Real runs are in
tests/e2e/test_compress.py."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.test_evaluate import SAMPLE
from trainer.compress.page import drawn
from trainer.compress.results import Answered, Timed, aligned, interval, lost, p99, table, to_json
from trainer.runs.certainty import paired_interval, wilson
from trainer.tasks.info import CLASSIFICATION, Measure

ACCURACY = CLASSIFICATION.headline


def row(stage: str, right: str, **fields: Any) -> Answered:
    known = {"file": f"exports/{stage}/model.onnx", "weights_sha256": "ab", "bytes": 1000, "count": len(right), "right": right}
    return Answered(**({"stage": stage, "value": right.count("1") / max(1, len(right))} | known | fields))


def timed(*milliseconds: float) -> Timed:
    return Timed(milliseconds={"1": milliseconds, "32": [10 * each for each in milliseconds]}, peak_bytes=5_000_000)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_what_is_lost_is_counted_image_by_image(pairs: list[tuple[bool, bool]]) -> None:
    first, other = (row(name, "".join("01"[pair[index]] for pair in pairs)) for index, name in enumerate(("whole", "pruned")))
    expected = paired_interval(sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs), len(pairs))
    assert lost(first, other) == expected
    assert interval(other, ACCURACY) == wilson(other.value, len(pairs))


def test_answers_that_are_not_right_or_wrong_have_no_interval() -> None:
    error = Measure(name="mae", title="Mean error", unit="number", higher_is_better=False)
    rows = [row("whole", "", value=2.0, count=10), row("int8", "", value=2.5, count=10)]
    assert lost(*rows) is None
    assert interval(rows[0], error) is None
    _, cells = table(rows, {"whole": timed(1.0), "int8": timed(1.0)}, error)
    assert [cell[1:4] for cell in cells] == [["2", "-", "-"], ["2.5", "-", "-"]]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300))
def test_the_99th_percentile_is_a_value_that_at_most_one_in_a_hundred_exceeds(values: list[float]) -> None:
    found = p99(values)
    assert found in values
    assert sum(value > found for value in values) <= len(values) / 100
    assert sum(value >= found for value in values) > len(values) / 100 or found == max(values)


def test_the_json_keeps_what_is_a_function_of_the_weights_apart_from_what_was_measured() -> None:
    rows = [row("whole", "1111"), row("int8", "1101", bytes=300, refused="it lost too much")]
    one, two = (to_json(rows, {"whole": timed(*each), "int8": timed(*each)}, ACCURACY, threads=1) for each in ([1.0, 2.0], [3.0]))
    assert one["stages"] == two["stages"]
    assert one["measured"] != two["measured"]
    assert one["measured"]["whole"]["milliseconds"]["32"] == {"median": 15.0, "p99": 20.0, "calls": 2}
    assert one["stages"][0]["lost_95_percent"] is None
    assert one["stages"][1]["lost_95_percent"] == list(paired_interval(1, 0, 4))
    assert "right" not in json.dumps(one)


def test_table_and_page_show_every_stage_and_what_is_refused() -> None:
    rows = [row("whole", "1111"), row("<int8>", "1101", refused="<b>it lost</b>")]
    times = {"whole": timed(1.0), "<int8>": timed(2.0)}
    lines = aligned(*table(rows, times, ACCURACY))
    assert lines[0].split()[0] == "stage"
    assert "100.00 %" in lines[1]
    assert lines[2].startswith("<int8> (refused)  75.00 %")
    assert "25.00 (" in lines[2]
    text = drawn(rows, times, ACCURACY)
    assert "<b>it lost" not in text
    assert "&lt;int8&gt; is refused: &lt;b&gt;it lost" in text
    assert text.count("<svg") == 1


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ([], "nothing is to be made smaller; give one or more of --distil MODEL, --prune 0.5, --int8"),
        (["--prune", "1.5"], "--prune 1.5 must be above 0 and below 1"),
        (["--prune", "0.5", "--multiple", "0"], "--multiple 0: channels that stay"),
        (["--int8", "--teach"], "--teach is for the fine-tuning after --prune"),
        (["--int8", "--max-drop", "nan"], "--max-drop nan is a limit"),
        (["--prune", "0.5", "--aware", "always"], "--aware always is for --int8, which is not asked for"),
        (["--int8", "--calls", "0"], "--calls 0 times nothing"),
        (["--int8", "--threads", "0"], "--threads 0 times nothing"),
        (["--distil", "resnet18", "--train.teacher", "other"], "train.teacher=other: --distil makes the run the teacher"),
        (["--int8", "--storage", "s3://bucket/x"], "--storage s3://bucket/x is on another machine"),
        (["--int8", "--data.batch-size", "0"], "data.batch_size=0"),
    ],
)
def test_what_is_wrong_is_refused_before_a_run(argv: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch_pruning")
    pytest.importorskip("onnxruntime")
    from trainer.compress.__main__ import main

    with pytest.raises(SystemExit) as stop:
        main(["--data.path", str(SAMPLE), "--storage", str(tmp_path / "runs"), "--workers", "1", *argv])
    assert stop.value.code == 2
    assert problem in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "runs").exists()


def test_a_folder_of_another_job_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    from trainer.compress.__main__ import main

    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "job.json").write_text('{"begins_with": "another", "stages": {}, "given": {}}')
    with pytest.raises(SystemExit) as stop:
        main(
            ["--data.path", str(SAMPLE), "--storage", str(tmp_path), "--run", "job", "--workers", "1", "--model.weights", "none", "--int8"]
        )
    assert stop.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "was begun with other aware, begins_with, data.path, distil, distil_weights, int8, model.weights, multiple, prune, teach;" in said
    )
    assert [path.name for path in (tmp_path / "job").iterdir()] == ["job.json"]
