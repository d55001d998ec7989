"""Answers to any number of images: each exactly once, in files that are the same to the byte whoever writes them. Without Ray; a whole job
on Ray is in tests/e2e/test_inference.py."""

import errno
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cluster.launch import ClusterHardware
from cluster.storage import StorageOutage, StorageRefused, open_storage
from dataio.schema import Target
from tests.answering import parts_in, put_noise
from tests.s3 import Server, serving
from tests.trainer.test_predict import CLASSES, export
from trainer.inference import job as job_module
from trainer.inference import plan as plan_module
from trainer.inference.columns import columns_of, schema_of
from trainer.inference.inputs import FILES, ROWS, Listed, encoded, listed
from trainer.inference.job import Asked, WorkersLost, begin, carry_out, placed
from trainer.inference.plan import PLAN, SUMMARY, parts_of, read_plan, write_plan
from trainer.inference.predictor import Predictor
from trainer.inference.refusals import is_refusal, writing_to
from trainer.inference.shard import TRIES, UNDER_WAY, Job, Reporting, Worker
from trainer.predict import main
from trainer.runs.model_files import described, find_model
from trainer.settings.tree import TaskConfig
from trainer.tasks.make import make_task

HERE = ClusterHardware(local=True, nodes=1, cpus=2, gpus=0)
COUNT = 150


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 images in two folders, one of which is damaged, beside what is no image."""
    folder = tmp_path_factory.mktemp("images")
    put_noise(folder / ("a" if index < 70 else "b") / f"{index:03d}.png" for index in range(COUNT))
    (folder / "b" / "100.png").write_bytes(b"damaged")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.png").write_bytes(b"hidden")
    return folder


@pytest.fixture(scope="module")
def rows(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images as rows of two Parquet files, in small row groups."""
    folder = tmp_path_factory.mktemp("rows")
    paths = sorted(images.rglob("[0-9]*.png"))
    table = [{"image": {"bytes": path.read_bytes(), "path": str(path.relative_to(images))}, "label": 0} for path in paths]
    pq.write_table(pa.Table.from_pylist(table[:90]), folder / "one.parquet", row_group_size=25)
    pq.write_table(pa.Table.from_pylist(table[90:]), folder / "two.parquet", row_group_size=25)
    (folder / "_plan.parquet").write_bytes(b"of another tool")
    return folder


def asked_for(run: Path, out: object, *inputs: object, shard_images: int = 40, column: str = "", **changes: Any) -> Asked:
    folder = find_model(str(run))
    job = Job(
        out=str(out),
        model=folder.storage.uri,
        model_name=folder.name,
        model_sha256=described(folder)["file_sha256"],
        fit="",
        top=3,
        calibrated=True,
        device="cpu",
        threads=1,
    )
    return Asked(
        out=str(out),
        inputs=tuple(map(str, inputs)),
        column=column,
        job=replace(job, **changes),
        shard_images=shard_images,
        workers=1,
    )


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Answer the shards in this process, and note which."""
    answered: list[int] = []

    def answers(job: Job, shards: Sequence[int], *_: int) -> Iterator[Mapping[str, Any]]:
        worker = Worker(job)
        for shard in shards:
            (line,) = worker({"shard": np.array([shard])})["done"]
            answered.append(shard)
            yield json.loads(line)

    monkeypatch.setattr(job_module, "_answers", answers)
    return answered


def do(asked: Asked) -> Any:
    return carry_out(asked, begin(asked, quiet), HERE, quiet)


def worker_of(asked: Asked) -> Worker:
    """A worker of the job whose plan is there."""
    plan = read_plan(open_storage(asked.out))
    assert plan is not None
    return Worker(replace(asked.job, plan=plan.ident))


def table_of(out: Path) -> pa.Table:
    return pads.dataset(out).to_table()


# --- what is listed -------------------------------------------------------------------------------------------------------------------


def test_a_folders_images_are_listed_in_order_and_nothing_else(images: Path) -> None:
    found = listed([str(images)])
    assert (found.kind, found.images, found.places) == ("files", COUNT, ("",))
    assert found.table.column("key").to_pylist() == sorted(str(path) for path in images.rglob("[0-9]*.png"))


def test_files_and_folders_keep_the_commands_order_and_words(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(images)
    found = listed(["b/101.png", "a"])
    assert found.table.column("key").to_pylist() == ["b/101.png", *[f"a/{index:03d}.png" for index in range(70)]]
    assert all(os.path.isabs(path) for path in found.table.column("path").to_pylist())


def test_a_name_that_is_not_utf8_is_read(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff.png"
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    os.rename(tmp_path / "x.png", path)
    found = listed([str(tmp_path)])
    (batch,) = encoded(found.kind, found.places, found.column, found.table)
    assert batch[0].key.endswith("/\\xff.png")
    assert batch[0].data.startswith(b"\x89PNG")


def test_rows_are_listed_by_row_groups(rows: Path) -> None:
    found = listed([str(rows)])
    assert (found.kind, found.images, found.column) == ("rows", COUNT, "image")
    assert found.table.column("rows").to_pylist() == [25, 25, 25, 15, 25, 25, 10]
    assert found.table.column("start").to_pylist() == [0, 25, 50, 75, 90, 115, 140]
    assert found.table.column("first").to_pylist() == [0, 25, 50, 75, 0, 25, 50]


@pytest.mark.parametrize(
    ("table", "column", "message"),
    [
        ({"picture_bytes": [b"x"], "mask": [b"y"]}, "", "has no column image of struct"),
        ({"text": ["x"]}, "", r"but text: string: give --image-column NAME"),
        ({"image": [b"x"]}, "img", "has no column 'img'; its columns are image: give --image-column"),
        ({"image": ["x"]}, "image", "is string; it must be binary or struct"),
    ],
)
def test_parquet_without_a_column_of_images_is_refused(table: dict[str, list[Any]], column: str, message: str, tmp_path: Path) -> None:
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=message):
        listed([str(tmp_path)], column=column)


def test_the_only_binary_column_holds_the_images_and_a_column_of_names_their_keys(tmp_path: Path) -> None:
    pq.write_table(pa.table({"jpeg": [b"x", None], "file_name": ["one", None]}), tmp_path / "x.parquet")
    found = listed([str(tmp_path / "x.parquet")])
    (batch,) = encoded(found.kind, found.places, found.column, found.table)
    assert [(each.key, each.data, each.error) for each in batch] == [("one", b"x", ""), ("x/00000001", b"", "no image: null")]


def test_what_names_nothing_or_two_kinds_or_is_damaged_is_refused(images: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no IMAGE given"):
        listed([])
    with pytest.raises(ValueError, match=r"nothing\.png does not exist; name image files"):
        listed([str(images), str(tmp_path / "nothing.png")])
    with pytest.raises(ValueError, match="holds no image"):
        listed([str(tmp_path)])
    with pytest.raises(ValueError, match="150 image files and 2 Parquet files"):
        listed([str(images), str(rows)])
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(ValueError, match="no readable Parquet file"):
        listed([str(tmp_path)])


@pytest.mark.parametrize(
    "changed",
    [
        {"image": [b"x"]},
        {"image": [b"x", b"other"]},
        {"photo": [b"x", b"y"]},
        {"image": ["x", "y"]},
        {"key": ["a", "b"], "image": [b"x", b"y"]},
    ],
    ids=["fewer rows", "another image", "the column is gone", "it holds text", "another column"],
)
def test_a_file_that_is_not_the_one_that_was_listed_is_refused(changed: dict[str, list[Any]], tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x", b"y"]}), tmp_path / "x.parquet")
    found = listed([str(tmp_path)])
    (batch,) = encoded(found.kind, found.places, found.column, found.table)
    assert [each.data for each in batch] == [b"x", b"y"]
    pq.write_table(pa.table(changed), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x\.parquet is not the file any more that was listed; put that one back"):
        list(encoded(found.kind, found.places, found.column, found.table))


def test_a_file_that_is_gone_or_damaged_by_now_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x", b"y"]}), tmp_path / "x.parquet")
    found = listed([str(tmp_path)])
    whole = (tmp_path / "x.parquet").read_bytes()
    for piece in (whole[:-1], b"PAR1" + bytes(len(whole) - 12) + whole[-8:]):  # the latter is a bare OSError to Arrow
        (tmp_path / "x.parquet").write_bytes(piece)
        with pytest.raises(ValueError, match=r"x\.parquet is no readable Parquet file \(.*\); give another file in its place"):
            list(encoded(found.kind, found.places, found.column, found.table))
    (tmp_path / "x.parquet").unlink()
    with pytest.raises(ValueError, match=r"x\.parquet is not there any more; put it back, and the same command goes on"):
        list(encoded(found.kind, found.places, found.column, found.table))


# --- how it is cut --------------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(groups=st.lists(st.integers(0, 30), max_size=30), size=st.integers(1, 50))
def test_each_row_is_in_one_shard_in_order(groups: list[int], size: int) -> None:
    starts = np.cumsum([0, *groups])[:-1].tolist()
    count = len(groups)
    columns = {"where": [0] * count, "path": [b"x"] * count, "group": range(count), "first": starts, "rows": groups}
    columns |= {"start": starts, "mark": [0] * count}
    table = pa.table(columns, ROWS)
    parts = parts_of(Listed(kind="rows", places=("",), table=table), size)
    covered = [row for part in parts for each in part.to_pylist() for row in range(each["start"], each["start"] + each["rows"])]
    assert covered == list(range(sum(groups)))
    assert all(sum(part.column("rows").to_pylist()) >= size for part in parts[:-1])
    assert all(sum(part.column("rows").to_pylist()) > 0 for part in parts)


@settings(deadline=None)
@given(count=st.integers(0, 200), size=st.integers(1, 250))
def test_each_file_is_in_one_shard_in_order(count: int, size: int) -> None:
    keys = [str(index) for index in range(count)]
    table = pa.table({"key": keys, "where": [0] * count, "path": [key.encode() for key in keys]}, FILES)
    parts = parts_of(Listed(kind="files", places=("",), table=table), size)
    assert [key for part in parts for key in part.column("key").to_pylist()] == keys
    assert all(part.num_rows == size for part in parts[:-1])


def test_parquet_files_without_a_row_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="hold no row"):
        write_plan(open_storage(tmp_path / "out"), listed([str(tmp_path)]), {}, 10)


# --- what is answered -----------------------------------------------------------------------------------------------------------------


def test_the_answers_are_those_of_predict_each_image_once(exported_run: Path, images: Path, tmp_path: Path, here: list[int]) -> None:
    ended = do(asked_for(exported_run, tmp_path / "out", images))
    assert here == [0, 1, 2, 3]
    paths = sorted(str(path) for path in images.rglob("[0-9]*.png"))
    expected = [each.to_json() for each in Predictor(find_model(str(exported_run)), device=torch.device("cpu")).predict(paths, top=3)]
    found = table_of(tmp_path / "out").to_pylist()
    assert [row["row"] for row in found] == list(range(COUNT))
    assert [row["key"] for row in found] == paths
    for row, answer in zip(found, expected, strict=True):
        if "error" in answer:
            assert (row["error"], row["label"], row["label_ranking"]) == (answer["error"], None, None)
            continue
        assert row["error"] is None
        assert [each["class"] for each in row["label_ranking"]] == [each["class"] for each in answer["predictions"]]
        # Batches differ where an image is bad or a shard ends, and so may a probability's last bits.
        probabilities = [each["probability"] for each in answer["predictions"]]
        assert [each["probability"] for each in row["label_ranking"]] == pytest.approx(probabilities, abs=1e-6)
        assert (row["label"], row["label_probability"]) == (answer["predictions"][0]["class"], row["label_ranking"][0]["probability"])
    assert (ended.counts.images, ended.counts.bad, sum(ended.counts.answers.values())) == (COUNT, 1, COUNT - 1)
    assert set(ended.counts.answers) <= set(CLASSES)
    assert json.loads((tmp_path / "out" / SUMMARY).read_text())["counts"] == ended.counts.to_json()


def test_rows_are_answered_as_files_are(exported_run: Path, images: Path, rows: Path, tmp_path: Path, here: list[int]) -> None:
    do(asked_for(exported_run, tmp_path / "files", images, shard_images=75))
    do(asked_for(exported_run, tmp_path / "rows", rows, shard_images=75))
    files, of_rows = table_of(tmp_path / "files"), table_of(tmp_path / "rows")
    assert of_rows.column("key").to_pylist() == [str(Path(key).relative_to(images)) for key in files.column("key").to_pylist()]
    for name in ("row", "label", "error"):
        assert of_rows.column(name) == files.column(name)


def test_a_file_is_the_same_whoever_writes_it(exported_run: Path, images: Path, tmp_path: Path, here: list[int]) -> None:
    asked = asked_for(exported_run, tmp_path / "out", images)
    do(asked)
    before = parts_in(tmp_path / "out")
    assert len(before) == 4
    worker_of(asked).answer(2)
    assert parts_in(tmp_path / "out") == before


def test_a_command_that_was_killed_goes_on_and_ends_in_the_same_bytes(
    exported_run: Path, images: Path, tmp_path: Path, here: list[int]
) -> None:
    do(asked_for(exported_run, tmp_path / "whole", images))
    here.clear()
    asked = asked_for(exported_run, tmp_path / "killed", images)
    begun = begin(asked, quiet)
    answers = job_module._answers(replace(asked.job, plan=begun.plan.ident), begun.left, 1, 1, 0)
    next(answers)
    next(answers)
    said: list[str] = []
    ended = carry_out(asked, begin(asked, said.append), HERE, quiet)
    assert here == [0, 1, 2, 3]
    assert said == [f"80 of 150 images are done; going on with the list in {PLAN}, as it was made at first"]
    assert (ended.counts.images, ended.here, ended.counts.bad) == (COUNT, 70, 1)
    assert parts_in(tmp_path / "killed") == parts_in(tmp_path / "whole")
    assert not (tmp_path / "killed" / UNDER_WAY).exists()


def test_a_finished_command_answers_nothing_again_and_a_damaged_file_is_made_again(
    exported_run: Path, images: Path, tmp_path: Path, here: list[int]
) -> None:
    asked = asked_for(exported_run, tmp_path / "out", images)
    first = do(asked)
    whole = parts_in(tmp_path / "out")
    here.clear()
    again = do(asked)
    assert (here, again.here, again.counts) == ([], 0, first.counts)
    damaged = tmp_path / "out" / "predictions-00001.parquet"
    damaged.write_bytes(damaged.read_bytes()[:500])
    assert do(asked).counts == first.counts
    assert here == [1]
    assert parts_in(tmp_path / "out") == whole


def test_the_list_is_that_of_the_first_command(exported_run: Path, images: Path, tmp_path: Path, here: list[int]) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted(images.rglob("00*.png")):
        (folder / path.name).write_bytes(path.read_bytes())
    asked = asked_for(exported_run, tmp_path / "out", folder, shard_images=4)
    begin(asked, quiet)
    (folder / "0000.png").write_bytes((folder / "001.png").read_bytes())
    (folder / "009.png").unlink()
    assert do(asked).counts.images == 10
    found = table_of(tmp_path / "out").to_pylist()
    assert [Path(row["key"]).name for row in found] == [f"{index:03d}.png" for index in range(10)]
    assert found[9]["error"] == "cannot be read: No such file or directory"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top": 1}, "--top was 3 and is 1"),
        ({"fit": "crop"}, "--fit was not given and is crop"),
        ({"calibrated": False}, "--raw was True and is False"),
        ({"model_sha256": "0" * 64}, "the model was"),
    ],
)
def test_another_job_is_refused_by_name(changes: dict[str, Any], words: str, exported_run: Path, images: Path, tmp_path: Path) -> None:
    begin(asked_for(exported_run, tmp_path / "out", images), quiet)
    with pytest.raises(ValueError, match=f"holds predictions of another job: {words}"):
        begin(asked_for(exported_run, tmp_path / "out", images, **changes), quiet)


def test_other_images_and_another_folder_are_refused(exported_run: Path, images: Path, tmp_path: Path) -> None:
    begin(asked_for(exported_run, tmp_path / "out", images), quiet)
    with pytest.raises(ValueError, match=r"IMAGE... was .*images\d+ and is .*/a"):
        begin(asked_for(exported_run, tmp_path / "out", images / "a"), quiet)
    with pytest.raises(ValueError, match="--shard-images was 40 and is 50"):
        begin(asked_for(exported_run, tmp_path / "out", images, shard_images=50), quiet)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds thesis.tex, and no predictions"):
        begin(asked_for(exported_run, tmp_path / "other", images), quiet)


def test_a_list_that_another_command_wrote_meanwhile_is_the_one_that_counts(
    exported_run: Path, images: Path, tmp_path: Path, here: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, out = asked_for(exported_run, tmp_path / "out", images), open_storage(tmp_path / "out")

    def listed_by_another_first(inputs: Sequence[str], **options: Any) -> Listed:
        """Another command is a moment faster: it has answered half."""
        monkeypatch.undo()
        with monkeypatch.context() as alone:
            alone.setattr(job_module, "_answers", lambda job, shards, *_: map(answered_by(job), list(shards)[:2]))
            with pytest.raises(WorkersLost):
                do(theirs)
        return listed(inputs, **options)

    def answered_by(job: Job) -> Callable[[int], Mapping[str, Any]]:
        return Worker(job).answer

    theirs = asked
    monkeypatch.setattr(job_module, "listed", listed_by_another_first)
    begun = begin(asked, quiet)
    assert (begun.plan, begun.left) == (read_plan(out), [2, 3])

    theirs = asked_for(exported_run, tmp_path / "second", images, top=1)
    asked = asked_for(exported_run, tmp_path / "second", images)
    monkeypatch.setattr(job_module, "listed", listed_by_another_first)
    with pytest.raises(
        ValueError, match=r"holds predictions of another job: --top was 1 and is 3\. Name another folder, or delete that one"
    ):
        begin(asked, quiet)


def test_an_out_that_cannot_be_written_to_is_refused_before_the_images_are_listed(
    exported_run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> Listed:
        raise AssertionError("listed")

    monkeypatch.setattr(job_module, "listed", never)
    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "mine")
    (tmp_path / "mine").mkdir()
    for out, words in (
        (tmp_path / "file", "is no folder; name one that is new or empty"),
        (tmp_path / "file" / "below", f"{tmp_path}/file is no folder"),
        (tmp_path / "mine", "nothing can be written to"),
        (tmp_path / "mine" / "a" / "b", f"nothing can be written to {tmp_path}/mine; name a folder that you may write to"),
        ("s3://", "names no folder; give one, such as s3://BUCKET/FOLDER"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            begin(asked_for(exported_run, out, images), quiet)


def test_a_pipe_in_the_place_of_a_parquet_file_is_refused_and_of_an_image_told_in_its_row(
    exported_run: Path, images: Path, tmp_path: Path, here: list[int]
) -> None:
    os.mkfifo(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x\.parquet: not a regular file\); name what you may read"):
        begin(asked_for(exported_run, tmp_path / "rows", tmp_path / "x.parquet"), quiet)
    os.mkfifo(tmp_path / "x.png")
    ended = do(asked_for(exported_run, tmp_path / "out", images / "a", tmp_path / "x.png"))
    assert (ended.counts.images, ended.counts.bad) == (71, 1)
    assert table_of(tmp_path / "out").column("error").to_pylist()[-1] == "cannot be read: not a regular file"


def test_a_plan_of_another_version_or_damaged_is_refused(
    exported_run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asked_for(exported_run, tmp_path / "out", images)
    with monkeypatch.context() as later:
        later.setattr(plan_module, "FORMAT", 9)
        begin(asked, quiet)
    with pytest.raises(ValueError, match="of another version, or damaged"):
        begin(asked, quiet)
    plan = tmp_path / "out" / PLAN
    plan.write_bytes(plan.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"_plan.parquet is no readable Parquet file .*; give another --out"):
        begin(asked, quiet)


def test_another_model_in_its_place_is_noticed_by_the_worker(exported_run: Path, images: Path, tmp_path: Path) -> None:
    asked = asked_for(exported_run, tmp_path / "out", images)
    begin(asked, quiet)
    with pytest.raises(ValueError, match="holds another model by now"):
        worker_of(replace(asked, job=replace(asked.job, model_sha256="0" * 64)))


def test_a_shard_that_takes_its_worker_down_again_and_again_ends_the_job_by_name(exported_run: Path, images: Path, tmp_path: Path) -> None:
    asked = asked_for(exported_run, tmp_path / "out", images)
    begin(asked, quiet)
    worker = worker_of(asked)

    class Dies(BaseException):
        """The process, which leaves nothing done behind."""

    def dies(*_: object) -> Any:
        raise Dies

    worker._predictor.decode = dies  # type: ignore[method-assign]
    for _ in range(TRIES):
        with pytest.raises(Dies):
            worker.answer(1)
    with pytest.raises(ValueError, match=rf"shard 1 \(row 40 of {PLAN} on\) has taken {TRIES} workers down"):
        worker.answer(1)
    assert begin(asked, quiet).left == [0, 1, 2, 3]  # a new command tries anew
    assert worker_of(asked).answer(1)["counts"]["images"] == 40


def test_what_a_worker_cannot_do_is_told_as_a_refusal_or_as_what_passes(exported_run: Path, images: Path, tmp_path: Path) -> None:
    asked = asked_for(exported_run, tmp_path / "out", images)
    begun = begin(asked, quiet)
    job = replace(asked.job, plan=begun.plan.ident)

    def told(job: Job) -> Mapping[str, Any]:
        (line,) = Reporting(job)({"shard": np.array([0])})["done"]
        found: Mapping[str, Any] = json.loads(line)
        return found

    for other, words in (
        (replace(job, plan="0" * 16), "holds the list of another command by now"),
        (replace(job, model_sha256="0" * 64), "holds another model by now"),
        (replace(job, model_name="nobody/model"), "let it finish first"),
        (replace(job, out=str(tmp_path / "gone")), "cannot be used"),
    ):
        assert told(other)["refused"], words
        assert words in told(other)["message"]


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (ValueError("x"), True),
        (StorageRefused("403"), True),
        (PermissionError(errno.EACCES, "no", "x"), True),
        (OSError(errno.EROFS, "read-only", "x"), True),
        (FileNotFoundError(errno.ENOENT, "no", "x"), True),
        (StorageOutage("away"), False),
        (OSError(errno.ENOSPC, "full", "x"), False),
        (OSError(errno.EIO, "broken", "x"), False),
        (OSError(errno.ESTALE, "NFS", "x"), False),
        (TimeoutError("x"), False),
    ],
    ids=lambda each: type(each).__name__ + str(getattr(each, "errno", "") or ""),
)
def test_what_is_the_users_to_mend_is_a_refusal_and_what_passes_is_none(error: Exception, refused: bool, tmp_path: Path) -> None:
    assert is_refusal(error) == refused
    with pytest.raises(ValueError if refused else OSError) as told, writing_to(open_storage(tmp_path)):
        raise error
    if not isinstance(error, ValueError) and refused:
        assert f"--out {tmp_path} cannot be used" in str(told.value)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        assert str(told.value) == f"--out {tmp_path} has no room (full): make some"


# --- on an object store ---------------------------------------------------------------------------------------------------------------


def test_images_model_and_answers_may_lie_on_s3(
    images: Path, rows: Path, tmp_path: Path, here: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Server()) as server:
        client = server.client()
        client.create_bucket(Bucket="pets")
        for path in sorted(images.rglob("*")):
            if path.is_file():
                client.upload_file(str(path), "pets", f"images/{path.relative_to(images)}")
        for path in sorted(rows.iterdir()):
            client.upload_file(str(path), "pets", f"rows/{path.name}")
        export(tmp_path)
        for path in sorted((tmp_path / "pets" / "model").iterdir()):
            client.upload_file(str(path), "pets", f"runs/pets/model/{path.name}")
        at_home = asked_for(tmp_path / "pets", tmp_path / "out", images)
        do(at_home)
        folder = find_model(server.uri("pets/runs/pets"))
        remote = replace(at_home.job, model=folder.storage.uri, model_name=folder.name)
        expected = table_of(tmp_path / "out")
        for what in ("images", "rows"):
            out = server.uri(f"pets/answers-{what}")
            asked = replace(at_home, out=out, inputs=(server.uri(f"pets/{what}"),), job=replace(remote, out=out))
            assert do(asked).counts.images == COUNT
            storage = open_storage(out)
            parts = [entry.name for entry in storage.list("") if not entry.name.startswith("_")]
            found = pa.concat_tables([pq.read_table(pa.BufferReader(storage.read(name))) for name in parts])
            assert found.column("label") == expected.column("label")
            assert found.column("key")[0].as_py() == ("s3://pets/images/a/000.png" if what == "images" else "a/000.png")


def test_a_storage_that_is_away_is_no_fault_of_an_image(images: Path) -> None:
    with serving(Server()) as server:
        server.client().create_bucket(Bucket="pets")
        for name in ("a/000.png", "a/001.png"):
            server.client().upload_file(str(images / name), "pets", name)
        found = listed([server.uri("pets")])
        server.client().delete_object(Bucket="pets", Key="a/001.png")
        (batch,) = encoded(found.kind, found.places, "", found.table)
        assert [bool(each.data) for each in batch] == [True, False]
        assert batch[1].error.startswith("cannot be read: ")
        server.client().put_object(Bucket="pets", Key="a/001.png", Body=b"x")
        server.stop()
        with pytest.raises(OSError, match="did not answer"):
            list(encoded(found.kind, found.places, "", found.table))


# --- columns --------------------------------------------------------------------------------------------------------------------------

LABEL = Target(name="species", kind="label", classes=("cat", "dog"))
LABELS = Target(name="tags", kind="labels", classes=("indoor", "night", "wet"))
NUMBER = Target(name="age", kind="number")


@pytest.mark.parametrize("targets", [(LABEL,), (LABELS,), (NUMBER,), (LABEL, LABELS, NUMBER)], ids=["label", "labels", "number", "several"])
def test_each_kind_of_target_has_columns_of_its_own(targets: tuple[Target, ...]) -> None:
    task = make_task(TaskConfig(), targets)
    outputs = torch.tensor([[3.0, 0.0, 5.0, -5.0, 1.0, 2.0][: task.outputs], [0.0, 3.0, -5.0, -5.0, -5.0, -2.0][: task.outputs]])
    answers = [*task.answers(outputs, top=3), None]
    columns = columns_of(task, answers)
    schema = schema_of(task, knows_novelty=True)
    columns |= {"row": [0, 1, 2], "key": ["x", "y", "z"], "unlike_training": [True, False, None], "error": [None, None, "bad"]}
    found = pa.Table.from_pydict({name: columns[name] for name in schema.names}, schema=schema).to_pylist()
    for target in targets:
        own = [answer["heads"][target.name] if "heads" in answer else answer for answer in answers if answer is not None]
        assert found[2][target.name] is None
        for row, answer in zip(found[:2], own, strict=True):
            match target.kind:
                case "label":
                    assert row[target.name] == answer["predictions"][0]["class"]
                    assert row[f"{target.name}_probability"] == pytest.approx(answer["predictions"][0]["probability"])
                case "labels":
                    assert row[target.name] == [each["class"] for each in answer["labels"]]
                case "number":
                    assert row[target.name] == pytest.approx(answer["value"])


def test_the_answer_of_a_task_of_ones_own_is_json() -> None:
    task: Any = object()
    assert columns_of(task, [{"b": 1, "a": [2]}, None]) == {"answer": ['{"a": [2], "b": 1}', None]}
    assert schema_of(task, knows_novelty=False).names == ["row", "key", "answer", "error"]


# --- the command line -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hardware", "workers", "device", "expected"),
    [
        ((2, 0), 0, "auto", (1, 2, 0)),
        ((64, 0), 0, "auto", (16, 4, 0)),
        ((6, 0), 0, "auto", (1, 4, 0)),
        ((2, 0), 2, "auto", (2, 1, 0)),
        ((32, 8), 0, "auto", (8, 4, 1)),
        ((32, 8), 3, "auto", (3, 8, 1)),
        ((32, 8), 0, "cpu", (8, 4, 0)),
    ],
)
def test_workers_are_placed_by_gpus_or_by_cpus(
    hardware: tuple[int, int], workers: int, device: str, expected: tuple[int, int, int]
) -> None:
    cpus, gpus = hardware
    assert placed(ClusterHardware(local=True, nodes=1, cpus=cpus, gpus=gpus), workers, device) == expected


def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="no node of the cluster has a GPU"):
        placed(HERE, 0, "cuda")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--workers", "2"], "--workers goes with --out FOLDER"),
        (["--image-column", "x"], "--image-column goes with --out FOLDER"),
        (["--out", "o", "--workers", "-1"], "--workers -1 is no number of processes"),
        (["--out", "o", "--shard-images", "0"], "--shard-images 0 is no number of images"),
        (["--out", "o", "--explain", "e"], "--explain draws a picture for each image"),
        (["--out", "o", "--top", "0"], "--top 0 shows nothing"),
        (["--out", "ftp://x/y"], "unknown scheme 'ftp'"),
    ],
)
def test_wrong_flags_end_with_their_rule_before_anything_is_written(
    flags: list[str],
    words: str,
    exported_run: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([str(exported_run), str(images), *flags])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_read_plan_says_what_was_written(exported_run: Path, images: Path, tmp_path: Path) -> None:
    asked = asked_for(exported_run, tmp_path / "out", images)
    assert read_plan(open_storage(tmp_path / "out")) is None
    begun = begin(asked, quiet)
    assert read_plan(open_storage(tmp_path / "out")) == begun.plan
    assert begun.plan.settings == asked.settings
    assert (begun.plan.images, begun.plan.shards) == (COUNT, 4)
