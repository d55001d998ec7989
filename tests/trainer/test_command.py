"""`finetune`: one command that says what it can do, takes a folder, and shows the way by which it was called."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.command import main, usage
from trainer.drive.signals import Phase, farewell
from trainer.runs.progress import predict_command
from trainer.settings.cli import parse
from trainer.settings.completion import flags_of, script
from trainer.settings.fields import settings
from trainer.settings.programs import program
from trainer.settings.toml import load
from trainer.settings.tree import RunConfig

REPOSITORY = Path(__file__).parents[2]
COMMANDS = (
    "run",
    "preview",
    "find-rate",
    "search",
    "curve",
    "audit",
    "predict",
    "evaluate",
    "watch",
    "track",
    "report",
    "compress",
    "prune",
    "export",
    "push",
    "runs",
    "convert",
    "completion",
)


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    status = main(argv)
    captured = capsys.readouterr()
    return status, captured.out + captured.err


# --- words ----------------------------------------------------------------------------------------------------------------------------


def test_alone_it_says_what_it_can_do(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ((), ("--help",), ("-h",), ("help",)):
        assert said(capsys, *argv) == (0, usage() + "\n")
    assert all(f"finetune {name} " in usage() for name in COMMANDS)


def test_every_command_has_its_own_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/finetune"])
    for name in COMMANDS[:-1]:
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        assert f"finetune {name} " in capsys.readouterr().out, name


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["predct"], "predct is no command; did you mean predict? commands are run, preview, find-rate"),
        (["--data.path", "x"], "--data.path: settings follow a command, such as finetune run DIR --train.epochs 3"),
        (["trainer"], "trainer is no command; did you mean finetune run trainer?"),
        (["completion"], "no shell; it must be one of bash, zsh, such as finetune completion bash"),
        (["completion", "tcsh"], "tcsh; it must be one of bash, zsh"),
    ],
)
def test_a_mistake_is_told_with_the_way_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, argv: list[str], words: str
) -> None:
    monkeypatch.chdir(REPOSITORY)
    status, text = said(capsys, *argv)
    assert status == 2
    assert words in text


def test_version_and_help_import_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from trainer.command import main; main(['--version']); main(['--help']); print(sorted({'torch', 'ray', 'tyro', "
        "'pyarrow', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# --- the way by which it was called -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("started_as", "run", "watch", "convert"),
    [
        ("/venv/bin/finetune", "finetune run", "finetune watch", "finetune convert"),
        ("/checkout/trainer/command.py", "finetune run", "finetune watch", "finetune convert"),
        ("/checkout/trainer/run.py", "python -m trainer.run", "python -m trainer.runs watch", "python -m dataio.convert"),
        ("", "python -m trainer.run", "python -m trainer.runs watch", "python -m dataio.convert"),
    ],
)
def test_a_command_is_shown_as_the_user_calls_it(started_as: str, run: str, watch: str, convert: str) -> None:
    assert [program(name, started_as) for name in ("run", "watch", "convert")] == [run, watch, convert]


def test_what_is_printed_to_be_given_next_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/finetune"])
    assert predict_command("/runs/pets") == "finetune predict /runs/pets IMAGE..."
    assert "or finetune report, writes it" in farewell(Phase.REPORTING, "SIGTERM")
    monkeypatch.setattr(sys, "argv", [str(REPOSITORY / "trainer" / "run.py")])
    assert predict_command("/runs/pets") == "python -m trainer.predict /runs/pets IMAGE..."


# --- a folder ---------------------------------------------------------------------------------------------------------------------------


def test_a_folder_is_the_data_with_the_recipe_for_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pets").mkdir()
    for word in ("pets", "pets/", "./pets", str(tmp_path / "pets")):
        invocation = parse([word, "--train.epochs", "3"])
        photos = load("photos", RunConfig())
        expected = settings(photos) | {"data.path": str(tmp_path / "pets"), "train.epochs": 3}
        assert settings(invocation.config) == expected
        assert (invocation.recipes, invocation.takes_dir_recipe) == (("photos",), True)


def test_with_another_recipe_a_folder_is_the_data_alone(tmp_path: Path) -> None:
    invocation = parse([str(tmp_path), "--config", "best"])
    assert settings(invocation.config) == settings(load("best", RunConfig())) | {"data.path": str(tmp_path)}
    assert (invocation.recipes, invocation.takes_dir_recipe) == (("best",), False)
    without_dir = parse(["--data.path", str(tmp_path)])
    assert settings(without_dir.config) == settings(RunConfig()) | {"data.path": str(tmp_path)}
    assert not without_dir.recipes


@pytest.mark.parametrize("word", ["cifar10", "s3://bucket/pets", "gs://bucket/pets?endpoint=x"])
def test_what_is_no_folder_here_is_taken_as_it_is(word: str) -> None:
    assert parse([word]).config.data.path == word


def test_no_folder_two_folders_and_a_folder_twice_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pets").mkdir()
    (tmp_path / "own.toml").touch()
    for argv, words in (
        (["pest"], "pest: there is no such folder or file; give the folder that holds your images"),
        (["own.toml"], "did you mean --config own.toml?"),
        (["quickstart"], "did you mean --config quickstart?"),
        (["pets", "pets"], "pets pets: one folder or file holds the samples of a run"),
        (["pets", "--data.path", "x"], "pets and --data.path both say where the samples are; give one of them"),
        (["pets", "--data.path=x"], "pets and --data.path both say where the samples are; give one of them"),
    ):
        with pytest.raises(SystemExit):
            parse(argv)
        assert words in capsys.readouterr().err


# --- completion -------------------------------------------------------------------------------------------------------------------------


def test_flags_and_their_words_are_read_from_help() -> None:
    text = "usage: x [-h] --data.fit {refuse,crop}\n  --data.path STR   or --run-it\n --flip [{true,false}], --top {None}|INT\n"
    assert flags_of(text) == {"--data.fit": ("refuse", "crop"), "--data.path": (), "--flip": ("true", "false"), "--run-it": (), "--top": ()}


@pytest.fixture(scope="module")
def completing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    helps = {"run": "--config STR --resume {auto,never,must} --data.path STR --data.pad INT", "predict": "--top INT", "completion": ""}
    folder = tmp_path_factory.mktemp("shell")
    (folder / "runs" / "pets-1").mkdir(parents=True)
    text = script("bash", helps, recipes=["best", "photos"], takes_run=["predict"], storage=str(folder / "runs"))
    (folder / "script").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("finetune r", ["run"]),
        ("finetune run --data.p", ["--data.pad", "--data.path"]),
        ("finetune run --resume ", ["auto", "must", "never"]),
        ("finetune run --resume n", ["never"]),
        ("finetune run --config ", ["best", "photos"]),
        ("finetune preview --config ", ["best", "photos"]),
        ("finetune run ", []),
        ("finetune predict ", ["pets-1"]),
        ("finetune predict pets-1 -", ["--top"]),
        ("finetune completion b", ["bash"]),
    ],
)
def test_a_shell_completes(completing: Path, typed: str, offered: list[str]) -> None:
    words = typed.split(" ")
    asks = f"source {completing}/script; COMP_WORDS=({' '.join(f'{word!r}' for word in words)}); COMP_CWORD={len(words) - 1}; _finetune"
    done = subprocess.run(
        ["bash", "-c", f'{asks}; printf "%s\\n" "${{COMPREPLY[@]}}"'], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert (sorted(done.stdout.split()), done.stderr) == (sorted(offered), "")
