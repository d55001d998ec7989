"""python -m deploy.grafana [--check]: writes dashboards/*.json, or says whether they are up to date."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from deploy.grafana.dashboards import DASHBOARDS
from deploy.grafana.model import to_json

FOLDER = Path(__file__).parent / "dashboards"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.grafana", description="Write the dashboards as Grafana's JSON.")
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where a file is not what would be written")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="FOLDER")
    options = parser.parse_args(arguments)
    texts = {options.out / f"{dashboard.name}.json": to_json(dashboard) for dashboard in DASHBOARDS}
    if not options.check:
        options.out.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            path.write_text(text)
            print(f"wrote {path}")
        return 0
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    stale += [path for path in sorted(options.out.glob("*.json")) if path not in texts]
    for path in stale:
        print(f"error: {path} is not what deploy/grafana/dashboards.py says; run python -m deploy.grafana", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
