"""The command line `finetune compress RUN|DIR --prune 0.5 --int8` (`python -m trainer.compress`): distil, prune, fine-tune, quantise, each
stage if it is asked for, and one table of what every stage came to.

All lies in a folder of its own in --storage. Killed anywhere and given again, the command goes on there: runs go on from their checkpoints
(trainer.series), stages that were asked are not asked again, and weights and accuracies end the same to the bit. Times do not: they are
measured once all stages are there, in turns.
"""

from dataio.leaving import Leaving
from dataio.terminal import prepare_output

if __name__ == "__main__":
    leaving = Leaving()
    prepare_output(survive=True)

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.compress.measure import Limit, answered, answered_int8, timed
from trainer.compress.page import drawn
from trainer.compress.plan import DISTILLED, INT8, INT8_AWARE, PRUNED, WHOLE, Job, aware, distilled, job_of, tuned, whole
from trainer.compress.results import Answered, aligned, table, to_json
from trainer.prune.write import write_pruned
from trainer.runs.folder import RunFolder
from trainer.series.command import guarded_series, tell
from trainer.series.train import Member, train
from trainer.settings.cli import DIR_RECIPE
from trainer.settings.programs import program
from trainer.settings.say import Terminal, complain, say, say_json
from trainer.tasks.info import Measure

JSON_FILE, PAGE_FILE = "compress.json", "compress.html"
CHANNELS = "channels"
"""The folder of the pruned model before it is fine-tuned."""


def main(argv: Sequence[str]) -> int:
    """0 if all stages are there; 1 if one failed or the last int8 model lost too much, 128 + signal if one stopped it. Exits with 2
    (SystemExit) for wrong arguments, or for what a run would refuse."""
    console = Terminal(stderr=True) if "--json" in argv else Terminal()
    return guarded_series(lambda: _carry_out(argv, console))


def _carry_out(argv: Sequence[str], console: Terminal) -> int:
    job = job_of(argv, console)
    if job.invocation.takes_dir_recipe:
        tell(console, f"settings of the recipe {DIR_RECIPE}; flags change them")
    rows, measure = staged(job, console)
    tell(console, f"timing {len(rows)} models, {job.line.calls} calls each of 1 and 32 images")
    shown(job, rows, measure)
    return 1 if rows[-1].refused else 0


def staged(job: Job, console: Terminal) -> tuple[list[Answered], Measure]:
    """Every stage that is asked for, made and asked about the test split. RunFailed, or RunStopped."""
    first = job.run or _trained(job, whole(job), console)
    row, measure = answered(job.storage, WHOLE, first)
    rows, last = [row], first
    if job.line.distil:
        last = _trained(job, distilled(job, first), console)
        rows.append(answered(job.storage, DISTILLED, last)[0])
    if job.line.prune:
        folder = Path(job.storage.at(CHANNELS))
        written = write_pruned(last, folder, fraction=job.line.prune, multiple=job.line.multiple)
        last = _trained(job, tuned(job, written.config, first), console)
        rows.append(answered(job.storage, PRUNED, last)[0])
    if job.line.int8:
        rows += _in_int8(job, rows[-1], last, console)
    return rows, measure


def _in_int8(job: Job, exact: Answered, last: RunFolder, console: Terminal) -> list[Answered]:
    """The rows of the model in int8, and of one that was fine-tuned for it. `exact`: the row of the same model in float32."""
    tell(console, f"{INT8}: of {exact.stage}")
    limit = Limit(max_drop=job.line.max_drop, than=exact.value)
    rows = [answered_int8(job.storage, INT8, last, limit)[0]]
    if job.line.aware == "always" or (job.line.aware == "auto" and rows[0].refused):
        if rows[0].refused:
            tell(console, f"{INT8}: {rows[0].refused}; so the model is fine-tuned with its rounding")
        last = _trained(job, aware(job, last), console)
        rows.append(answered_int8(job.storage, INT8_AWARE, last, limit)[0])
    return rows


def shown(job: Job, rows: Sequence[Answered], measure: Measure) -> None:
    """Time the stages, write the files and say the result."""
    times = timed(job.storage, rows, threads=job.line.threads, calls=job.line.calls)
    result = to_json(rows, times, measure, threads=job.line.threads)
    job.storage.write_atomic(PAGE_FILE, drawn(rows, times, measure).encode())
    job.storage.write_atomic(JSON_FILE, (json.dumps(result, indent=1) + "\n").encode())
    if job.line.json:
        say_json({**result, "folder": job.storage.uri})
    else:
        for line in aligned(*table(rows, times, measure)):
            say(line)
        say(f"the page: {job.storage.at(PAGE_FILE)}")
    for row in rows:
        if row.refused:
            complain(f"{row.stage}: refused: {row.refused}")


def _trained(job: Job, member: Member, console: Terminal) -> RunFolder:
    """The finished run."""

    def on_run(member: Member, number: int) -> None:
        folder = job.storage.at(member.name)
        tell(console, f"{member.name}: {member.config.model.name} ({program('watch')} {folder})")

    for _ in train([member], job.storage, on_run):
        pass
    return RunFolder(storage=job.storage, name=member.name)


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    leaving.by(lambda: main(sys.argv[1:]))
