"""An audit finds what was planted in real texts: copies in training and test, or under other labels, and odd ones; in every kind of
source."""

import csv
import io
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.storage import open_storage
from dataio.prepared import prepared
from tests.texts import make_model, write_csv, write_json_lines
from tests.trainer.text_run import finished_text_run, text_config
from trainer.audit import folds, text_copies
from trainer.audit import texts as texts_module
from trainer.audit.__main__ import main
from trainer.audit.findings import Copies, Doubt, Findings, Sample, changes_of
from trainer.audit.page import render, verdict
from trainer.audit.text_copies import near_pairs
from trainer.audit.texts import LENGTH, Sampled, Shingles, folded, shingles_of
from trainer.series.child import Ended
from trainer.settings.fields import replaced
from trainer.settings.toml import from_toml

SNIPPETS = Path(__file__).resolve().parents[2] / "dataio" / "samples" / "movie_snippets"
HOSTILE = "</blockquote><script>alert(1)</script> is what this film deserves, \u202ereversed"
RUSSIAN, SIGNS, GIBBERISH, SHORT = "Отличный фильм, непременно посмотрите", "!!! ... ???", "qzx vbnmq wrtzz kkjhg qqq", "Meh"


@dataclass(frozen=True)
class Row:
    split: str
    text: str
    label: str


def real(split: str, count: int) -> list[Row]:
    with (SNIPPETS / f"{split}.csv").open(newline="") as file:
        return [Row(split, row["text"], row["label"]) for row, _ in zip(csv.DictReader(file), range(count), strict=False)]


def other(label: str) -> str:
    return "negative" if label == "positive" else "positive"


def changed(text: str) -> str:
    """With another word in the middle."""
    words = text.split()
    words[len(words) // 2] = "moreover"
    return " ".join(words)


def long_enough(rows: Sequence[Row], count: int) -> list[Row]:
    """Rows of which one word is a small part."""
    return [row for row in rows if len(row.text.split()) >= 14][:count]


TRAIN, TEST = real("train", 300), real("test", 100)
OF_TEST, OF_TRAIN = long_enough(TEST, 3), long_enough(TRAIN, 4)
PLANTED = [
    Row("train", OF_TEST[0].text, OF_TEST[0].label),
    Row("train", f"  {OF_TEST[1].text.upper().replace(' ', '  ')}", OF_TEST[1].label),
    Row("train", changed(OF_TEST[2].text), OF_TEST[2].label),
    Row("train", OF_TRAIN[0].text, other(OF_TRAIN[0].label)),
    Row("train", OF_TRAIN[1].text, OF_TRAIN[1].label),
    Row("train", changed(OF_TRAIN[2].text), OF_TRAIN[2].label),
    Row("train", changed(OF_TRAIN[3].text), other(OF_TRAIN[3].label)),
    Row("train", RUSSIAN, "positive"),
    Row("train", SIGNS, "positive"),
    Row("train", GIBBERISH, "negative"),
    Row("train", SHORT, "negative"),
    Row("train", " ".join(row.text for row in TRAIN[:25]), "negative"),
    Row("train", HOSTILE, "negative"),
    Row("train", HOSTILE, "negative"),
]
ROWS = [*TRAIN, *PLANTED, *TEST]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder with a tokenizer that knows the words of the real texts."""
    words = sorted({word for row in (*TRAIN, *TEST) for word in re.findall(r"\w+|[^\w\s]+", row.text.lower())})
    return make_model(tmp_path_factory.mktemp("model"), words)


def csv_of(folder: Path) -> Path:
    return write_csv(folder / "texts.csv", [vars(row) for row in ROWS])


def tsv_of(folder: Path) -> Path:
    return write_csv(folder / "texts.tsv", [vars(row) for row in ROWS])


def json_lines_of(folder: Path) -> Path:
    return write_json_lines(folder / "texts.jsonl", [vars(row) for row in ROWS])


def parquet_of(folder: Path) -> Path:
    for split in ("train", "test"):
        table = {name: [vars(row)[name] for row in ROWS if row.split == split] for name in ("text", "label")}
        (folder / "parquet").mkdir(exist_ok=True)
        pq.write_table(pa.table(table), folder / "parquet" / f"{split}-00000-of-00001.parquet")
    return folder / "parquet"


def files_of(folder: Path) -> Path:
    for number, row in enumerate(ROWS):
        file = folder / "files" / row.split / row.label / f"{number:04d}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(row.text)
    return folder / "files"


def audit(model: Path, source: Path, out: Path, *more: str) -> int:
    return main([str(source), "--model.name", f"hf/{model}", "--data.root", str(out.parent / "data"), "--data.max-tokens", "39",
                 "--folds", "0", "--out", str(out), *more])  # fmt: skip


@pytest.fixture(scope="module")
def audited(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an audit of a table, without folds."""
    folder = tmp_path_factory.mktemp("audit")
    assert audit(model, csv_of(folder), folder / "out") == 0
    return folder / "out"


def found_in(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "findings.json").read_text())
    return found


def texts_by_key(model: Path, out: Path, source: Path) -> dict[tuple[str, str], str]:
    """(split, key) -> text, of the data that the audit has read."""
    config = text_config(model, source, data__root=str(out.parent / "data"), data__max_tokens=39)
    dataset = prepared(config.data).dataset
    return {
        (name, key): text
        for name in ("train", "test")
        for key, text in zip(
            dataset.split(name).keys(range(dataset.split(name).count)),
            dataset.split(name).texts(range(dataset.split(name).count)),
            strict=True,
        )
    }


def groups_of(found: dict[str, Any], texts: dict[tuple[str, str], str]) -> Iterator[tuple[frozenset[str], dict[str, Any]]]:
    for group in found["copies"]:
        yield frozenset(texts[each["split"], each["key"]] for each in group["texts"]), group


def test_planted_copies_are_found_leaks_first_and_no_real_text_is_one(model: Path, audited: Path) -> None:
    found, texts = found_in(audited), texts_by_key(model, audited, audited.with_name("texts.csv"))
    groups = dict(groups_of(found, texts))
    copies = [{OF_TEST[0].text}, {OF_TEST[1].text, PLANTED[1].text}, {OF_TEST[2].text, PLANTED[2].text}, {OF_TRAIN[0].text},
              {OF_TRAIN[1].text}, {OF_TRAIN[2].text, PLANTED[5].text}, {OF_TRAIN[3].text, PLANTED[6].text}, {HOSTILE}]  # fmt: skip
    assert set(groups) == set(map(frozenset, copies))
    by_how = [{each["how"] for each in groups[frozenset(each)]["texts"]} for each in copies]
    assert by_how == [{"text"}, {"folded"}, {"near"}, {"text"}, {"text"}, {"near"}, {"near"}, {"text"}]
    assert [group["is_leak"] for group in found["copies"]] == [True] * 3 + [False] * 5
    assert [group["labels_differ"] for group in found["copies"]] == [False] * 3 + [True] * 2 + [False] * 3
    assert all((group["ratio"] == 0) == ("near" not in {each["how"] for each in group["texts"]}) for group in found["copies"])
    assert found["texts"] == {"train": 314, "test": 100}


def test_odd_texts_are_told_with_what_is_odd(model: Path, audited: Path) -> None:
    texts = texts_by_key(model, audited, audited.with_name("texts.csv"))
    odd = {texts[each["split"], each["key"]]: each["what"] for each in found_in(audited)["odd"]}
    assert odd[RUSSIAN] == "in Cyrillic script, mostly unknown tokens"
    assert "without letters" in odd[SIGNS]
    assert odd[GIBBERISH] == "mostly unknown tokens"
    assert "short" in odd[SHORT]
    assert "long" in odd[PLANTED[11].text]
    assert not {row.text for row in (*OF_TEST, *OF_TRAIN)} & set(odd)


def test_the_page_shows_texts_as_text(audited: Path) -> None:
    page = (audited / "audit.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "\u202e" not in page
    assert page.count("<blockquote") >= 2 * 7
    assert "<img" not in page
    assert "image" not in page.partition("</style>")[2].replace("data:image", "")
    assert "picture" not in page.partition("</style>")[2]
    assert "3 texts are in several splits, 2 texts have different labels" in page


@pytest.mark.parametrize("made", [csv_of, tsv_of, json_lines_of, parquet_of, files_of])
def test_what_is_proposed_can_be_given_to_a_run_as_it_is(made: Any, model: Path, audited: Path, tmp_path: Path) -> None:
    """By `data.corrections`, for each kind of source: what was to be dropped is not in the data any more, and all else is."""
    source = made(tmp_path)
    assert audit(model, source, tmp_path / "out") == 0
    before = texts_by_key(model, tmp_path / "out", source)
    told = [{name: found_in(out)[name] for name in ("texts", "left_out", "notes")} for out in (tmp_path / "out", audited)]
    assert told[0] == told[1]
    kinds = [
        sorted(sorted(each["how"] for each in group["texts"]) for group in found_in(out)["copies"]) for out in (tmp_path / "out", audited)
    ]
    assert kinds[0] == kinds[1], "whatever the kind of source"
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "changes.csv").read_text())))
    actions = {(row["split"], row["key"]): row["action"] for row in rows}
    config = text_config(
        model, source, data__root=str(tmp_path / "data"), data__max_tokens=39, data__corrections=str(tmp_path / "out" / "changes.csv")
    )
    dataset = prepared(config.data).dataset
    after = {(name, key) for name in ("train", "test") for key in dataset.split(name).keys(range(dataset.split(name).count))}
    dropped = {place for place, action in actions.items() if action == "drop"}
    assert after == before.keys() - dropped
    # Three leaks; both texts that have two labels; of two equal ones the second.
    assert sorted(before[place] for place in dropped) == sorted(
        [PLANTED[0].text, PLANTED[1].text, PLANTED[2].text, OF_TRAIN[0].text, OF_TRAIN[0].text, OF_TRAIN[1].text, HOSTILE]
    )
    assert all(split == "train" for split, _ in dropped)


def test_the_same_audit_finds_the_same_bytes(model: Path, audited: Path, tmp_path: Path) -> None:
    source = audited.with_name("texts.csv")
    assert audit(model, source, tmp_path / "again", "--data.root", str(audited.with_name("data"))) == 0
    for name in ("findings.json", "changes.csv"):
        assert (tmp_path / "again" / name).read_bytes() == (audited / name).read_bytes()


def test_a_run_stands_for_its_texts_and_its_model(model: Path, audited: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    source = write_csv(tmp_path / "texts.csv", [vars(row) for row in (*TRAIN[:60], *TEST[:20], PLANTED[0])])
    config = text_config(tmp_path / "model", source, run="mine")
    finished_text_run(open_storage(tmp_path / "runs"), config)
    assert main([str(tmp_path / "runs" / "mine"), "--folds", "0", "--out", str(tmp_path / "out")]) == 0
    assert found_in(tmp_path / "out")["texts"] == {"train": 61, "test": 20}
    told = "the folds begin with model.weights="
    assert not folds.notes_on(config, "texts"), "of a published encoder there is nothing to say"
    (note,) = folds.notes_on(text_config(tmp_path / "runs" / "mine" / "model", source), "texts")
    assert note.startswith(told), "a run's own model has seen the labels"


def test_many_texts_that_are_cut_are_a_note_and_not_odd(model: Path, audited: Path, tmp_path: Path) -> None:
    source = audited.with_name("texts.csv")
    assert audit(model, source, tmp_path / "out", "--data.max-tokens", "12") == 0
    found = found_in(tmp_path / "out")
    (note,) = found["notes"]
    assert re.fullmatch(r"\d+ of 414 texts \(\d+\.\d %\) are as long as data\.max_tokens=12 allows, most of them cut; .*", note)
    assert not any("max_tokens" in each["what"] for each in found["odd"])


def test_texts_that_another_tokenizer_made_are_refused(
    model: Path, audited: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (converted,) = audited.with_name("data").glob("texts-*")
    with pytest.raises(SystemExit):
        audit(make_model(tmp_path / "other"), converted, tmp_path / "out")
    assert "was made into tokens by another tokenizer" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


# --- near copies --------------------------------------------------------------------------------------------------------------------------


def all_shingles(texts: Sequence[str]) -> Shingles:
    sampled = Sampled()
    for text in texts:
        sampled.add(shingles_of(folded(text)))
    return sampled.all()


@given(
    st.lists(
        st.lists(st.sampled_from(["good", "film", "bad", "very", "plot"]), min_size=1, max_size=6).map(" ".join), min_size=2, max_size=25
    ),
    st.integers(20, 90),
    st.integers(1, 200),
)
def test_near_pairs_are_those_that_all_pairs_at_once_show(texts: list[str], least: int, at_once: int) -> None:
    shingles = all_shingles(texts)
    sets = [set(shingles.of(np.array([number]))[0].tolist()) for number in range(len(texts))]
    weight = {each: max(1, round(64 * math.log2(len(texts) / sum(each in other for other in sets)))) for each in set().union(*sets)}

    def weighs(some: set[int]) -> int:
        return sum(weight[each] for each in some)

    expected = {
        (one, two): 1 - weighs(sets[one] & sets[two]) / weighs(sets[one] | sets[two])
        for one in range(len(texts))
        for two in range(one + 1, len(texts))
        if 100 * weighs(sets[one] & sets[two]) >= least * weighs(sets[one] | sets[two])
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_copies, "AT_ONCE", at_once)
        found = near_pairs(shingles, np.arange(len(texts)), least=least)
    assert {(pair.first, pair.second): pair.ratio for pair in found} == pytest.approx(expected)


EDITS: dict[str, Callable[[list[str], random.Random], list[str]]] = {
    "another word": lambda words, dice: _with(words, dice.randrange(len(words)), "film"),
    "two other words": lambda words, dice: _with(_with(words, dice.randrange(len(words)), "film"), dice.randrange(len(words)), "film"),
    "a word left out": lambda words, dice: _with(words, dice.randrange(len(words)), ""),
    "capitals without signs": lambda words, dice: re.sub(r"[^\w\s]", "", " ".join(words)).upper().split(),
    "three quarters of it": lambda words, dice: words[: max(3, int(0.75 * len(words)))],
    "quoted": lambda words, dice: ["RT", "@user", ":", *words],
    "a letter mistyped": lambda words, dice: _mistyped(" ".join(words), dice).split(),
}


def _with(words: list[str], place: int, word: str) -> list[str]:
    return [*words[:place], *([word] if word else []), *words[place + 1 :]]


def _mistyped(text: str, dice: random.Random) -> str:
    place = dice.randrange(len(text))
    return f"{text[:place]}x{text[place + 1 :]}"


def test_of_copies_as_people_make_them_nearly_all_are_found_among_4000_texts_and_no_other_pair() -> None:
    """What docs/audit.md says."""
    dice = random.Random(0)
    texts = [row.text for row in (*real("train", 3000), *real("test", 1000))]
    planted = {}
    for number, place in enumerate(dice.sample(range(len(texts)), 350)):
        how = list(EDITS)[number % len(EDITS)]
        planted[place, len(texts)] = how
        texts.append(" ".join(EDITS[how](texts[place].split(), dice)))
    found = {(pair.first, pair.second) for pair in near_pairs(all_shingles(texts), np.arange(len(texts)))}
    assert not found - planted.keys()
    missed = Counter(planted[pair] for pair in planted.keys() - found)
    assert missed.total() <= 12, missed


def test_nothing_is_a_copy_of_a_text_without_shingles() -> None:
    nothing = Shingles(values=np.empty(0, np.uint64), starts=np.zeros(4, np.int64))
    assert near_pairs(nothing, np.arange(3)) == []
    assert near_pairs(all_shingles(["good", "good"]), np.arange(1)) == []


def test_texts_of_a_template_are_no_copies_and_a_copy_of_one_is() -> None:
    names = ["Anna Berg", "Boris Klein", "Carla Duarte", "Dmitri Ivanov", "Elena Fuchs", "Farid Hamdi", "Greta Jonas", "Hugo Lindt"]
    texts = [f"Please transfer the amount of money that I asked for to {name} at once" for name in names]
    copy = "Please transfer the amount of money that I asked for to Carla Duarte at once!"
    assert [(pair.first, pair.second) for pair in near_pairs(all_shingles([*texts, copy]), np.arange(9))] == [(2, 8)]


def test_fewer_shingles_are_kept_of_more_texts_and_copies_are_still_found(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [row.text for row in TRAIN[:80]] + [changed(row.text) for row in OF_TRAIN]
    monkeypatch.setattr(texts_module, "MOST_SHINGLES", 4_000)
    kept = all_shingles(texts)
    assert 1_000 < len(kept.values) <= 4_000
    monkeypatch.undo()
    whole = all_shingles(texts)
    assert len(whole.values) > 4_000
    assert set(kept.values.tolist()) < set(whole.values.tolist())
    pairs = [{(pair.first, pair.second) for pair in near_pairs(each, np.arange(len(texts)))} for each in (kept, whole)]
    assert pairs[0] == pairs[1] == {(TRAIN.index(row), 80 + number) for number, row in enumerate(OF_TRAIN) if TRAIN.index(row) < 80}


@given(st.text())
def test_folding_is_done_once_and_for_all(text: str) -> None:
    once = folded(text)
    assert folded(once) == once == once.strip()
    assert folded(f"\u200b{text}\n") == once
    assert len(shingles_of(once)) >= 1


def test_what_is_the_same_but_for_its_form_is_folded_alike() -> None:
    for one, two in (
        ("Straße", "STRASSE"),
        ("ﬁne  film", "fine film"),
        ("cafe\u0301", "café"),
        ("a\u200bb", "ab"),
        (" x\n\ty ", "x y"),
        ("ＡＢ", "ab"),
    ):
        assert folded(one) == folded(two)
    assert folded("not good") != folded("good")
    assert len(shingles_of("abcdefg")) == 7 - LENGTH + 1


# --- labels -------------------------------------------------------------------------------------------------------------------------------


def test_labels_are_judged_by_runs_that_have_not_seen_the_texts(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folds are pretended runs, with real models that call every text positive."""

    def run(words: Sequence[str]) -> Ended:
        flags = dict(zip(words[2::2], words[3::2], strict=True))
        config = from_toml(Path(flags["--config"]).read_text())
        config = replaced(replaced(config, "run", flags["--run"]), "data.fold", flags["--data.fold"])
        finished_text_run(open_storage(config.storage), config, answer=1)
        return Ended(status=0, signal=0)

    monkeypatch.setattr(folds, "run_child", run)
    make_model(tmp_path / "model")
    source = write_csv(tmp_path / "texts.csv", [vars(row) for row in (*TRAIN[:60], *TEST[:20])])
    assert (
        audit(tmp_path / "model", source, tmp_path / "out", "--folds", "2", "--train.precision", "fp32", "--train.virtual-ranks", "2") == 0
    )
    said = capsys.readouterr().out
    assert "2 runs of 3 epochs, each on 30 of 60 training texts: 180 texts to train on" in said
    assert "image" not in said
    found = found_in(tmp_path / "out")
    negative = {f"texts/{number:08d}" for number, row in enumerate(TRAIN[:60]) if row.label == "negative"}
    assert {each["key"] for each in found["labels"]} == negative
    assert found["answered_as_labelled"] == pytest.approx(1 - len(negative) / 60)
    assert "Labels of the test texts: the folds have not recorded their answers to all of them." in found["left_out"]
    page = (tmp_path / "out" / "audit.html").read_text()
    assert next(row for row in TRAIN if row.label == "negative" and "'" not in row.text and '"' not in row.text).text in page


def test_doubted_labels_of_texts_are_shown_and_proposed() -> None:
    sample = Sample(split="train", row=3, key="texts:3", label="positive")
    doubt = Doubt(sample=sample, answer="negative", of_answer=0.9, of_label=0.05)
    tested = Sample(split="test", row=1, key="texts:1", label="positive")
    findings = Findings(
        data="texts.csv",
        fingerprint="f" * 64,
        counts={"train": 9, "test": 3},
        unit="texts",
        classes=("negative", "positive"),
        doubts=(doubt,),
        copies=(Copies(samples=(sample, tested), how=("near", "near"), ratio=0.2),),
        folds=5,
        right=0.9,
    )
    text = render(findings, {sample: "<b>Not good at all</b>"}, changes="changes.csv")
    assert "&lt;b&gt;Not good at all&lt;/b&gt;" in text
    assert "no text" in text, "of what could not be read"
    assert "80.0 % in common" in text
    assert "They answered 90.0 % of the training texts as labelled." in text
    assert verdict(findings)[1] == "1 text is in several splits, 1 label is doubted."
    assert [(change.action, change.label) for change in changes_of(findings)] == [("drop", "")]
