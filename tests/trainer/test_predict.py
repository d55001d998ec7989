"""Export and prediction: what was trained is what answers, and what cannot be answered is named."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from cluster.storage import open_storage
from dataio.schema import single_label
from trainer.export.model_folder import export_model, model_card
from trainer.inference.predictor import Predictor
from trainer.models.vision import Preprocess, build_model
from trainer.predict import image_paths, main
from trainer.runs.model_files import find_model
from trainer.settings.tree import DataConfig, ModelConfig, RunConfig, TrainConfig
from trainer.tasks.make import make_task

CLASSES = ("cat", "dog", "<b>bird`|`</b>")
CONFIG = RunConfig(
    run="pets",
    data=DataConfig(path="/home/somebody/pets", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)),
    model=ModelConfig(name="resnet18", stem="article", image_size=24, interpolation="bicubic"),
    train=TrainConfig(ema=0.99),
)
SIDE = 16
TASK = make_task(CONFIG.task, single_label(CLASSES))


def trained() -> torch.nn.Module:
    """Weights that no seed gives, in the layout training uses."""
    model = build_model(replace(CONFIG.model, weights="none"), classes=3, seed=5, image_hw=(SIDE, SIDE))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model.to(memory_format=torch.channels_last)


def export(storage: Path, config: RunConfig = CONFIG) -> torch.nn.Module:
    model = trained()
    summary = {"test_accuracy": 0.8765, "steps": 160, "weights_sha256": "ab" * 32}
    export_model(
        storage=open_storage(storage),
        run=config.run,
        tensors=model.state_dict(),
        config=config,
        task=TASK,
        data_image_size=(SIDE, SIDE),
        summary=summary,
    )
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    storage = tmp_path_factory.mktemp("runs")
    return storage / "pets", export(storage)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three images of the right size, in a folder and below it, beside a file that is none."""
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in ("a.png", "b.PNG", "deep/c.png"):
        Image.fromarray(generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(folder / name, format="png")
    (folder / "notes.txt").write_text("no image")
    return folder


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_predictions_are_the_trained_models_own(run: tuple[Path, torch.nn.Module], images: Path) -> None:
    folder, model = run
    paths = list(image_paths([str(images)]))
    assert [Path(path).name for path in paths] == ["a.png", "b.PNG", "c.png"]
    predictions = list(Predictor(find_model(str(folder)), device=torch.device("cpu")).predict(paths, top=3))
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
    preprocess = Preprocess(mean=CONFIG.data.mean, std=CONFIG.data.std, image_size=24, interpolation="bicubic")
    model = model.eval()
    with torch.inference_mode():
        expected = model(preprocess(torch.from_numpy(pixels).permute(0, 3, 1, 2))).softmax(1)
    for prediction, row in zip(predictions, expected, strict=True):
        assert prediction.error == ""
        given = {best["class"]: best["probability"] for best in prediction.answer["predictions"]}
        assert list(given) == [CLASSES[index] for index in row.argsort(descending=True)]
        assert torch.tensor([given[name] for name in CLASSES]).allclose(row, atol=1e-6)


def test_exported_tensors_are_exactly_the_given_ones(run: tuple[Path, torch.nn.Module]) -> None:
    folder, model = run
    saved = safetensors.torch.load_file(folder / "model" / "model.safetensors")
    state = model.state_dict()
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], state[name]) and saved[name].dtype == state[name].dtype for name in state)


def test_tied_weights_are_exported(tmp_path: Path) -> None:
    shared = torch.arange(6.0).view(2, 3)
    export_model(
        storage=open_storage(tmp_path),
        run="r",
        tensors={"a": shared, "b": shared.t()},
        config=CONFIG,
        task=TASK,
        data_image_size=(8, 8),
        summary={},
    )
    saved = safetensors.torch.load_file(tmp_path / "r" / "model" / "model.safetensors")
    assert torch.equal(saved["a"], shared)
    assert torch.equal(saved["b"], shared.t())


def test_exporting_again_gives_the_same_files(run: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    export(tmp_path)
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "pets" / "model" / name).read_bytes() == (run[0] / "model" / name).read_bytes()


def test_the_model_card_tells_what_it_is_and_keeps_secrets(run: tuple[Path, torch.nn.Module]) -> None:
    card = (run[0] / "model" / "README.md").read_text()
    for words in ("87.65 %", "resnet18", "160 steps", "24x24", "decay 0.99", "[0.4, 0.5, 0.6]", "`pets`"):
        assert words in card
    assert "somebody" not in card  # where the data lay is nobody's business
    block = card.rpartition("```json\n")[2].partition("\n```")[0]
    assert json.loads(block) == list(CLASSES)
    assert "`" not in block  # so a class cannot end the code block
    bare = model_card(run="r", config=CONFIG, task=TASK, data_image_size=(8, 8), summary={})
    assert "Test accuracy" not in bare


def test_every_image_is_answered_and_bad_ones_are_named(
    run: tuple[Path, torch.nn.Module], images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "empty.png").write_bytes(b"")
    (images / "garbage.png").write_bytes(b"not an image at all")
    (images / "cut.png").write_bytes((images / "a.png").read_bytes()[:60])
    Image.new("RGB", (SIDE + 4, SIDE)).save(images / "wide.png")
    paths = [str(images / name) for name in ("empty.png", "a.png", "garbage.png", "missing.png", "cut.png", "wide.png", "b.PNG")]
    assert main([str(run[0]), *paths, "--json", "--device", "cpu"]) == 1
    answers = lines(capsys)
    assert [answer["image"] for answer in answers] == paths
    assert ["error" in answer for answer in answers] == [True, False, True, True, True, True, False]
    reasons = [answer.get("error", "") for answer in answers]
    for reason, words in zip(reasons, ("empty", "", "unknown format", "No such file", "truncated", "wrong size", ""), strict=True):
        assert words in reason
    assert "the model was trained on 16x16: add --fit crop or --fit stretch" in reasons[5]


def test_images_of_another_size_are_resized_when_asked(
    run: tuple[Path, torch.nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (40, 30), (200, 10, 10)).save(tmp_path / "wide.png")
    for fit in ("crop", "stretch"):
        assert main([str(run[0]), str(tmp_path / "wide.png"), "--fit", fit, "--json", "--device", "cpu"]) == 0
        assert len(lines(capsys)[0]["predictions"]) == 3


def test_text_output_has_one_line_an_image(run: tuple[Path, torch.nn.Module], images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pets", str(images), "--top", "1", "--storage", str(run[0].parent), "--device", "cpu"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 3
    assert all(line.startswith(str(images)) and line.endswith(" %") for line in shown)


def test_the_same_image_twice_and_more_images_than_a_batch(run: tuple[Path, torch.nn.Module], images: Path) -> None:
    paths = [str(images / "a.png")] * 70 + [str(images / "b.PNG")]
    predictions = list(Predictor(find_model(str(run[0])), device=torch.device("cpu")).predict(paths, top=1))
    assert [prediction.image for prediction in predictions] == paths
    assert len({prediction.answer["predictions"][0]["class"] for prediction in predictions[:70]}) == 1


def _flip_a_bit(model: Path) -> None:
    data = bytearray((model / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (model / "model.safetensors").write_bytes(data)


def _older_format(model: Path) -> None:
    description = json.loads((model / "config.json").read_text())
    del description["mean"]
    (model / "config.json").write_text(json.dumps(description))


def _newer_format(model: Path) -> None:
    description = json.loads((model / "config.json").read_text())
    description["model"]["attention"] = "yes"
    (model / "config.json").write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_flip_a_bit, "model.safetensors is damaged: its SHA-256 is"),
        (lambda model: (model / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda model: (model / "config.json").unlink(), "has no model/config.json: a run exports its model when it finishes"),
        (lambda model: (model / "config.json").write_text("{"), "config.json is damaged"),
        (lambda model: (model / "config.json").write_text("[]"), "config.json is damaged"),
        (_older_format, "lacks mean"),
        (_newer_format, "settings that this version does not know: attention"),
    ],
)
def test_a_damaged_model_is_refused_with_the_reason(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], said: str
) -> None:
    export(tmp_path)
    damage(tmp_path / "pets" / "model")
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "pets"), str(images)])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["{run}"], "no IMAGE given"),
        (["{run}", "{images}", "--top", "0"], "--top 0 shows nothing"),
        (["{run}", "{empty}"], "holds no image"),
        (["{run}x", "{images}"], "did you mean pets?"),
    ],
)
def test_a_wrong_command_says_what_to_do(
    run: tuple[Path, torch.nn.Module], images: Path, capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    (images / "none").mkdir()
    with pytest.raises(SystemExit) as stop:
        main([word.format(run=run[0], images=images, empty=images / "none") for word in argv])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("background", ["auto", "", "white"])
def test_shapes_on_transparency_are_told_apart_unless_alpha_was_dropped_in_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], background: str
) -> None:
    export(tmp_path, replace(CONFIG, data=replace(CONFIG.data, background=background)))
    paths = []
    for name, shape in {"square": np.s_[2:14, 2:14], "bar": np.s_[7:9, :]}.items():
        pixels = np.zeros((SIDE, SIDE, 4), np.uint8)
        pixels[(*shape, 3)] = 255  # black on black that is transparent
        paths.append(str(tmp_path / f"{name}.png"))
        Image.fromarray(pixels).save(paths[-1])
    assert main([str(tmp_path / "pets"), *paths, "--device", "cpu", "--json"]) == 0
    shown = capsys.readouterr()
    one, other = (json.loads(line)["predictions"] for line in shown.out.splitlines())
    assert (one == other) == (background == "")
    said = "2 of 2 images with transparency: " + ("put on white" if background else "its alpha channel dropped")
    assert said in shown.err


def test_a_folder_is_searched_for_images_by_their_content(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((SIDE, SIDE, 3), np.uint8)).save(tmp_path / "0", "JPEG")
    (tmp_path / "notes").write_text("BMI")
    (tmp_path / "@eaDir").mkdir()
    (tmp_path / "@eaDir" / "thumb.jpg").write_bytes((tmp_path / "0").read_bytes())
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    assert list(image_paths([str(tmp_path)])) == [str(tmp_path / "0")]
