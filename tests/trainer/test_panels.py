"""The report's panels of tasks that are no classification, and what becomes of panels that cannot be shown."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataio.config import DataConfig
from dataio.parquet import open_dataset
from tests.trainer.report_runs import (
    LABELS,
    MULTILABEL,
    MULTITASK,
    SAMPLE,
    label_entries,
    labels_of,
    recorded,
    write_multilabel,
    write_multitask,
    write_pictured,
)
from tests.trainer.test_report import HOSTILE, Page, page_of
from trainer.report.files import RunFiles, read_files
from trainer.report.page import NOTHING, Html
from trainer.report.panels import PANELS, panels_of
from trainer.report.panels.answers import NOT_KNOWN, answers_of, names_of
from trainer.report.panels.labels import SHOWN_LABELS, labels_table
from trainer.report.panels.numbers import numbers_of
from trainer.report.thumbnails import WORST, look_up, worst_rows
from trainer.runs.folder import find_run
from trainer.settings.toml import to_toml
from trainer.settings.tree import RunConfig
from trainer.tasks.info import CLASSIFICATION, Measure, TaskInfo


def text_of(page: Page | Html) -> str:
    return re.sub(r"\s+", " ", page.text if isinstance(page, Page) else Page(page).text)


def files_of(folder: Path, *, pictures: bool = False) -> RunFiles:
    return read_files(find_run(str(folder)), pictures=pictures)


def first_words(html: Html) -> list[str]:
    """Of each row of a table, its first cell."""
    return re.findall(r"<tr><td>([^<]*)</td>", html)


@pytest.mark.parametrize("info", [CLASSIFICATION, MULTILABEL, MULTITASK])
def test_the_panels_that_a_task_names_are_there(info: TaskInfo) -> None:
    assert set(info.panels) <= PANELS.keys()
    assert "measures" in PANELS


def test_a_multilabel_run_is_told_by_its_own_measures(tmp_path: Path) -> None:
    page = page_of(write_multilabel(tmp_path / "labels"))
    text = text_of(page)
    assert "Test mAP 73.21 % on the 500 test images after 160 steps" in text
    assert "Test micro F1 68.00 % Test exact match 31.00 %" in text
    assert "Test measures, %" in text
    assert "classified correctly" not in text
    assert "Confusion" not in text


def test_labels_are_told_weakest_first_and_one_that_no_sample_has_last() -> None:
    entries = label_entries(*labels_of())
    assert first_words(labels_table(entries, "images")) == [*reversed(LABELS[:-1]), LABELS[-1]]


def test_missed_and_wrongly_given_labels_are_counted(tmp_path: Path) -> None:
    truth, probabilities = labels_of()
    given = probabilities >= 0.5
    text = text_of(PANELS["labels"](files_of(write_multilabel(tmp_path / "labels"))))
    missed = ((truth == 1) & ~given).sum(0)
    wrong = ((truth == 0) & given).sum(0)
    told_missed, told_wrong = text.partition("Most often given wrongly")[::2]
    told_missed = told_missed.partition("Most often missed")[2]
    for told, counts, of in ((told_missed, missed, truth.sum(0)), (told_wrong, wrong, given.sum(0))):
        for name, count, whole in zip(LABELS, counts.tolist(), of.tolist(), strict=True):
            assert (f" {name} {count} {100 * count / whole:.1f} % " in f"{told} ") if count else f" {name} " not in told


_ratio = st.none() | st.floats(0, 1)


@given(
    st.lists(
        st.fixed_dictionaries(
            {"name": st.sampled_from("abcdef"), "average_precision": _ratio, "f1": _ratio, "support": st.none() | st.integers(0, 9)}
        ),
        max_size=2 * SHOWN_LABELS,
    )
)
def test_a_table_of_labels_is_bounded_and_loses_none_silently(entries: list[dict[str, Any]]) -> None:
    html = labels_table(entries, "images")
    assert len(first_words(html)) == min(len(entries), SHOWN_LABELS)
    assert ("stronger ones in summary.json" in html) == (len(entries) > SHOWN_LABELS)


def test_each_head_is_told_by_its_kind(tmp_path: Path) -> None:
    page = page_of(write_multitask(tmp_path / "tasks"))
    text = text_of(page)
    assert "kind (one label of several, known of 500 images)" in text
    assert "traits (any number of labels, known of 500 images)" in text
    assert "weight (a number, known of 480 images)" in text
    assert "colour (one label of several, known of 0 images)" in text
    assert "MAE 3.91 RMSE 5.02 R² 0.87" in text
    assert "is ↓ taken for →" in text
    assert "Said minus true" in text
    assert page.elements.count("svg") == 7  # loss, ratios, MAE, learning rate, speed; the number's two
    idents = [value for _, key, value in page.attributes if key == "id"]
    assert len(idents) == len(set(idents))
    assert {value[1:] for _, key, value in page.attributes if key == "href" and value.startswith("#head")} <= set(idents)


def test_a_confusion_matrix_too_large_for_a_head_is_left_to_the_summary(tmp_path: Path) -> None:
    run = files_of(write_multitask(tmp_path / "tasks"))
    details = {"confusion": np.eye(21, dtype=int).tolist(), "classes": [f"class {index}" for index in range(21)]}
    head = {"kind": "label", "count": 21, "measures": {"accuracy": 1.0}, "details": details}
    told = PANELS["heads"](replace(run, summary={"heads": {"many": head}}))
    assert "accuracy" in told
    assert "taken for" not in told


def test_numbers_leave_out_what_is_not_known(tmp_path: Path) -> None:
    run = files_of(write_multitask(tmp_path / "tasks"))
    pair = numbers_of(run.predictions, "weight")
    assert pair is not None
    assert [len(values) for values in pair] == [480, 480]
    assert numbers_of(run.predictions, "kind") is None
    assert numbers_of(None, "weight") is None
    assert run.predictions is not None
    blank = {name: np.full_like(column, np.nan) if column.dtype.kind == "f" else column for name, column in run.predictions.columns.items()}
    assert numbers_of(replace(run.predictions, columns=blank), "weight") is None


def test_the_worst_samples_are_those_of_the_largest_loss() -> None:
    losses = np.zeros(500, np.float32)
    losses[[7, 99, 3]] = (5.0, 9.0, np.inf)
    losses[4] = np.nan  # nothing is known of it
    found = recorded({"loss": losses})
    assert worst_rows(found)[:3] == [3, 99, 7]
    assert 4 not in worst_rows(replace(found, columns={"loss": np.where(losses > 0, losses, np.nan)}))
    thumbnails = look_up(found, open_dataset(SAMPLE), 0)
    assert (len(thumbnails.worst), thumbnails.cells, len(thumbnails.sources)) == (WORST, {}, WORST)
    assert worst_rows(recorded({"other": losses})) == []


def test_the_worst_samples_are_shown_with_what_is_true_and_what_was_said(tmp_path: Path) -> None:
    folder = write_multilabel(tmp_path / "labels")
    page = page_of(folder)
    run = files_of(folder)
    assert run.predictions is not None
    worst = worst_rows(run.predictions)
    (answer,) = answers_of(run.predictions, worst[0], names_of(run.summary))
    truth, probabilities = labels_of()
    assert answer.true == ", ".join(name for name, there in zip(LABELS, truth[worst[0]], strict=True) if there)
    surest = int(np.argmax(probabilities[worst[0]]))
    assert answer.said.startswith(f"{LABELS[surest]} {100 * probabilities[worst[0]][surest]:.0f} %")
    assert not answer.is_right
    assert sum(name == "img" for name in page.elements) == WORST + 1, "and the one that was left out"
    alts = [value for name, key, value in page.attributes if (name, key) == ("img", "alt")]
    assert alts[0].startswith(f"{run.predictions.keys[worst[0]]}: {answer.true}, said {answer.said}, loss ")


def test_without_the_data_set_the_worst_samples_are_a_table(tmp_path: Path) -> None:
    folder = write_multitask(tmp_path / "tasks")
    gone = RunConfig(run="gone", data=DataConfig(path=str(tmp_path / "nowhere"), root=str(tmp_path / "root")))
    (folder / "config.toml").write_text(to_toml(gone))
    page = page_of(folder)
    assert "img" not in page.elements
    assert "There are no images here: the data set of this run is not there any more" in page.text
    assert "key kind: is kind: said traits: is traits: said weight: is weight: said loss" in text_of(page)


def test_what_is_not_known_of_a_sample_is_no_mistake() -> None:
    columns = {
        "a_label": np.array([-1], np.int32),
        "a_prediction": np.array([2], np.int32),
        "b_labels": np.array([[-1, 1, 0]], np.int8),
        "b_probabilities": np.array([[0.9, 0.8, 0.1]], np.float32),
        "c_target": np.array([np.nan], np.float32),
        "c_prediction": np.array([2.5], np.float32),
        "loss": np.array([0.0], np.float32),
    }
    found = recorded({name: np.repeat(column, 500, axis=0) for name, column in columns.items()})
    said = answers_of(found, 0, names_of({"heads": {"a": {"details": {"classes": ["x", "y", "z"]}}}}))
    assert [(answer.name, answer.true, answer.said, answer.is_right) for answer in said] == [
        ("a", NOT_KNOWN, "z", True),
        ("b", "1", "0 90 %, 1 80 %", True),
        ("c", NOT_KNOWN, "2.5", None),
    ]


# --- tasks of others ------------------------------------------------------------------------------------------------------------------


def test_a_panel_that_is_not_there_is_a_note_and_the_measures_are_shown(tmp_path: Path) -> None:
    toy = TaskInfo(name="toy", unit="texts", measures=(Measure(name="bleu", title="BLEU"),), panels=("tea-leaves",))
    folder = write_multilabel(tmp_path / "toy", task=toy.to_json(), test_bleu=0.4321, quarantined=3)
    page = page_of(folder)
    text = text_of(page)
    assert "The task names the panel tea-leaves, which this report does not have." in text
    assert "measure test BLEU 43.21 %" in text
    assert "Test BLEU 43.21 % on the 500 test texts after 160 steps" in text
    assert "3 texts could not be used" in text
    assert "Texts/s" in text
    assert "images" not in text.replace("There are no images", "")


@pytest.mark.parametrize("value", [7, "x", [1, "x", None], {"a": 1}, [{}], {"a": {"details": 3, "measures": [1], "kind": 5}}])
@pytest.mark.parametrize("key", ["labels", "heads", "per_class", "confusion"])
def test_an_evaluation_of_any_shape_gives_a_page(tmp_path: Path, key: str, value: Any) -> None:
    for write in (write_multilabel, write_multitask, write_pictured):
        page = page_of(write(tmp_path / write.__name__, **{key: value}))
        assert "Reproduce" in page.text


def test_a_panel_that_fails_costs_itself_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(run: RunFiles) -> Html:
        raise KeyError("no such thing")

    monkeypatch.setattr("trainer.report.panels.PANELS", {**PANELS, "labels": broken})
    made, problems = panels_of(files_of(write_multilabel(tmp_path / "labels")))
    told = text_of(Html("".join(made)))
    assert problems == ["The panel labels could not be made of what the evaluation wrote: 'no such thing'."]
    assert problems[0] in told
    assert "Worst images" in told


def test_a_task_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    folder = write_pictured(tmp_path / "odd", task={"name": "odd"})
    text = text_of(page_of(folder))
    assert "Its task cannot be read: " in text
    assert "of the 500 test images are classified correctly" in text


def test_where_there_is_nothing_to_show_a_panel_is_nothing(tmp_path: Path) -> None:
    run = replace(files_of(write_pictured(tmp_path / "plain")), summary={}, predictions=None)
    assert {name: panel(run) for name, panel in PANELS.items()} == dict.fromkeys(PANELS, NOTHING)


@pytest.mark.parametrize("write", [write_multilabel, write_multitask])
def test_names_from_the_data_stay_text(tmp_path: Path, write: Any) -> None:
    harmless_folder = write(tmp_path / "harmless")
    harmless = page_of(harmless_folder)
    summary = json.loads((harmless_folder / "summary.json").read_text())
    key = "labels" if "labels" in summary else "heads"
    text = json.dumps(summary[key])
    for name in (*LABELS, "T-shirt/top", "Pullover"):
        text = text.replace(json.dumps(name), json.dumps(f"{HOSTILE}{name}"))
    page = page_of(write(tmp_path / "hostile", **{key: json.loads(text)}))
    assert set(page.elements) <= set(harmless.elements)
    assert {key for _, key, _ in page.attributes} == {key for _, key, _ in harmless.attributes}
    assert page.text.count("<script>alert(1)</script>") > 10
