"""`finetune export` of models of texts: graphs with the names that users of transformers know, which answer as the model does for texts of
any length, and take them by the tokenizer beside the graph."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.exported import CASES, measure, table
from dataio.codecs.text.tokens import PAD, TextFacts, Tokenizer
from dataio.schema import Target, single_label
from tests.texts import WORDS, make_tokenizer, tiny_description
from tests.trainer.small_text_run import TEST, train_on_texts
from trainer.export.model_folder import Exported, TextExport, load_export
from trainer.formats.__main__ import main
from trainer.runs.model_files import find_model
from trainer.settings.fields import replaced
from trainer.settings.texts import with_text_model
from trainer.settings.tree import RunConfig, TaskConfig
from trainer.tasks.make import make_task

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxruntime.quantization")
transformers = pytest.importorskip("transformers", reason="the extra `text` is not installed")

pytestmark = pytest.mark.usefixtures("threads_kept")

TEXTS = (
    "the film was very good",
    "dull",
    "We never liked this  BOOK\nand it is a cold unknownword",
    "the meal was fine and " * 12,  # more tokens than the model was trained with
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_on_texts(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def made(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All formats of the run's model."""
    out = tmp_path_factory.mktemp("exports")
    assert main([str(run), "--to", "onnx", "torch", "--int8", "--max-drop", "10", "--out", str(out)]) == 0
    return out


def expected(run: Path, texts: tuple[str, ...]) -> torch.Tensor:
    """(n, outputs) by the model itself, each text alone."""
    found = load_export(find_model(str(run)), torch.device("cpu"), may_be_of_texts=True)
    assert found.texts is not None
    tokenizer = Tokenizer(found.texts.tokenizer, max_tokens=found.texts.max_tokens, too_long="cut", where="here")
    outputs = []
    for facts in tokenizer.facts([text.encode() for text in texts]):
        assert isinstance(facts, TextFacts)
        with torch.inference_mode():
            outputs.append(found.model(found.preprocess(torch.frombuffer(bytearray(facts.stored), dtype=torch.int32)[None])))
    return torch.cat(outputs)


def described(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_another_program_gives_the_same_answers_by_the_cards_own_lines(format: str, run: Path, made: Path) -> None:
    folder = made / format
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    after = (
        "\nimport sys, numpy\nassert not {'trainer', 'dataio', 'cluster', 'transformers'} & set(sys.modules)\n"
        "numpy.save('found.npy', numpy.asarray(outputs))\n"
    )
    (folder / "asked.py").write_text(f"texts = {list(TEXTS)!r}\n{code}{after}")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-I", "asked.py"], cwd=folder, env=environment, check=True)
    found, own = torch.from_numpy(np.load(folder / "found.npy")), expected(run, TEXTS)
    assert float((found - own).abs().max()) <= 1e-4 * float(own.abs().max())


def test_every_text_of_the_test_split_was_compared_and_the_manifest_says_what_goes_in_and_out(made: Path) -> None:
    about = described(made / "onnx")
    assert about["input"] == {
        "names": ["input_ids", "attention_mask", "token_type_ids"],
        "shape": ["batch", "sequence"],
        "type": "int64",
        "prepared": "by the caller",
        "tokenizer": "tokenizer.json",
        "max_tokens": 32,
        "too_long": "cut",
        "pad_token_id": 0,
    }
    assert about["output"] == {"name": "logits", "shape": ["batch", 2], "type": "float32", "meaning": "before softmax or sigmoid"}
    assert about["classes"] == ["neg", "pos"]
    assert (about["compared"]["texts"], about["compared"]["answers_changed"]) == (TEST, 0)
    assert about["compared"]["accuracy"] == about["compared"]["accuracy_of_the_model"] > 0.75  # it has learnt something
    assert set(about["files"]) == {"model.onnx", "tokenizer.json", "tokenizer_config.json", "config.json"}
    assert "image" not in (made / "onnx" / "README.md").read_text()


def test_the_graph_names_its_inputs_and_leaves_their_sizes_free(made: Path) -> None:
    session = onnxruntime.InferenceSession(made / "onnx" / "model.onnx")
    assert [(each.name, each.shape, each.type) for each in session.get_inputs()] == [
        (name, ["batch", "sequence"], "tensor(int64)") for name in ("input_ids", "attention_mask", "token_type_ids")
    ]
    assert [each.name for each in session.get_outputs()] == ["logits"]


def test_transformers_opens_the_tokenizer_and_the_names_of_the_classes(run: Path, made: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(made / "onnx")
    inputs = tokenizer(list(TEXTS), padding=True, truncation=True, return_tensors="np")
    assert inputs["input_ids"].shape == (len(TEXTS), 32)
    session = onnxruntime.InferenceSession(made / "onnx" / "model.onnx")
    (found,) = session.run(["logits"], dict(inputs))
    own = expected(run, TEXTS)
    assert float((torch.from_numpy(found) - own).abs().max()) <= 1e-4 * float(own.abs().max())
    config = transformers.AutoConfig.from_pretrained(made / "onnx")
    assert (config.model_type, config.id2label, config.problem_type) == ("bert", {0: "neg", 1: "pos"}, "single_label_classification")


def test_int8_is_smaller_and_says_how_it_was_made(made: Path) -> None:
    plain, small = described(made / "onnx"), described(made / "onnx-int8")
    assert small["files"]["model.onnx"]["bytes"] < plain["files"]["model.onnx"]["bytes"]
    assert small["files"]["tokenizer.json"] == plain["files"]["tokenizer.json"]
    assert small["quantised"]["activations"] == "uint8, a scale for each tensor, measured as it comes"
    assert 0 < small["compared"]["largest_difference"] < 0.2
    low, high = small["compared"]["accuracy_lost_95_percent"]
    assert low <= small["compared"]["accuracy_of_the_model"] - small["compared"]["accuracy"] <= high


def test_what_differs_is_refused_and_nothing_is_written(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--max-difference", "0", "--out", str(tmp_path)]) == 1
    assert f"of {TEST} answers with them" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--preprocessing"], "--preprocessing is of images: no graph holds a tokenizer"),
        (["--int8", "--calibration", "there"], "--calibration is of images: in int8 a model of texts"),
        (["--int8", "--calibration-images", "9"], "--calibration is of images: in int8 a model of texts"),
        (["--to", "safetensors"], "--to safetensors gives weights to timm or torchvision, and this is a model of texts"),
    ],
)
def test_what_is_of_images_is_refused(
    run: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(run), *arguments, "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_the_benchmark_of_exports_times_texts_too(run: Path) -> None:
    found = measure(argparse.Namespace(run=str(run), threads=1, rounds=2))
    assert found["input_shape"] == [32]
    assert {batch: set(cases) for batch, cases in found["milliseconds"].items()} == {batch: set(CASES) for batch in ("1", "32")}
    assert found["compared"]["onnx"]["answers_changed"] == 0
    assert len(table(found)) == 1 + len(CASES)


def encoder(kind: str, place: Path, targets: tuple[Target, ...] = single_label(("neg", "pos"))) -> Exported:
    """A tiny encoder of this kind, with random weights."""
    from trainer.models.text import Tokens

    architecture = tiny_description(kind)
    tokenizer = make_tokenizer(place).read_bytes()
    (place / "config.json").write_text(json.dumps(architecture))
    config = replaced(replaced(RunConfig(), "model.name", f"hf/{place}"), "model.weights", "none")
    task = make_task(TaskConfig(), targets, holds_texts=True)
    return Exported(
        task=task,
        model=task.build(with_text_model(replaced(config, "data.max_tokens", 32)).model, shape=(32,), seed=0).eval(),
        preprocess=Tokens(),
        image_size=(0, 0),
        fit="refuse",
        background="",
        max_image_pixels=0,
        texts=TextExport(architecture=architecture, tokenizer=tokenizer, max_tokens=32, too_long="cut"),
    )


# Each other type is built as one of these.
@pytest.mark.parametrize("kind", ["albert", "distilbert", "gemma3_text", "gpt2", "modernbert", "mpnet", "qwen3", "roberta"])
def test_every_kind_of_network_answers_in_onnx_for_any_length_and_padding(kind: str, tmp_path: Path) -> None:
    from trainer.formats.onnx_graph import make_onnx

    exported = encoder(kind, tmp_path)
    made = make_onnx(exported, is_prepared_inside=False, threads=1)
    generator = torch.Generator().manual_seed(0)
    for count, length in ((1, 1), (1, 32), (3, 8), (5, 17)):
        rows = torch.randint(0, 4 + len(WORDS), (count, length), generator=generator, dtype=torch.int32)
        rows[0, length // 2 + 1 :] = PAD
        with torch.inference_mode():
            own = exported.model(exported.preprocess(rows))
        assert float((made.ask(rows) - own).abs().max()) <= 1e-4 * float(own.abs().max())


def test_a_network_of_ones_own_is_refused(tmp_path: Path) -> None:
    from trainer.formats.texts import graph_of_texts

    exported = encoder("bert", tmp_path)
    assert exported.texts is not None
    own = Exported(**{**{name: getattr(exported, name) for name in Exported.__slots__}, "model": torch.nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"the network is Linear, one of your own; only an encoder with its head can be exported"):
        graph_of_texts(own, exported.texts)


def test_several_targets_are_told_and_have_no_class_names_of_one(tmp_path: Path) -> None:
    from trainer.formats.graph import graph_of

    targets = (Target(name="tags", kind="labels", classes=("a", "b")), Target(name="score", kind="number"))
    config = json.loads(graph_of(encoder("bert", tmp_path, targets), is_prepared_inside=False).files["config.json"])
    assert not {"id2label", "label2id", "problem_type"} & set(config)
    number = graph_of(encoder("bert", tmp_path, targets[1:]), is_prepared_inside=False).files["config.json"]
    assert json.loads(number)["problem_type"] == "regression"
