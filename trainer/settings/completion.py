"""Writes the script with which a shell completes the words of `finetune`. trainer.command calls it with the commands' help texts, so that
the flags offered are those that there are."""

import re
import shlex
from collections.abc import Mapping, Sequence

from trainer.settings.programs import FINETUNE

SHELLS = ("bash", "zsh")
_FLAG = re.compile(r"(?<![\w-])(--[a-z][\w.-]*)(?:[ =]+(?:\[)?\{([^}\n]+)\})?")


def flags_of(text: str) -> dict[str, tuple[str, ...]]:
    """The flags in a help text, sorted, each with the words that may follow it where the text lists them."""
    found: dict[str, tuple[str, ...]] = {}
    for flag, choices in _FLAG.findall(text):
        words = tuple(word for part in choices.split(",") if (word := part.strip()) and word != "None")
        found[flag.rstrip(".-")] = words or found.get(flag, ())
    return dict(sorted(found.items()))


def script(shell: str, helps: Mapping[str, str], *, recipes: Sequence[str], takes_run: Sequence[str], storage: str) -> str:
    """The script for `shell`, one of SHELLS. `helps` is each command's help text. The commands `takes_run` take the name of a run, which
    lies in the folder `storage`. Where nothing fits, the shell offers files."""
    flags = {name: flags_of(text) for name, text in helps.items()}
    values = [
        f"    {shlex.quote(f'{name} {flag}')}) words={shlex.quote(' '.join(choices))} ;;"
        for name, theirs in flags.items()
        for flag, choices in theirs.items()
        if choices
    ]
    of_commands = [f"      {name}) words={shlex.quote(' '.join(theirs))} ;;" for name, theirs in flags.items()]
    lines = [
        f"# Completion of {FINETUNE}. Written by: {FINETUNE} completion {shell}",
        *(["autoload -U +X bashcompinit && bashcompinit"] if shell == "zsh" else []),
        "_finetune() {",
        '  local current="${COMP_WORDS[COMP_CWORD]}" words=""',
        '  case "${COMP_WORDS[1]} ${COMP_WORDS[COMP_CWORD-1]}" in',
        f"    'run --config' | 'preview --config') words={shlex.quote(' '.join(recipes))} ;;",
        *values,
        "  esac",
        f'  if [ "$COMP_CWORD" -eq 1 ]; then words={shlex.quote(" ".join((*helps, "--help", "--version")))}',
        '  elif [ -z "$words" ]; then case "$current" in',
        '    -*) case "${COMP_WORDS[1]}" in',
        *of_commands,
        "    esac ;;",
        f'    *) case "${{COMP_WORDS[1]}}" in completion) words={shlex.quote(" ".join(SHELLS))} ;;',
        f'      {"|".join(takes_run)}) words="$(ls -1 {storage} 2>/dev/null)" ;;',
        "    esac ;;",
        "  esac; fi",
        '  COMPREPLY=($(compgen -W "$words" -- "$current"))',
        "}",
        f"complete -o default -F _finetune {FINETUNE}",
    ]
    return "\n".join(lines)
