"""The documentation as a site: it builds strictly, has every page and picture, breaks on a broken link, and its search finds things."""

import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from deploy import site

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site") / "site"
    site.build(out)
    return out


def test_every_page_of_the_documentation_is_in_it(built: Path) -> None:
    for page in sorted((PROJECT / "docs").glob("*.md")):
        assert (built / f"{page.stem}.html").is_file()
    listed = [page for pages in site.pages().values() for page in pages]
    assert len(listed) == len(set(listed))
    for name in ("index.html", "changelog.html", "contributing.html", "benchmarks/index.html", "docs/images/report.png"):
        assert (built / name).is_file(), name


def test_its_search_knows_every_page(built: Path) -> None:
    index = json.loads((built / "search" / "search_index.json").read_text())
    places = {entry["location"].partition("#")[0] for entry in index["docs"]}
    assert {f"{page.stem}.html" for page in (PROJECT / "docs").glob("*.md")} <= places
    assert any("Goodput" in entry["text"] or "goodput" in entry["text"] for entry in index["docs"])


def test_no_page_loads_anything_from_another_host(built: Path) -> None:
    for page in built.rglob("*.html"):
        text = page.read_text()
        assert 'src="http' not in text, page.name
        assert 'rel="stylesheet" href="http' not in text, page.name


def test_a_link_that_leads_nowhere_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        (tmp_path / name).write_text(f"# {name}\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks").mkdir()
    for page in (page for pages in site.SECTIONS.values() for page in pages if "/" in page):
        (tmp_path / page).write_text("# Page\n\nSee [this](nowhere.md).\n" if page == "docs/report.md" else "# Page\n")
    monkeypatch.setattr(site, "PROJECT", tmp_path)
    with pytest.raises(ValueError, match=r"the site cannot be built: (.|\n)*report\.md(.|\n)*nowhere\.md"):
        site.build(tmp_path / "site")
    assert not (tmp_path / "site").exists()


@pytest.fixture
def address(built: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(built))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_reader_searches_and_a_phone_shows_it(address: str) -> None:
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    from deploy.screenshot import BROWSERS, chromium

    if not any(map(shutil.which, BROWSERS)):
        pytest.skip(f"needs Chromium: none of {', '.join(BROWSERS)} is installed")
    with chromium() as browser:
        page = browser.new_context(viewport={"width": 390, "height": 800}).new_page()
        elsewhere: list[str] = []
        page.on(
            "request", lambda request: elsewhere.append(request.url) if not request.url.startswith((address, "data:", "blob:")) else None
        )
        page.goto(f"{address}/index.html")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        page.set_viewport_size({"width": 1300, "height": 800})
        field = page.locator("input.md-search__input")
        field.click()
        field.press_sequentially("quarantine")
        page.locator(".md-search-result__item a").first.wait_for(state="attached")
        links = page.locator(".md-search-result__item a").evaluate_all("all => all.map(link => link.href)")
        assert any("/report.html" in link for link in links), links
        assert elsewhere == []
