"""The command line `finetune prune RUN --fraction 0.5` (`python -m trainer.prune`): a finished run's model without a share of its channels,
and the settings that fine-tune it. See the package."""

from dataio.leaving import Leaving
from dataio.terminal import prepare_output

if __name__ == "__main__":
    leaving = Leaving()
    prepare_output()

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from trainer.drive.guarded import guarded
from trainer.prune.choose import MULTIPLE, check_fraction, require_torch_pruning
from trainer.prune.write import SETTINGS_FILE, Written, place_of, write_pruned
from trainer.runs.folder import find_run
from trainer.runs.model_files import described, model_of
from trainer.settings.programs import program
from trainer.settings.say import say, say_json
from trainer.settings.tree import RunConfig
from trainer.settings.units import number, percent, size


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Make a finished run's model narrower: of each group of layers the channels with the smallest weights go. What is left has forgotten
    much: fine-tune it with the settings that are written beside it, `finetune run --config DIR/finetune.toml`. It is then a run as any
    other, for all commands. The number of outputs stays. `finetune compress` does this and measures what it costs."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder (path or URI), or its name under --storage."""
    fraction: float = 0.5
    """Share of each layer's channels that goes. Half of the channels are about a quarter of the parameters and of the arithmetic."""
    multiple: int = MULTIPLE
    """The channels that stay are a multiple of it, which processors compute faster; 1 takes the share exactly."""
    out: str = ""
    """Folder to write to. Empty: `pruned` in the run's folder."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object instead of text."""
    storage: str = RunConfig().storage
    """Folder or URI that holds the runs' folders."""


def main(argv: Sequence[str]) -> int:
    """0 if the model was written; 1 if it cannot be written, 128 + signal if one stopped it. Exits with 2 (SystemExit) for wrong arguments
    or a model that cannot be pruned."""
    arguments = tyro.cli(Arguments, prog=program("prune"), args=argv)
    return guarded(lambda _: _carry_out(arguments), stopped=f"stopped; a pruned model has its {SETTINGS_FILE}, or it is not whole")


def _carry_out(arguments: Arguments) -> int:
    check_fraction(arguments.fraction, arguments.multiple)
    require_torch_pruning()
    run = find_run(arguments.run, arguments.storage)
    described(model_of(run))  # says first what is missing of an unfinished run
    folder = place_of(run, arguments.out)
    written = write_pruned(run, folder, fraction=arguments.fraction, multiple=arguments.multiple)
    if arguments.json:
        say_json(written.to_json())
        return 0
    for line in in_words(written):
        say(line)
    return 0


def in_words(written: Written) -> Iterator[str]:
    """What was pruned, and how to go on."""
    before, after = written.before, written.after
    yield f"{written.folder}: {len(written.to_json()['widths'])} layers are narrower"
    for what, then, now, told in (
        ("parameters", before.parameters, after.parameters, number),
        ("MACs for an image", before.macs, after.macs, number),
        ("weights", written.bytes_before, written.bytes_after, size),
    ):
        yield f"  {what}: {told(then)} to {told(now)} ({percent(now / then, 1)})"
    yield f"it has forgotten much; fine-tune it: {program('run')} --config {written.settings}"


if __name__ == "__main__":
    leaving.by(lambda: main(sys.argv[1:]))
