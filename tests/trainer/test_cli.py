"""Settings: how defaults, TOML files and flags become one RunConfig, and what a user is told who gets one wrong."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.interval import AUTO
from tests.trainer.configs import configs
from trainer.settings.cli import parse
from trainer.settings.fields import settings
from trainer.settings.rules import validate, worker_count
from trainer.settings.toml import from_toml, load, recipe_names, to_toml
from trainer.settings.tree import DataConfig, OptimConfig, RunConfig, TrainConfig

REPOSITORY = Path(__file__).parents[2]


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What a wrong command line prints; it ends with status 2 and shows no traceback."""
    with pytest.raises(SystemExit) as stop:
        parse(argv)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    text = captured.out + captured.err
    assert "Traceback" not in text
    return re.sub(r"[\s│]+", " ", text)


# --- merging --------------------------------------------------------------------------------------------------------------------------


def test_no_arguments_are_the_defaults() -> None:
    invocation = parse([])
    assert (invocation.config, invocation.recipes, invocation.action) == (RunConfig(), (), "run")


@given(configs())
def test_every_config_survives_toml(config: RunConfig) -> None:
    assert from_toml(to_toml(config)) == config


@given(config=configs(), base=configs())
def test_full_toml_leaves_nothing_of_its_base(config: RunConfig, base: RunConfig) -> None:
    assert from_toml(to_toml(config), base=base) == config


def test_printed_config_loads_again(tmp_path: Path) -> None:
    first = parse(["--config", "quickstart", "--optim.lr", "0.3", "--train.max_steps", "77"]).config
    saved = tmp_path / "mine.toml"
    saved.write_text(to_toml(first))
    again = parse(["--config", str(saved)])
    assert again.config == first
    assert again.recipes == ("mine",)


def test_later_files_win_and_flags_win_over_all(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[optim]\nlr = 0.1\nmomentum = 0.5\n[train]\nepochs = 3\n")
    (tmp_path / "b.toml").write_text("[optim]\nlr = 0.2\n[train]\nepochs = 4\n")
    config = parse(["--train.epochs", "5", "--config", str(tmp_path / "a.toml"), f"--config={tmp_path / 'b.toml'}"]).config
    assert (config.optim.lr, config.optim.momentum, config.train.epochs) == (0.2, 0.5, 5)


@pytest.mark.parametrize(
    "flags",
    [
        ["--train.max-steps", "9", "--data.no-flip", "--train.checkpoint-every", "0"],
        ["--train.max_steps", "9", "--data.no_flip", "--train.checkpoint_every", "0"],
        ["--train.max_steps=9", "--data.flip=false", "--train.checkpoint-every=0"],
        ["--train.max-steps=9", "--data.flip", "False"],
    ],
)
def test_flags_are_taken_with_hyphens_or_underscores_and_booleans_with_a_word(flags: list[str]) -> None:
    expected = RunConfig(train=TrainConfig(max_steps=9), data=DataConfig(flip=False))
    assert parse(flags).config == expected


@pytest.mark.parametrize("words", ["--train.checkpoint-every auto", "--train.checkpoint_every=auto", "--train.checkpoint-every -1"])
def test_auto_is_a_checkpoint_interval_as_a_flag_and_in_toml(words: str) -> None:
    config = parse(words.split()).config
    assert config == RunConfig(train=TrainConfig(checkpoint_every=AUTO))
    assert from_toml('[train]\ncheckpoint_every = "auto"\n', base=RunConfig(train=TrainConfig(checkpoint_every=5))) == config
    assert from_toml(to_toml(config)) == config
    with pytest.raises(ValueError, match=r"train\.checkpoint_every=-2 must be at least -1; 0 takes one an epoch, auto"):
        validate(RunConfig(train=TrainConfig(checkpoint_every=-2)))


@pytest.mark.parametrize(
    ("flags", "channels_last"),
    [
        ("--train.channels-last", "on"),
        ("--train.channels_last on", "on"),
        ("--train.channels-last=True", "on"),
        ("--train.no-channels-last", "off"),
        ("--train.no_channels_last", "off"),
        ("--train.channels-last false", "off"),
        ("--train.channels-last off --train.channels-last auto", "auto"),
    ],
)
def test_a_switch_is_a_flag_or_a_word(flags: str, channels_last: str) -> None:
    assert parse([*flags.split(), "--train.compile"]).config.train.channels_last == channels_last
    base = RunConfig(train=TrainConfig(channels_last="auto"))
    for value in ("true", '"on"'):
        assert from_toml(f"[train]\nchannels_last = {value}\n", base=base).train.channels_last == "on"


def test_profile_has_a_short_flag() -> None:
    assert parse(["--profile"]).config == RunConfig(train=TrainConfig(profile=True))


def test_a_whole_number_is_a_good_float() -> None:
    lr = from_toml("[optim]\nlr = 1\n").optim.lr
    assert lr == 1.0
    assert isinstance(lr, float)


def test_actions() -> None:
    assert parse(["--dry-run"]).action == "dry_run"
    assert parse(["--print-config"]).action == "print_config"


def test_relative_paths_in_a_file_are_relative_to_it_and_in_a_flag_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "here").mkdir()
    file = tmp_path / "deep" / "own.toml"
    file.write_text('[data]\npath = "../images"\n[model]\nweights = "./w.safetensors"\n')
    monkeypatch.chdir(tmp_path / "here")
    config = parse(["--config", "../deep/own.toml"]).config
    assert config.data.path == str(tmp_path / "images")
    assert config.model.weights == str(tmp_path / "deep" / "w.safetensors")
    assert parse(["--data.path", "./pets"]).config.data.path == str(tmp_path / "here" / "pets")
    assert parse(["--config", str(file), "--data.path", "cifar10"]).config.data.path == "cifar10"


def test_a_file_does_not_move_the_paths_of_those_before_it(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[train]\nepochs = 2\n")
    assert parse(["--config", "quickstart", "--config", str(tmp_path / "a.toml")]).config.data == load("quickstart", RunConfig()).data


def test_home_is_expanded_where_the_shell_does_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = parse(["--data.path=~/pets", "--model.weights", "~/w.pt"]).config
    assert (config.data.path, config.model.weights) == (str(tmp_path / "pets"), str(tmp_path / "w.pt"))


# --- recipes --------------------------------------------------------------------------------------------------------------------------


def test_shipped_recipes_obey_the_rules() -> None:
    assert recipe_names() == ["article", "best", "photos", "quickstart", "text-quickstart", "texts"]
    for name in recipe_names():
        assert parse(["--config", name]).recipes == (name,)


def test_article_is_the_tutorial_to_the_letter() -> None:
    flat = settings(load("article", RunConfig()))
    assert {key: flat[key] for key in flat if key.split(".")[0] in ("model", "optim")} == {
        "model.name": "resnet18",
        "model.weights": "imagenet",
        "model.stem": "article",
        "model.image_size": 0,
        "model.interpolation": "bilinear",
        "model.normalise": "data",
        "model.widths": "",
        "model.pooling": "auto",
        "model.lora_rank": 0,
        "model.lora_alpha": 0,
        "model.lora_dropout": 0.0,
        "model.freeze": "none",
        "model.lp_epochs": 1,
        "optim.name": "sgd",
        "optim.lr": 0.001,
        "optim.momentum": 0.9,
        "optim.nesterov": False,
        "optim.weight_decay": 0.0,
        "optim.decay_all": False,
        "optim.schedule": "constant",
        "optim.warmup_steps": 0,
        "optim.warmup_fraction": -1.0,
        "optim.final_lr_fraction": 0.0,
        "optim.head_lr_factor": 1.0,
        "optim.layer_decay": 1.0,
        "optim.loss": "",
        "optim.label_smoothing": 0.0,
        "optim.clip_norm": 0.0,
    }
    data = {key: flat[f"data.{key}"] for key in ("path", "batch_size", "pad", "flip", "mean", "std")}
    assert data == {"path": "cifar10", "batch_size": 100, "pad": 4, "flip": True, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    assert (flat["train.epochs"], flat["train.precision"], flat["train.ema"]) == (10, "fp32", 0.0)


def test_quickstart_finds_its_data_in_this_checkout() -> None:
    config = load("quickstart", RunConfig())
    assert Path(config.data.path) == REPOSITORY / "dataio" / "samples" / "fashion_mnist"


# --- mistakes in files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[optim]\nlearning = 1\n", ["unknown key optim.learning;", "keys of [optim]: name, lr, momentum"]),
        ("[optim]\nmomentun = 1\n", ["unknown key optim.momentun; did you mean optim.momentum?"]),
        ("[data]\nbatch-size = 1\n", ["unknown key data.batch-size; did you mean data.batch_size?"]),
        ("[train]\nlabel_smoothing = 0.1\n", ["unknown key train.label_smoothing; did you mean optim.label_smoothing?"]),
        ("lr = 0.1\n", ["unknown key lr; did you mean optim.lr?", "keys of the top level: workers, run"]),
        ("[optimizer]\n", ["unknown key optimizer;", "keys of the top level"]),
        ("[cluster.fault]\n", ["unknown key cluster.fault; did you mean cluster.faults?"]),
        ("optim = 3\n", ["optim = 3, but optim is a table; write [optim]"]),
        ('[optim]\nlr = "fast"\n', ["optim.lr = 'fast' is text; it must be a number, without quotes"]),
        ("[train]\nepochs = 1.5\n", ["train.epochs = 1.5 is a number with a fraction; it must be a whole number"]),
        ("[train]\nepochs = true\n", ["train.epochs = True is a boolean; it must be a whole number"]),
        ("[optim]\nlr = true\n", ["optim.lr = True is a boolean; it must be a number"]),
        ("[train]\ncompile = 1\n", ["train.compile = 1 is a whole number; it must be true or false"]),
        ("workers = 4\n", ["workers = 4 is a whole number; it must be text in quotes"]),
        ('[train]\nprecision = "fp23"\n', ["train.precision = 'fp23'; did you mean fp32? it must be one of auto, fp32, bf16"]),
        ("[data]\nmean = [0.5, 0.5]\n", ["data.mean = [0.5, 0.5]; it must be a list of 3 numbers"]),
        ("[data]\nmean = [0.5, 0.5, 'x']\n", ["data.mean = 'x' is text; it must be a number"]),
        ("[data\n", ["is not valid TOML"]),
    ],
)
def test_a_mistake_in_a_file_names_file_key_rule_and_fix(text: str, said: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^my\.toml") as caught:
        from_toml(text, origin="my.toml")
    for words in said:
        assert words in str(caught.value)


def test_unknown_recipe_and_unreadable_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "--config quikstart is no recipe; did you mean quickstart? shipped: article, best, photos, quickstart" in error_of(
        capsys, "--config", "quikstart"
    )
    assert "cannot be read (No such file or directory)" in error_of(capsys, "--config", str(tmp_path / "none.toml"))
    (tmp_path / "bin.toml").write_bytes(b"\xff\xfe")
    assert "is not UTF-8 text" in error_of(capsys, "--config", str(tmp_path / "bin.toml"))


# --- mistakes in flags ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--train.max-stepz", "3"], "--train.max-steps"),
        (["--data.batchsize", "3"], "--data.batch-size"),
        (["--lr", "3"], "--optim.lr"),
        (["--optim.learning-rate", "3"], "Unrecognized options: --optim.learning-rate"),
        (["--train.precision", "fp16"], "invalid choice 'fp16' for argument '--train.precision'"),
        (["--train.channels-last", "blue"], "--train.channels-last: invalid choice 'blue'; it must be one of auto, on, off"),
        (["--data.flip", "perhaps"], "--data.flip: invalid choice 'perhaps'; it must be one of true, false"),
        (["--data.flip", "true", "quickstart"], "--data.flip: 'true quickstart' is more than one word; settings are given as flags"),
        (["--train.no-channels-last", "off"], "'false off' is more than one word"),
        (["--optim.lr", "fast"], "--optim.lr: could not convert string to float: 'fast'"),
        (["--config"], "Missing value for argument '--config'"),
        (["quickstart"], "did you mean --config quickstart?"),
        (["--dry-run", "--print-config"], "give one of them"),
        (["--workers", "4:1"], "workers=4:1 is an empty range: the fewest come first; give --workers 1:4"),
        (["--workers", "0:4"], "workers=0:4 is not a number of workers"),
        (["--workers", "1:2:3"], "workers=1:2:3 is not a number of workers; give a whole number from 1 up, a range such as 1:4, or auto"),
        (["--workers", "0"], "workers=0 is not a number of workers"),
        (["--workers", "many"], "workers=many is not a number of workers"),
        (["--run", "../x"], "run='../x' is not a folder's name"),
        (["--data.batch-size", "100", "--train.virtual-ranks", "8"], "train.virtual_ranks=8; use 96 or 104"),
        (["--data.batch-size", "3", "--train.virtual-ranks", "8"], "train.virtual_ranks=8; use 8"),
        (["--data.batch-size", "100", "--workers", "3"], "data.batch_size=100 is not a multiple of workers=3; use 99 or 102"),
        (["--workers", "4", "--train.virtual-ranks", "2"], "use --workers 2 or fewer"),
        (["--data.image-size", "8", "--data.pad", "8"], "data.pad=8 is not below the images' side of 8 pixels"),
        (["--optim.nesterov", "--optim.name", "adamw"], "optim.nesterov=true belongs to SGD"),
        (
            ["--train.cuda-graphs", "--train.reduction", "ddp", "--workers", "2"],
            "train.cuda_graphs=on and train.reduction=ddp with 2 workers",
        ),
        (["--train.cuda-graphs", "--train.accumulate", "2"], "train.cuda_graphs=on and train.accumulate=2: a graph's"),
        (
            ["--data.augment-backend", "dali"],
            "data.augment_backend=dali does what data.crop=resized, rotate, policy, jitter and erase ask for",
        ),
        (["--optim.nesterov", "--optim.momentum", "0"], "optim.nesterov=true needs momentum"),
        (["--model.freeze", "lp-ft", "--train.epochs", "1"], "model.lp_epochs=1 leaves nothing of train.epochs=1"),
        (["--cluster.keep-checkpoints", "1"], "cluster.keep_checkpoints=1 must be at least 2"),
        (["--data.max-bad-fraction", "5"], "data.max_bad_fraction=5 must be at least 0 and at most 1"),
        (["--data.std", "0", "1", "1"], "data.std=0 must be above 0"),
        (["--optim.lr", "nan"], "optim.lr=nan must be above 0"),
        (["--storage", ""], "storage is empty"),
    ],
)
def test_a_mistake_on_the_command_line_says_what_is_wrong_and_what_to_do(
    capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    assert said in error_of(capsys, *argv)


def test_all_broken_rules_are_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    text = error_of(capsys, "--optim.lr", "-1", "--train.epochs", "0", "--data.pad", "-2")
    assert "3 settings are wrong" in text
    for key in ("optim.lr=-1", "train.epochs=0", "data.pad=-2"):
        assert key in text


@pytest.mark.parametrize("key", [key for key, value in settings(RunConfig()).items() if type(value) in (int, float)])
def test_no_number_may_be_hugely_negative(key: str) -> None:
    """Every numeric setting has a rule: none was forgotten in the table."""
    table, _, leaf = key.rpartition(".")
    with pytest.raises(ValueError, match=re.escape(key)):
        validate(from_toml(f"[{table}]\n{leaf} = -1000\n"))


@given(batch_size=st.integers(1, 2000), virtual_ranks=st.integers(1, 64))
def test_the_two_batch_sizes_offered_are_the_nearest_that_work(batch_size: int, virtual_ranks: int) -> None:
    config = RunConfig(data=DataConfig(batch_size=batch_size), train=TrainConfig(virtual_ranks=virtual_ranks))
    if batch_size % virtual_ranks == 0:
        validate(config)
        return
    with pytest.raises(ValueError, match="is not a multiple") as caught:
        validate(config)
    offered = [int(number) for number in re.findall(r"\d+", str(caught.value).rpartition("; use ")[2])]
    nearest = [size for size in range(batch_size - virtual_ranks, batch_size + virtual_ranks + 1) if size > 0 and size % virtual_ranks == 0]
    assert offered == nearest


def test_rules_that_need_facts_are_checked_when_the_facts_are_given() -> None:
    config = RunConfig(data=DataConfig(pad=4, batch_size=100), optim=OptimConfig(warmup_steps=50))
    validate(config)
    for facts in ({"workers": 3}, {"shape": (4, 28)}, {"total_steps": 50}):
        with pytest.raises(ValueError, match="use"):
            validate(config, **facts)  # type: ignore[arg-type]
    validate(config, workers=4, shape=(28, 28), total_steps=51)


def test_worker_count() -> None:
    assert worker_count(RunConfig(workers="auto")) is None
    assert worker_count(RunConfig(workers="12")) == 12


# --- as a program ---------------------------------------------------------------------------------------------------------------------


def test_help_lists_every_setting_with_its_meaning(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for key in settings(RunConfig()):
        assert f"--{key.replace('_', '-')}" in shown
    assert "Committed checkpoints kept" in shown
    assert "A shipped recipe" in shown


def test_a_wrong_setting_ends_a_program_with_status_2_and_one_short_message() -> None:
    code = "import sys; from trainer.settings.cli import parse; parse(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, "--train.epochs", "0"], cwd=REPOSITORY, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: train.epochs=0 must be at least 1\n")


def test_warm_up_must_end_before_the_run_does_unless_the_run_is_cut_short_for_a_trial() -> None:
    config = RunConfig(optim=OptimConfig(warmup_steps=48))
    validate(config, total_steps=49)
    with pytest.raises(ValueError, match=r"optim.warmup_steps=48 does not end before the run's 48 steps do; use at most 47"):
        validate(config, total_steps=48)
    validate(dataclasses.replace(config, train=TrainConfig(max_steps=5)), total_steps=5)
