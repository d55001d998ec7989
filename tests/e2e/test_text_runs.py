"""Texts, from a table to a report: trained with a real encoder (tiny, its weights random), killed, resumed in the middle of an epoch of
batches of similar length, on one worker and on several, and asked by the commands."""

import hashlib
import html
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow.dataset as pads
import pytest
import safetensors.torch

from cluster.ledger import read_ledger
from dataio.parquet import open_dataset
from tests.e2e.running import PROJECT, Run
from tests.texts import make_decoder, make_model, rows, sentence, write_csv

pytest.importorskip("transformers", reason="the extra `text` is not installed")
pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

TEXTS, TEST_TEXTS, EPOCHS = 300, 60, 4
HOSTILE = "the film was <script>alert(1)</script> & very good"
SETTINGS = (
    *("--data.batch-size", "24", "--data.max-tokens", "32", "--data.sort-steps", "4"),
    *("--train.virtual-ranks", "3", "--train.epochs", str(EPOCHS), "--train.precision", "fp32", "--train.checkpoint-every", "4"),
    *("--optim.name", "adamw", "--optim.lr", "0.005", "--optim.layer-decay", "0.8", "--optim.clip-norm", "1"),
    *("--train.ledger", "--cluster.threads-per-worker", "1", "--cluster.heartbeat-seconds", "0.2"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table of texts, three of which cannot be used, and a model."""
    place = tmp_path_factory.mktemp("texts")
    make_model(place / "model")
    table = [{**row, "split": "train" if number < TEXTS else "test"} for number, row in enumerate(rows(range(TEXTS + TEST_TEXTS)))]
    table += [{"text": HOSTILE, "label": "neg", "split": "test"}, {"text": " ", "label": "pos", "split": "train"}]
    with write_csv(place / "texts.csv", table).open("ab") as file:
        file.write(b"a g\xe4nzlich good film,pos,train\n,neg,train\n")
    return place


def started(place: Path, name: str, workers: int, more: Sequence[str] = ()) -> Run:
    model = ("--model.name", f"hf/{place / 'model'}", "--workers", str(workers), *more)
    return Run(*model, storage=place / "runs", name=name, data=place / "texts.csv", settings=SETTINGS)


def finished(run: Run) -> Run:
    try:
        assert run.finish(timeout=400) == 0, run.output()
    finally:
        run.kill()
    return run


@pytest.fixture(scope="module")
def alone(place: Path) -> Run:
    return finished(started(place, "alone", 1))


def seen(run: Run) -> Counter[tuple[int, int]]:
    return Counter((record.epoch, sample) for record in read_ledger(run.folder / "ledger") for sample in record.ids)


def test_workers_and_kills_change_no_bit_and_repeat_no_text(place: Path, alone: Run) -> None:
    several = started(place, "several", 2)
    several.wait_for("checkpoint_committed", step=4)
    several.kill_worker(1)  # a rank, in the middle of an epoch
    several.wait_for("checkpoint_committed", step=16)
    os.killpg(several.process.pid, signal.SIGKILL)  # the driver with all that it started
    several.process.wait()
    again = finished(started(place, "several", 3, ("--data.cache", "none")))  # and its texts are no longer held in memory
    assert again.summary()["weights_sha256"] == alone.summary()["weights_sha256"]
    assert again.summary()["test_accuracy"] == alone.summary()["test_accuracy"]
    wanted = Counter({(epoch, sample): 1 for epoch in range(EPOCHS) for sample in range(TEXTS)})
    assert seen(alone) == seen(again) == wanted
    assert again.summary()["restarts"] == 1


@pytest.mark.long
def test_ten_kills_on_one_two_and_three_workers_change_no_bit_and_repeat_no_text(place: Path) -> None:
    epochs = 10
    more = ("--train.epochs", str(epochs), "--data.sort-steps", "8")
    undisturbed = finished(started(place, "undisturbed", 2, more))
    for life in range(5):
        workers = 1 + life % 3
        run = started(place, "killed", workers, more)
        attempt = run.wait_for("first_step")["attempt"]
        run.wait_for("checkpoint_committed")
        run.kill_worker(life % workers)
        run.wait_for("first_step", attempt=attempt + 1)
        os.killpg(run.process.pid, signal.SIGKILL)
        run.process.wait()
    again = finished(started(place, "killed", 3, more))
    assert again.summary()["weights_sha256"] == undisturbed.summary()["weights_sha256"]
    wanted = Counter({(epoch, sample): 1 for epoch in range(epochs) for sample in range(TEXTS)})
    assert seen(undisturbed) == seen(again) == wanted
    assert again.summary()["restarts"] == 5


def test_what_cannot_be_used_is_counted_and_what_came_out_is_told(alone: Run) -> None:
    summary = alone.summary()
    assert (summary["quarantined"], summary["test_count"], summary["task"]["unit"]) == (3, TEST_TEXTS + 1, "texts")
    reasons = sorted(json.loads(line)["reason"].partition(":")[0] for line in (alone.folder / "quarantine.jsonl").read_text().splitlines())
    assert reasons == ["empty", "empty", "undecodable"]
    assert {"test_accuracy", "test_macro_f1", "test_mcc"} <= summary.keys()
    assert summary["test_accuracy"] > 0.6, "it learned nothing"
    output = alone.output()
    assert "2 classes (neg, pos): 300 train, 61 test texts" in output
    assert "Texts/s" in output
    assert "TEXT..." in output
    assert "image" not in output.lower(), output


def test_the_report_shows_texts_where_those_of_images_show_images(alone: Run) -> None:
    page = (alone.folder / "report.html").read_text()
    assert html.escape(HOSTILE) in re.sub("</?mark[^>]*>", "", page)
    assert "<script>" not in page
    assert "<img" not in page
    assert page.count("<blockquote") > 6
    assert page.count("<mark") > 20
    assert "Marked in some: the words on which the answer rests (gradient x input)" in page
    assert "MCC" in page


def command(module: str, *arguments: str, status: int = 0) -> str:
    done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_model_is_evaluated_on_its_own_data_and_on_others(place: Path, alone: Run) -> None:
    own = json.loads(command("trainer.evaluate", str(alone.folder), "--json"))
    assert own["accuracy"] == own["recorded_accuracy"] == alone.summary()["test_accuracy"]
    assert own["mcc"] == alone.summary()["test_mcc"]
    other = write_csv(place / "other.csv", rows(range(1000, 1100)))
    found = json.loads(command("trainer.evaluate", str(alone.folder), "--data.path", str(other), "--json"))
    assert (found["count"], found["split"]) == (100, "all")
    answers = command("trainer.predict", str(alone.folder), str(other), "--json").splitlines()
    right = sum(json.loads(line)["predictions"][0]["class"] == sentence(number)[1] for number, line in enumerate(answers, 1000))
    assert right == round(found["accuracy"] * 100)


def test_the_model_answers_files_of_texts(place: Path, alone: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the film was very good\n")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "c.txt").write_text("the film was very good and " * 20)
    said = command("trainer.predict", str(alone.folder), str(tmp_path), status=1).splitlines()
    assert [line.partition(": ")[0] for line in said if line.startswith(str(tmp_path))] == [
        str(tmp_path / name) for name in ("a.txt", "c.txt", "b.txt")
    ]
    assert any("is not UTF-8" in line for line in said)
    assert "1 of 3 texts have more tokens than the model was trained with: their beginning was answered" in said
    assert "1 of 3 texts could not be answered" in said


def test_training_goes_on_from_an_exported_model(place: Path, alone: Run) -> None:
    more = Run(
        *("--model.name", f"hf/{alone.folder / 'model'}", "--workers", "1", "--train.max-steps", "2"),
        storage=place / "runs",
        name="more",
        data=place / "texts.csv",
        settings=SETTINGS,
    )
    finished(more)
    assert "its head is kept, as it was trained for the same classes" in more.output()


def test_what_does_not_work_for_texts_yet_says_so(alone: Run) -> None:
    said = command("trainer.prune", str(alone.folder), status=2)
    assert "of texts" in said, said
    assert "Traceback" not in said


def test_any_number_of_texts_is_answered_into_files_by_ray(place: Path, alone: Run, tmp_path: Path) -> None:
    other = write_csv(tmp_path / "other.csv", rows(range(2000, 2150)))
    words = (str(alone.folder), str(other), "--out", str(tmp_path / "out"), "--shard-images", "40", "--workers", "1")
    said = command("trainer.predict", *words)
    assert "150 texts in 4 Parquet files" in said
    found = pads.dataset(tmp_path / "out").to_table().to_pylist()
    assert [row["row"] for row in found] == list(range(150))
    answers = [json.loads(line) for line in command("trainer.predict", str(alone.folder), str(other), "--json").splitlines()]
    assert [row["label"] for row in found] == [answer["predictions"][0]["class"] for answer in answers]
    assert "150 of 150 texts are done" in command("trainer.predict", *words)


def test_the_model_is_exported_and_its_answers_are_explained(place: Path, alone: Run, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    said = command("trainer.formats", str(alone.folder), "--out", str(tmp_path / "exports"))
    assert f"all answers are the model's on {TEST_TEXTS + 1} texts of the test split" in said
    (tmp_path / "a.txt").write_text(HOSTILE)
    words = (str(alone.folder), str(tmp_path / "a.txt"), "--json", "--explain", str(tmp_path / "why"))
    assert json.loads(command("trainer.predict", *words).splitlines()[0])["explanation"]
    assert "<script>" not in (tmp_path / "why" / "texts.html").read_text()


def test_a_dry_run_says_what_would_run_whether_the_texts_are_converted_or_not(place: Path, alone: Run, tmp_path: Path) -> None:
    arguments = ("--model.name", f"hf/{place / 'model'}", "--data.path", str(place / "texts.csv"), *SETTINGS, "--run", "dry", "--dry-run")
    said = command("trainer.run", *arguments, "--data.root", str(place / "runs" / "data"), "--storage", str(place / "runs"))
    assert "300 texts to train, 61 to test, 2 classes, 24 tokens at most" in " ".join(said.split())
    before = command("trainer.run", *arguments, "--data.root", str(tmp_path), "--storage", str(tmp_path))
    assert "not converted yet" in before
    assert "24 texts, in 3 virtual ranks of 8" in before
    assert "Error" not in said + before


def test_the_data_hold_tokens_of_the_models_own_tokenizer(place: Path, alone: Run) -> None:
    manifests = [open_dataset(folder).manifest for folder in (place / "runs" / "data").glob("texts-*")]
    (manifest,) = [each for each in manifests if each.fingerprint == alone.summary()["dataset_fingerprint"]]
    assert manifest.texts is not None
    assert manifest.texts.tokenizer_sha256 == hashlib.sha256((place / "model" / "tokenizer.json").read_bytes()).hexdigest()


def test_what_the_learner_can_do_for_images_it_does_for_texts(place: Path, alone: Run) -> None:
    run = Run(
        *("--model.name", f"hf/{place / 'model'}", "--model.pooling", "first", "--model.freeze", "lp-ft", "--workers", "2"),
        *(
            "--train.reduction",
            "ddp",
            "--train.accumulate",
            "2",
            "--train.ema",
            "0.9",
            "--train.patience",
            "3",
            "--train.precision",
            "bf16",
        ),
        *("--data.balance", "weights", "--data.validation-fraction", "0.2", "--optim.label-smoothing", "0.1"),
        storage=place / "runs",
        name="seams",
        data=place / "texts.csv",
        settings=SETTINGS,
    )
    summary = finished(run).summary()
    assert (summary["status"], summary["test_count"]) == ("finished", TEST_TEXTS + 1)
    evaluated = json.loads(command("trainer.evaluate", str(run.folder), "--json"))
    assert evaluated["accuracy"] == summary["test_accuracy"]


def test_a_decoders_adapters_are_the_same_for_any_workers_and_kills_and_the_exported_model_needs_none(place: Path) -> None:
    pytest.importorskip("peft", reason="the extra `lora` is not installed")
    model = make_decoder(place / "decoder")

    def adapted(name: str, workers: int) -> Run:
        return Run(
            *("--model.name", f"hf/{model}", "--model.lora-rank", "4", "--model.lora-dropout", "0.1", "--workers", str(workers)),
            *("--train.ema", "0.9", "--data.validation-fraction", "0.2"),  # the best evaluation's average is exported
            storage=place / "runs",
            name=name,
            data=place / "texts.csv",
            settings=SETTINGS,
        )

    several = adapted("adapted-several", 2)
    several.wait_for("checkpoint_committed", step=4)
    several.kill_worker(1)
    finished(several)
    one = finished(adapted("adapted-one", 1))
    assert several.summary()["restarts"] == 1
    assert several.summary()["weights_sha256"] == one.summary()["weights_sha256"]
    assert several.summary()["test_accuracy"] == one.summary()["test_accuracy"]
    exported = safetensors.torch.load_file(one.folder / "model" / "model.safetensors")
    assert not [name for name in exported if "lora" in name or "base_layer" in name]
    evaluated = json.loads(command("trainer.evaluate", str(one.folder), "--json"))
    assert evaluated["accuracy"] == one.summary()["test_accuracy"]


def test_a_setting_of_images_ends_the_command_before_anything_is_made(place: Path) -> None:
    arguments = ("--model.name", f"hf/{place / 'model'}", "--data.path", str(place / "texts.csv"), "--storage", str(place / "nothing"))
    said = command("trainer.run", *arguments, *SETTINGS, "--train.mixup", "0.2", status=2)
    assert "train.mixup=0.2 is of images, or does not work for texts yet" in said
    assert not (place / "nothing").exists()
