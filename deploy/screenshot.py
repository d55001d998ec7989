"""`python -m deploy.screenshot RUN --out FILE.png`: a picture of a run's report, as shown in the README. Needs Chromium and playwright.

It opens the page as a person does, without a server or network. `trainer.report` makes the page.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, Page, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MOST_BYTES = 300_000
Scheme = Literal["light", "dark"]


def find_browser() -> str | None:
    """Path of the installed Chromium."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    """The installed Chromium, headless. FileNotFoundError if there is none."""
    path = find_browser()
    if path is None:
        raise FileNotFoundError(f"none of {', '.join(BROWSERS)} is installed; on Debian: apt install chromium")
    with sync_playwright() as playwright:
        # Without its sandbox, which root may not use. The page is our own and loads nothing.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Browser, file: Path, *, width: int, height: int, scheme: Scheme) -> Iterator[Page]:
    """A page in a window of `width` x `height` CSS pixels."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, offline=True)
    try:
        page = context.new_page()
        page.goto(file.resolve().as_uri())
        yield page
    finally:
        context.close()


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.screenshot", description="A picture of a run's report (report.html).")
    parser.add_argument("run", type=Path, help="a run's folder, or an HTML file")
    parser.add_argument("--out", type=Path, required=True, help="the PNG to write")
    parser.add_argument("--width", type=int, default=1000, help="of the window, in CSS pixels (%(default)s)")
    parser.add_argument("--height", type=int, default=1250, help="of the picture; 0 takes the whole page (%(default)s)")
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    parser.add_argument("--start", metavar="TITLE", help="the part at the picture's top, by its title: Confusion, 'The run in time', ...")
    parser.add_argument("--open", metavar="CELL", help="a cell of the confusion matrix to open, as CLASS-ANSWER by number: 6-0")
    arguments = parser.parse_args(argv)
    file = arguments.run / "report.html" if arguments.run.is_dir() else arguments.run
    if not file.is_file():
        print(f"error: {file} is not there; write it first: python -m trainer.report {arguments.run}", file=sys.stderr)
        return 2
    try:
        with chromium() as browser:
            size = {"width": arguments.width, "height": arguments.height or 800}
            with opened(browser, file, scheme=arguments.scheme, **size) as page:
                if arguments.start:
                    heading = page.get_by_role("heading", level=2, name=arguments.start, exact=True)
                    if not heading.count():
                        there = ", ".join(page.locator("h2").all_inner_texts())
                        print(f"error: --start {arguments.start} is no part of {file}; it has {there}", file=sys.stderr)
                        return 2
                    heading.evaluate("title => title.scrollIntoView()")
                if arguments.open:
                    page.click(f'button[popovertarget="cell-{arguments.open}"]')
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                page.screenshot(path=arguments.out, full_page=not arguments.height)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    written = arguments.out.stat().st_size
    if written > MOST_BYTES:
        print(f"warning: {arguments.out} has {written:,} bytes; a smaller --height makes it smaller", file=sys.stderr)
    print(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
