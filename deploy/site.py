"""`python -m deploy.site`: the documentation as a site, with search, into `.build/site` (`--out`; `--serve` shows it on this machine).

The pages are those of the repository: README.md, docs/, CONTRIBUTING.md, CHANGELOG.md, benchmarks/. This file puts them together, turns
their links to each other into links of the site, and takes along the files they link to. mkdocs and its theme (mkdocs-material, in the
extra `dev`) do the rest, strictly: a link or an anchor that leads nowhere is an error. The site loads nothing from other hosts but the
library that draws the diagrams of a page.
"""

import argparse
import http.server
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import yaml  # type: ignore[import-untyped]

PROJECT = Path(__file__).resolve().parents[1]
SECTIONS: Mapping[str, Sequence[str]] = {
    "Start": ("README.md", "CHANGELOG.md"),
    "Use": (
        "docs/tasks.md",
        "docs/photographs.md",
        "docs/texts.md",
        "docs/audit.md",
        "docs/labels.md",
        "docs/augmentation.md",
        "docs/distillation.md",
        "docs/unlabelled.md",
        "docs/rates.md",
        "docs/search.md",
        "docs/curve.md",
        "docs/report.md",
        "docs/track.md",
        "docs/predict.md",
        "docs/export.md",
        "docs/compress.md",
        "docs/serve.md",
        "docs/python.md",
        "docs/confidence.md",
        "docs/terminal.md",
        "docs/streaming.md",
        "docs/storage.md",
    ),
    "Run on a cluster": ("docs/cluster.md", "docs/kubernetes.md", "docs/vms.md", "docs/security.md"),
    "Operate": ("docs/fault-tolerance.md", "docs/dashboards.md", "docs/alerts.md", "docs/metrics.md"),
    "Inside": ("docs/design.md", "docs/extending.md", "CONTRIBUTING.md", "benchmarks/README.md", "benchmarks/GPU.md"),
}
"""The site's pages, by their places in the repository. A page of docs/ that is not here is put under Inside."""
HOME = "README.md"
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_MERMAID = {"name": "mermaid", "class": "mermaid", "format": "!!python/name:pymdownx.superfences.fence_code_format"}


def pages() -> dict[str, list[str]]:
    """Section -> its pages, each page of docs/ once."""
    told = {name: list(listed) for name, listed in SECTIONS.items()}
    known = {page for listed in told.values() for page in listed}
    told["Inside"] += [page for path in sorted((PROJECT / "docs").glob("*.md")) if (page := f"docs/{path.name}") not in known]
    return told


def assemble(folder: Path) -> None:
    """Write mkdocs.yml and the site's sources into `folder`."""
    sources = folder / "pages"
    places = {page: _place(page) for listed in pages().values() for page in listed}
    taken: set[str] = set()
    for page, place in places.items():
        text = _relinked((PROJECT / page).read_text(encoding="utf-8"), page, places, taken)
        target = sources / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    for name in taken:
        target = sources / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PROJECT / name, target)
    nav = [
        {section: [{"Overview": places[page]} if page == HOME else places[page] for page in listed]} for section, listed in pages().items()
    ]
    settings = yaml.safe_dump(_settings(nav), sort_keys=False)
    # YAML's tag for a Python function, which safe_dump writes as plain text.
    (folder / "mkdocs.yml").write_text(settings.replace(f"'{_MERMAID['format']}'", _MERMAID["format"]), encoding="utf-8")


def build(out: Path) -> None:
    """Build the site into `out`, which is replaced. ValueError if a link is broken, or mkdocs is missing."""
    with tempfile.TemporaryDirectory(prefix="finetune-site-") as made:
        folder = Path(made)
        assemble(folder)
        command = [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "--clean",
            "-f",
            str(folder / "mkdocs.yml"),
            "-d",
            str(folder / "site"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        if done.returncode:
            said = (done.stdout + done.stderr).strip()
            if "No module named" in said:
                raise ValueError("mkdocs or its theme is not installed: pip install -c constraints.txt -e '.[dev]'")
            raise ValueError(f"the site cannot be built: {said}")
        if out.exists():
            shutil.rmtree(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(folder / "site", out)


def _place(page: str) -> str:
    """Where a page of the repository lies in the site."""
    if page == HOME:
        return "index.md"
    if page == "benchmarks/README.md":
        return "benchmarks/index.md"
    return page.removeprefix("docs/").lower() if page.startswith("docs/") else page if "/" in page else page.lower()


def _relinked(text: str, page: str, places: Mapping[str, str], taken: set[str]) -> str:
    """A page's text with its links as the site has them. `taken` gets the other files that it links to."""

    def replaced(found: re.Match[str]) -> str:
        before, link, anchor, after = found[1], found[2], found[3] or "", found[4]
        if "://" in link or link.startswith("mailto:"):
            return found[0]
        name = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
        place = places.get(name)
        if place is None:
            if not (PROJECT / name).is_file():
                return found[0]  # mkdocs says that it leads nowhere
            taken.add(name)
            place = name
        here = posixpath.dirname(places[page])
        return f"{before}{posixpath.relpath(place, here or '.')}{anchor}{after}"

    return _LINK.sub(replaced, text)


def _settings(nav: Sequence[Mapping[str, Sequence[object]]]) -> dict[str, object]:
    palette = [
        {"media": f"(prefers-color-scheme: {scheme})", "scheme": name, "toggle": {"icon": icon, "name": f"To {other}"}}
        for scheme, name, icon, other in (
            ("light", "default", "material/weather-night", "dark"),
            ("dark", "slate", "material/weather-sunny", "light"),
        )
    ]
    return {
        "site_name": "Fine-tuning that survives anything",
        "docs_dir": "pages",
        "use_directory_urls": False,  # so that its pages can be read from a disk too; the search needs a server
        "nav": list(nav),
        "theme": {
            "name": "material",
            "font": False,  # the system's: nothing is loaded from other hosts
            "palette": palette,
            "features": ["navigation.sections", "navigation.top", "search.highlight", "search.suggest", "content.code.copy", "toc.follow"],
        },
        "plugins": ["search"],
        "markdown_extensions": [
            "tables",
            "attr_list",
            "pymdownx.highlight",
            {"pymdownx.superfences": {"custom_fences": [dict(_MERMAID)]}},
            {"toc": {"permalink": True}},
        ],
        "validation": {
            "nav": {"omitted_files": "warn", "not_found": "warn", "absolute_links": "warn"},
            "links": {"not_found": "warn", "anchors": "warn", "absolute_links": "warn", "unrecognized_links": "warn"},
        },
    }


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.site", description="The documentation as a site with search.")
    parser.add_argument("--out", type=Path, default=PROJECT / ".build" / "site", help="folder to write (%(default)s); it is replaced")
    parser.add_argument("--serve", type=int, metavar="PORT", help="then serve it on 127.0.0.1")
    arguments = parser.parse_args(argv)
    try:
        build(arguments.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(arguments.out / "index.html")
    if arguments.serve is not None:
        handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(arguments.out))
        with http.server.ThreadingHTTPServer(("127.0.0.1", arguments.serve), handler) as server:
            print(f"http://127.0.0.1:{server.server_port}/")
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                return 0
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
