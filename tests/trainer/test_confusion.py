"""The report's images: those that the predictions name, read from the data set, bounded, and shown only where they belong to the run."""

import base64
import io
import re
import struct
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

import trainer.report.thumbnails
from dataio.config import DataConfig
from dataio.parquet import RowGroup, Split, open_dataset
from tests.trainer.report_runs import MANIFEST, SAMPLE, at, predictions_of, story, write_pictured
from tests.trainer.test_report import HOSTILE, Page, page_of
from trainer.report.files import read_files
from trainer.report.sections import render, write_report
from trainer.report.thumbnails import PER_CELL, PER_RIGHT_CELL, SIDE, WORST, choose, look_up, thumbnail
from trainer.report.timeline import failures, totals
from trainer.runs.folder import find_run
from trainer.runs.summary import timeline
from trainer.settings.tree import RunConfig
from trainer.tasks.predictions import About, Predictions

TEST = open_dataset(SAMPLE).split("test")


def pixels(source: str) -> np.ndarray:
    kind, _, data = source.partition(";base64,")
    assert kind in ("data:image/png", "data:image/jpeg")
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        return np.asarray(image.convert("RGB"))


def stored(sample: int) -> np.ndarray:
    with Image.open(io.BytesIO(TEST.read_group(0).encoded[sample].tobytes())) as image:
        return np.asarray(image.convert("RGB"))


def test_each_cell_shows_its_own_images_the_surest_mistakes_first() -> None:
    found = predictions_of()
    thumbnails = look_up(found, open_dataset(SAMPLE), 10)
    confusion = found.confusion(10)
    assert set(thumbnails.cells) == {(int(i), int(j)) for i, j in np.argwhere(confusion)}
    for (label, answer), rows in thumbnails.cells.items():
        members = np.flatnonzero((found.labels == label) & (found.answers == answer))
        by_confidence = members[np.argsort(found.confidence[members], kind="stable")]
        expected = by_confidence[:PER_RIGHT_CELL] if label == answer else by_confidence[::-1][:PER_CELL]
        assert list(rows) == expected.tolist()
        for row in rows:
            assert np.array_equal(pixels(thumbnails.sources[row]), stored(int(found.ids[row])))
    wrong = np.flatnonzero(found.labels != found.answers)
    assert list(thumbnails.worst) == wrong[np.argsort(-found.confidence[wrong], kind="stable")][:WORST].tolist()
    assert thumbnails.notes == []


def test_the_page_holds_those_images_and_nothing_that_runs_or_loads(tmp_path: Path) -> None:
    found = predictions_of()
    page = page_of(write_pictured(tmp_path / "pictured", found))
    sources = [value for name, key, value in page.attributes if (name, key) == ("img", "src")]
    thumbnails = look_up(found, open_dataset(SAMPLE), 10)
    shown = Counter([*thumbnails.worst, *(row for rows in thumbnails.cells.values() for row in rows)])
    expected = sum((Counter({thumbnails.sources[row]: times}) for row, times in shown.items()), Counter[str]())
    assert not expected - Counter(sources)
    assert (Counter(sources) - expected).total() == 1  # the image that was left out
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "script" not in page.elements
    targets = {value for _, key, value in page.attributes if key == "popovertarget"}
    assert targets == {value for _, key, value in page.attributes if key == "id" and value.startswith("cell-") and "title" not in value}
    alts = [value for name, key, value in page.attributes if (name, key) == ("img", "alt")]
    assert sum("sure" not in alt for alt in alts) == 1
    row = thumbnails.worst[0]
    label, answer = (MANIFEST.classes[index] for index in (found.labels[row], found.answers[row]))
    assert f"{found.keys[row]}: {label} taken for {answer}, {100 * found.confidence[row]:.1f} % sure" in alts
    assert page.text.count(found.keys[row]) == 2  # among the worst, and in its cell


def test_the_same_predictions_give_the_same_page(tmp_path: Path) -> None:
    folder = find_run(str(write_pictured(tmp_path / "pictured")))
    assert render(read_files(folder)) == render(read_files(folder))


def test_keys_from_the_data_stay_text(tmp_path: Path) -> None:
    harmless = page_of(write_pictured(tmp_path / "harmless"))
    hostile = write_pictured(
        tmp_path / "hostile", predictions_of(keys=[f"{HOSTILE}{index}" for index in range(500)]), classes=[HOSTILE] * 10
    )
    page = page_of(hostile)
    assert Counter(page.elements) == Counter(harmless.elements)
    assert {key for _, key, _ in page.attributes} == {key for _, key, _ in harmless.attributes}


def test_images_beyond_the_pages_room_are_left_out_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.report.thumbnails, "PAGE_BYTES", 60_000)
    found = predictions_of()
    thumbnails = look_up(found, open_dataset(SAMPLE), 10)
    uses = Counter([*thumbnails.worst, *(row for rows in thumbnails.cells.values() for row in rows)])
    assert 40_000 < sum(len(thumbnails.sources[row]) * times for row, times in uses.items() if row in thumbnails.sources) <= 60_000
    assert set(thumbnails.worst) <= set(thumbnails.sources)  # the most telling ones come first
    (note,) = thumbnails.notes
    assert note.startswith(f"{len(uses) - len(thumbnails.sources)} more images would make this page larger than 60 kB")
    page = page_of(write_pictured(tmp_path / "pictured", found))
    assert note in page.text


def test_what_would_take_too_much_reading_is_left_out() -> None:
    read = []

    class Halves:
        """The test split as two large row groups."""

        group_offsets = np.array([0, 250, 500])

        def group_bytes(self, group: int) -> int:
            return 200_000_000

        def read_group(self, group: int) -> RowGroup:
            read.append(group)
            whole = TEST.read_group(0)
            return replace(whole, encoded=whole.encoded[250 * group : 250 * group + 250])

    rows = [*range(490, 500), *range(10)]
    encoded, unread = trainer.report.thumbnails._read(cast(Split, Halves()), predictions_of(), rows)
    assert (sorted(encoded), unread, read) == (list(range(490, 500)), 10, [1])
    assert encoded[490] == TEST.read_group(0).encoded[490].tobytes()


def test_many_classes_keep_the_images_of_their_most_frequent_mistakes() -> None:
    count, classes = 4000, 100
    draw = np.random.default_rng(0)
    labels = draw.integers(0, classes, count)
    answers = np.where(draw.random(count) < 0.5, labels, (labels + draw.integers(1, 4, count)) % classes)
    found = Predictions(
        about=About(step=1, split="test", dataset_fingerprint="x", count=count),
        ids=np.arange(count),
        keys=["k"] * count,
        columns={
            "label": labels.astype(np.int32),
            "prediction": answers.astype(np.int32),
            "confidence": draw.random(count).astype(np.float32),
            "loss": np.zeros(count, np.float32),
        },
    )
    worst, cells = choose(found, classes)
    assert len(worst) == WORST
    assert len(cells) == trainer.report.thumbnails.PAIRS
    confusion = found.confusion(classes)
    np.fill_diagonal(confusion, 0)
    assert min(confusion[cell] for cell in cells) >= np.sort(confusion.ravel())[::-1][trainer.report.thumbnails.PAIRS - 1]


def test_a_thumbnail_is_small_upright_and_never_the_files_own_bytes() -> None:
    draw = np.random.default_rng(0)
    large = Image.fromarray(draw.integers(0, 255, (300, 900, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    sink = io.BytesIO()
    large.save(sink, "JPEG", exif=exif, comment=b"<script>alert(1)</script>")
    source = thumbnail(sink.getvalue())
    assert source is not None
    assert pixels(source).shape == (SIDE, SIDE // 3, 3)
    assert b"script" not in base64.b64decode(source.partition(",")[2])
    assert thumbnail(b"no image") is None
    assert thumbnail(sink.getvalue()[:200]) is None
    assert thumbnail(b"<svg xmlns='http://www.w3.org/2000/svg'/>") is None


def jpeg_with(exif: bytes) -> bytes:
    """A JPEG file with this EXIF block."""
    sink = io.BytesIO()
    Image.fromarray(np.full((40, 60, 3), 90, dtype=np.uint8)).save(sink, "JPEG", exif=b"Exif\0\0" + exif)
    return sink.getvalue()


ON_ITS_SIDE = (0x0112, 3, 1, b"\0\6")


def tags(*entries: tuple[int, int, int, bytes]) -> bytes:
    """An EXIF block with these entries: tag, type, count, value."""
    packed = b"".join(struct.pack(">HHL4s", tag, kind, count, value.ljust(4, b"\0")) for tag, kind, count, value in sorted(entries))
    return b"MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + packed + struct.pack(">L", 0)


@settings(max_examples=60, deadline=None)
@given(
    odd=st.tuples(
        st.sampled_from([0x0100, 0x010E, 0x011A, 0x0128, 0x0213, 0x02BC, 0x8769, 0x8825, 0x927C]),
        st.integers(0, 14),
        st.sampled_from([0, 1, 2, 4, 1000, 2**32 - 1]),
        st.binary(max_size=4),
    )
)
@pytest.mark.filterwarnings("ignore")
def test_an_image_with_malformed_tags_is_shown(odd: tuple[int, int, int, bytes]) -> None:
    source = thumbnail(jpeg_with(tags(ON_ITS_SIDE, odd)))
    assert source is not None
    assert sorted(pixels(source).shape) == [3, 40, 60]  # upright, unless the tag that is read first hides the others


@pytest.mark.parametrize(
    "odd",
    [(0x010E, 5, 1, b""), (0x011A, 1, 1, b""), (0x011A, 6, 1, b"\xff\xff\xff\xff"), (0x0128, 1, 1, b""), (0x02BC, 2, 1, b"")],
)
@pytest.mark.filterwarnings("ignore")
def test_a_tag_that_pillow_can_read_and_not_write_again_leaves_the_image_upright(odd: tuple[int, int, int, bytes]) -> None:
    source = thumbnail(jpeg_with(tags(ON_ITS_SIDE, odd)))
    assert source is not None
    assert pixels(source).shape == (60, 40, 3)


@given(noise=st.binary(max_size=60))
@settings(max_examples=40, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_an_image_whose_tags_are_noise_is_shown(noise: bytes) -> None:
    assert thumbnail(jpeg_with(noise)) is not None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_pillow_turns_it(orientation: int) -> None:
    small = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    sink = io.BytesIO()
    small.save(sink, "PNG", exif=exif)
    source = thumbnail(sink.getvalue())
    assert source is not None
    with Image.open(sink) as opened:
        assert np.array_equal(pixels(source), np.asarray(ImageOps.exif_transpose(opened)))


@given(cut=st.integers(0, 800))
@settings(max_examples=20, deadline=None)
def test_a_cut_image_ends_nothing(cut: int) -> None:
    whole = jpeg_with(tags(ON_ITS_SIDE))
    shown = thumbnail(whole[:cut])
    assert shown is None or cut >= len(whole) - 2


def test_predictions_of_another_evaluation_are_not_used(tmp_path: Path) -> None:
    stale = write_pictured(tmp_path / "stale", predictions_of(step=80))
    assert "predictions.parquet is not used: they are of step 80, the summary is of step 160." in page_of(stale).text
    other = write_pictured(tmp_path / "other")
    (other / "predictions.parquet").write_bytes(predictions_of(seed=1).to_parquet())
    assert "its confusion matrix is not the summary's" in page_of(other).text
    moved = write_pictured(tmp_path / "moved", dataset_fingerprint="cd" * 32)
    assert "they are of another data set" in page_of(moved).text
    fewer = write_pictured(tmp_path / "fewer", confusion=[[1, 0], [0, 1]], classes=["a", "b"], per_class=None)
    assert "they are of other classes" in page_of(fewer).text
    broken = write_pictured(tmp_path / "broken")
    (broken / "predictions.parquet").write_bytes(b"PAR1")
    assert "it is no file of predictions" in page_of(broken).text
    (broken / "predictions.parquet").unlink()
    assert "There is no predictions.parquet, which a run writes when it finishes" in page_of(broken).text
    for folder in (stale, other, moved, fewer, broken):
        page = Page((folder / "report.html").read_text())
        assert page.elements.count("img") <= 1  # the image that was left out, where the data set is known
        assert "Confusion" in page.text


def test_where_the_data_are_gone_the_report_says_so_and_names_the_mistakes(tmp_path: Path) -> None:
    gone = RunConfig(run="gone", data=DataConfig(path=str(tmp_path / "nowhere"), root=str(tmp_path / "root")))
    page = page_of(write_pictured(tmp_path / "gone", config=gone))
    assert "There are no images here: the data set of this run is not there any more" in page.text
    found = predictions_of()
    assert all(found.keys[row] in page.text for row in choose(found, 10)[0])
    assert "img" not in page.elements
    assert "button" not in page.elements


def test_a_run_on_a_source_finds_what_was_converted_and_converts_nothing(tmp_path: Path) -> None:
    config = RunConfig(run="r", data=DataConfig(path="cifar10", root=str(tmp_path / "root")))
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "other").mkdir()
    (tmp_path / "root" / "other" / "manifest.json").write_text("{}")
    (tmp_path / "root" / "sample").symlink_to(SAMPLE)
    page = page_of(write_pictured(tmp_path / "r", config=config))
    assert page.elements.count("img") > 100
    assert sorted(path.name for path in (tmp_path / "root").iterdir()) == ["other", "sample"]


def test_a_data_set_that_the_caller_has_open_is_used(tmp_path: Path) -> None:
    gone = RunConfig(run="gone", data=DataConfig(path=str(tmp_path / "nowhere"), root=str(tmp_path / "root")))
    folder = write_pictured(tmp_path / "gone", config=gone)
    page = Page(Path(write_report(str(folder), open_dataset(SAMPLE))).read_text())
    assert page.elements.count("img") > 100


def test_the_worst_of_many_samples_say_how_many_they_are_of(tmp_path: Path) -> None:
    found = predictions_of()
    some = replace(found, about=replace(found.about, count=9000))
    folder = write_pictured(tmp_path / "some", some)
    assert "Of the 9,000 images, the 500 worst are recorded." in page_of(folder).text


# --- the run in time ------------------------------------------------------------------------------------------------------------------


def test_each_failure_is_on_the_strip_with_what_it_cost() -> None:
    events = story()
    sessions = timeline(events)
    (lost,) = failures(events, sessions)
    assert (lost.at, lost.since_seconds, lost.back_seconds, lost.event["lost_steps"]) == (80.0, 80.0, 5.0, 17)
    assert totals(sessions) == {
        "start_up": 20.0 + 12.0,
        "training": (60.0 - 20.0) + (125.0 - 85.0) + (62.0 - 7.0),
        "lost_work": (80.0 - 60.0) + (126.0 - 125.0),
        "recovery": 5.0,
    }


def test_a_failure_of_a_later_driver_is_where_its_session_is_on_the_strip() -> None:
    again = [at(40_030, "attempt_failed", attempt=3, lost_steps=3), at(40_031, "attempt_started", attempt=4, start_step=100)]
    events = sorted([*story(), *again, at(40_034, "training_started", attempt=4, step=100)], key=lambda event: event["time"])
    _, lost = failures(events, timeline(events))
    assert (lost.at, lost.since_seconds, lost.back_seconds) == (126.0 + 35.0, 40_030.0, 4.0)


def test_the_strip_says_what_the_account_says(tmp_path: Path) -> None:
    folder = write_pictured(tmp_path / "pictured")
    text = re.sub(r"\s+", " ", page_of(folder).text)
    html = (folder / "report.html").read_text()
    shares = [float(share) for share in re.findall(r"<i style=\"flex:([\d.]+) 0 0;background:var\(--\w+\)\" title=\"[^\"]+ on\"", html)]
    assert sum(shares) == pytest.approx(1.0, abs=1e-5)
    assert html.count('class="off"') == 1
    assert "A gap is where nobody was running" in text
    assert "killed (SIGKILL) 17 steps 5.0 s" in text


def test_the_ranks_are_side_by_side(tmp_path: Path) -> None:
    text = re.sub(r"\s+", " ", page_of(write_pictured(tmp_path / "pictured")).text)
    # 1,500 images each: rank 0 waited 12 of 42 s for the others, rank 1 two.
    assert "0 node-0 50 0.71 s" in text
    assert "1 node-1 37.5 0.71 s" in text
    assert "The slowest does 85.7 % of the median." in text
    many = [{**entry, "step_seconds": 40.0 + index} for index, entry in enumerate([rank_entry()] * 1000)]
    page = page_of(write_pictured(tmp_path / "many", ranks=many))
    assert "the slowest and the fastest of them" in page.text
    assert (tmp_path / "many" / "report.html").stat().st_size < 1_000_000
    for broken in ([{}], ["x"], [{**rank_entry(), "steps": 0.0}], None):
        folder = write_pictured(tmp_path / f"broken-{len(list(tmp_path.iterdir()))}", ranks=broken)
        assert "images/s" not in page_of(folder).text


def rank_entry() -> dict[str, float]:
    names = ("steps", "images", "step_seconds", "data_wait_seconds", "exchange_wait_seconds", "checkpoint_stall_seconds")
    return dict(zip(names, (60.0, 1500.0, 42.0, 1.0, 2.0, 0.5), strict=True))
