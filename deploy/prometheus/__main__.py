"""python -m deploy.prometheus [--check] [--runbook URL] [--out FILE]: writes alerts.yml, or says whether it is up to date."""

import argparse
import sys
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from deploy.prometheus.alerts import RUNBOOK, rules

FILE = Path(__file__).parent / "alerts.yml"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.prometheus", description="Write the alert rules.")
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where the file is not what would be written")
    parser.add_argument("--runbook", default=RUNBOOK, metavar="URL", help="where docs/alerts.md is to be read (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=FILE, metavar="FILE")
    options = parser.parse_args(arguments)
    if urllib.parse.urlsplit(options.runbook).scheme not in ("http", "https", "file"):
        print(f"error: --runbook {options.runbook!r} is no URL, and a pager could not open it; give https://...", file=sys.stderr)
        return 2
    text = rules(runbook=options.runbook)
    if not options.check:
        options.out.write_text(text)
        print(f"wrote {options.out}")
    elif not options.out.exists() or options.out.read_text() != text:
        print(f"error: {options.out} is not what deploy/prometheus/alerts.py says; run python -m deploy.prometheus", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
