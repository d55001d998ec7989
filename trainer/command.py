"""`finetune`: one command with a sub-command for each thing that a user does. pyproject.toml installs it; `python -m trainer.command` is
the same. Each sub-command is the command line of a module, which also works by itself (`python -m trainer.run`).

Nothing but the named sub-command is imported, and torch not at all by `--version` and `--help`.
"""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from dataio.leaving import Leaving, hear_interrupts
from dataio.terminal import prepare_output
from trainer.settings.programs import FINETUNE
from trainer.settings.words import did_you_mean

DISTRIBUTION = "ray-finetune"
Main = Callable[[list[str]], int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A sub-command."""

    name: str
    takes: str
    """Its words, as in a line of help."""
    about: str
    load: Callable[[], Main]
    """Imports its module; gives its main function."""
    outlives_output: bool = False
    """Its work does not depend on who reads along (dataio.terminal)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sub-command that the first word names. Returns its exit status; 2 for a wrong command line."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # imports take seconds: Ctrl-C ends them without a traceback
    words = list(sys.argv[1:] if argv is None else argv)
    command = _COMMANDS.get(words[0]) if words else None
    prepare_output(survive=command is not None and command.outlives_output)
    if command is not None:
        _import_from_here()
        command_main = command.load()
        hear_interrupts()
        return command_main(words[1:])
    from trainer.settings.say import complain, say

    match words:
        case [] | ["--help" | "-h" | "help"]:
            say(usage())
        case ["--version" | "-V"]:
            say(f"{DISTRIBUTION} {installed_version()}")
        case _:
            complain(f"error: {_unknown(words[0])}")
            return 2
    return 0


def entry() -> NoReturn:
    """`main` as a process: what pyproject.toml installs."""
    Leaving().by(main)


def usage() -> str:
    """The text of `--help`."""
    left = [f"  {FINETUNE} {command.name} {command.takes}" for command in _COMMANDS.values()]
    width = max(map(len, left)) + 2
    lines = [f"{words:<{width}}{command.about}" for words, command in zip(left, _COMMANDS.values(), strict=True)]
    return "\n".join(
        [
            "Fine-tune a pretrained image model on your images. It survives what kills other runs: the same command goes on.",
            "",
            *lines,
            "",
            f"{FINETUNE} COMMAND --help explains a command; {FINETUNE} --version. RUN is a run's name, or its folder.",
        ]
    )


def installed_version() -> str:
    """The version of the installed distribution; of a checkout that nobody has installed, `unknown`."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "unknown (a checkout that is not installed)"


def _unknown(word: str) -> str:
    known = f"commands are {', '.join(_COMMANDS)}"
    if word.startswith("-"):
        return f"{word}: settings follow a command, such as {FINETUNE} run DIR --train.epochs 3; {known}"
    if os.path.exists(word):
        return f"{word} is no command; did you mean {FINETUNE} run {word}? {known}"
    return f"{word} is no command;{did_you_mean(word, tuple(_COMMANDS))} {known}"


def _import_from_here() -> None:
    """Let modules of the user's own (`--task.name my_task:MyTask`) be found in the working directory, as with `python -m`. It comes last:
    a file that lies there by chance is not taken for a library."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)


def _run() -> Main:
    from trainer.run import main

    return main


def _find_rate() -> Main:
    from trainer.find_rate import main

    return main


def _preview() -> Main:
    from trainer.preview import main

    return main


def _curve() -> Main:
    from trainer.curve.__main__ import main

    return main


def _search() -> Main:
    from trainer.search.__main__ import main

    return main


def _audit() -> Main:
    from trainer.audit.__main__ import main

    return main


def _predict() -> Main:
    from trainer.predict import main

    return main


def _evaluate() -> Main:
    from trainer.evaluate import main

    return main


def _watch() -> Main:
    from trainer.runs.__main__ import main

    return lambda argv: main(["watch", *argv])


def _track() -> Main:
    from trainer.track.__main__ import main

    return main


def _report() -> Main:
    from trainer.report.__main__ import main

    return main


def _compress() -> Main:
    from trainer.compress.__main__ import main

    return main


def _prune() -> Main:
    from trainer.prune.__main__ import main

    return main


def _export() -> Main:
    from trainer.formats.__main__ import main

    return main


def _push() -> Main:
    from trainer.push import main

    return main


def _convert() -> Main:
    from dataio.convert import main

    return partial(main, prog=f"{FINETUNE} convert")


def _runs() -> Main:
    from trainer.runs.__main__ import main

    return main


def _completion() -> Main:
    return _complete


def _complete(argv: list[str]) -> int:
    from trainer.settings.completion import SHELLS, script
    from trainer.settings.say import complain, say
    from trainer.settings.toml import recipe_names
    from trainer.settings.tree import RunConfig

    if len(argv) != 1 or argv[0] not in SHELLS:
        complain(f"error: {' '.join(argv) or 'no shell'}; it must be one of {', '.join(SHELLS)}, such as {FINETUNE} completion bash")
        return 2
    takes_run = [command.name for command in _COMMANDS.values() if "RUN" in command.takes]
    say(script(argv[0], _helps(), recipes=recipe_names(), takes_run=takes_run, storage=RunConfig().storage))
    return 0


def _helps() -> dict[str, str]:
    """Each command's own `--help`. It takes some seconds, as all of them are imported."""
    os.environ["COLUMNS"] = "400"  # a flag and its choices stand on one line
    texts = {}
    for command in _COMMANDS.values():
        with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
            if command.load is not _completion:
                command.load()(["--help"])
        texts[command.name] = text.getvalue()
    return texts


_COMMANDS = {
    command.name: command
    for command in (
        Command(name="run", takes="DIR [--SETTING VALUE ...]", about="fine-tune on a folder of images", load=_run, outlives_output=True),
        Command(name="preview", takes="DIR [--SETTING VALUE ...]", about="show images as the model will get them", load=_preview),
        Command(name="find-rate", takes="DIR [--SETTING VALUE ...]", about="find a learning rate for such a run", load=_find_rate),
        Command(
            name="search",
            takes="DIR [--SETTING VALUE ...]",
            about="try other settings, and say which are better",
            load=_search,
            outlives_output=True,
        ),
        Command(
            name="curve", takes="DIR [--SETTING VALUE ...]", about="say what more labels would bring", load=_curve, outlives_output=True
        ),
        Command(name="audit", takes="DIR|RUN [--folds N]", about="find leaks, copies and wrong labels in the data", load=_audit),
        Command(name="predict", takes="RUN IMAGE...", about="ask a finished run's model about images", load=_predict),
        Command(name="evaluate", takes="RUN", about="measure it again, or on other data", load=_evaluate),
        Command(name="watch", takes="[RUN]", about="follow a run", load=_watch),
        Command(
            name="track",
            takes="RUN --to TRACKER",
            about="copy a run into TensorBoard, MLflow or W&B",
            load=_track,
            outlives_output=True,
        ),
        Command(name="report", takes="RUN", about="write a run's page; --compare RUN RUN", load=_report),
        Command(
            name="compress",
            takes="RUN|DIR [--prune F] [--int8] ...",
            about="make it small in stages, and say what each costs",
            load=_compress,
            outlives_output=True,
        ),
        Command(name="prune", takes="RUN [--fraction F]", about="make its model narrower, to be fine-tuned again", load=_prune),
        Command(name="export", takes="RUN [--to FORMAT]", about="write its model as ONNX and others, and compare", load=_export),
        Command(name="push", takes="RUN OWNER/NAME", about="upload its model to a Hugging Face hub", load=_push),
        Command(name="runs", takes="[PATTERN]", about="list all runs", load=_runs),
        Command(name="convert", takes="SOURCE DEST", about="convert images once, ahead of runs", load=_convert, outlives_output=True),
        Command(name="completion", takes="bash|zsh", about="print a script that completes these words", load=_completion),
    )
}

if __name__ == "__main__":
    entry()
