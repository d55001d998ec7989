"""Functions of the user's own that a setting names as `module:function`: found, called, and their mistakes told by file and line. Called
for a model (trainer.models.architecture), a loss and an augmentation (trainer.learn.own).
"""

import importlib
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dataio.config import module_and_function


class OwnCodeError(ValueError):
    """A function of the user's own cannot be found, fails, or returns what it should not. The message says where."""

    failure_kind = "user"


def own_function(setting: str, name: str) -> Callable[..., Any]:
    """The function `name` (`module:function`), which the setting names. OwnCodeError if there is none."""
    module_name, function = module_and_function(name)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise OwnCodeError(
            f"{setting}={name}: {module_name} cannot be imported: {_told(error)}; a module is named as in an import statement, from the "
            "folder in which the program is started or from what is installed"
        ) from error
    found = getattr(module, function, None)
    if not callable(found):
        there = [key for key, value in vars(module).items() if callable(value) and getattr(value, "__module__", "") == module.__name__]
        raise OwnCodeError(f"{setting}={name}: {module_name} has no function {function}; it has {', '.join(there) or 'none'}")
    return found  # type: ignore[no-any-return]


def called(setting: str, name: str, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What `function` returns. OwnCodeError with the place in the user's code if it raises anything."""
    try:
        return function(*arguments, **named)
    except Exception as error:
        raise OwnCodeError(f"{setting}={name} failed: {_told(error)}") from error


def _told(error: Exception) -> str:
    """The error, and the innermost line of a file that is not a library's or ours."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_foreign(frame.filename)]
    where = f" ({frames[-1].filename}, line {frames[-1].lineno}: {frames[-1].line})" if frames else ""
    if isinstance(error, SyntaxError):
        where = f" ({error.filename}, line {error.lineno})"
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


def _is_foreign(file: str) -> bool:
    return file.startswith("<") or "site-packages" in file or file == __file__ or Path(file).is_relative_to(_LIBRARY)


_LIBRARY = Path(traceback.__file__).parent
