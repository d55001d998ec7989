"""The command line `python -m trainer.run`, alone or under `ray job submit --`: arguments, console, exit status, signals.

The run itself is trainer/drive/start.py's job, a dry run trainer/drive/dry_run.py's. This is the only file that reads the environment for
the driver.
"""

import signal

if __name__ == "__main__":  # the imports below take seconds: Ctrl-C ends them without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import os
import shlex
import sys
from types import FrameType

from cluster.machine import raise_open_files, usable_cpus
from cluster.process import process_stat
from trainer.drive.identity import run_prefix
from trainer.drive.stages import Asked, Environment
from trainer.drive.start import run
from trainer.settings.cli import fail, parse
from trainer.settings.say import Terminal, complain, say
from trainer.settings.toml import to_toml


def main(argv: list[str] | None = None) -> int:
    """Run what the command line asks for. Returns the exit status: 0 done, 1 failed, 2 wrong setting, 128 + signal if stopped by one."""
    argv = sys.argv[1:] if argv is None else argv
    signal.signal(signal.SIGINT, signal.default_int_handler)
    invocation = parse(argv)
    if invocation.action == "print_config":
        say(to_toml(invocation.config).rstrip("\n"))
        return 0
    signal.signal(signal.SIGTERM, _raise_exit)
    # People and programs read a job's log: no wrapping at 80 columns there.
    console = Terminal() if sys.stdout.isatty() else Terminal(width=160, highlight=False)
    try:
        if invocation.action == "dry_run":
            from trainer.drive.dry_run import dry_run  # imports torch

            return dry_run(invocation.config, invocation.recipes, console)
        raise_open_files()
        asked = Asked(
            config=invocation.config,
            prefix=run_prefix(invocation.config, invocation.recipes),
            command=shlex.join(["python", "-m", "trainer.run", *argv]),
            environment=environment(),
        )
        return run(asked, console)
    except ValueError as error:
        fail(str(error))
    except OSError as error:  # a full disk or a deleted folder is not a bug, and a traceback would not help
        complain(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        complain("interrupted before training began; the same command starts again")
        return 128 + signal.SIGINT


def _raise_exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


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
    sys.exit(main())
