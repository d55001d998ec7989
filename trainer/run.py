"""The command line `python -m trainer.run`, alone or under `ray job submit --`: arguments, console, exit status, signals. `finetune run`
(trainer/command.py) calls the same `main`.

The run itself is trainer/drive/start.py's job, a dry run trainer/drive/dry_run.py's. This is the only file that reads the environment for
the driver.
"""

from dataio.leaving import Leaving
from dataio.terminal import prepare_output

if __name__ == "__main__":
    leaving = Leaving()
    prepare_output(survive=True)

import os
import shlex
import signal
import sys
from dataclasses import replace

from cluster.machine import usable_cpus
from cluster.process import process_stat
from trainer.drive.identity import run_prefix
from trainer.drive.signals import Phase, Signals, farewell, tell
from trainer.drive.stages import Asked, Environment
from trainer.drive.start import run
from trainer.settings.cli import Invocation, fail, parse
from trainer.settings.programs import program
from trainer.settings.say import Terminal, complain, say
from trainer.settings.texts import with_text_model
from trainer.settings.toml import to_toml


def main(argv: list[str] | None = None) -> int:
    """Run what the command line asks for. Returns the exit status: 0 done, 1 failed, 2 wrong setting, 128 + signal if stopped by one."""
    argv = sys.argv[1:] if argv is None else argv
    signals = Signals()
    with signals.heard():
        try:
            invocation = parse(argv)
            if invocation.action == "print_config":
                say(to_toml(invocation.config).rstrip("\n"))
                return 0
            return _carry_out(invocation, argv, signals)
        except ValueError as error:
            fail(str(error))
        except OSError as error:  # a full disk or a deleted folder is not a bug, and a traceback would not help
            complain(f"error: {error}")
            return 1
        except KeyboardInterrupt:
            tell(farewell(signals.phase, signals.name or "SIGINT"))
            return 128 + (signals.number or signal.SIGINT)


def _carry_out(invocation: Invocation, argv: list[str], signals: Signals) -> int:
    invocation = replace(invocation, config=with_text_model(invocation.config))
    # People and programs read a job's log: no wrapping at 80 columns there.
    console = Terminal() if sys.stdout.isatty() else Terminal(width=160, highlight=False)
    if invocation.takes_dir_recipe:
        console.print(f"settings of the recipe {invocation.recipes[0]}; --print-config shows them, flags change them", soft_wrap=True)
    if invocation.action == "dry_run":
        from trainer.drive.dry_run import dry_run  # imports torch

        signals.enter(Phase.DRY_RUN)
        here = environment()
        return dry_run(
            invocation.config,
            invocation.recipes,
            console,
            from_recipes=invocation.from_recipes,
            given=invocation.given,
            in_job=here.in_job,
            ray_address=here.ray_address,
        )
    asked = Asked(
        config=invocation.config,
        prefix=run_prefix(invocation.config, invocation.recipes),
        command=shlex.join([*program("run").split(), *argv]),
        environment=environment(),
        from_recipes=invocation.from_recipes,
        recipes=invocation.recipes,
        given=invocation.given,
    )
    return run(asked, console, signals)


def environment() -> Environment:
    """Read the environment variables and the facts about this process that the run needs."""
    return Environment(
        ray_address=os.environ.get("RAY_ADDRESS", ""),
        in_job="RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ,
        is_verbose=bool(os.environ.get("FINETUNE_VERBOSE")),
        cpus=usable_cpus(),
        process_started=process_started(),
    )


def process_started() -> float:
    """Unix time at which this process began. A run's seconds include its imports."""
    stat = process_stat("self")
    assert stat is not None
    return stat.started()


if __name__ == "__main__":
    leaving.by(main)
