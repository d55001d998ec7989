"""The curve's runs follow the stated rule, its files are a function of the runs, and its sentences say what the runs say."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.storage import open_storage
from tests.texts import make_model, rows, write_csv
from tests.trainer.text_run import finished_text_run, manifest_of, text_config
from trainer.curve.__main__ import main, planned_sizes
from trainer.curve.next_labels import ToLabel
from trainer.curve.page import drawn
from trainer.curve.plan import LEAST_STEPS, Planned, cost_lines, planned, size_of, sizes_of
from trainer.curve.power_law import CannotTell, Fit, Law
from trainer.curve.results import check_measure, curve_of, noise_words, sentences, to_json, wanted_words
from trainer.learn.build import task_of
from trainer.series import train as series
from trainer.series.train import Member, words_of
from trainer.settings.fields import replaced, settings
from trainer.settings.rules import validate
from trainer.settings.tree import RunConfig
from trainer.tasks.info import CLASSIFICATION, MULTILABEL, Measure, TaskInfo

SAMPLE = Path(__file__).resolve().parents[2] / "dataio" / "samples" / "fashion_mnist"


def config_with(**values: Any) -> RunConfig:
    config = RunConfig()
    for key, value in values.items():
        config = replaced(config, key.replace("__", "."), value)
    return config


def size(images: int, whole: int = 2000, config: RunConfig | None = None, *, ranks: int = 1, warmup: float = 0.0) -> RunConfig:
    return size_of(config or RunConfig(), images, whole=whole, ranks=ranks, warmup_fraction=warmup).config


# --- the plan ---------------------------------------------------------------------------------------------------------------------------


def test_parts_are_fractions_or_numbers_each_once_in_order() -> None:
    assert sizes_of((1.0, 0.5, 0.25, 1000, 0.5), 2000) == (500, 1000, 2000)


@pytest.mark.parametrize(
    ("part", "problem"),
    [(0.0, "neither a fraction"), (1.5, "neither a fraction"), (float("nan"), "neither a fraction"), (3000, "more than the 2,000"),
     (0.0001, "no image to learn from")],
)  # fmt: skip
def test_a_part_that_is_none_is_refused(part: float, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        sizes_of((part,), 2000)


def test_the_run_on_all_images_has_the_settings_that_were_given() -> None:
    config = config_with(train__epochs=7, optim__lr=0.5, data__batch_size=40)
    changed = {key for key, value in settings(size(2000, config=config)).items() if value != settings(config)[key]}
    assert changed == {"train.virtual_ranks", "train.explain"}


def test_a_quarter_of_the_images_takes_half_of_the_steps() -> None:
    config = config_with(train__epochs=10, data__batch_size=20, train__eval_every_epochs=2, model__lp_epochs=3)
    whole, quarter = (size_of(config, images, whole=2000, ranks=1, warmup_fraction=0.1) for images in (2000, 500))
    assert (whole.steps, quarter.steps) == (1000, 500)
    assert quarter.config.train.epochs == 20
    assert (quarter.config.train.eval_every_epochs, quarter.config.model.lp_epochs) == (4, 6)
    assert (quarter.config.data.batch_size, quarter.config.optim.lr) == (20, config.optim.lr)
    assert (whole.config.data.part, quarter.config.data.part) == (1.0, 500.0)
    assert whole.config.optim.warmup_fraction == quarter.config.optim.warmup_fraction == 0.1


def test_a_limit_of_steps_follows_the_same_rule() -> None:
    config = config_with(train__epochs=100, train__max_steps=40, data__batch_size=20)
    assert [size_of(config, n, whole=1600, ranks=1, warmup_fraction=0).steps for n in (100, 400, 1600)] == [10, 20, 40]


@given(images=st.integers(2, 2000), batch=st.sampled_from([16, 32, 100, 512]), ranks=st.sampled_from([1, 2]))
def test_a_batch_shrinks_with_the_rate_until_an_epoch_has_steps(images: int, batch: int, ranks: int) -> None:
    config = config_with(data__batch_size=batch, optim__lr=0.4)
    made = size(images, config=config, ranks=ranks)
    assert made.optim.lr / made.data.batch_size == pytest.approx(0.4 / batch)
    assert made.data.batch_size % ranks == 0
    steps = -(-images // made.data.batch_size)
    assert steps >= LEAST_STEPS or made.data.batch_size % (2 * ranks) or images == 2000
    validate(made, workers=ranks)


def test_more_virtual_ranks_than_images_are_refused() -> None:
    with pytest.raises(ValueError, match="3 training samples do not go round 8 virtual ranks"):
        size(3, ranks=8)


def test_every_repeat_has_other_images_and_another_seed_and_comes_from_the_largest_size_down() -> None:
    config = config_with(train__seed=5, data__choice_seed=2)
    runs = planned([size_of(config, n, whole=800, ranks=1, warmup_fraction=0) for n in (400, 800)], 2)
    assert [(run.samples, run.repeat) for run in runs] == [(800, 0), (400, 0), (800, 1), (400, 1)]
    assert [(run.member.config.train.seed, run.member.config.data.choice_seed) for run in runs] == [(5, 2), (5, 2), (6, 3), (6, 3)]
    assert len({run.member.name for run in runs}) == 4
    with pytest.raises(ValueError, match="--repeats 0"):
        planned([], 0)


def test_more_repeats_add_runs_and_rename_none() -> None:
    sizes = [size_of(RunConfig(), n, whole=800, ranks=1, warmup_fraction=0) for n in (400, 800)]
    few, many = planned(sizes, 1), planned(sizes, 3)
    assert many[: len(few)] == few


def test_the_cost_is_told_in_steps_of_the_run_on_all_images() -> None:
    config = config_with(train__epochs=10, data__batch_size=20)
    sizes = [size_of(config, n, whole=1600, ranks=1, warmup_fraction=0) for n in (400, 1600)]
    lines = cost_lines(sizes, 3, 1600)
    assert lines[0].startswith("6 runs: 3 of each of 2 sizes; steps go with the square root of the images")
    assert lines[-1] == "together 3,600 steps, 4.5 times those of the run on all images, and the start and test of 6 runs"


def test_the_warm_up_of_a_recipe_keeps_its_share_at_every_size() -> None:
    from dataio.parquet import open_dataset
    from trainer.settings.toml import load

    config = load("quickstart", RunConfig())
    sizes = planned_sizes(config, open_dataset(SAMPLE).manifest, (0.25, 1.0), ranks=1, from_recipes=frozenset())
    assert [each.config.optim.warmup_fraction for each in sizes] == [0.3, 0.3]
    assert [each.config.optim.warmup_of(each.steps) for each in sizes] == [24, 48]


# --- the results ------------------------------------------------------------------------------------------------------------------------


def summary(error: float, *, recalls: Sequence[float], tested: int = 10_000, info: TaskInfo = CLASSIFICATION) -> dict[str, Any]:
    each = tested // len(recalls)
    return {
        "task": info.to_json(),
        info.headline.key: 1 - error,
        "test_count": tested,
        "weights_sha256": f"{error}",
        "seconds": 12.3,
        "classes": ["<cat>", "dog", "rare"],
        "per_class": [{"recall": recall, "support": 3 if index == 2 else each} for index, recall in enumerate(recalls)],
    }


def made(law: Law, *, info: TaskInfo = CLASSIFICATION, sizes: Sequence[int] = (250, 500, 1000, 2000), jitter: float = 0.001) -> list[Any]:
    found = []
    for images in sizes:
        for repeat in range(2):
            error = law.at(images) + repeat * jitter
            planned_run = Planned(member=Member(name=f"n{images}-r{repeat}", config=RunConfig(), steps=1), samples=images, repeat=repeat)
            found.append((planned_run, summary(error, recalls=[1 - 1.9 * error, 0.9, 0.5], info=info)))
    return found


LAW = Law(a=0.02, b=3.0, c=0.5)


def test_a_curve_says_what_twice_the_labels_bring_and_which_class_gains() -> None:
    curve = curve_of(made(LAW))
    assert isinstance(curve.outcome, Fit)
    assert curve.outcome.twice.samples == 4000
    assert curve.outcome.twice.low <= LAW.at(4000) <= curve.outcome.twice.high
    first, about_classes = sentences(curve)
    assert first.startswith("With 2,000 labelled images the test accuracy is 9")
    assert "with twice as many, 4,000, it would be 9" in first
    assert "(90% interval of a run: " in first
    assert about_classes.startswith("Most would be gained by <cat> (+")
    assert [each.name for each in curve.gaining] == ["<cat>"]


def test_a_class_with_few_test_images_and_one_that_does_not_change_are_told_as_such() -> None:
    by_name = {each.name: each.outcome for each in curve_of(made(LAW)).classes}
    assert isinstance(by_name["rare"], CannotTell)
    assert by_name["rare"].reason == "3 test images say nothing of it; 10 are the least"
    assert isinstance(by_name["dog"], CannotTell)
    assert "flat" in by_name["dog"].reason


def test_where_nothing_can_be_told_the_sentence_says_why_and_what_to_do() -> None:
    curve = curve_of(made(Law(a=0.1, b=0, c=1)))
    assert sentences(curve)[0].startswith(
        "What more labels would bring cannot be told: the errors of the sizes differ by no more than noise"
    )
    assert noise_words(curve) == ""
    assert to_json(curve)["fit"] is None


def test_the_json_is_a_function_of_the_runs_alone() -> None:
    runs = made(LAW)
    slower = [(run, {**said, "seconds": 99.0, "versions": "other"}) for run, said in reversed(runs)]
    slower.insert(0, slower.pop())  # the first one says what the task is, whichever it is
    assert json.dumps(to_json(curve_of(runs))) == json.dumps(to_json(curve_of(slower)))


def test_a_measure_that_is_no_share_takes_its_noise_from_the_repeats() -> None:
    curve = curve_of(made(LAW, info=MULTILABEL))
    assert (curve.is_share, isinstance(curve.outcome, Fit)) == (False, True)
    assert "mAP" in sentences(curve)[0]
    assert "from the repeats and 8 runs of 4 sizes" in noise_words(curve)


def test_a_measure_that_is_no_ratio_is_refused_with_the_way_out() -> None:
    info = TaskInfo(name="own", measures=(Measure(name="mae", title="Mean error", unit="number", higher_is_better=False),), panels=())
    with pytest.raises(ValueError, match=r"this task is measured by mean error; choose targets that are labels with --data\.targets"):
        check_measure({"task": info.to_json()})


def test_the_page_escapes_what_the_data_say_and_shows_the_list() -> None:
    curve = curve_of(made(LAW))
    text = drawn(curve, [ToLabel(rank=1, name="<b>.png", guess="<cat>", margin="0.0100")])
    assert "<cat>" not in text
    assert "&lt;cat&gt;" in text
    assert "&lt;b&gt;.png" in text
    assert text.count("<svg") == 2
    assert wanted_words(curve) not in text
    assert drawn(curve) == drawn(curve_of(made(LAW)))
    assert "--unlabelled FOLDER" in drawn(curve)
    assert "cannot be told" in drawn(curve_of(made(LAW, sizes=(250, 500))))


# --- the command ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--data.part", "0.5"], "data.part=0.5: the curve chooses the parts itself; say which with --parts"),
        (["--repeats", "0"], "--repeats 0 trains nothing"),
        (["--next", "0"], "--next 0 names no sample"),
        (["--parts", "0.5", "3000"], "--parts 3000 asks for more than the 2,000 training images"),
        (["--data.batch-size", "0"], "data.batch_size=0"),
        (["--train.patience", "3"], "needs a validation split"),
    ],
)
def test_what_is_wrong_is_refused_before_a_run(argv: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--data.path", str(SAMPLE), "--storage", str(tmp_path / "runs"), "--workers", "1", *argv])
    assert stop.value.code == 2
    assert problem in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "runs").exists()


# --- texts ------------------------------------------------------------------------------------------------------------------------------

PRETENDED = """
import json, pathlib, shutil, sys, tomllib
name, storage = sys.argv[sys.argv.index("--run") + 1], sys.argv[sys.argv.index("--storage") + 1]
config = tomllib.load(open(sys.argv[sys.argv.index("--config") + 1], "rb"))
folder, size = pathlib.Path(storage, name), int(name[1:8])
shutil.copytree(pathlib.Path(__file__).parent / "finished", folder)
recall = 1 - 2.0 * size ** -0.5
(folder / "summary.json").write_text(json.dumps({"status": "finished", "task": INFO, "test_accuracy": recall, "test_count": 2000,
    "weights_sha256": name, "seconds": 1.0, "steps": 3, "classes": ["neg", "pos"],
    "per_class": [{"recall": recall, "support": 1000}] * 2}))
"""


def test_more_labels_for_texts_and_which_to_label_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The runs are pretended ones; the model that is asked is real."""
    model, table = make_model(tmp_path / "model"), write_csv(tmp_path / "texts.csv", rows(range(400)))
    config = text_config(model, table, run="finished")
    finished_text_run(open_storage(tmp_path), config)
    info = task_of(config, manifest_of(config)).info.to_json()
    (tmp_path / "pretended.py").write_text(PRETENDED.replace("INFO", repr(info)))
    monkeypatch.setattr(series, "words_of", lambda *given: [str(tmp_path / "pretended.py"), *words_of(*given)[2:]])
    unlabelled = write_csv(tmp_path / "more.tsv", [{"text": text} for text in ("<b>good</b>", "very bad", " ", "very bad", "so so")])
    capsys.readouterr()
    words = [
        *(str(table), "--model.name", f"hf/{model}", "--data.root", str(tmp_path / "data"), "--storage", str(tmp_path / "runs")),
        *("--data.max-tokens", "32", "--workers", "1", "--run", "c", "--repeats", "1", "--unlabelled", str(unlabelled), "--next", "3"),
    ]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "the run on all texts" in said
    assert "With 360 labelled texts the test accuracy is" in said
    assert f"1 of 5 texts in {unlabelled} cannot be read" in said
    assert "3 texts to label next" in said
    assert "image" not in said
    folder = tmp_path / "runs" / "c"
    curve = json.loads((folder / "curve.json").read_bytes())
    assert [run["texts"] for run in curve["runs"]] == [45, 90, 180, 360]
    assert (curve["fit"]["twice"]["texts"], curve["classes"][0]["points"][0]["texts"]) == (720, 45)
    assert "images" not in json.dumps(curve)
    listed = list(csv.DictReader((folder / "label-next.csv").read_text().splitlines()))
    assert {row["text"] for row in listed} == {"<b>good</b>", "very bad", "so so"}, "a copy comes after all that differ"
    assert {row["guess"].split()[0] for row in listed} <= {"neg", "pos"}
    page = (folder / "curve.html").read_text()
    assert "&lt;b&gt;good&lt;/b&gt;" in page
    assert "image" not in page.partition("</style>")[2]
    files = {name: (folder / name).read_bytes() for name in ("curve.json", "curve.html", "label-next.csv")}
    assert main(words) == 0
    assert {name: (folder / name).read_bytes() for name in files} == files
    with pytest.raises(SystemExit):
        main([*words, "--unlabelled", str(tmp_path / "nothing")])
    assert "nothing does not exist; give a folder of images, or a folder or table of texts" in " ".join(capsys.readouterr().err.split())
