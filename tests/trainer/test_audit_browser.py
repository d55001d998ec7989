"""The page of an audit as a person meets it: in a real browser, wide and narrow, light and dark, by keyboard."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

from dataio.parquet import open_dataset  # noqa: E402
from deploy.screenshot import BROWSERS, chromium, find_browser, opened  # noqa: E402
from tests.trainer.planted import SAMPLE  # noqa: E402
from tests.trainer.test_report_browser import CONTRAST, complaints  # noqa: E402
from trainer.audit.__main__ import write  # noqa: E402
from trainer.audit.findings import Copies, Doubt, Findings, Oddity, Sample  # noqa: E402
from trainer.audit.looks import Overlap  # noqa: E402

pytestmark = pytest.mark.skipif(find_browser() is None, reason=f"needs Chromium: none of {', '.join(BROWSERS)} is installed")
WIDE, PHONE = {"width": 1100, "height": 900}, {"width": 360, "height": 740}
DOUBTS = 40


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Findings of each kind about real images, among them a group of many copies and a key that is a long word."""
    out = tmp_path_factory.mktemp("audit")
    dataset = open_dataset(SAMPLE)
    classes = dataset.manifest.classes

    def image(split: str, row: int) -> Sample:
        key = f"{'a-very-long-name' * 12}.png" if row == 3 else dataset.split(split).keys([row])[0]
        return Sample(split=split, row=row, key=key, label=classes[int(dataset.split(split).labels()[row])])

    many = tuple(replace(image("train", row), label="Bag") for row in range(20, 30))
    findings = Findings(
        data=str(SAMPLE),
        fingerprint=dataset.manifest.fingerprint,
        counts={"train": 2000, "test": 500},
        unit="images",
        classes=classes,
        copies=(
            Copies(samples=(image("train", 3), image("test", 4)), how=("near", "near"), ratio=0.3),
            Copies(samples=(image("train", 5), image("train", 6)), how=("pixels", "pixels"), ratio=0.0),
            Copies(samples=many, how=("mirrored",) * len(many), ratio=0.4),
        ),
        doubts=tuple(
            Doubt(sample=image("train", 100 + row), answer=classes[row % 10], of_answer=0.9, of_label=0.01) for row in range(DOUBTS)
        ),
        overlaps=(Overlap(first=0, second=6, first_as_second=30, second_as_first=41, samples=400),),
        oddities=(
            Oddity(sample=image("test", 7), what="dark, blurred", far=7.3),
            Oddity(sample=image("test", 8), what="of one colour", far=float("inf")),
        ),
        left_out=("Nothing else.",),
        folds=5,
        right=0.87,
    )
    write(findings, dataset, out)
    return out / "audit.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_the_browser_has_no_complaint_the_page_fits_and_can_be_read(browser: Any, audit: Path, size: dict[str, int], scheme: Any) -> None:
    with opened(browser, audit, scheme=scheme, **size) as page:
        said = complaints(page)
        page.reload()
        assert said == []
        assert page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]") == [size["width"]] * 2
        beyond = page.evaluate(
            "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1"
            " && !e.closest('.scroll')).map(e => e.outerHTML.slice(0, 100))"
        )
        assert beyond == []
        assert page.evaluate(CONTRAST) == []


def test_each_finding_has_its_images_with_a_name_and_leaks_come_first(browser: Any, audit: Path) -> None:
    with opened(browser, audit, scheme="light", **WIDE) as page:
        titles = page.locator("h2").all_inner_texts()
        assert titles == [
            "What to do",
            "Leaks (1)",
            "Copies with different labels (1)",
            f"Labels that are doubted ({DOUBTS})",
            "Classes that overlap",
            "Copies (1)",
            "Odd images (2)",
            "What was left out",
        ]
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        page.evaluate("document.querySelectorAll('img').forEach(each => each.scrollIntoView())")
        widths = page.locator("img").evaluate_all("images => images.map(i => i.complete && i.naturalWidth)")
        assert widths == [28] * (2 + 2 + DOUBTS + 6 + 2), "of a group of many copies, six"
        assert page.locator("img:not([alt])").count() == 0
        leak = page.locator("section", has=page.get_by_role("heading", name="Leaks"))
        assert "train: " in leak.inner_text()
        assert "test: " in leak.inner_text()
        copies = page.locator("section", has=page.get_by_role("heading", name="Copies (1)"))
        assert "and 4 more" in copies.inner_text()


def test_what_is_folded_away_opens_by_keyboard(browser: Any, audit: Path) -> None:
    with opened(browser, audit, scheme="light", **WIDE) as page:
        fold = page.locator("summary", has_text=f"{DOUBTS - 24} more")
        inside = page.locator("details figure").first
        assert not inside.is_visible()
        fold.focus()
        page.keyboard.press("Enter")
        assert inside.is_visible()
        page.keyboard.press("Enter")
        assert not inside.is_visible()
