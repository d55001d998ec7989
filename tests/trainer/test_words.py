"""Words that not everybody knows are explained where they are first met: in the README, the tables, the report and `--help`."""

import io
import re
from pathlib import Path

import pytest

from tests.trainer.report_runs import story, write_pictured
from trainer.report.__main__ import main as report
from trainer.runs.__main__ import main as runs
from trainer.runs.progress import final_table
from trainer.settings.say import Terminal

README = Path(__file__).resolve().parents[2] / "README.md"
GOODPUT = r"steps that count"


@pytest.mark.parametrize(("word", "words"), [("goodput", GOODPUT), ("stem", "first layers"), ("virtual.rank", "parts a batch is cut into")])
def test_the_readme_explains_a_word_in_its_first_line(word: str, words: str) -> None:
    first = next(line for line in README.read_text().splitlines() if re.search(rf"\b{word}s?\b", line, re.IGNORECASE))
    assert re.search(words, first), first


def test_the_final_table_and_the_list_of_runs_say_what_goodput_is(capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    Terminal(file=out, width=120).print(final_table({"run": "pets", "status": "finished", "goodput": 0.5}))
    assert re.search(rf"Goodput.*50\.0 %.*{GOODPUT}", out.getvalue())
    with pytest.raises(SystemExit):
        runs(["--help"])
    assert re.search(
        r"Goodput is the share of a\s+run's time that went into\s+steps\s+that\s+count", re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    )


def test_the_report_explains_the_settings_that_it_shows(tmp_path: Path) -> None:
    folder = write_pictured(tmp_path / "pets", events=story())
    for name in ("predictions.parquet", "curves.parquet"):  # without images and curves the report is quick
        (folder / name).unlink()
    (folder / "config.toml").write_text('[model]\nstem = "auto"\n[train]\nvirtual_ranks = 2\nema = 0.9\n')
    assert report([str(folder)]) == 0
    page = (folder / "report.html").read_text()
    for words in ("the model's first layers", "the equal parts into which each batch is cut", "an average of the weights", "Goodput"):
        assert words in page.replace("&#x27;", "'").replace("&#39;", "'"), words
