"""`finetune export`: a model in another format answers as the model does, in a process that knows nothing of this program. What does not is
refused before anything is written."""

import hashlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.storage import open_storage
from dataio.schema import Target
from tests.trainer.small_run import train
from tests.trainer.test_evaluate import BASE
from trainer.export.model_folder import Exported, load_export
from trainer.formats import manifest, quantise
from trainer.formats.__main__ import main
from trainer.formats.check import decisions, is_decision
from trainer.formats.library import make_weights
from trainer.formats.made import Axis
from trainer.formats.traced import traced
from trainer.rank.finished import open_finished
from trainer.runs.folder import find_run
from trainer.runs.model_files import find_model
from trainer.settings.tree import ModelConfig, TaskConfig
from trainer.tasks.make import make_task

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxruntime.quantization")

NETWORKS = {
    "resized": ModelConfig(name="timm/test_efficientnet", weights="none", stem="native", image_size=40, interpolation="bicubic"),
    "folded": ModelConfig(name="resnet18", weights="none", stem="folded"),
    "plain": ModelConfig(name="shufflenet_v2_x0_5", weights="none", stem="native"),
}


pytestmark = pytest.mark.usefixtures("threads_kept")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each network, on the sample's images. The first has learnt something."""
    storage = tmp_path_factory.mktemp("runs")
    for name, network in NETWORKS.items():
        config = replace(BASE, run=name, model=network, train=replace(BASE.train, precision="fp32"))
        train(storage, config, 1 if network.name == "resnet18" else 40)
    return storage


@pytest.fixture(scope="module")
def images(runs: Path) -> np.ndarray:
    """(32, 3, 28, 28) uint8 test images, decoded as the run decodes them."""
    opened = open_finished(find_run(str(runs / "plain")), {}, split="test", device=torch.device("cpu"))
    (batch,) = opened.loader.evaluate("test", range(32), batch_size=32)
    return batch.samples.contiguous().numpy()


def exported(runs: Path, name: str) -> Exported:
    return load_export(find_model(str(runs / name)), torch.device("cpu"))


def expected(found: Exported, images: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        outputs: torch.Tensor = found.model(found.preprocess(torch.from_numpy(images)))
    return outputs


def prepared(takes: dict[str, Any], images: np.ndarray) -> np.ndarray:
    """What the manifest tells the caller to do, done by PIL and numpy."""
    if takes["prepared"] == "in the graph":
        return images
    pixels = images.astype(np.float32)
    assert "resized_to" not in takes, "PIL resizes in integers: test_the_graph_resizes_as_the_model_does"
    mean, std = (np.array(takes[key], np.float32).reshape(1, 3, 1, 1) for key in ("mean", "std"))
    given = (pixels / 255 - mean) / std
    if "enlarged" in takes:
        assert takes["enlarged"]["by"] == "nearest"
        given = given.repeat(takes["enlarged"]["times"], axis=2).repeat(takes["enlarged"]["times"], axis=3)
    return given.astype(takes["type"])


def elsewhere(folder: Path, given: np.ndarray) -> np.ndarray:
    """The answers by the very lines of the card, in a process that cannot import this program."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    np.save(folder / "given.npy", given)
    is_torch = "import onnxruntime" not in code
    before = "import numpy\nimages = numpy.load('given.npy')\n" + ("import torch\nimages = torch.from_numpy(images)\n" if is_torch else "")
    after = (
        "\nimport sys\nassert not {'trainer', 'dataio', 'cluster'} & set(sys.modules)\nnumpy.save('found.npy', numpy.asarray(outputs))\n"
    )
    (folder / "asked.py").write_text(before + code + after)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-I", "asked.py"], cwd=folder, env=environment, check=True)
    found: np.ndarray = np.load(folder / "found.npy")
    return found


def described(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


@pytest.mark.parametrize(("name", "format"), [("plain", "onnx"), ("plain", "torch"), ("folded", "onnx"), ("folded", "safetensors")])
def test_another_program_gives_the_same_answers_by_the_cards_own_lines(
    name: str, format: str, runs: Path, images: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(runs / name), "--to", format, "--out", str(tmp_path)]) == 0
    folder = tmp_path / format
    about, model = described(folder), exported(runs, name)
    given = prepared(about["input"], images)
    assert list(given.shape[1:]) == about["input"]["shape"][1:]
    found = torch.from_numpy(elsewhere(folder, given))
    own = expected(model, images)
    assert float((found - own).abs().max()) <= 1e-4 * float(own.abs().max())
    assert decisions(model.task, found) == decisions(model.task, own)
    assert about["classes"] == list(model.task.targets[0].classes)
    assert about["compared"]["images"] == 500
    assert about["compared"]["answers_changed"] == 0
    assert "all answers are the model's on 500 images of the test split" in capsys.readouterr().out


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_the_graph_resizes_as_the_model_does(format: str, runs: Path, images: np.ndarray, tmp_path: Path) -> None:
    assert main([str(runs / "resized"), "--to", format, "--preprocessing", "--out", str(tmp_path)]) == 0
    about = described(tmp_path / format)
    assert (about["input"]["type"], about["input"]["shape"]) == ("uint8", ["batch", 3, 28, 28])
    own = expected(exported(runs, "resized"), images)
    for count in (1, 7, 32):  # the batch is free
        found = torch.from_numpy(elsewhere(tmp_path / format, images[:count]))
        assert float((found - own[:count]).abs().max()) <= 1e-4 * float(own.abs().max())


class OneBatch(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.reshape(2, -1)


class TwoInputs(torch.nn.Module):
    def forward(self, images: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        return images * sizes


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (OneBatch(), r"torch.export cannot trace the network \(.*\); export its weights: --to safetensors"),
        (TwoInputs(), "the network's forward takes images, sizes; only one of a single input can be exported"),
    ],
)
def test_a_network_of_one_batch_or_of_two_inputs_is_refused(network: torch.nn.Module, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        traced(network, [torch.zeros(2, 3, 4, 4)], {0: Axis(name="batch", most=64)})


def test_int8_keeps_the_accuracy_and_is_smaller(runs: Path, tmp_path: Path) -> None:
    assert main([str(runs / "plain"), "--int8", "--max-drop", "3", "--out", str(tmp_path)]) == 0
    plain, small = described(tmp_path / "onnx"), described(tmp_path / "onnx-int8")
    assert small["files"]["model.onnx"]["bytes"] < 0.5 * plain["files"]["model.onnx"]["bytes"]
    assert small["quantised"]["calibrated_by"] == 256
    low, high = small["compared"]["accuracy_lost_95_percent"]
    lost = small["compared"]["accuracy_of_the_model"] - small["compared"]["accuracy"]
    assert low <= lost <= high
    assert lost <= 0.03
    assert small["compared"]["accuracy"] > 0.25  # it has learnt something
    assert main([str(runs / "plain"), "--int8", "--max-drop", "3", "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "onnx-int8" / "model.onnx").read_bytes() == (tmp_path / "onnx-int8" / "model.onnx").read_bytes()


def test_bad_images_to_calibrate_by_are_refused_by_what_they_do_to_the_accuracy(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grey = tmp_path / "grey"
    grey.mkdir()
    for index in range(4):
        Image.new("RGB", (28, 28), (127, 127, 128)).save(grey / f"{index}.png")
    out = tmp_path / "out"
    assert main([str(runs / "plain"), "--int8", "--calibration", str(grey), "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert "onnx-int8: refused, nothing was written: accuracy goes from " in said
    assert "--max-drop allows 1." in said
    assert not (out / "onnx-int8").exists()
    assert (out / "onnx" / "manifest.json").exists()  # the other format is as good as ever


def test_preparation_stays_exact_in_int8(runs: Path, images: np.ndarray, tmp_path: Path) -> None:
    """Only what has weights is rounded, whether images are prepared inside or outside of the graph."""
    for flags, folder in (((), "outside"), (("--preprocessing",), "inside")):
        assert main([str(runs / "plain"), "--int8", "--max-drop", "100", *flags, "--out", str(tmp_path / folder)]) == 0
    outside, inside = (described(tmp_path / folder / "onnx-int8") for folder in ("outside", "inside"))
    found = elsewhere(tmp_path / "outside" / "onnx-int8", prepared(outside["input"], images))
    assert np.allclose(found, elsewhere(tmp_path / "inside" / "onnx-int8", images), atol=1e-4 * np.abs(found).max())
    assert outside["compared"]["accuracy"] == inside["compared"]["accuracy"]


def test_what_differs_is_refused_and_nothing_is_written(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(runs / "plain"), "--max-difference", "0", "--out", str(tmp_path)]) == 1
    assert "onnx: refused, nothing was written: outputs differ by " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_changed_weight_is_found(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison asks what lies in the file, and not the model in memory."""
    from trainer.formats import library

    save = library.safetensors.torch.save

    def spoilt(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
        name = next(name for name in tensors if name.endswith("weight"))
        return save({**tensors, name: tensors[name] * 1.01}, metadata=metadata)

    monkeypatch.setattr(library.safetensors.torch, "save", spoilt)
    assert main([str(runs / "plain"), "--to", "safetensors", "--out", str(tmp_path)]) == 1
    assert list(tmp_path.iterdir()) == []


def test_it_is_whole_or_says_that_it_is_not(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [str(runs / "plain"), "--to", "safetensors", "--out", str(tmp_path)]
    folder = tmp_path / "safetensors"
    assert main(arguments) == 0
    about = described(folder)
    for name, facts in about["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == facts["sha256"]
    storage = type(open_storage(tmp_path))
    write = storage.write_atomic

    def full(self: Any, path: str, data: bytes) -> None:
        if path.endswith("README.md"):
            raise OSError(28, "No space left on device")
        write(self, path, data)

    monkeypatch.setattr(storage, "write_atomic", full)
    assert main(arguments) == 1
    assert not (folder / manifest.MANIFEST_FILE).exists()  # half of the new, half of the old: no export
    monkeypatch.undo()
    assert main(arguments) == 0
    assert described(folder)["files"] == about["files"]


def test_without_out_it_lies_in_the_runs_folder(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(runs / "plain"), "--to", "safetensors", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    told = json.loads(line)
    assert told["folder"] == str(runs / "plain" / "exports" / "safetensors")
    assert {key: value for key, value in told.items() if key != "folder"} == described(Path(told["folder"]))
    assert told["of"]["run"] == "plain"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "torch", "--int8"], "--int8 is a kind of ONNX, and --to says torch; add onnx, or leave --int8 out"),
        (["--max-drop", "-1"], "--max-drop -1.0 is a limit; give a number of 0 or more"),
        (["--max-difference", "nan"], "--max-difference nan is a limit; give a number of 0 or more"),
        (["--calibration", "there"], "--calibration there is for --int8, which is not asked for; add it"),
        (["--int8", "--calibration-images", "0"], "--calibration-images 0: scales come from images; use 1 or more"),
        (["--int8", "--calibration", "nowhere"], "--calibration nowhere is no folder with images"),
    ],
)
def test_wrong_arguments_are_told(runs: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(runs / "plain"), *arguments, "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            ModelConfig(name="resnet18", stem="article"),
            r"one whose first layers \(model.stem=article\) are not theirs; use --to onnx or --to torch",
        ),
        (ModelConfig(name="own_models:small"), r"this is a network of your own; use --to onnx or --to torch"),
    ],
)
def test_weights_of_no_library_are_refused(config: ModelConfig, said: str, runs: Path) -> None:
    with pytest.raises(ValueError, match=said):
        make_weights(exported(runs, "plain"), config)


def test_an_unfinished_run_has_nothing_to_export(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.toml").write_text((runs / "plain" / "config.toml").read_text())
    with pytest.raises(SystemExit):
        main([str(tmp_path / "begun")])
    assert "a run exports its model when it finishes; let it finish first" in capsys.readouterr().err


def test_each_output_of_several_targets_is_told() -> None:
    targets = (
        Target(name="animal", kind="label", classes=("ant", "bee", "cat")),
        Target(name="seen", kind="labels", classes=("wing", "tail")),
        Target(name="age", kind="number", mean=4.0, std=2.0),
    )
    task = make_task(TaskConfig(), targets)
    told = manifest.targets_of(task, task.outputs)
    assert [each["outputs"] for each in told] == [[0, 3], [3, 5], [5, 6]]
    assert (told[2]["mean"], told[2]["std"], told[2]["formula"]) == (4.0, 2.0, "output * std + mean")
    assert "outputs" not in manifest.targets_of(task, 9)[0]  # a task that has more outputs than its targets


def test_an_answer_is_compared_without_its_probabilities_and_a_number_not_at_all() -> None:
    classes = make_task(TaskConfig(), (Target(name="animal", kind="label", classes=("ant", "bee", "cat")),))
    one, near, other = decisions(classes, torch.tensor([[3.0, 1, 0], [2.9, 1, 0.1], [0, 1, 0]]))
    assert one == near != other
    assert is_decision(one)
    age = make_task(TaskConfig(), (Target(name="age", kind="number", mean=4.0, std=2.0),))
    assert not any(map(is_decision, decisions(age, torch.tensor([[0.5], [7.0]]))))


def test_images_to_calibrate_by_are_spread_over_the_data() -> None:
    assert quantise.places(10, 256).tolist() == list(range(10))
    found = quantise.places(60_000, 256)
    assert len(set(found.tolist())) == 256
    steps = np.diff(found)
    assert set(steps.tolist()) == {234, 235}  # so of data that are stored by class, each has its share
    assert (found[0], found[-1]) == (117, 59_882)


def test_without_the_extra_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None if name == "onnx" else find(name, package))
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path)])
    assert stop.value.code == 2
    assert "ONNX needs three packages: pip install onnx onnxruntime onnxscript (extra `onnx`)" in capsys.readouterr().err


def test_a_signal_ends_it_with_a_line_and_leaves_no_folder(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*given: Any, **options: Any) -> None:
        assert list((tmp_path / "tmp").iterdir())  # its folder is there
        signal.raise_signal(signal.SIGTERM)

    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(onnxruntime.quantization, "quantize_static", interrupted)
    assert main([str(runs / "plain"), "--int8", "--out", str(tmp_path / "out")]) == 128 + signal.SIGTERM
    assert "SIGTERM: stopped; a format has its manifest.json, or it is not whole" in capfd.readouterr().err
    assert list((tmp_path / "tmp").iterdir()) == []
    assert [folder.name for folder in (tmp_path / "out").iterdir()] == ["onnx"]
