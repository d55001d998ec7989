"""How the user calls a command of this program: `finetune predict` or `python -m trainer.predict`. Called by all command lines, for their
help, and by whoever prints a command to be given next.

Both ways do the same. Whoever came by one is shown that one: outside the checkout the modules may belong to another Python.
"""

import os
import sys

FINETUNE = "finetune"
_MODULES = {"convert": "dataio.convert", "export": "trainer.formats", "find-rate": "trainer.find_rate", "watch": "trainer.runs watch"}
_STARTED_AS = (FINETUNE, "command.py")  # the installed script, and `python -m trainer.command`


def program(command: str, started_as: str | None = None) -> str:
    """The way to call `command`, one of trainer.command's. `started_as` is the file that Python runs; None asks Python."""
    name = os.path.basename((sys.argv[0] if sys.argv else "") if started_as is None else started_as)
    return f"{FINETUNE} {command}" if name in _STARTED_AS else f"python -m {_MODULES.get(command, f'trainer.{command}')}"
