"""A run and its dry run refuse the same things, all at once, before anything is made. A look at a folder sees what its conversion sees."""

import io
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from cluster.zygote import Zygote
from dataio.manifest import Manifest, SplitInfo
from dataio.prepared import open_prepared, source_of
from dataio.quarantine import BadSample
from dataio.scan import GLANCE_BYTES, Looked, look_at, scan
from dataio.schema import Target, single_label
from trainer.drive.check import Checked, Refused, begins_at_random
from trainer.drive.dry_run import dry_run
from trainer.drive.problems import CHECKS, Facts, Room, problems_of, refuse, said_of_norms
from trainer.drive.set_up import SetUp
from trainer.drive.stages import Asked, Environment
from trainer.drive.start import look_first
from trainer.drive.survey import survey
from trainer.settings.spec import RANK_MODULES
from trainer.settings.tree import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from trainer.tasks.info import CLASSIFICATION

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty images of two classes in many sizes; two cannot be used, one of them a large JPEG without its end."""
    root = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for number in range(60):
        folder = root / ("cat", "dog")[number % 2]
        folder.mkdir(exist_ok=True)
        height, width = draw.integers(20, 60, 2).tolist()
        Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")
    large = Image.fromarray(draw.integers(0, 256, (900, 1200, 3), dtype=np.uint8))
    large.save(root / "cat" / "large.jpg", quality=98)
    whole = (root / "cat" / "large.jpg").read_bytes()
    assert len(whole) > 1.5 * GLANCE_BYTES
    (root / "cat" / "torn.jpg").write_bytes(whole[:-5000])
    (root / "dog" / "01.png").write_bytes((root / "dog" / "01.png").read_bytes()[:200])
    (root / "labels.csv").write_text(
        "image,label\n" + "".join(f"{kind}/{path.name},{kind}\n" for kind in ("cat", "dog") for path in sorted((root / kind).iterdir()))
    )
    return root


@pytest.fixture
def config(photos: Path, tmp_path: Path) -> RunConfig:
    plain = RunConfig(storage=str(tmp_path / "runs"))
    data = replace(plain.data, path=str(photos), root=str(tmp_path / "root"), batch_size=4, max_bad_fraction=0.1)
    return replace(plain, data=data, model=replace(plain.model, name="shufflenet_v2_x0_5", weights="none"))


# --- looking ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", "labels.csv"])
def test_a_look_at_the_headers_sees_what_the_conversion_will_hold(config: RunConfig, photos: Path, path: str) -> None:
    data = replace(config.data, path=str(photos / path) if path else str(photos))
    looked = look_at(data)
    assert looked.manifest is not None
    assert not looked.is_converted
    dataset = open_prepared(data)[1]
    made = dataset.manifest
    assert {name: split.count for name, split in looked.manifest.splits.items()} == {
        name: split.count for name, split in made.splits.items()
    }
    assert (looked.manifest.image_sizes, looked.manifest.quarantined, looked.targets) == (made.image_sizes, 2, made.targets)
    assert [(bad.key, bad.reason, bad.split, bad.sample_id) for bad in looked.bad] == [
        (bad.key, bad.reason, bad.split, bad.sample_id) for bad in dataset.left_out()
    ]
    counts = {name: np.bincount(dataset.split(name).labels(), minlength=2).tolist() for name in made.splits}
    assert looked.class_counts == counts
    again = look_at(data)
    assert again.is_converted, "what was converted already is not looked at again"
    assert again.manifest == made


def test_of_a_large_jpeg_only_beginning_and_end_are_read(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def looked_at(encoded: bytes, *, max_image_pixels: int) -> object:
        lengths.append(len(encoded))
        return look(encoded, max_image_pixels=max_image_pixels)

    from dataio import scan as module

    look = module.looked_at
    monkeypatch.setattr(module, "looked_at", looked_at)
    assert {bad.key for bad in scan(source_of(config.data), max_image_pixels=10**8).bad} == {"cat/torn.jpg", "dog/01.png"}
    assert max(lengths) == GLANCE_BYTES + module.TAIL_BYTES


# --- judging ----------------------------------------------------------------------------------------------------------------------------


def looked_of(train: int = 100, test: int = 10, sizes: tuple[str, ...] = ("32x32",), bad: int = 0, **changes: object) -> Looked:
    splits = {"train": SplitInfo(count=train, shards=()), "test": SplitInfo(count=test, shards=())}
    manifest = Manifest(
        targets=single_label(("cat", "dog")),
        splits={name: split for name, split in splits.items() if split.count >= 0},
        fingerprint="",
        image_sizes=dict.fromkeys(sizes, 1),
        quarantined=bad,
        source="folder",
        identity="",
    )
    records = [BadSample(key=f"{number}.png", reason="empty: no bytes", split="train", sample_id=number) for number in range(bad)]
    return replace(Looked(targets=manifest.targets, manifest=manifest, is_converted=False, bad=records), **changes)  # type: ignore[arg-type]


FINE = Facts(config=RunConfig(data=DataConfig(batch_size=10)), workers=1, looked=looked_of())
LONG_WARM_UP = replace(FINE, config=replace(FINE.config, optim=OptimConfig(warmup_steps=200), train=TrainConfig(epochs=2)))
MORE = RunConfig(data=DataConfig(batch_size=10, unlabelled="more"))
NUMBER = (Target(name="weight", kind="number"),)
MODEL = Checked(has_depthwise=False, task=CLASSIFICATION, weights_bytes=1_000_000)


def test_what_is_not_known_yet_is_no_problem() -> None:
    assert problems_of(FINE) == []
    assert problems_of(Facts(config=RunConfig())) == []


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (replace(FINE, looked=looked_of(bad=30)), "30 of 140 samples are bad"),
        (replace(FINE, looked=looked_of(test=-1)), "has the splits train, and a run is evaluated on test"),
        (replace(FINE, looked=looked_of(test=0)), "has no usable test image; hold out more"),
        (replace(FINE, config=replace(FINE.config, model=ModelConfig(name="hf/bert"))), "holds images, and model.name=hf/bert takes texts"),
        (replace(FINE, config=RunConfig(data=DataConfig(batch_size=10, part=5000))), "data.part=5000 is more than the"),
        (replace(FINE, looked=looked_of(sizes=("32x32", "40x40"))), "there are 2 sizes"),
        (replace(FINE, workers=3), "data.batch_size=10 is not a multiple of workers=3"),
        (replace(FINE, looked=looked_of(sizes=("4x4",))), "data.pad=4 is not below"),
        (replace(FINE, config=RunConfig(data=DataConfig(batch_size=10, class_weights="dgo=2"))), "did you mean dog?"),
        (LONG_WARM_UP, "optim.warmup_steps=200 does not end before the run's 20 steps do"),
        (replace(FINE, config=replace(FINE.config, train=TrainConfig(patience=3))), "train.patience=3 needs a validation split"),
        (replace(FINE, model=Refused(kind="value", message="no such model")), "no such model"),
        (replace(FINE, config=replace(FINE.config, run="mine", resume="must"), has_checkpoint=False), "--resume must"),
        (replace(FINE, config=replace(FINE.config, run="mine", resume="never"), has_checkpoint=True), "--resume never"),
        (replace(FINE, config=MORE, unlabelled=looked_of(bad=30)), "data.unlabelled: 30 of 140 samples are bad"),
        (replace(FINE, config=MORE, unlabelled=looked_of(sizes=("9x8",))), "data.unlabelled=more holds images of 9x8 pixels"),
        (replace(FINE, config=MORE, looked=looked_of(targets=NUMBER)), "is for a classification with one label an image"),
        (
            replace(FINE, model=MODEL, storage_room=Room(where="/x", free_bytes=999)),
            "has 999 B free, and a checkpoint of this run takes 2 MB",
        ),
        (
            replace(FINE, looked=looked_of(source_bytes=5_000), root_room=Room(where="/x", free_bytes=999)),
            "data.root='/x' has 999 B free, and the converted data take 5 kB",
        ),
    ],
)
def test_each_problem_is_said_once_with_its_fix(facts: Facts, words: str) -> None:
    [said] = problems_of(facts)
    assert words in said


def test_every_check_has_a_case_above() -> None:
    """A check that no facts can fail would be a promise without a test."""
    marks = next(mark for mark in test_each_problem_is_said_once_with_its_fix.pytestmark if mark.name == "parametrize")  # type: ignore[attr-defined]
    cases = [facts for facts, _ in marks.args[1]]
    assert [check.__name__ for check in CHECKS if not any(check(facts) for facts in cases)] == []


def test_a_run_that_was_begun_keeps_the_warm_up_that_it_began_with() -> None:
    assert problems_of(replace(LONG_WARM_UP, is_new=False)) == []


@pytest.mark.parametrize(
    ("momentum", "steps", "said"),
    [
        (0.01, 440, ["after this run's 440 steps 1.2 % of its statistics are still those of the beginning", "Train 688 steps or more"]),
        (0.01, 687, ["0.1 % of its statistics"]),
        (0.01, 688, []),
        (0.1, 160, []),
        (0.1, 40, ["after this run's 40 steps 1.5 %"]),
        (0.0, 10, []),
        (0.1, None, []),
    ],
)
def test_a_model_from_nothing_whose_norms_are_too_slow_for_the_run_is_told(momentum: float, steps: int | None, said: list[str]) -> None:
    model = replace(MODEL, norm_momentum=momentum)
    found = said_of_norms(RunConfig(), model, steps)
    assert len(found) == bool(said)
    assert all(part in found[0] for part in said)
    assert said_of_norms(replace(RunConfig(), train=TrainConfig(max_steps=5)), model, 5) == [], "a run cut short is a trial"
    assert said_of_norms(RunConfig(), None, steps) == []


def test_only_a_librarys_model_without_weights_begins_at_random() -> None:
    assert begins_at_random(ModelConfig(weights="none"))
    assert not begins_at_random(ModelConfig(weights="imagenet"))
    assert not begins_at_random(ModelConfig(name="mine:build", weights="none")), "it may come with weights"


def test_all_problems_make_one_message() -> None:
    refuse([])
    with pytest.raises(ValueError, match=r"^one$"):
        refuse(["one"])
    with pytest.raises(ValueError, match=r"^2 things stand against this run:\n- one\n  more of it\n- two$"):
        refuse(["one\nmore of it", "two"])
    assert problems_of(replace(FINE, found_wrong=("a", "a"))) == ["a"]


# --- the run and its dry run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    made = Zygote(RANK_MODULES)
    yield made
    made.close(kill=True)


GIVEN = frozenset({"data.fit"})
"""As if a flag had said it: so the rule for photographs (test_photos.py) chooses nothing."""


def of_run(config: RunConfig, zygote: Zygote) -> str:
    known = Environment(ray_address="", in_job=False, is_verbose=False, cpus=2, process_started=0.0)
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        look_first(Asked(config=config, prefix="pets", command="", environment=known, given=GIVEN), zygote, SetUp(QUIET))
    return str(refused.value)


def of_dry_run(config: RunConfig) -> str:
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        dry_run(config, (), QUIET, given=GIVEN)
    return str(refused.value)


def test_the_run_and_its_dry_run_list_the_same_problems_of_all_kinds(config: RunConfig, zygote: Zygote, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    wrong = replace(
        config,
        storage=str(tmp_path / "file" / "runs"),
        data=replace(config.data, max_bad_fraction=0.0),
        model=replace(config.model, name="resnet81", weights=str(tmp_path / "gone.pth")),
        optim=replace(config.optim, warmup_steps=10_000),
    )
    said = of_run(wrong, zygote)
    assert said.startswith("6 things stand against this run:\n- ")
    for words in (
        "cannot be made",
        "no such file",
        "2 of 62 samples are bad",
        "sizes (HxW)",
        "optim.warmup_steps=10000",
        "did you mean resnet18",
    ):
        assert words in said
    assert said == of_dry_run(wrong)
    assert sorted(os.listdir(tmp_path)) == ["file"], "nothing was made, in neither case"


@pytest.mark.parametrize("kind", ["converted", "given", "missing"])
def test_they_agree_on_data_that_are_converted_or_missing(config: RunConfig, zygote: Zygote, kind: str) -> None:
    folder = open_prepared(config.data)[0]
    path = {"converted": config.data.path, "given": folder, "missing": "/nowhere"}[kind]
    wrong = replace(config, data=replace(config.data, path=path, max_bad_fraction=0.0), model=replace(config.model, weights="/gone.pth"))
    said = of_run(wrong, zygote)
    assert ("samples are bad" in said) == (kind == "converted"), "what a given folder left out was agreed to when it was made"
    assert ("'/nowhere' does not exist" in said) == (kind == "missing")
    assert "/gone.pth" in said
    assert said == of_dry_run(wrong)


def test_a_dry_run_of_a_folder_tells_sizes_classes_split_and_what_is_left_out(config: RunConfig, tmp_path: Path) -> None:
    for width in (80, 120):
        sink = io.StringIO()
        ready = replace(config, data=replace(config.data, image_size=32, fit="crop"))
        assert dry_run(ready, (), Console(file=sink, width=width)) == 0
        shown = " ".join(sink.getvalue().replace("│", " ").split())
        for words in (
            "train 54, test 6",
            "2 classes: cat 31 (3 to test), dog 29 (3 to test)",
            "sizes (height x width), from 2",
            "to 900x1200; the most frequent: ",
            "train cat/torn.jpg: truncated: a JPEG without its end marker (EOI)",
            "54 images to train, 6 to test, 2 classes, 32x32 pixels",
            "Steps 140: 10 epochs of 14",
        ):
            assert words in shown, shown
        assert all(len(line) <= width for line in sink.getvalue().splitlines() if not line.startswith("train."))
    assert list(tmp_path.iterdir()) == []


def test_a_survey_leaves_nothing(config: RunConfig, tmp_path: Path) -> None:
    facts = survey(config, workers=lambda: 1, in_job=False)
    assert facts.found_wrong == ()
    assert facts.storage_room is not None
    assert facts.root_room is not None
    assert list(tmp_path.iterdir()) == []


def test_a_ledger_needs_a_disk_and_never_becomes_a_folder_of_the_bucket_s_name(config: RunConfig, tmp_path: Path) -> None:
    """It was written into ./BUCKET/RUN/ledger, in whatever folder the rank ran."""
    asked = replace(config, storage="s3://bucket/runs?region=x", train=TrainConfig(ledger=True))
    (problem,) = survey(asked, workers=lambda: 1, in_job=False).found_wrong
    assert problem == "--train.ledger needs a storage on a disk, and s3://bucket/runs is none; leave it out, or give --storage FOLDER"
    assert survey(replace(asked, storage=str(tmp_path)), workers=lambda: 1, in_job=False).found_wrong == ()
    assert list(tmp_path.iterdir()) == []
