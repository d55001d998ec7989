"""LoRA: a model of texts of which adapters and head alone are trained, resumed to the bit, and exported as an ordinary model."""

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from cluster.storage import open_storage
from dataio.batch import Batch
from dataio.codecs.text.tokens import PAD
from dataio.manifest import TextInfo
from dataio.schema import single_label
from tests.texts import make_decoder, make_model, make_tokenizer, tiny_description
from trainer.drive.check import Checked, Question, built
from trainer.drive.disk_room import state_bytes
from trainer.drive.identity import automatic_name
from trainer.drive.plan import model_facts
from trainer.export.model_folder import export_model, load_export, text_export
from trainer.learn.build import Learner, build_learner
from trainer.learn.state import OPTIMIZER_FILE, TrainState, weights_sha256
from trainer.models.adapters import merged, resting
from trainer.runs.folder import RunFolder
from trainer.settings.fields import replaced
from trainer.settings.identity import deciding_settings
from trainer.settings.rules import validate
from trainer.settings.texts import TYPES, modules_of, with_text_model
from trainer.settings.tree import RunConfig, TaskConfig
from trainer.tasks.make import make_task

pytest.importorskip("peft", reason="the extra `lora` is not installed")

TASK = make_task(TaskConfig(), single_label(("neg", "pos")), holds_texts=True)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["bert", "gpt2", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp(request.param)
    return make_model(place) if request.param == "bert" else make_decoder(place, request.param)


def config_of(folder: Path, **changes: Any) -> RunConfig:
    config = replaced(replaced(RunConfig(), "model.name", f"hf/{folder}"), "data.max_tokens", 32)
    for key, value in {"model.lora_rank": 4, "optim.name": "adamw", "optim.lr": 0.01, **changes}.items():
        config = replaced(config, key, value)
    return with_text_model(config)


def learner_of(folder: Path, **changes: Any) -> Learner:
    return build_learner(config_of(folder, **changes), TASK, (24,), CPU)


def tokens_of(step: int) -> torch.Tensor:
    """(6, T) int32 of stored tokens, of texts of different lengths."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(4, 30, (6, 12), generator=generator, dtype=torch.int32)
    for row in range(6):
        tokens[row, 3 + row :] = PAD
    return tokens


def train(learner: Learner, first: int, last: int) -> None:
    for step in range(first, last):
        learner.set_trainable(step // 2)
        learner.set_learning_rate(step, 20)
        torch.manual_seed(step)  # of dropout
        learner.optimizer.zero_grad()
        outputs = learner.model(learner.preprocess(tokens_of(step)))
        learner.task.loss_sum(outputs, {"label": torch.arange(6) % 2}).backward()
        learner.optimizer.step()
        if learner.ema is not None:
            learner.ema.update()


def text_info(config: RunConfig) -> TextInfo:
    sha256 = hashlib.sha256(Path(config.data.tokenizer).read_bytes()).hexdigest()
    return TextInfo(tokenizer_sha256=sha256, vocabulary=40, max_tokens=32, too_long="cut", lengths={"24": 1}, cut=0)


def state_of(learner: Learner) -> TrainState:
    return TrainState(learner.model, learner.optimizer, learner.ema)


def files_of(learner: Learner) -> dict[str, bytes]:
    return {name: b"".join(parts) for name, parts in state_of(learner).snapshot({}).files().items()}


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_trains_its_adapters_and_its_head_alone(kind: str, tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny_description(kind)))
    learner = learner_of(tmp_path, **{"model.weights": "none"})
    before = {name: tensor.clone() for name, tensor in learner.model.named_parameters()}
    plain = learner_of(tmp_path, **{"model.weights": "none", "model.lora_rank": 0})
    learner.model.eval()
    plain.model.eval()
    tokens = learner.preprocess(tokens_of(0))
    with torch.no_grad():
        assert torch.equal(learner.model(tokens), plain.model(tokens))  # an adapter adds nothing before it is trained
    train(learner, 0, 3)
    changed = {name for name, tensor in learner.model.named_parameters() if not torch.equal(tensor, before[name])}
    adapters = {name for name in before if "lora_" in name}
    assert changed == adapters | {"head.weight", "head.bias"}
    assert len(adapters) == 2 * len(TYPES[kind].adapts) * (1 if kind == "albert" else 2)  # albert's two blocks are one
    held = {id(parameter) for group in learner.optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for name, parameter in learner.model.named_parameters() if name in changed}


def test_the_adapted_layers_are_those_that_peft_adapts() -> None:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    both = KNOWN.keys() & TYPES.keys()
    assert {kind: TYPES[kind].adapts for kind in both} == {kind: tuple(KNOWN[kind]) for kind in both}
    assert {"bert", "gpt2", "llama", "qwen2"} <= both


def test_what_adapters_draw_depends_on_the_seed_alone(folder: Path) -> None:
    before = torch.random.get_rng_state()
    one, same, other = (learner_of(folder, **{"train.init_seed": seed}).model.state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(one[name], same[name]) for name in one)
    drawn = [name for name in one if "lora_A" in name]
    assert drawn
    assert not any(torch.equal(one[name], other[name]) for name in drawn)
    assert all(torch.equal(one[name], other[name]) for name in one if name.startswith("encoder.") and "lora_" not in name)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train.ema": 0.9, "model.lora_dropout": 0.1, "optim.layer_decay": 0.5},
        {"model.freeze": "lp-ft", "train.epochs": 4, "optim.name": "sgd"},
    ],
    ids=str,
)
def test_a_resumed_run_ends_in_the_bits_of_one_that_was_not_interrupted(folder: Path, changes: dict[str, Any]) -> None:
    straight = learner_of(folder, **changes)
    train(straight, 0, 3)
    files = files_of(straight)
    train(straight, 3, 6)
    resumed = learner_of(folder, **{**changes, "train.seed": 5})
    state_of(resumed).load(files.__getitem__)
    train(resumed, 3, 6)
    assert files_of(resumed) == files_of(straight)
    trained = {key.partition("/")[0] for key in safetensors.torch.load(files[OPTIMIZER_FILE])}
    assert trained
    assert all(key.startswith("head.") or "lora_" in key for key in trained)


@pytest.mark.parametrize("reduction", ["tree", "ddp"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_in_virtual_ranks_and_micro_batches_train_adapters_and_head(folder: Path, precision: str, reduction: str) -> None:
    changes = {"train.precision": precision, "train.reduction": reduction, "train.virtual_ranks": 2, "train.accumulate": 3}
    ends = []
    for _ in range(2):
        learner = learner_of(folder, **changes, **{"optim.clip_norm": 1.0, "model.lora_dropout": 0.1})
        before = {name: tensor.clone() for name, tensor in learner.model.named_parameters()}
        learner.set_trainable(0)
        learner.set_learning_rate(0, 20)
        stepper = learner.stepper()
        for step in range(3):
            both = [
                Batch(
                    samples=tokens_of(2 * step + virtual_rank),
                    targets={"label": torch.arange(6) % 2},
                    ids=np.arange(6) + 6 * virtual_rank,
                    epoch=0,
                    step=step,
                    virtual_rank=virtual_rank,
                )
                for virtual_rank in range(2)
            ]
            assert stepper.step(both, global_count=12, step=step).isfinite()
        still = {name for name, tensor in learner.model.named_parameters() if torch.equal(tensor, before[name])}
        assert still == resting(learner.model)
        ends.append(weights_sha256(learner.model))
    assert ends[0] == ends[1]


def test_in_lp_ft_the_adapters_begin_after_the_head(folder: Path) -> None:
    learner = learner_of(folder, **{"model.freeze": "lp-ft", "train.epochs": 4})
    for epoch, adapts in ((0, False), (1, True)):
        learner.set_trainable(epoch)
        names = {name for name, parameter in learner.model.named_parameters() if parameter.requires_grad}
        assert names >= {"head.weight", "head.bias"}
        assert any("lora_" in name for name in names) is adapts
        assert not names & resting(learner.model)
        assert learner.model.encoder.training is adapts


@pytest.mark.parametrize("is_averaged", [False, True])
def test_an_exported_model_is_an_ordinary_one_that_answers_as_the_adapted_one_does(folder: Path, tmp_path: Path, is_averaged: bool) -> None:
    learner = learner_of(folder, **{"train.ema": 0.5 if is_averaged else 0.0})
    train(learner, 0, 4)
    plain = learner_of(folder, **{"model.lora_rank": 0}).model.state_dict()
    tensors = merged(learner.model, learner.ema.weights() if learner.ema is not None else learner.model.state_dict())
    assert tensors.keys() == plain.keys()
    adapted = {name.replace(".base_layer.", ".") for name in learner.model.state_dict() if name.endswith(".base_layer.weight")}
    assert {name for name in plain if not torch.equal(plain[name], tensors[name])} == adapted | {"head.weight", "head.bias"}
    storage = open_storage(str(tmp_path))
    export_model(
        storage=storage,
        run="r",
        tensors=tensors,
        config=learner.config,
        task=TASK,
        data_image_size=(24,),
        summary={},
        texts=text_export(learner.config, text_info(learner.config)),
    )
    described = json.loads((tmp_path / "r" / "model" / "config.json").read_text())
    assert not [key for key in described["model"] if "lora" in key]
    assert "LoRA of rank 4, merged" in (tmp_path / "r" / "model" / "README.md").read_text()
    loaded = load_export(RunFolder(storage=storage, name="r/model"), CPU, may_be_of_texts=True)
    assert not resting(loaded.model)
    tokens = learner.preprocess(tokens_of(9))
    learner.model.eval()
    with torch.no_grad():
        if learner.ema is None:
            wanted = learner.model(tokens)
        else:
            with learner.ema.applied():
                wanted = learner.model(tokens)
        assert torch.allclose(loaded.model(tokens), wanted, atol=1e-5)
    # What a run begins from, without adapters or with new ones.
    again = learner_of(tmp_path / "r" / "model")
    assert torch.equal(again.model.head.weight, tensors["head.weight"])


def test_merging_is_what_the_library_does(folder: Path) -> None:
    from peft.tuners.lora import LoraLayer

    learner = learner_of(folder, **{"model.lora_alpha": 3})
    train(learner, 0, 3)
    ours = {name: tensor.clone() for name, tensor in merged(learner.model, learner.model.state_dict()).items()}
    layers = {name: layer for name, layer in learner.model.named_modules() if isinstance(layer, LoraLayer)}
    assert layers
    for name, layer in layers.items():
        layer.merge()
        assert torch.allclose(ours[f"{name}.weight"], layer.get_base_layer().weight, atol=1e-7)
        assert layer.scaling["default"] == 3 / 4


def test_a_model_without_adapters_is_left_as_it_is(folder: Path) -> None:
    learner = learner_of(folder, **{"model.lora_rank": 0})
    tensors = learner.model.state_dict()
    assert merged(learner.model, tensors) is tensors
    assert resting(learner.model) == frozenset()
    assert "peft" not in modules_of(learner.config.model)
    assert "peft" in modules_of(config_of(folder).model)


def test_a_run_with_adapters_is_another_run_and_one_without_keeps_its_name(folder: Path) -> None:
    plain, adapted = config_of(folder, **{"model.lora_rank": 0}), config_of(folder)
    names = [automatic_name(config, "f" * 64, "x", "w" * 64) for config in (plain, adapted, config_of(folder, **{"model.lora_rank": 8}))]
    assert len(set(names)) == 3
    assert not [key for key in deciding_settings(plain) if "lora" in key]


def test_a_plan_and_a_check_count_what_is_trained(folder: Path) -> None:
    config = config_of(folder, **{"optim.name": "adamw"})
    facts = model_facts(TASK, config.model, shape=(24,))
    learner = build_learner(config, TASK, (24,), CPU)
    held = sum(parameter.numel() for group in learner.optimizer.param_groups for parameter in group["params"])
    assert facts.trainable == held < facts.parameters / 2
    question = Question(task=TaskConfig(), targets=tuple(TASK.targets), label_smoothing=0.0, model=config.model, shape=(24,), seed=0)
    checked = built(question)
    assert isinstance(checked, Checked)
    assert checked.resting_bytes == 4 * (facts.parameters - held)
    assert state_bytes(config, checked.weights_bytes, checked.resting_bytes) == checked.weights_bytes + 2 * 4 * held + 2 * (
        checked.weights_bytes - 4 * facts.parameters
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.freeze": "backbone"}, r"model\.lora_rank=4 trains adapters in the backbone, and model\.freeze=backbone trains the head"),
        ({"model.lora_rank": 0, "model.lora_alpha": 16}, r"model\.lora_alpha=16 is of LoRA, and model\.lora_rank=0 has none"),
        ({"model.lora_rank": 0, "model.lora_dropout": 0.1}, r"model\.lora_dropout=0\.1 is of LoRA, and model\.lora_rank=0 has none"),
        ({"model.lora_rank": -1}, r"model\.lora_rank=-1 must be at least 0; 0 trains the weights themselves"),
    ],
)
def test_what_does_not_go_together_says_so(folder: Path, changes: dict[str, Any], message: str) -> None:
    validate(config_of(folder))
    validate(config_of(folder, **{"model.freeze": "lp-ft"}))
    with pytest.raises(ValueError, match=message):
        validate(config_of(folder, **changes))


def test_images_have_no_adapters() -> None:
    with pytest.raises(ValueError, match=r"model\.lora_rank=4 is of texts, and model\.name=resnet18 takes images"):
        validate(replaced(RunConfig(), "model.lora_rank", 4))


def test_without_the_extra_it_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None if name == "peft" else found(name, package))
    config = config_of(folder)
    with pytest.raises(ValueError, match=r'model\.lora_rank=4 needs the package peft: pip install "peft>=0.21" \(extra `lora`\)'):
        TASK.build(config.model, shape=(24,), seed=0)


def test_the_weights_that_are_compared_hold_the_adapters(folder: Path) -> None:
    learner = learner_of(folder)
    before = weights_sha256(learner.model)
    train(learner, 0, 1)
    assert weights_sha256(learner.model) != before
