"""The report as a person meets it: in a real browser, wide and narrow, light and dark, with the keyboard, and on paper."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

from deploy.screenshot import BROWSERS, MOST_BYTES, chromium, find_browser, opened  # noqa: E402
from tests.trainer.report_runs import maps_of_all, predictions_of, write_multilabel, write_multitask, write_pictured  # noqa: E402
from tests.trainer.test_calibration import drawn  # noqa: E402
from trainer.rank.calibrating import calibration_record  # noqa: E402
from trainer.report.compare import render_comparison  # noqa: E402
from trainer.report.files import read_files  # noqa: E402
from trainer.report.sections import write_report  # noqa: E402
from trainer.runs.folder import find_run  # noqa: E402
from trainer.tasks.explanations import EXPLANATIONS_FILE  # noqa: E402

pytestmark = pytest.mark.skipif(find_browser() is None, reason=f"needs Chromium: none of {', '.join(BROWSERS)} is installed")
PROJECT = Path(__file__).resolve().parents[2]
WIDE, PHONE = {"width": 1100, "height": 900}, {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_pictured(tmp_path_factory.mktemp("runs") / "pictured")
    return Path(write_report(str(folder)))


@pytest.fixture(scope="module")
def why(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With maps of where answers come from, and a reliability plot."""
    confidence = calibration_record({"label": drawn(500, hotter=2.2)})
    folder = write_pictured(tmp_path_factory.mktemp("why") / "run", calibration=confidence)
    (folder / EXPLANATIONS_FILE).write_bytes(maps_of_all().to_parquet())
    return Path(write_report(str(folder)))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    storage = tmp_path_factory.mktemp("two")
    runs = [write_pictured(storage / name, predictions_of(seed=seed), weights_sha256=name) for seed, name in enumerate("ab")]
    file = storage / "comparison.html"
    file.write_text(render_comparison(*(read_files(find_run(str(run)), pictures=False) for run in runs)))
    return file


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_report(str(write_multilabel(tmp_path_factory.mktemp("labels") / "run"))))


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_report(str(write_multitask(tmp_path_factory.mktemp("heads") / "run"))))


def complaints(page: Any) -> list[str]:
    """Fills up with whatever the browser has to say of the page, from now on."""
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if not request.url.startswith(("file:", "data:")) else None)
    return said


@pytest.mark.parametrize("which", ["report", "comparison", "labels", "heads", "why"])
@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_the_browser_has_no_complaint_and_the_page_fits(browser: Any, which: str, size: dict[str, int], request: Any) -> None:
    file = request.getfixturevalue(which)
    with opened(browser, file, scheme="light", **size) as page:
        said = complaints(page)
        page.reload()
        assert said == []
        widths = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert widths[0] == widths[1] == size["width"]
        # What is wider than the page scrolls inside itself.
        beyond = page.evaluate(
            "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1"
            " && !e.closest('.scroll') && !e.closest('[popover]') && !e.closest('svg')).map(e => e.outerHTML.slice(0, 100))"
        )
        assert beyond == []


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_a_map_stands_beside_its_image_at_the_same_size_and_confidence_is_drawn(browser: Any, why: Path, size: dict[str, int]) -> None:
    with opened(browser, why, scheme="dark", **size) as page:
        pairs = page.locator(".worst .pair").all()
        assert len(pairs) > 10
        for pair in pairs[:3]:
            images = pair.locator("img")
            assert images.evaluate_all("images => images.map(i => i.complete && i.naturalWidth)") == [28, 96]
            left, right = (images.nth(place).bounding_box() for place in (0, 1))
            assert (left["y"], left["width"], left["height"]) == (right["y"], right["width"], right["height"])
            assert left["x"] + left["width"] < right["x"]
        confidence = page.locator("section", has=page.get_by_role("heading", name="Confidence"))
        drawn_width = confidence.locator("svg").bounding_box()["width"]
        assert size["width"] / 3 < drawn_width < size["width"]
        assert "test, 500 images, cross-fitted" in confidence.inner_text()


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_each_cell_opens_its_images_and_they_are_there(browser: Any, report: Path, size: dict[str, int]) -> None:
    confusion = json.loads((report.parent / "summary.json").read_text())["confusion"]
    with opened(browser, report, scheme="light", **size) as page:
        cells = page.locator("table.confusion td button").all()
        assert len(cells) == sum(count > 0 for row in confusion for count in row)
        for cell in cells[:: 9 if size is PHONE else 5]:
            popover = page.locator(f"#{cell.get_attribute('popovertarget')}")
            assert not popover.is_visible()
            cell.click()
            assert popover.is_visible()
            box = popover.bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= size["width"]
            _, label, answer = popover.get_attribute("id").split("-")
            limit = 6 if label == answer else 12
            loaded = popover.locator("img").evaluate_all("images => images.map(i => i.complete && i.naturalWidth)")
            assert loaded == [28] * min(limit, confusion[int(label)][int(answer)])
            popover.get_by_role("button", name="Close").click()
            assert not popover.is_visible()


def test_a_cell_opens_and_closes_by_keyboard(browser: Any, report: Path) -> None:
    with opened(browser, report, scheme="light", **WIDE) as page:
        cell = page.locator("table.confusion td button").first
        cell.focus()
        page.keyboard.press("Enter")
        popover = page.locator(f"#{cell.get_attribute('popovertarget')}")
        assert popover.is_visible()
        assert popover.get_attribute("role") == "dialog"
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Close"
        page.keyboard.press("Escape")
        assert not popover.is_visible()
        assert cell.evaluate("button => button === document.activeElement")


CONTRAST = """
() => {
  const linear = x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4;
  const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(x => linear(x / 255));
    return .2126 * r + .7152 * g + .0722 * b; };
  const seen = new Map();
  for (const e of document.querySelectorAll('main *')) {
    if (e.closest('svg') || ![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    let under = e; while (under && getComputedStyle(under).backgroundColor === 'rgba(0, 0, 0, 0)') under = under.parentElement;
    const back = getComputedStyle(under || document.body).backgroundColor;
    if (back.startsWith('rgba')) continue;
    const [a, b] = [light(getComputedStyle(e).color), light(back)].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) seen.set(e.outerHTML.slice(0, 80), ratio);
  }
  return [...seen];
}
"""


def test_light_and_dark_are_two_pages_and_both_can_be_read(browser: Any, report: Path, comparison: Path, labels: Path, heads: Path) -> None:
    for file in (report, comparison, labels, heads):
        papers = []
        for scheme in ("light", "dark"):
            with opened(browser, file, scheme=scheme, **WIDE) as page:
                papers.append(page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"))
                assert page.evaluate(CONTRAST) == []
        assert papers == [["rgb(255, 255, 255)", "rgb(31, 35, 40)"], ["rgb(13, 17, 23)", "rgb(230, 237, 243)"]]


def test_everything_that_can_be_pressed_or_seen_has_a_name(browser: Any, report: Path) -> None:
    with opened(browser, report, scheme="light", **WIDE) as page:
        nameless = "e => !(e.getAttribute('aria-label') || e.getAttribute('alt') || e.textContent.trim())"
        assert page.evaluate(f"[...document.querySelectorAll('img, button, a, summary, [role=img]')].filter({nameless}).length") == 0
        heads = page.locator("table.confusion th[scope=row]").all_inner_texts()
        cells = page.locator("table.confusion td button").all()
        for cell in cells[::11]:
            _, label, answer = str(cell.get_attribute("popovertarget")).split("-")
            what = f"{heads[int(label)]}, recognised" if label == answer else f"{heads[int(label)]} taken for {heads[int(answer)]}"
            assert cell.get_attribute("aria-label") == f"{cell.inner_text()}: show {what}"
        assert page.locator("html").get_attribute("lang") == "en"
        assert page.locator("h1").count() == 1


def test_it_prints_on_white_with_its_settings_and_without_what_is_closed(browser: Any, report: Path) -> None:
    with opened(browser, report, scheme="dark", **WIDE) as page:
        page.locator("table.confusion td button").first.click()  # left open
        page.emulate_media(media="print", color_scheme="dark")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.locator("[popover]:visible").count() == 0
        assert page.get_by_text('path = "').is_visible()  # the settings, folded away on a screen
        pdf = page.pdf(format="A4", print_background=True)
        page.emulate_media(media="screen")
        assert not page.get_by_text('path = "').is_visible()
    assert pdf.startswith(b"%PDF-")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 12


def test_a_mark_on_the_strip_leads_to_what_failed(browser: Any, report: Path) -> None:
    with opened(browser, report, scheme="light", **WIDE) as page:
        page.locator(".marks a").click()
        row = page.locator("tr:has(:target)")
        assert "killed (SIGKILL)" in row.inner_text()
        assert "17 steps" in row.inner_text()
        spans = page.locator(".timeline i").evaluate_all("parts => parts.map(part => part.getBoundingClientRect().width)")
        assert sum(spans) == pytest.approx(page.locator(".timeline").bounding_box()["width"], abs=1)


def test_the_picture_for_the_readme_is_made_by_a_command(report: Path, tmp_path: Path) -> None:
    picture = tmp_path / "images" / "report.png"

    def screenshot(run: Path, *more: str) -> subprocess.CompletedProcess[str]:
        # In a process of its own: two playwrights in one thread are not allowed.
        command = [sys.executable, "-m", "deploy.screenshot", str(run), "--out", str(picture), *more]
        return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False)

    done = screenshot(report.parent, "--width", "800", "--height", "600", "--open", "0-0")
    assert (done.returncode, done.stdout.strip()) == (0, str(picture)), done.stderr
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")) == (800, 600)
    assert len(data) < MOST_BYTES
    whole = screenshot(report.parent, "--height", "600", "--start", "Confusion")
    assert whole.returncode == 0, whole.stderr
    assert picture.read_bytes() != data
    nowhere = screenshot(report.parent, "--start", "Confuson")
    assert nowhere.returncode == 2
    assert "it has Key numbers, Curves, Confusion, Worst mistakes" in nowhere.stderr
    nothing = screenshot(tmp_path)
    assert nothing.returncode == 2
    assert "python -m trainer.report" in nothing.stderr


def test_what_a_phone_cuts_off_has_a_shadow_until_it_is_scrolled_to(browser: Any, report: Path) -> None:
    with opened(browser, report, scheme="light", width=390, height=800) as page:
        matrix = page.locator(".scroll:has(.confusion)")
        assert matrix.evaluate("box => box.scrollWidth > box.clientWidth + 20")
        darkest = edge_of(page, matrix)
        matrix.evaluate("box => box.scrollLeft = box.scrollWidth")
        assert darkest < 215, "the right edge is shaded"
        assert edge_of(page, matrix) > 245, "and no longer where the matrix ends"


def edge_of(page: Any, box: Any) -> float:
    """Mean brightness of the rightmost pixels of a box's top, above the numbers."""
    place = box.bounding_box()
    clip = {"x": place["x"] + place["width"] - 3, "y": place["y"] + 2, "width": 3, "height": 6}
    with Image.open(io.BytesIO(page.screenshot(clip=clip, full_page=True))) as image:
        return float(np.asarray(image.convert("L"), dtype=float).mean())
