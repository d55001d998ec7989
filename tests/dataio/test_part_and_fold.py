"""A part of the training samples, and folds of them: what is chosen depends on labels and contents alone, and each class has its share."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpus import encode, picture
from hypothesis import example, given
from hypothesis import strategies as st
from made import read, write_folder, write_table

from dataio.balance import class_counts, known_class_counts
from dataio.batch import Batch
from dataio.config import DataConfig
from dataio.conversion import convert
from dataio.fold import MAX_FOLDS, Choice, Fold, fold_of, part_of
from dataio.loader import Loader
from dataio.manifest import SplitInfo
from dataio.order import Order
from dataio.parquet import ROWS_PER_GROUP, Dataset, ShardWriter, Split, open_dataset
from dataio.quarantine import BadSample
from dataio.schema import single_label
from dataio.selection import choose, planned, ranked, selected, selected_counts, turns

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)


def contents_of(count: int, draw: int = 0) -> np.ndarray:
    """(count,) uint64, as good as hashes."""
    return np.random.default_rng(draw).integers(0, 1 << 64, count, dtype=np.uint64)


def groups_of(sizes: list[int], draw: int = 0) -> np.ndarray:
    """(sum(sizes),) int64: so many samples of each group, in any order."""
    return np.random.default_rng(draw).permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int64)


# --- the order ------------------------------------------------------------------------------------------------------------------------


@given(SIZES)
@example([7, 1, 1, 1])  # Webster's method gives the first four places to the large one
@example([1000, *[1] * 99])
def test_after_any_number_of_turns_each_group_has_its_share_give_or_take_less_than_one(sizes: list[int]) -> None:
    total, there = sum(sizes), sum(map(bool, sizes))
    scale = max(1, 2 * there - 2)  # Tijdeman's bound is 1 - 1/scale
    had = np.cumsum(np.eye(len(sizes), dtype=np.int64)[list(turns(sizes, total))], axis=0)  # (total, groups)
    shares_times_total = np.arange(1, total + 1)[:, None] * np.array(sizes)
    assert np.all(scale * abs(had * total - shares_times_total) <= (scale - 1) * total)
    assert had[-1].tolist() == sizes


def test_equal_groups_take_turns() -> None:
    assert list(turns([3, 3, 3], 9)) == [0, 1, 2] * 3


@given(SIZES, st.integers(0, 5), st.data())
def test_parts_are_nested_and_hold_what_the_numbers_promise(sizes: list[int], seed: int, data: st.DataObject) -> None:
    groups, total = groups_of(sizes), sum(sizes)
    contents = contents_of(total)
    count = data.draw(st.integers(0, total))
    order = ranked(groups, contents, seed=seed, count=total)
    assert sorted(order.tolist()) == list(range(total))
    assert ranked(groups, contents, seed=seed, count=count).tolist() == order[:count].tolist()
    if count > 1:
        choice = Choice(part=float(count), seed=seed)
        train, held = choose(groups, contents, choice)
        assert np.flatnonzero(train).tolist() == sorted(order[:count].tolist())
        assert not held.any()
        assert planned(sizes, choice) == (np.bincount(groups[train], minlength=len(sizes)).tolist(), [0] * len(sizes))


@given(SIZES, st.integers(2, 6), st.integers(0, 5), st.floats(0.05, 1))
def test_folds_are_disjoint_cover_everything_and_have_each_groups_share(sizes: list[int], folds: int, seed: int, part: float) -> None:
    groups, total = groups_of(sizes), sum(sizes)
    if total < folds:
        with pytest.raises(ValueError, match=f"cannot be cut into {folds} folds"):
            choose(groups, contents_of(total), Choice(fold=Fold(number=folds, folds=folds)))
        return
    times_held = np.zeros(total, int)
    for number in range(1, folds + 1):
        choice = Choice(fold=Fold(number=number, folds=folds), seed=seed)
        train, held = choose(groups, contents_of(total), choice)
        assert np.array_equal(train, ~held)
        assert abs(held.sum() - Fraction(total, folds)) < 1
        for group, size in enumerate(sizes):
            assert abs((held & (groups == group)).sum() - Fraction(size, folds)) < 1
        some, same = choose(groups, contents_of(total), replace(choice, part=part))
        assert np.array_equal(same, held), "a part is taken of what the fold leaves"
        assert not (some & held).any()
        assert some.sum() == max(1, round(part * train.sum()))
        of_each = [np.bincount(groups[mask], minlength=len(sizes)).tolist() for mask in (some, held)]
        assert planned(sizes, replace(choice, part=part)) == tuple(of_each)
        times_held += held
    assert set(times_held.tolist()) == {1}


@given(SIZES, st.integers(0, 5))
def test_the_choice_is_of_contents_and_does_not_depend_on_how_samples_are_stored(sizes: list[int], shuffle: int) -> None:
    groups, total = groups_of(sizes), sum(sizes)
    contents = contents_of(total)
    mixed = np.random.default_rng(shuffle).permutation(total)
    for choice in (Choice(part=0.3), Choice(fold=Fold(number=1, folds=2)) if total > 1 else Choice(part=0.5)):
        (train, held), (moved, moved_held) = choose(groups, contents, choice), choose(groups[mixed], contents[mixed], choice)
        assert np.array_equal(train[mixed], moved)
        assert np.array_equal(held[mixed], moved_held)


def test_another_choice_seed_chooses_others_of_the_same_number() -> None:
    groups, contents = groups_of([400, 100]), contents_of(500)
    masks = [choose(groups, contents, Choice(part=50.0, seed=seed))[0] for seed in range(6)]
    assert {tuple(np.bincount(groups[mask])) for mask in masks} == {(40, 10)}
    overlaps = [int((one & other).sum()) for at, one in enumerate(masks) for other in masks[at + 1 :]]
    assert max(overlaps) < 20, "two choices of a tenth share about a tenth of it"


def test_the_order_itself_is_kept() -> None:
    """Golden: a choice must mean the same in every release, or a part would not lie in one that was trained on before."""
    groups = np.repeat(np.arange(3), (30, 20, 5))
    contents = np.array([int.from_bytes(hashlib.sha256(b"%d" % number).digest()[:8], "little") for number in range(55)], np.uint64)
    order = ranked(groups, contents, seed=3, count=55)
    held = choose(groups, contents, Choice(fold=Fold(number=2, folds=5), seed=3))[1]
    digest = hashlib.sha256(order.astype("<i8").tobytes() + np.flatnonzero(held).astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "10a8407f77d12e6a"


# --- settings -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("2", "is no fold; write NUMBER/FOLDS, such as 2/5"),
        ("a/b", "is no fold; write NUMBER/FOLDS"),
        ("2/5/1", "is no fold; write NUMBER/FOLDS"),
        ("-1/5", "is no fold; write NUMBER/FOLDS"),
        ("6/5", "data.fold=6/5: the folds of 5 are 1/5 to 5/5; use one of them"),
        ("0/5", "the folds of 5 are 1/5 to 5/5"),
        ("1/1", f"there can be 2 to {MAX_FOLDS} folds; use 5"),
        ("1/1001", "there can be 2 to"),
    ],
)
def test_a_fold_that_is_none_is_told_what_one_is(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=r"^data.fold=") as caught:
        fold_of(text)
    assert told in str(caught.value)


def test_folds_and_parts_are_read() -> None:
    assert fold_of("") is None
    assert fold_of("2/5") == Fold(number=2, folds=5)
    assert [part_of(value) for value in (1e-3, 1.0, 2.0, 600.0)] == [1e-3, 1.0, 2.0, 600.0]
    for value in (0.0, -1.0, 1.5, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"neither a fraction \(above 0, up to 1.* nor a whole number.*use 0.1 for a tenth, or 600"):
            part_of(value)


def test_more_than_there_are_is_told_with_the_most_that_there_are() -> None:
    assert Choice(part=600.0).sizes(600) == (600, 0)
    with pytest.raises(ValueError, match=r"data.part=601 is more than the 600 training samples; use at most 600, or a fraction of them"):
        Choice(part=601.0).sizes(600)
    with pytest.raises(ValueError, match=r"more than the 480 training samples that fold 2 of 5 leaves of 600; use at most 480"):
        Choice(part=481.0, fold=Fold(number=2, folds=5)).sizes(600)
    assert Choice(part=1e-9).sizes(600) == (1, 0)


# --- a data set -----------------------------------------------------------------------------------------------------------------------

COUNTS = (300, 120, 40, 5)
BETWEEN = 1201


def written(folder: Path) -> Dataset:
    """Samples of four classes in several row groups and two shards; each sample's bytes are its key."""
    folder.mkdir()
    labels = groups_of([3 * count for count in COUNTS])
    shards = []
    for number, (begin, end) in enumerate(((0, 2 * ROWS_PER_GROUP), (2 * ROWS_PER_GROUP, len(labels)))):
        writer = ShardWriter(folder / f"train-{number}.parquet", single_label("abcd"))
        for start in range(begin, end, ROWS_PER_GROUP):
            keys = [f"{row}.png" for row in range(start, min(start + ROWS_PER_GROUP, end))]
            data = [key.encode() for key in keys]
            hashes = [hashlib.sha256(each).digest() for each in data]
            writer.write_group(data, {"label": labels[start : start + len(keys)]}, keys, hashes)
        shards.append(writer.close())
    return Dataset(manifest_of(shards, len(labels)), {shard.name: folder / shard.name for shard in shards})


def manifest_of(shards: list[Any], count: int) -> Any:
    from dataio.manifest import Manifest

    return Manifest(
        targets=single_label("abcd"),
        splits={"train": SplitInfo(count=count, shards=tuple(shards))},
        fingerprint="ab" * 32,
        image_sizes={"4x4": count},
        quarantined=0,
        source="made",
        identity="cd" * 32,
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return written(tmp_path_factory.mktemp("chosen") / "data")


def rows_of(split: Split) -> list[tuple[str, int, bytes]]:
    """(key, label, bytes) of each sample, as they are read by row groups."""
    groups = [split.read_group(group) for group in range(split.groups)]
    return [
        (key, int(label), each.tobytes())
        for group in groups
        for key, label, each in zip(group.keys, group.labels, group.encoded, strict=True)
    ]


@pytest.mark.parametrize("config", [DataConfig(part=0.1), DataConfig(part=7), DataConfig(fold="3/4"), DataConfig(fold="1/3", part=0.02)])
def test_the_chosen_samples_are_read_as_a_split_of_their_own(dataset: Dataset, config: DataConfig) -> None:
    whole = rows_of(dataset.split("train"))
    column, contents = dataset.split("train").marks("label")
    assert [int(each) for each in contents] == [int.from_bytes(hashlib.sha256(data).digest()[:8], "little") for _, _, data in whole]
    train, held = choose(column, contents, Choice.of(config))
    view = selected(dataset, config)
    for name, mask in (("train", train), ("validation", held)) if config.fold else (("train", train),):
        split, wanted = view.split(name), [row for row, is_in in zip(whole, mask.tolist(), strict=True) if is_in]
        assert rows_of(split) == wanted
        assert split.count == len(wanted) == view.manifest.splits[name].count == split.group_offsets[-1]
        assert all(split.read_group(group).keys for group in range(split.groups)), "a row group without any is not read"
        assert split.labels().tolist() == [label for _, label, _ in wanted]
        assert split.keys([len(wanted) - 1, 0]) == [wanted[-1][0], wanted[0][0]]
        assert [key for key, _, _ in split.content()] == [key for key, _, _ in wanted]
        assert list(split.hashes()) == [hashlib.sha256(data).digest() for _, _, data in wanted]
        assert split.name == name
    assert class_counts(view) == known_class_counts(view) == tuple(np.bincount(column[train], minlength=4).tolist())
    assert rows_of(dataset.split("train")) == whole, "the data set itself is as it was"


def test_what_is_off_is_the_same_data_set(dataset: Dataset) -> None:
    assert selected(dataset, DataConfig()) is dataset
    assert selected(dataset, DataConfig(choice_seed=5)) is dataset
    view = selected(dataset, DataConfig(part=0.5))
    assert view.manifest.fingerprint == dataset.manifest.fingerprint, "the data are the same; the settings tell the runs apart"


def test_what_is_chosen_is_told(dataset: Dataset) -> None:
    view = selected(dataset, DataConfig(part=20))
    assert view.selected is not None
    assert view.selected.line == "trains on 20 of 1,395 images, stratified by class (data.part=20, data.choice_seed=0)"
    assert view.selected.vanished == ("d",)
    (warning,) = view.selected.warnings
    assert "none of the chosen training images is of class d, so the model never answers it; a larger data.part" in warning
    fold = selected(dataset, DataConfig(fold="2/5", choice_seed=4)).selected
    assert fold is not None
    assert fold.line == (
        "trains on 1,116 of 1,395 images, all but fold 2 of 5, stratified by class; fold 2 of 5, 279 images, is the validation split "
        "(data.fold=2/5, data.choice_seed=4)"
    )
    assert fold.warnings == ()
    with pytest.raises(ValueError, match=r"data.part=2000 is more than the 1,395 training samples; use at most 1395"):
        selected(dataset, DataConfig(part=2000))


@given(SIZES, st.sampled_from([DataConfig(part=0.3), DataConfig(fold="1/2"), DataConfig(fold="2/2", part=0.5)]))
def test_the_numbers_are_known_before_the_data_are(sizes: list[int], config: DataConfig) -> None:
    total = sum(sizes)
    if total < 2:
        return
    manifest = replace(manifest_of([], total), targets=single_label([f"class {number}" for number in range(len(sizes))]))
    seen, (of_train, of_held), told = selected_counts(manifest, sizes, config)
    groups = groups_of(sizes)
    train, held = choose(groups, contents_of(total), Choice.of(config))
    assert of_train == tuple(np.bincount(groups[train], minlength=len(sizes)).tolist())
    assert of_held == tuple(np.bincount(groups[held], minlength=len(sizes)).tolist())
    assert seen.splits["train"].count == train.sum()
    assert told is not None
    assert (told.train, told.held) == (train.sum(), held.sum())
    assert selected_counts(manifest, sizes, DataConfig()) == (manifest, ((), ()), None)


# --- loading --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """160 training images of three classes, and 40 to test."""
    root = tmp_path_factory.mktemp("photos")
    write_folder(root / "source", {"ant": 100, "bee": 60, "cat": 40})
    for number, file in enumerate(sorted((root / "source").glob("*/*.png"))):
        file.write_bytes(encode(picture(number, 4, 4)))  # no two alike
    convert(read(root / "source"), root / "data", max_bad_fraction=0, max_image_pixels=1000)
    return open_dataset(root / "data")


def loaded(dataset: Dataset, config: DataConfig, virtual_ranks: range, *, cache: str, window: int) -> Loader:
    order = Order(
        seed=5,
        fingerprint=dataset.manifest.fingerprint,
        count=dataset.split("train").count,
        batch_size=config.batch_size,
        virtual_ranks=4,
        window=window,
        group=16,
    )

    def fail(bad: BadSample) -> None:
        raise AssertionError(bad)

    return Loader(
        dataset,
        replace(config, cache=cache, pad=0),  # type: ignore[arg-type]
        order=order,
        virtual_ranks=virtual_ranks,
        device=torch.device("cpu"),
        seed=5,
        on_bad=fail,
    )


def content(batches: Iterator[tuple[Batch, ...]]) -> dict[tuple[int, int], tuple[Any, ...]]:
    """By (step, virtual rank): ids, labels, pixels."""
    return {
        (batch.step, batch.virtual_rank): (batch.ids.tolist(), batch.targets["label"].tolist(), batch.samples.numpy().tobytes())
        for step in batches
        for batch in step
    }


@pytest.mark.parametrize(("cache", "window"), [("host", 0), ("none", 0), ("none", 32)])
def test_each_chosen_sample_comes_once_an_epoch_for_any_workers_and_from_any_step(photos: Dataset, cache: str, window: int) -> None:
    config = DataConfig(part=0.5, fold="1/4", batch_size=12)
    view = selected(photos, config)
    count = view.split("train").count
    assert count == 60  # half of the 120 that the fold leaves
    alone = content(loaded(view, config, range(4), cache=cache, window=window).train(0, 10))
    for epoch in range(2):
        ids = [each for (step, _), (seen, _, _) in alone.items() if step // 5 == epoch for each in seen]
        assert sorted(ids) == list(range(count))
    shared: dict[tuple[int, int], tuple[Any, ...]] = {}
    for virtual_ranks in (range(3), range(3, 4)):
        shared |= content(loaded(selected(photos, config), config, virtual_ranks, cache=cache, window=window).train(0, 10))
    assert shared == alone
    resumed = content(loaded(view, config, range(4), cache=cache, window=window).train(7, 10))
    assert resumed == {place: seen for place, seen in alone.items() if place[0] >= 7}
    labels = view.split("train").labels()
    assert all(given == labels[ids].tolist() for ids, given, _ in alone.values())


def test_the_fold_is_evaluated_as_the_validation_split(photos: Dataset) -> None:
    config = DataConfig(fold="4/4", batch_size=12)
    view = selected(photos, config)
    loader = loaded(view, config, range(4), cache="none", window=0)
    count = view.manifest.splits["validation"].count
    batches = list(loader.evaluate("validation", range(count), 16))
    assert sum(len(batch.ids) for batch in batches) == count == 40
    held = set(view.split("validation").keys(range(count)))
    assert held.isdisjoint(view.split("train").keys(range(view.split("train").count)))
    assert "validation" not in photos.manifest.splits


def test_a_validation_split_of_the_data_gives_way_to_the_fold_and_that_is_told(tmp_path: Path) -> None:
    write_folder(tmp_path / "s" / "train", {"ant": 20, "bee": 20})
    write_folder(tmp_path / "s" / "val", {"ant": 3, "bee": 3}, first=100)
    write_folder(tmp_path / "s" / "test", {"ant": 3, "bee": 3}, first=200)
    convert(read(tmp_path / "s"), tmp_path / "d", max_bad_fraction=0, max_image_pixels=1000)
    view = selected(open_dataset(tmp_path / "d"), DataConfig(fold="1/4"))
    assert {name: split.count for name, split in view.manifest.splits.items()} == {"train": 30, "validation": 10, "test": 6}
    assert view.selected is not None
    assert view.selected.warnings == ("the data's own validation split of 6 images is not used: the fold is in its place",)
    assert view.reading is not None
    assert view.reading.class_counts == {"train": (15, 15), "validation": (5, 5), "test": (3, 3)}


def test_other_targets_are_stratified_by_rarest_label_and_by_tenths(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    lines = []
    for number in range(100):
        (folder / f"{number}.png").write_bytes(encode(picture(number, 4, 4)))
        tags = " ".join(["common"] * (number % 2) + ["rare"] * (number % 10 == 0))
        lines.append(f"{number}.png,{'test' if number >= 80 else 'train'},{tags},{number}")
    write_table(folder, "image,split,tags,size\n" + "\n".join(lines) + "\n")
    for targets, by in (("tags:labels", "each image's rarest label"), ("size:number", "tenths of size")):
        dest = tmp_path / targets.partition(":")[0]
        convert(read(folder, targets=targets), dest, max_bad_fraction=0, max_image_pixels=1000)
        dataset = open_dataset(dest)
        view = selected(dataset, DataConfig(part=0.25))
        assert view.selected is not None
        assert (view.selected.train, view.selected.whole, view.selected.by) == (20, 80, by)
        values = view.split("train").targets()[targets.partition(":")[0]]
        if "number" in targets:
            assert Counter((values // 8).astype(int).tolist()) == Counter(dict.fromkeys(range(10), 2))
        else:
            names = dataset.manifest.targets[0].classes
            assert dict(zip(names, (values == 1).sum(0).tolist(), strict=True)) == {"common": 10, "rare": 2}
