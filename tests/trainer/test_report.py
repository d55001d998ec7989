"""The report: what it says of runs that went well, badly, or nowhere; and that nothing in the data can make it do anything."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.journal import Journal
from cluster.storage import open_storage
from cluster.text import printable
from trainer.rank.history import CURVE_SCHEMA
from trainer.report.__main__ import main
from trainer.report.files import read_files
from trainer.report.page import Html, tag
from trainer.report.plots import CURVE_POINTS, by_attempt, spans_magnitudes, thinned
from trainer.report.sections import render, write_report
from trainer.report.thumbnails import SHOWN_CLASSES
from trainer.report.verdict import verdict
from trainer.runs.certainty import in_percent, wilson
from trainer.runs.folder import find_run
from trainer.settings.toml import to_toml
from trainer.settings.tree import RunConfig
from trainer.settings.units import percent

CLASSES = ["cat", "dog", "bird"]
CONFUSION = [[90, 8, 2], [5, 95, 0], [1, 0, 99]]


class Page(HTMLParser):
    """Elements, attributes and text of a page; checks that what is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def summary_of(**changes: Any) -> dict[str, Any]:
    scores = [{"recall": 0.9, "precision": 0.94, "f1": 0.92, "support": 100} for _ in CLASSES]
    return {
        "run": "pets",
        "status": "finished",
        "steps": 160,
        "epochs": 4.0,
        "restarts": 0,
        "quarantined": 0,
        "test_accuracy": 284 / 300,
        "images_per_second": 71.0,
        "goodput": 0.93,
        "seconds": 112.0,
        "weights_sha256": "ab" * 32,
        "classes": CLASSES,
        "per_class": scores,
        "confusion": CONFUSION,
        "accounting": {"steps": 100.0, "data_wait": 2.0, "start_up": 10.0},
        "versions": {"torch": "2.15.0"},
    } | changes


def write_run(
    folder: Path,
    *,
    summary: dict[str, Any] | None = None,
    events: list[tuple[str, dict[str, Any]]] | None = None,
    curve_rows: int = 160,
    quarantined: list[dict[str, Any]] | None = None,
) -> Path:
    """A run's folder as trainer.run leaves it."""
    folder.mkdir(parents=True)
    now = [1_700_000_000.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    journal = Journal.open(open_storage(folder.parent), folder.name, "driver", clock)
    journal.write("run_started", command="python -m trainer.run --config quickstart")
    journal.write("attempt_started", attempt=1, workers=1, start_step=0)
    for step in (40, 80, 120, 160):
        journal.write("evaluation", step=step, epoch=step / 40, test_loss=1.0 / step, test_accuracy=0.5 + step / 400)
    for kind, fields in events if events is not None else [("run_finished", {"steps": 160})]:
        journal.write(kind, **fields)
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    if curve_rows:
        rows = [
            {
                "step": step,
                "epoch": step / 40,
                "attempt": 1,
                "time": 1_700_000_000.0 + step,
                "train_loss": 2.0 / step,
                "learning_rate": 0.02,
                "images_per_second": 70.0 + step % 3,
                "data_wait_seconds": 0.01,
                "step_seconds": 0.7,
            }
            for step in range(1, curve_rows + 1)
        ]
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=CURVE_SCHEMA), sink)
        (folder / "curves.parquet").write_bytes(sink.getvalue())
    if quarantined:
        (folder / "quarantine.jsonl").write_text("".join(json.dumps(record) + "\n" for record in quarantined))
    (folder / "config.toml").write_text(to_toml(RunConfig(run=folder.name)))
    return folder


def page_of(folder: Path) -> Page:
    return Page(Path(write_report(str(folder))).read_text())


def test_a_finished_run_says_how_good_it_is_and_shows_everything(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "pets", summary=summary_of())
    assert write_report(str(folder)) == str(folder / "report.html")
    page = page_of(folder)
    assert (
        "94.67 % of the 300 test images are classified correctly (95 % interval: 91.5 to 96.7 %) after 160 steps, 1:52 min. Nothing failed."
        in page.text
    )
    for title in ("Key numbers", "Curves", "Where the time went", "Failures", "Classes", "Confusion", "Reproduce"):
        assert title in page.text
    assert page.elements.count("svg") == 4  # loss, accuracy, learning rate, throughput
    assert f"python -m trainer.run --config {folder}/config.toml --run pets-again" in page.text
    assert "python -m trainer.run --config quickstart" in page.text
    assert re.search(r"torch\s+2\.15\.0", page.text)
    assert 'path = "cifar10"' in page.text


def test_the_page_asks_the_network_for_nothing_and_runs_nothing(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "pets", summary=summary_of()))
    assert not {"script", "link", "iframe", "img", "object", "embed", "base", "form"} & set(page.elements)
    assert not [attribute for attribute in page.attributes if attribute[1] in ("src", "srcset", "action") or attribute[1].startswith("on")]
    links = {value for _, name, value in page.attributes if name in ("href", "xlink:href")}
    assert links
    assert all(link.startswith("#") for link in links)
    text = (tmp_path / "pets" / "report.html").read_text()
    assert "@import" not in text
    assert set(re.findall(r"url\(([^)]{2})", text)) <= {"#f"}
    assert "default-src 'none'" in text


def test_names_in_drawings_are_unique_and_found(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "pets", summary=summary_of()))
    idents = [value for _, name, value in page.attributes if name == "id"]
    assert len(idents) == len(set(idents))
    used = [value[1:] for _, name, value in page.attributes if name in ("href", "xlink:href")]
    used += [match for _, _, value in page.attributes for match in re.findall(r"url\(#([^)]+)\)", value)]
    assert set(used) <= set(idents)


def test_the_drawings_follow_light_and_dark(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "pets", summary=summary_of())
    page_of(folder)
    text = (folder / "report.html").read_text()
    assert "prefers-color-scheme:dark" in text
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert "var(--ink)" in drawn
    assert "var(--s0)" in drawn
    assert re.findall(r"#[0-9a-f]{6}", drawn) == []


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;$\\frac{</style></title>"


def test_text_from_the_data_stays_text(tmp_path: Path) -> None:
    hostile_name = "run"
    summary = summary_of(
        classes=[HOSTILE, "dog", "bird"],
        status="finished",
        versions={HOSTILE: HOSTILE},
        accounting={HOSTILE: 5.0, "steps": 1.0},
        command=HOSTILE,
    )
    events: list[tuple[str, dict[str, Any]]] = [
        ("attempt_failed", {"attempt": 1, "kind": HOSTILE, "message": HOSTILE, HOSTILE: HOSTILE, "lost_steps": 3}),
        (HOSTILE, {}),
        ("run_finished", {}),
    ]
    bad = [{"key": HOSTILE, "reason": HOSTILE, "split": HOSTILE, "sample_id": 3}]
    folder = write_run(tmp_path / hostile_name, summary=summary, events=events, quarantined=bad)
    (folder / "config.toml").write_text(f"# {HOSTILE}\n")
    failed: list[tuple[str, dict[str, Any]]] = [("attempt_failed", {"kind": "x", "message": "y", "lost_steps": 3}), ("run_finished", {})]
    harmless = page_of(write_run(tmp_path / "other", summary=summary_of(), events=failed))
    page = page_of(folder)
    assert set(page.elements) <= set(harmless.elements)
    assert not [attribute for attribute in page.attributes if attribute[1].startswith("on") or attribute[1] == "src"]
    assert page.text.count("<script>alert(1)</script>") >= 10


@given(st.text(), st.text())
def test_tag_gives_back_its_text_and_attributes_as_printable_makes_them(text: str, value: str) -> None:
    class Catch(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[object] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.seen.append((tag, attrs))

        def handle_data(self, data: str) -> None:
            self.seen.append(data)

    text, value = (part.replace("\r", "\n").replace("\0", "0") for part in (text, value))  # which HTML itself replaces
    text, value = printable(text), printable(value)
    catch = Catch()
    catch.feed(tag("p", text, class_=value))
    catch.close()
    assert catch.seen == [("p", [("class", value)]), *([text] if text else [])]
    assert isinstance(tag("p", Html("<b>")), Html)


def test_failures_are_told_with_their_cost(tmp_path: Path) -> None:
    events: list[tuple[str, dict[str, Any]]] = [
        ("attempt_failed", {"attempt": 1, "kind": "worker_lost", "message": "killed by signal 9", "last_step": 57, "lost_steps": 17}),
        ("checkpoint_corrupt", {"path": "checkpoints/step-00000040.g0001", "reason": "sha256 differs"}),
        ("resumed", {"step": 40}),
        ("run_finished", {}),
    ]
    bad = [{"key": "img-7", "reason": "truncated: no IEND", "split": "train", "sample_id": 7}]
    page = page_of(write_run(tmp_path / "pets", summary=summary_of(restarts=1, quarantined=1), events=events, quarantined=bad))
    assert "1 failure lost 17 steps. 1 damaged checkpoint was found and not used. 1 image could not be used." in page.text
    for words in ("killed by signal 9", "sha256 differs", "img-7", "truncated: no IEND", "dashed: failures and restarts"):
        assert words in page.text
    assert "None." not in page.text


def test_what_fails_again_and_again_is_told_once_with_its_count(tmp_path: Path) -> None:
    events: list[tuple[str, dict[str, Any]]] = [
        ("checkpoint_failed", {"attempt": 1, "step": step, "message": f"no space left for step-{step:08d}"}) for step in range(10, 60, 10)
    ]
    text = re.sub(r"\s+", " ", page_of(write_run(tmp_path / "pets", summary=summary_of(), events=events)).text)
    assert text.count("no space left") == 1
    assert "checkpoint failed, 5 times" in text
    assert "steps 10 to 50" in text


def test_a_failure_is_a_sentence_and_its_long_message_waits_to_be_opened(tmp_path: Path) -> None:
    message = "WorkerDied: a worker died.\nWorker info: Worker(\n  actor=..."
    failure = {"attempt": 1, "rank": 1, "kind": "infrastructure", "message": message, "last_step": 37, "lost_steps": 1}
    events: list[tuple[str, dict[str, Any]]] = [
        ("worker_registered", {"attempt": 1, "rank": 1, "pid": 4711}),
        ("attempt_failed", failure),
        ("resumed", {"step": 36, "path": "x"}),
        ("attempt_started", {"attempt": 2, "workers": 2, "start_step": 36}),
    ]
    folder = write_run(tmp_path / "pets", summary=summary_of(), events=events)
    page = page_of(folder)
    assert "Attempt 1 failed on rank 1 at step 37 (infrastructure): WorkerDied: a worker died; 1 step lost" in page.text
    assert "Going on from the checkpoint of step 36" in page.text
    assert "Attempt 2: 2 workers, from step 36" in page.text
    details = re.findall(r"<details>.*?</details>", (folder / "report.html").read_text(), flags=re.DOTALL)
    assert ["Worker info" in text for text in details] == [True, False]  # the other one holds the settings
    assert "4711" not in page.text  # a worker's start is no failure


def test_a_curve_has_a_gap_where_nothing_was_computed() -> None:
    x = np.arange(10.0)
    attempt = np.array([1.0] * 4 + [2.0] * 6)
    xs, ys = by_attempt(x, 2 * x, attempt)
    assert np.array_equal(xs, [0, 1, 2, 3, np.nan, 4, 5, 6, 7, 8, 9], equal_nan=True)
    assert np.array_equal(ys, 2 * xs, equal_nan=True)
    xs, ys = by_attempt(np.arange(50_000.0), np.ones(50_000), np.repeat(np.arange(10.0), 5_000))
    assert len(xs) <= CURVE_POINTS + 10
    assert np.isnan(ys).sum() == 9
    xs, _ = by_attempt(np.zeros(0), np.zeros(0), np.zeros(0))
    assert not np.isfinite(xs).any()


def test_a_loss_that_spans_magnitudes_is_drawn_on_a_logarithmic_axis() -> None:
    assert spans_magnitudes(np.array([70.0, 1.0, 0.5, 0.1, np.nan]))
    assert not spans_magnitudes(np.array([2.3, 1.0, 0.5, 0.3]))
    assert not spans_magnitudes(np.array([70.0, 1.0, 0.5, 0.0]))  # a zero has no logarithm
    assert not spans_magnitudes(np.full(3, np.nan))


def test_a_run_without_failures_says_so(tmp_path: Path) -> None:
    assert "None." in page_of(write_run(tmp_path / "pets", summary=summary_of())).text


def test_a_stopped_run_is_not_taken_for_a_finished_one(tmp_path: Path) -> None:
    events: list[tuple[str, dict[str, Any]]] = [
        ("checkpoint_committed", {"step": 57}),
        ("stop_requested", {"reason": "SIGTERM"}),
        ("run_stopped", {"step": 57}),
    ]
    summary = summary_of(status="stopped", steps=57, test_accuracy=None, per_class=None, confusion=None, accounting=None)
    folder = write_run(tmp_path / "pets", summary=summary, events=events)
    mood, sentence = verdict(read_files(find_run(str(folder))))
    assert mood == "warn"
    assert sentence == (
        "Stopped after 57 steps (SIGTERM) before its end: these numbers are not final; the newest checkpoint is of step 57, "
        "and the same command goes on from there."
    )
    assert "SIGTERM" in page_of(folder).text


def test_a_run_that_failed_says_why(tmp_path: Path) -> None:
    events: list[tuple[str, dict[str, Any]]] = [("run_failed", {"kind": "user", "message": "ZeroDivisionError: division by zero"})]
    folder = write_run(tmp_path / "pets", summary=summary_of(status="failed", test_accuracy=None), events=events)
    mood, sentence = verdict(read_files(find_run(str(folder))))
    assert mood == "bad"
    assert sentence.startswith("Failed after 160 steps: ZeroDivisionError: division by zero")


def test_a_run_that_was_started_again_is_not_judged_by_its_old_summary(tmp_path: Path) -> None:
    events: list[tuple[str, dict[str, Any]]] = [("run_stopped", {}), ("run_started", {}), ("checkpoint_committed", {"step": 80})]
    folder = write_run(tmp_path / "pets", summary=summary_of(status="stopped"), events=events)
    assert verdict(read_files(find_run(str(folder))))[1].startswith("No end is recorded: the run is still going, or was killed; the newest")


def test_a_killed_run_tells_what_it_has_and_what_it_lacks(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "pets", events=[], curve_rows=0))
    assert "No end is recorded" in page.text
    assert "There is no summary.json" in page.text
    assert "There are no curves" in page.text
    assert page.elements.count("svg") == 2  # the evaluations of the journal


@pytest.mark.parametrize("name", ["summary.json", "curves.parquet", "journal.jsonl", "quarantine.jsonl", "config.toml"])
@pytest.mark.parametrize("content", [b"", b"\xff\x00{garbage", b"[1, 2"])
def test_a_damaged_file_costs_its_part_of_the_report_only(tmp_path: Path, name: str, content: bytes) -> None:
    folder = write_run(tmp_path / "pets", summary=summary_of())
    (folder / name).write_bytes(content)
    page = page_of(folder)
    assert "pets" in page.text
    if name != "summary.json":
        assert "94.67 % of the 300 test images" in page.text


def test_many_classes_become_a_picture_and_a_list(tmp_path: Path) -> None:
    count = SHOWN_CLASSES + 10
    confusion = (50 * np.eye(count, dtype=int)).tolist()
    confusion[3][7] = 20
    names = [f"class {index}" for index in range(count)]
    folder = write_run(tmp_path / "pets", summary=summary_of(classes=names, confusion=confusion, per_class=None))
    page = page_of(folder)
    assert "class 3 class 7 20 28.6 %" in re.sub(r"\s+", " ", page.text)
    assert page.elements.count("svg") == 5
    assert [value[:10] for _, name, value in page.attributes if name == "xlink:href" and value.startswith("data:")] == ["data:image"]


def test_weakest_classes_come_first(tmp_path: Path) -> None:
    scores = [{"recall": value, "precision": value, "f1": value, "support": 100} for value in (0.9, 0.2, 0.5)]
    order = (("dog", 0.2), ("bird", 0.5), ("cat", 0.9))
    text = re.sub(r"\s+", " ", page_of(write_run(tmp_path / "pets", summary=summary_of(per_class=scores))).text)
    told = (f"{name} {percent(share)} {in_percent(wilson(share, 100))} {percent(share)} {percent(share)} 100" for name, share in order)
    assert " ".join(told) in text


@given(st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), max_size=3000))
def test_thinning_keeps_ends_and_mean(values: list[float]) -> None:
    y = np.array(values, dtype=np.float64)
    x = np.arange(len(values), dtype=np.float64)
    thin_x, thin_y = thinned(x, y)
    known = y[np.isfinite(y)]
    assert len(thin_x) == len(thin_y) <= CURVE_POINTS
    assert np.isfinite(thin_y).all()
    assert bool(len(thin_y)) == bool(len(known))
    if len(known):
        assert known.min() - 1e-6 <= thin_y.min()
        assert thin_y.max() <= known.max() + 1e-6
    if len(known) <= CURVE_POINTS:
        assert np.array_equal(thin_y, known)


def test_long_runs_have_small_reports(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "pets", summary=summary_of(), curve_rows=20_000)
    page_of(folder)
    assert (folder / "report.html").stat().st_size < 200_000


# --- as a command ---------------------------------------------------------------------------------------------------------------------


def test_the_command_takes_a_path_a_name_and_a_uri(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path / "runs" / "pets", summary=summary_of())
    monkeypatch.chdir(folder)
    for argv in ([str(folder)], ["pets", "--storage", str(tmp_path / "runs")], [f"file://{folder}"], ["."]):
        (folder / "report.html").unlink(missing_ok=True)
        assert main(argv) == 0
        assert capsys.readouterr().out.strip().endswith("pets/report.html")
        assert (folder / "report.html").exists()
    monkeypatch.chdir(tmp_path / "runs")
    (folder / "report.html").unlink()
    assert write_report("pets") == str(folder / "report.html")


def test_the_same_folder_gives_the_same_page(tmp_path: Path) -> None:
    folder = find_run(str(write_run(tmp_path / "pets", summary=summary_of())))
    assert render(read_files(folder)) == render(read_files(folder))


def test_an_unknown_run_is_told_which_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("pets-a", "flowers", "cars"):
        write_run(tmp_path / name, summary=summary_of())
    (tmp_path / "not-a-run").mkdir()
    for argv in (["petz-a", "--storage", str(tmp_path)], [str(tmp_path / "petz-a")]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert "did you mean pets-a?" in said
        assert all(name in said for name in ("flowers", "cars"))
        assert "not-a-run" not in said


def test_an_empty_storage_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no run pets, nor any other in"):
        find_run("pets", str(tmp_path))
    with pytest.raises(ValueError, match="is a whole storage, not a run"):
        find_run("s3://bucket")
    with pytest.raises(ValueError, match="unknown scheme 'ftp'"):
        find_run("ftp://host/runs/pets")
    with pytest.raises(ValueError, match="RUN is empty"):
        find_run("")
