"""Texts from all their kinds of files: read, made into tokens once, stored, refused where they cannot be used, and made into batches."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataio.codecs.codec import Refusal
from dataio.codecs.text.form import TextForm, text_form, tokenizer_bytes
from dataio.codecs.text.tokens import PAD, PART_BIT, TextFacts, Tokenizer
from dataio.config import DataConfig
from dataio.convert import main
from dataio.length_order import LengthOrder
from dataio.loader import Loader
from dataio.manifest import Manifest
from dataio.order import Order
from dataio.parquet import Dataset, open_dataset
from dataio.prepared import open_prepared, prepare
from dataio.quarantine import TooManyBadSamples
from dataio.reading import described
from dataio.scan import look_at
from dataio.sources import SourceError, open_source
from tests.texts import make_tokenizer, rows, sentence, write_csv, write_json_lines


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return DataConfig(path=str(tmp_path / "texts.csv"), root=str(tmp_path / "root"), tokenizer=str(make_tokenizer(tmp_path / "model")))


def converted(config: DataConfig, path: Path) -> Dataset:
    return open_prepared(replace(config, path=str(path)))[1]


def found(dataset: Dataset) -> dict[str, list[tuple[str, str]]]:
    """Split -> its (text, class), in order."""
    (target,) = dataset.manifest.targets
    pairs = {}
    for name in dataset.manifest.splits:
        split = dataset.split(name)
        labels = (target.classes[label] for label in split.targets()[target.name])
        pairs[name] = list(zip(split.texts(range(split.count)), labels, strict=True))
    return pairs


def by_split(train: range, test: range) -> dict[str, list[tuple[str, str]]]:
    return {"train": list(map(sentence, train)), "test": list(map(sentence, test))}


def with_split(train: range, test: range) -> list[dict[str, str]]:
    return [{**row, "split": split} for split, part in (("train", train), ("test", test)) for row in rows(part)]


# --- kinds of files -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.ndjson", "t.parquet"])
def test_a_file_gives_its_texts_labels_and_splits(name: str, tmp_path: Path, config: DataConfig) -> None:
    table, path = with_split(range(30), range(30, 40)), tmp_path / name
    if name.endswith("sv"):
        write_csv(path, table)
    elif name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(table), path)
    else:
        write_json_lines(path, table)
    dataset = converted(config, path)
    assert found(dataset) == by_split(range(30), range(30, 40))
    assert dataset.split("test").keys([0]) == ["t/00000030"]
    assert (dataset.manifest.version, dataset.manifest.unit, dataset.manifest.source) == (3, "texts", "texts")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_folder_has_its_splits_in_the_names_of_files(suffix: str, tmp_path: Path, config: DataConfig) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, numbers in (("train", range(25)), ("dev", range(25, 35)), ("test", range(35, 40))):
        path = folder / f"{name}.{suffix}"
        match suffix:
            case "csv":
                write_csv(path, rows(numbers))
            case "jsonl":
                write_json_lines(path, rows(numbers))
            case _:
                pq.write_table(pa.Table.from_pylist(rows(numbers)), path)
    dataset = converted(config, folder)
    assert found(dataset) == by_split(range(25), range(35, 40)) | {"validation": list(map(sentence, range(25, 35)))}


def test_a_folder_a_class_of_txt_files_is_read(tmp_path: Path, config: DataConfig) -> None:
    for number in range(40):
        text, label = sentence(number)
        path = tmp_path / "data" / ("train" if number < 30 else "test") / label / f"{number:03d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    (tmp_path / "data" / "README.md").write_text("no text of these")
    dataset = converted(config, tmp_path / "data")
    wanted = {name: Counter((f"{text}\n", label) for text, label in pairs) for name, pairs in by_split(range(30), range(30, 40)).items()}
    assert {name: Counter(pairs) for name, pairs in found(dataset).items()} == wanted
    assert dataset.manifest.source == "text-folder"
    assert dataset.reading is not None
    assert dataset.reading.not_read == ("1 .md",)


def test_without_a_test_split_a_part_of_each_class_is_held_out(tmp_path: Path, config: DataConfig) -> None:
    dataset = converted(replace(config, test_fraction=0.25), write_csv(tmp_path / "t.csv", rows(range(40))))
    pairs = found(dataset)
    assert sorted(pairs["train"] + pairs["test"]) == sorted(map(sentence, range(40)))
    assert Counter(label for _, label in pairs["test"]) == {"pos": 5, "neg": 5}


def test_columns_are_found_by_usual_names_or_named(tmp_path: Path, config: DataConfig) -> None:
    table = [{"id": str(n % 2), "Review": text, "Class": label, "x": "other"} for n, (text, label) in enumerate(map(sentence, range(20)))]
    usual = converted(config, write_csv(tmp_path / "a.csv", table))
    assert sorted(text for pairs in found(usual).values() for text, _ in pairs) == sorted(sentence(n)[0] for n in range(20))
    named = converted(replace(config, text_column="x", label_column="id"), write_csv(tmp_path / "b.csv", table))
    assert {text for pairs in found(named).values() for text, _ in pairs} == {"other"}
    assert named.manifest.classes == ("0", "1")


def test_numbers_and_several_labels_are_targets_of_texts_too(tmp_path: Path, config: DataConfig) -> None:
    table = [{"text": sentence(n)[0], "score": n / 2, "tags": ["a", "b"][: n % 3]} for n in range(30)]
    for path in (tmp_path / "t.jsonl", tmp_path / "t.parquet"):
        write_json_lines(path, table) if path.suffix == ".jsonl" else pq.write_table(pa.Table.from_pylist(table), path)
        dataset = converted(replace(config, targets="score:number,tags:labels"), path)
        assert [(target.name, target.kind, target.classes) for target in dataset.manifest.targets] == [
            ("score", "number", ()),
            ("tags", "labels", ("a", "b")),
        ]
        split = dataset.split("train")
        numbers = [int(key.rpartition("/")[2]) for key in split.keys(range(split.count))]
        assert split.targets()["score"].tolist() == [n / 2 for n in numbers]
        assert split.targets()["tags"].tolist() == [[int(n % 3 > 0), int(n % 3 > 1)] for n in numbers]


def test_class_names_in_the_hubs_metadata_name_the_classes(tmp_path: Path, config: DataConfig) -> None:
    about = {"info": {"features": {"label": {"names": ["bad", "good"], "_type": "ClassLabel"}}}}
    table = pa.table({"text": [sentence(n)[0] for n in range(20)], "label": [n % 2 for n in range(19)] + [-1]})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(about)}), tmp_path / "train.parquet")
    dataset = converted(config, tmp_path / "train.parquet")
    assert dataset.manifest.classes == ("bad", "good")
    assert [bad.reason for bad in dataset.left_out()] == ["bad label: -1 is not in 0..1"]


def test_pairs_of_texts_keep_which_token_is_of_which_text(tmp_path: Path, config: DataConfig) -> None:
    table = [{"a": "good film", "b": "bad", "label": str(n % 2)} for n in range(10)]
    dataset = converted(replace(config, text_column="a,b"), write_csv(tmp_path / "t.csv", table))
    assert dataset.split("train").texts([0]) == ["good film\nbad"]
    batch = next(loader_of(dataset, config).evaluate("train", range(1), 1))
    row = batch.samples[0]
    assert (row[row >= 0] >> PART_BIT).tolist() == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"t.csv": "words,label\na,b\n"}, "has no column text, sentence, review, content, ...; its columns are words, label"),
        ({"t.csv": "text\na\n"}, "has no column label, labels, tags"),
        ({"t.csv": ""}, "is empty"),
        ({"t.csv": "text,text,label\n"}, "two columns named 'text'"),
        ({"t.csv": "text,label\na\n"}, r"line 2: there are 1 cells, the header names 2"),
        ({"t.jsonl": "{}\n"}, "is empty"),
        ({"t.jsonl": '{"text": "a", "label": 1}\n["a"]\n'}, "line 2 is .*, not an object"),
        ({"t.jsonl": '{"text": "a", "label": 1}\nnonsense\n'}, "line 2 is not JSON"),
        ({"t.jsonl": '{"text": "a", "label": {"of": 1}}\n'}, "is no label, number or list of labels"),
        ({"t.parquet": "nonsense"}, "is no readable Parquet file"),
        ({"t.pdf": "nonsense"}, "is no file of texts; accepted are"),
    ],
)
def test_what_cannot_be_read_is_told_with_place_rule_and_fix(
    files: dict[str, str], message: str, tmp_path: Path, config: DataConfig
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(SourceError, match=message):
        converted(config, tmp_path / next(iter(files)))


def test_a_folder_of_nothing_lists_what_is_accepted(tmp_path: Path, config: DataConfig) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"holds nothing; accepted are\n  a table \(\.csv, \.tsv\)"):
        converted(config, tmp_path / "empty")


# --- tokens ---------------------------------------------------------------------------------------------------------------------------


def form_of(tokenizer: Path, **changes: Any) -> TextForm:
    form = text_form(replace(DataConfig(), tokenizer=str(tokenizer), **changes))
    assert form is not None
    return form


def tokenizer_of(form: TextForm) -> Tokenizer:
    return Tokenizer(tokenizer_bytes(form.tokenizer), max_tokens=form.max_tokens, too_long=form.too_long, where=str(form.tokenizer))


def test_tokens_are_the_tokenizers_own_and_a_long_text_keeps_its_end_marker(tmp_path: Path) -> None:
    path = make_tokenizer(tmp_path)
    from tokenizers import Tokenizer as Theirs

    theirs = Theirs.from_file(str(path))
    theirs.no_padding()
    theirs.no_truncation()
    text = "the film was good but the book was very dull"
    ours = tokenizer_of(form_of(path, max_tokens=8))
    facts, short = ours.facts([text.encode(), b"a film"])
    assert isinstance(facts, TextFacts)
    assert isinstance(short, TextFacts)
    whole = theirs.encode(text).ids
    assert np.frombuffer(facts.stored, "<i4").tolist() == [*whole[:7], whole[-1]]
    assert (facts.length, facts.was_cut, short.was_cut) == (8, True, False)
    assert np.frombuffer(short.stored, "<i4").tolist() == theirs.encode("a film").ids


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty: there is no text"),
        (b" \n\t", "empty: there is no text"),
        ("\u00a0".encode(), "empty: there is no text"),
        (b"good \xff film", r"undecodable: b'\xff fi' at byte 5 is not UTF-8"),
        (b"a" * ((1 << 20) + 1), "too long: 1048577 bytes; 1048576 are the most"),
        (b"the film was good but the book was dull", "too long: 11 tokens; data.max_tokens=8 are the most"),
    ],
)
def test_texts_that_cannot_be_used_say_why(data: bytes, reason: str, tmp_path: Path) -> None:
    assert tokenizer_of(form_of(make_tokenizer(tmp_path), max_tokens=8, too_long="refuse")).facts([data]) == [Refusal(reason=reason)]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(max_size=60), max_size=8))
def test_no_text_breaks_the_tokenizer_and_none_depends_on_the_others(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    tokenizer = tokenizer_of(form_of(_shared(tmp_path_factory), max_tokens=8))
    encoded = [text.encode(errors="replace") for text in texts]
    together = tokenizer.facts(encoded)
    assert together == [tokenizer.facts([each])[0] for each in encoded]
    assert all(isinstance(each, Refusal) or 2 < each.length <= 8 for each in together)


_made: list[Path] = []


def _shared(factory: pytest.TempPathFactory) -> Path:
    if not _made:
        _made.append(make_tokenizer(factory.mktemp("tokenizer")))
    return _made[0]


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"data\.tokenizer=.*tokenizer\.json is no tokenizer of the tokenizers library"):
        tokenizer_of(form_of(tmp_path))
    with pytest.raises(ValueError, match=r"cannot be read \(No such file or directory\); name the tokenizer\.json"):
        form_of(tmp_path / "none")


# --- conversion -----------------------------------------------------------------------------------------------------------------------


def test_bad_texts_are_quarantined_counted_and_limited(tmp_path: Path, config: DataConfig) -> None:
    path = write_csv(tmp_path / "t.csv", rows(range(200)))
    with path.open("ab") as file:
        file.write(b",pos\n" + b"good \xe9t\xe9,pos\n" + b"  ,neg\n")
    dataset = converted(config, path)
    assert sum(len(pairs) for pairs in found(dataset).values()) + len(dataset.left_out()) == 203
    reasons = sorted(bad.reason for bad in dataset.left_out())
    assert reasons == ["empty: there is no text"] * 2 + [r"undecodable: b'\xe9t\xe9' at byte 5 is not UTF-8"]
    with pytest.raises(TooManyBadSamples):
        converted(replace(config, max_bad_fraction=0.0, root=str(tmp_path / "other")), path)


def test_long_texts_are_cut_and_counted_or_refused_as_the_setting_says(tmp_path: Path, config: DataConfig) -> None:
    path = write_csv(tmp_path / "t.csv", rows(range(100)))
    whole, cut = converted(config, path), converted(replace(config, max_tokens=20), path)
    assert whole.manifest.texts is not None
    assert cut.manifest.texts is not None
    longer = sum(count for length, count in whole.manifest.texts.lengths.items() if int(length) > 20)
    assert longer == 16
    assert (whole.manifest.texts.cut, cut.manifest.texts.cut, cut.manifest.texts.longest) == (0, longer, 20)
    assert f"20 tokens at most, of which {longer} had more and were cut" in described(cut.manifest, cut.reading)
    refused = converted(replace(config, max_tokens=20, too_long="refuse", max_bad_fraction=0.5), path)
    assert Counter(bad.reason.partition(":")[0] for bad in refused.left_out()) == {"too long": longer}


def test_the_fingerprint_holds_the_tokenizer_and_how_it_was_used(tmp_path: Path, config: DataConfig) -> None:
    path = write_csv(tmp_path / "t.csv", rows(range(60)))
    other = make_tokenizer(tmp_path / "other", ["the", "good"])
    variants = [config, replace(config, tokenizer=str(other)), replace(config, max_tokens=50), replace(config, too_long="refuse")]
    fingerprints = [converted(each, path).manifest.fingerprint for each in variants]
    assert len(set(fingerprints)) == len(variants)
    moved = tmp_path / "moved" / "tokenizer.json"
    moved.parent.mkdir()
    moved.write_bytes(Path(config.tokenizer).read_bytes())
    again = converted(replace(config, tokenizer=str(moved.parent), root=str(tmp_path / "again")), path)
    assert again.manifest.fingerprint == fingerprints[0]


def test_a_converted_folder_is_found_again_and_looked_at_without_converting(tmp_path: Path, config: DataConfig) -> None:
    config = replace(config, path=str(write_csv(tmp_path / "t.csv", rows(range(60)))))
    before = look_at(config)
    assert not before.is_converted
    assert before.targets[0].classes == ("neg", "pos")
    folder = prepare(config)
    changed = (folder / "manifest.json").stat().st_mtime_ns
    assert prepare(config) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == changed
    assert look_at(config).is_converted
    assert Manifest.from_json((folder / "manifest.json").read_text()) == open_dataset(folder).manifest


def test_the_command_line_converts_texts(tmp_path: Path, config: DataConfig, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_csv(tmp_path / "t.csv", rows(range(60)))
    arguments = [str(path), str(tmp_path / "made"), "--tokenizer", config.tokenizer, "--max-tokens", "16", "--text-column", "text"]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert (
        "2 classes (neg, pos): 54 train, 6 test texts (27 of each class to train); test held out of train (10%); 16 tokens at most" in told
    )
    manifest = open_dataset(tmp_path / "made").manifest
    assert manifest.texts is not None
    assert manifest.texts.max_tokens == 16


def test_texts_are_not_read_as_images_nor_images_as_texts(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", rows(range(10)))
    with pytest.raises(ValueError, match=r"data\.text_column='text' is of texts, .* a model of texts brings \(--model\.name hf/FOLDER\)"):
        open_source(str(path), root=tmp_path, test_fraction=0.1, text_column="text")
    with pytest.raises(ValueError, match=r"data\.image_column='text' is of images"):
        open_source(str(path), root=tmp_path, test_fraction=0.1, image_column="text", holds_texts=True)


# --- batches --------------------------------------------------------------------------------------------------------------------------


def order_of(dataset: Dataset, **changes: Any) -> LengthOrder:
    split = dataset.split("train")
    values = {"seed": 3, "batch_size": 12, "virtual_ranks": 3, "sort_steps": 4, "spread": True, **changes}
    return LengthOrder(fingerprint=dataset.manifest.fingerprint, count=split.count, lengths=split.lengths(), **values)


def loader_of(dataset: Dataset, config: DataConfig, order: Order | None = None, **changes: Any) -> Loader:
    order = order or order_of(dataset)
    values: dict[str, Any] = {"virtual_ranks": range(order.virtual_ranks), "on_bad": lambda bad: None, **changes}
    return Loader(dataset, config, order=order, device=torch.device("cpu"), seed=3, **values)


@pytest.mark.parametrize("cache", ["host", "none"])
def test_batches_hold_the_tokens_padded_to_the_steps_need(cache: Any, tmp_path: Path, config: DataConfig) -> None:
    dataset = converted(config, write_csv(tmp_path / "t.csv", rows(range(100))))
    order, split = order_of(dataset), dataset.split("train")
    loader = loader_of(dataset, replace(config, cache=cache), order)
    stored = [np.frombuffer(bytes(each), "<i4") for group in range(split.groups) for each in split.read_group(group).encoded]
    seen: list[int] = []
    for number, step in enumerate(loader.train(0, order.steps_per_epoch)):
        for batch in step:
            assert batch.samples.shape == (len(batch.ids), order.width(number))
            assert batch.samples.dtype == torch.int32
            for row, sample in zip(batch.samples.numpy(), batch.ids, strict=True):
                assert row[: len(stored[sample])].tolist() == stored[sample].tolist()
                assert (row[len(stored[sample]) :] == PAD).all()
            assert batch.targets["label"].tolist() == split.labels()[batch.ids].tolist()
            seen += batch.ids.tolist()
    assert sorted(seen) == list(range(split.count))
    assert loader.tokens.given == sum(map(len, stored))
    assert loader.tokens.padded == sum(order.batch_count(number) * order.width(number) for number in range(order.steps_per_epoch))


def test_workers_and_restarts_make_the_same_batches(tmp_path: Path, config: DataConfig) -> None:
    dataset = converted(config, write_csv(tmp_path / "t.csv", rows(range(100))))
    steps = order_of(dataset).steps_per_epoch
    whole = [[(b.ids.tolist(), b.samples.tolist()) for b in step] for step in loader_of(dataset, config).train(0, 2 * steps)]
    later: list[list[Any]] = [[] for _ in range(2 * steps - 3)]
    for carried in (range(2), range(2, 3)):
        for number, step in enumerate(loader_of(dataset, config, virtual_ranks=carried).train(3, 2 * steps)):
            later[number] += [(b.ids.tolist(), b.samples.tolist()) for b in step]
    assert later == whole[3:]


def test_an_evaluation_sees_each_text_once_the_short_ones_first(tmp_path: Path, config: DataConfig) -> None:
    dataset = converted(config, write_csv(tmp_path / "t.csv", rows(range(100))))
    loader, split = loader_of(dataset, config), dataset.split("train")
    ids = loader.padding_least("train", range(20, 80))
    batches = list(loader.evaluate("train", ids, 16))
    assert sorted(sample for batch in batches for sample in batch.ids.tolist()) == list(range(20, 80))
    widths = [batch.samples.shape[1] for batch in batches]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]
    assert [batch.targets["label"].tolist() for batch in batches] == [split.labels()[batch.ids].tolist() for batch in batches]


def test_a_damaged_row_is_quarantined_and_has_no_label(tmp_path: Path, config: DataConfig) -> None:
    dataset = converted(config, write_csv(tmp_path / "t.csv", rows(range(40))))
    bad = []
    loader = loader_of(dataset, config, on_bad=bad.append)
    codec = loader._new_codec()
    out = np.empty((4, *codec.row.shape), np.int32)
    good = np.array([2, 5, 3], "<i4").tobytes()
    reasons = codec.decode([good, good[:-1], b"", np.array([2, 999, 3], "<i4").tobytes()], out)
    assert [index for index, _ in reasons] == [1, 2, 3]
    assert all(reason.startswith("damaged tokens: ") for _, reason in reasons)
    assert out[:, :4].tolist() == [[2, 5, 3, PAD], *[[0, PAD, PAD, PAD]] * 3]
