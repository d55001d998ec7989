"""What README and docs say is there: every `python -m trainer.run ...` is one that the real parser takes, every link leads somewhere, every
file that is named exists, and the example of a task is the one that is tested."""

import itertools
import re
import shlex
from pathlib import Path

import pytest

from tests.deploy.rules import PROJECT
from trainer.settings.cli import parse

PAGES = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").glob("*.md"))]
COMMAND = re.compile(r"python -m trainer\.run(?=\s|$)")
ENDS = {"&", "|", ">", "&&", ";"}
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED_FILE = re.compile(r"`((?:trainer|dataio|cluster|deploy|benchmarks|tests|docs)/[a-z0-9_./-]+)`")


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


def anchors(text: str) -> set[str]:
    """Of each heading what links call it: in small letters, with hyphens, without other signs."""
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_files_that_are_named_are_there(page: Path) -> None:
    assert [name for name in NAMED_FILE.findall(page.read_text()) if not (PROJECT / name).exists()] == []


def test_the_example_of_a_task_is_the_tested_one() -> None:
    page = (PROJECT / "docs" / "extending.md").read_text()
    [example] = re.findall(r"^```python\n(import pyarrow.*?)^```", page, re.MULTILINE | re.DOTALL)
    _, beginning, rest = (PROJECT / "tests" / "trainer" / "toy_task.py").read_text().partition("import pyarrow")
    assert example == (beginning + rest).replace("  # noqa: RUF012", "")
