"""Answers to any number of texts: the rows of tables and Parquet files and .txt files, each exactly once. Without Ray, as test_inference.py
has it for images; what is the same for both is asked there."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dataio.texts import BETWEEN
from tests.answering import parts_in
from tests.texts import sentence, write_csv, write_json_lines
from tests.trainer.small_text_run import train_on_texts
from tests.trainer.test_inference import HERE, asked_for, do, here, quiet, table_of, worker_of
from trainer.inference import job as job_module
from trainer.inference.inputs import NO_GROUP, Encoded, encoded, listed
from trainer.inference.job import Asked, begin, carry_out
from trainer.inference.plan import PLAN, parts_of
from trainer.inference.text_inputs import TEXTS
from trainer.predict import main
from trainer.runs.model_files import find_model

pytest.importorskip("transformers", reason="the extra `text` is not installed")

__all__ = ["here"]  # the fixture
pytestmark = pytest.mark.usefixtures("threads_kept")

COUNT, EMPTY, LONG, DAMAGED = 90, 7, 30, 50


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_on_texts(tmp_path_factory.mktemp("runs"))


def text_of(number: int) -> str:
    """One is empty, one has too many tokens, one is not UTF-8."""
    return {EMPTY: " ", LONG: "the film was good " * 20, DAMAGED: "a g\udce4nzlich film"}.get(number, sentence(number)[0])


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "new.csv"
    path.write_text("id,text\n" + "".join(f'n{number},"{text_of(number)}"\n' for number in range(COUNT)), errors="surrogateescape")
    return path


def asked(run: Path, out: object, *inputs: object, shard_images: int = 40, **changes: Any) -> Asked:
    return asked_for(run, out, *inputs, shard_images=shard_images, unit="texts", **changes)


def read(*words: object, most_rows: int = 40, column: str = "") -> list[Encoded]:
    """All that a command names, shard by shard."""
    found = listed(list(map(str, words)), sort=TEXTS, column=column, most_rows=most_rows)
    parts = parts_of(found, most_rows)
    return [each for part in parts for batch in encoded(found.kind, found.places, found.column, part, sort=TEXTS) for each in batch]


# --- what is listed and read ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 12))
def test_each_row_of_a_table_is_read_once_in_order(tmp_path_factory: pytest.TempPathFactory, counts: list[int], most: int) -> None:
    folder = tmp_path_factory.mktemp("tables")
    for number, count in enumerate(counts):
        rows = [{"text": f"{number}, {row}\nand on"} for row in range(count)]
        if number % 2 and count:
            write_json_lines(folder / f"{number}.jsonl", rows)
        else:
            (folder / f"{number}.csv").write_text("text\n" + "".join(f'"{row["text"]}"\n' for row in rows))
    found = listed([str(folder)], sort=TEXTS, most_rows=most)
    assert found.images == sum(counts)
    slices = found.table.to_pylist()
    assert all(0 < row["rows"] <= most and row["group"] == NO_GROUP for row in slices)
    assert [row["start"] for row in slices] == [sum(row["rows"] for row in slices[:index]) for index in range(len(slices))]
    if sum(counts):
        wanted = [(f"{n}/{row:08d}", f"{n}, {row}\nand on".encode()) for n, count in enumerate(counts) for row in range(count)]
        assert [(each.key, each.data) for each in read(folder, most_rows=most)] == wanted


def test_all_kinds_of_files_give_the_same_texts_and_pairs(tmp_path: Path) -> None:
    rows = [{"premise": f"film {number}", "hypothesis": f"it was {number}", "name": f"k{number}"} for number in range(70)]
    write_csv(tmp_path / "csv" / "a.csv", rows)
    write_csv(tmp_path / "tsv" / "a.tsv", rows)
    write_json_lines(tmp_path / "lines" / "a.jsonl", rows)
    (tmp_path / "parquet").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "parquet" / "a.parquet", row_group_size=16)
    wanted = [Encoded(key=row["name"], data=f"{row['premise']}{BETWEEN}{row['hypothesis']}".encode()) for row in rows]
    for kind in ("csv", "tsv", "lines", "parquet"):
        assert read(tmp_path / kind, column="premise, hypothesis") == wanted, kind
    both = read(tmp_path / "parquet", tmp_path / "csv" / "a.csv", column="premise")
    assert [each.data for each in both] == [row["premise"].encode() for row in rows] * 2


def test_a_row_without_a_text_says_so_and_an_empty_key_becomes_the_rows_place(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "a.jsonl", [{"text": "good", "id": ""}, {"text": 5, "id": 7}, {"text": "a\0b", "id": "x"}, {"id": "y"}])
    found = read(tmp_path / "a.jsonl")
    assert [each.key for each in found] == ["a/00000000", "7", "x", "y"]
    assert [each.error for each in found] == ["", "no text: int 5", "undecodable: a NUL, which is in no text", ""]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no TEXT given; name .txt files, folders of them"),
        (["nothing"], "nothing does not exist"),
        (["empty"], r"empty holds no text \(.txt\) and no table"),
        (["mixed"], r"there are 1 .txt files and 1 tables \(.*b.csv\); name the ones or the others"),
        (
            ["s3://bucket/a.csv"],
            r"s3://bucket/a.csv is a table \(.csv\), which is read on this machine alone; copy it, or write it as Parquet",
        ),
        (["other.csv"], "other.csv has no column text, sentence"),
        (["bad.jsonl"], "bad.jsonl, line 2 is not JSON"),
    ],
)
def test_what_cannot_be_listed_is_refused(words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_csv(tmp_path / "mixed" / "b.csv", [{"text": "good"}])
    (tmp_path / "mixed" / "a.txt").write_text("good")
    write_csv(tmp_path / "other.csv", [{"colour": "red", "size": "5"}])
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\nno JSON\n')
    with pytest.raises(ValueError, match=said):
        listed(words, sort=TEXTS)


# --- what is answered -----------------------------------------------------------------------------------------------------------------


def said_by_predict(run: Path, source: Path) -> list[dict[str, Any]]:
    from trainer.inference.texts import TextPredictor

    predictor = TextPredictor(find_model(str(run)), device=torch.device("cpu"))
    return [answer.to_json() for answer in predictor.predict([str(source)], top=3)]


def test_the_answers_are_those_of_predict_each_text_once(run: Path, table: Path, tmp_path: Path, here: list[int]) -> None:
    ended = do(asked(run, tmp_path / "out", table))
    assert here == [0, 1, 2]
    found = table_of(tmp_path / "out").to_pylist()
    assert [(row["row"], row["key"]) for row in found] == [(number, f"n{number}") for number in range(COUNT)]
    for row, answer in zip(found, said_by_predict(run, table), strict=True):
        if "error" in answer:
            assert (row["error"], row["label"], row["cut"]) == (answer["error"], None, None)
            continue
        probabilities = [each["probability"] for each in answer["predictions"]]
        assert [each["class"] for each in row["label_ranking"]] == [each["class"] for each in answer["predictions"]]
        assert [each["probability"] for each in row["label_ranking"]] == pytest.approx(probabilities, abs=1e-5)
        assert (row["error"], row["cut"]) == (None, answer.get("cut", False))
    assert [row["key"] for row in found if row["cut"]] == [f"n{LONG}"]
    assert (ended.counts.images, ended.counts.bad, ended.counts.cut) == (COUNT, 2, 1)
    assert {row["error"].partition(":")[0] for row in found if row["error"]} == {"empty", "undecodable"}


def test_files_are_answered_as_rows_are(run: Path, table: Path, tmp_path: Path, here: list[int]) -> None:
    for number in range(COUNT):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{number:03d}.txt").write_text(text_of(number), errors="surrogateescape")
    do(asked(run, tmp_path / "files", tmp_path / "texts"))
    do(asked(run, tmp_path / "rows", table))
    files, rows = table_of(tmp_path / "files"), table_of(tmp_path / "rows")
    assert files.column("key").to_pylist() == [str(tmp_path / "texts" / f"{number:03d}.txt") for number in range(COUNT)]
    for name in ("row", "label", "error", "cut"):
        assert files.column(name) == rows.column(name)


def test_a_command_that_was_killed_goes_on_and_ends_in_the_same_bytes(run: Path, table: Path, tmp_path: Path, here: list[int]) -> None:
    do(asked(run, tmp_path / "whole", table))
    here.clear()
    killed = asked(run, tmp_path / "killed", table)
    begun = begin(killed, quiet)
    answers = job_module._answers(replace(killed.job, plan=begun.plan.ident), begun.left, 1, 1, 0)
    next(answers)
    said: list[str] = []
    ended = carry_out(killed, begin(killed, said.append), HERE, said.append)
    assert here == [0, 1, 2]
    assert said[0] == f"40 of 90 texts are done; going on with the list in {PLAN}, as it was made at first"
    assert "image" not in " ".join(said)
    assert (ended.counts.images, ended.here, ended.counts.cut) == (COUNT, 50, 1)
    assert parts_in(tmp_path / "killed") == parts_in(tmp_path / "whole")


def replaced_by(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(text) and None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: path.unlink(), "is not there any more; put it back"),
        (replaced_by("text\nother\n"), "is not the file any more that was listed; put that one back"),
    ],
)
def test_a_table_that_is_not_the_one_that_was_listed_is_refused(
    change: Callable[[Path], None], said: str, run: Path, tmp_path: Path
) -> None:
    path = write_csv(tmp_path / "a.csv", [{"text": "good"}, {"text": "bad"}])
    job = asked(run, tmp_path / "out", path)
    begin(job, quiet)
    change(path)
    with pytest.raises(ValueError, match=said):
        worker_of(job).answer(0)


def test_another_column_or_another_kind_of_job_on_the_same_out_is_refused(run: Path, table: Path, tmp_path: Path) -> None:
    begin(asked(run, tmp_path / "out", table), quiet)
    with pytest.raises(ValueError, match="--text-column was not given and is id"):
        begin(replace(asked(run, tmp_path / "out", table), column="id"), quiet)


@pytest.mark.parametrize(
    ("flags", "said"), [(["--image-column", "x"], "--image-column x is of images"), (["--fit", "crop"], "--fit crop is of images")]
)
def test_flags_of_images_are_refused(
    flags: list[str], said: str, run: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(run), str(table), "--out", str(tmp_path / "out"), *flags])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_summary_counts_what_was_cut_and_that_of_images_says_nothing_of_it(
    run: Path, table: Path, tmp_path: Path, here: list[int]
) -> None:
    do(asked(run, tmp_path / "out", table))
    assert json.loads((tmp_path / "out" / "_summary.json").read_text())["counts"]["cut"] == 1
    from trainer.inference.shard import Counts

    assert "cut" not in Counts(images=3).to_json()
