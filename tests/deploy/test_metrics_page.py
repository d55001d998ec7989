"""docs/metrics.md says what the table says."""

from pathlib import Path

import pytest

from cluster import metrics
from cluster.metrics import METRICS, most_series
from deploy import metrics_page


def test_the_page_in_the_repository_is_the_one_that_the_table_gives(capsys: pytest.CaptureFixture[str]) -> None:
    assert metrics_page.main(["--check"]) == 0, capsys.readouterr().err


def test_a_page_that_has_drifted_or_is_missing_is_told_and_written_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.md"
    assert metrics_page.main(["--check"], path) == 1
    assert "run python -m deploy.metrics_page" in capsys.readouterr().err
    assert not path.exists()
    assert metrics_page.main([], path) == 0
    assert metrics_page.main(["--check"], path) == 0
    path.write_text(path.read_text().replace("Mean training loss", "Median training loss"))
    assert metrics_page.main(["--check"], path) == 1


def test_every_metric_has_its_row_and_the_number_of_series_is_the_tables() -> None:
    text = metrics_page.page()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [m.full_name for owner in ("rank", "coordinator") for m in METRICS if m.owner == owner]
    assert f"    {most_series('rank')} N + {most_series('coordinator')}\n" in text
    assert f"{1000 * most_series('rank') + most_series('coordinator'):,} with 1,000" in text


def test_a_metric_that_is_added_is_on_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    new = metrics.Metric(name="tea_bytes", kind="gauge", help="Tea left.", label="cup", values=("blue", metrics.OTHER))
    monkeypatch.setattr(metrics_page, "METRICS", (*METRICS, new))
    text = metrics_page.page()
    assert "| `finetune_tea_bytes` | gauge | bytes | `cup` | Tea left. |" in text
    assert "- `finetune_tea_bytes`, `cup`: blue, other" in text
