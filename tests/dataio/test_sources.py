"""Claims about all sources: what cannot be read lists what can, names can be given, a sample of a source is balanced."""

from pathlib import Path

import pytest
from made import read, write_idx, write_table

from dataio.schema import Target
from dataio.sources import Balanced, Sample, SourceError


def test_what_cannot_be_read_says_what_was_found_and_what_is_accepted(tmp_path: Path):
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "1.png").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("hello")
    for path, found in (
        (tmp_path / "flat", "it holds 1.png"),
        (tmp_path / "empty", "it holds nothing"),
        (tmp_path / "text.txt", "b'hello'"),
        (tmp_path / "gone", "does not exist"),
    ):
        with pytest.raises(SourceError) as caught:
            read(path)
        text = str(caught.value)
        assert found in text
        assert all(word in text for word in ("cifar10", "Parquet", "train/ and test/", "labels.csv", "IDX"))


@pytest.mark.parametrize("fraction", [1.0, -0.1, float("nan")])
def test_a_validation_fraction_that_is_none_is_refused(fraction: float):
    with pytest.raises(ValueError, match=r"data\.validation_fraction=.* use 0 \(none\)"):
        read("cifar10", validation_fraction=fraction)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("a,,b", "names nothing in ''"),
        (":label", "names nothing in ':label'"),
        ("a:tags", "'tags' is no kind of target; label, labels and number are"),
        ("a,b:number,a:label", "names 'a' twice"),
        ("fine", "CIFAR-10's images have one target, 'label'; leave data.targets empty"),
        ("label:number", "CIFAR-10's images have one target, 'label'"),
    ],
)
def test_targets_that_cannot_be_meant_are_refused(targets: str, message: str):
    with pytest.raises(SourceError, match=message):
        read("cifar10", targets=targets)


def test_options_off_their_defaults_make_another_source_of_the_same_files(tmp_path: Path):
    write_idx(tmp_path)
    sources = [
        read(tmp_path),
        read(tmp_path, validation_fraction=0.1),
        read(tmp_path, validation_fraction=0.2),
        read(tmp_path, targets="label"),
    ]
    assert len({source.identity for source in sources}) == 4
    assert all(source.identities == (source.identity,) for source in sources)
    assert read(tmp_path, targets=" ").identity == sources[0].identity
    plain, other = (read("cifar10", **options) for options in ({}, {"validation_fraction": 0.1}))
    assert plain.identity != other.identity


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, float("nan")])
def test_a_test_fraction_that_leaves_nothing_is_refused(fraction: float):
    with pytest.raises(ValueError, match=r"data\.test_fraction"):
        read("cifar10", test_fraction=fraction)


def test_class_names_can_be_given_and_must_be_as_many(tmp_path: Path):
    write_idx(tmp_path)
    names = tuple(f"name {number}" for number in range(10))
    source = read(tmp_path, classes=names)
    assert source.classes == names
    assert source.identity != read(tmp_path).identity
    with pytest.raises(SourceError, match="2 class names were given; the source has 10"):
        _ = read(tmp_path, classes=("a", "b")).classes
    with pytest.raises(SourceError, match="differ"):
        read(tmp_path, classes=("a", "a"))


def test_class_names_are_for_one_target_that_has_classes(tmp_path: Path):
    path = write_table(tmp_path, "image,tags,age\n{0},a|b,1.5\n{1},b,2.5\n")
    source = read(path, classes=("one", "two"))
    assert (source.classes, source.targets) == (("one", "two"), (Target(name="tags", kind="labels", classes=("one", "two")),))
    for targets, named in (("age", r"age \(number\)"), ("tags,age", r"tags \(labels\), age \(number\)")):
        with pytest.raises(
            SourceError, match=f"class names can be given where there is one target that has classes; the source has {named}"
        ):
            _ = read(path, targets=targets, classes=("one", "two")).classes


def test_a_balanced_sample_has_as_many_of_each_class_and_depends_on_seed_and_keys_alone(tmp_path: Path):
    write_idx(tmp_path)
    source = read(tmp_path)

    def chosen(seed: int, size: int) -> list[Sample]:
        sample = Balanced(source, sizes={"train": size, "test": 10}, seed=seed)
        assert sample.count("train") == size
        found = list(sample.samples("train"))
        assert list(sample.samples("train", 7)) == found[7:]
        return found

    twenty = chosen(0, 20)
    assert sorted(sample.label for sample in twenty) == sorted([*range(10)] * 2)
    assert twenty == chosen(0, 20)
    assert twenty != chosen(1, 20)
    assert sorted(sample.label for sample in chosen(0, 23)) == sorted([*[*range(10)] * 2, 0, 1, 2])
    assert {sample.key for sample in twenty} < {sample.key for sample in chosen(0, 23)}
    with pytest.raises(SourceError, match="class 0 has 3 train images; a sample of 4"):
        chosen(0, 40)


def test_a_balanced_sample_has_the_splits_that_have_a_size_and_needs_a_label(tmp_path: Path):
    path = write_table(tmp_path, "image,label,age\n{0},a,1.5\n{1},b,2.5\n{2},a,1.0\n{3},b,1.0\n")
    source = read(path, validation_fraction=0.5)
    assert source.splits() == ("train", "validation", "test")
    assert Balanced(source, sizes={"train": 2, "test": 2}, seed=0).splits() == ("train", "test")
    with pytest.raises(SourceError, match="age is of kind number; name a target of kind label first"):
        list(Balanced(read(path, targets="age,label"), sizes={"train": 2, "test": 2}, seed=0).samples("train"))


def test_what_is_made_of_a_source_has_an_identity_for_each_of_the_source(tmp_path: Path):
    write_idx(tmp_path, counts={"train": 30})
    source = read(tmp_path)
    renamed, sample = read(tmp_path, classes=tuple("abcdefghij")), Balanced(source, sizes={"train": 10, "test": 10}, seed=0)
    for made in (renamed, sample):
        assert len(set(made.identities) | set(source.identities)) == 4
        assert made.identity == made.identities[0]
