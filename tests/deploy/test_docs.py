"""Every `python -m trainer.run ...` in README and docs is one that the real parser takes: a flag that was renamed fails here."""

import itertools
import re
import shlex

import pytest

from tests.deploy.rules import PROJECT
from trainer.settings.cli import parse

PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
COMMAND = re.compile(r"python -m trainer\.run(?=\s|$)")
ENDS = {"&", "|", ">", "&&", ";"}


def commands(text: str) -> list[list[str]]:
    """The arguments of each command line in a block of code; words in capitals that stand for something are kept as they are."""
    found = []
    for block in re.findall(r"^```(?:console|bash|sh)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if match := COMMAND.search(line):
                words = shlex.split(line[match.end() :], comments=True)
                found.append(list(itertools.takewhile(lambda word: word not in ENDS, words)))
    return found


EVERY = [(page.name, words) for page in PAGES for words in commands(page.read_text())]


def test_there_are_such_commands() -> None:
    assert {"README.md", "cluster.md", "kubernetes.md", "vms.md", "storage.md"} <= {page for page, _ in EVERY}


@pytest.mark.parametrize(("page", "words"), EVERY, ids=[f"{page}: {' '.join(words)[:60]}" for page, words in EVERY])
def test_the_parser_takes_it(page: str, words: list[str]) -> None:
    assert parse(words).action in ("run", "dry_run", "print_config")


def test_a_flag_that_is_none_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    [words] = commands("```console\n$ python -m trainer.run --config quickstart \\\n    --cluster.metric-host 0.0.0.0 &\n```\n")
    with pytest.raises(SystemExit):
        parse(words)
    assert "metric-host" in capsys.readouterr().err
