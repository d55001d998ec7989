"""Converts deploy/prometheus/alerts.yml to monitoring/prometheusrule.yaml, the same alerts for a Prometheus Operator.

    python -m deploy.kubernetes            write it
    python -m deploy.kubernetes --check    status 1 if the file is out of date (a test calls this)

deploy/prometheus defines the alerts."""

import sys
from pathlib import Path

import yaml  # type: ignore[import-untyped]

HERE = Path(__file__).parent
ALERTS = HERE.parent / "prometheus" / "alerts.yml"
RULE = HERE / "monitoring" / "prometheusrule.yaml"
HEAD = "# Written by `python -m deploy.kubernetes` from deploy/prometheus/alerts.yml: change that.\n"


def rendered() -> str:
    metadata = {"name": "finetune", "labels": {"release": "prometheus"}}
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    rule = {"apiVersion": "monitoring.coreos.com/v1", "kind": "PrometheusRule", "metadata": metadata, "spec": {"groups": groups}}
    body: str = yaml.safe_dump(rule, sort_keys=False, width=120, allow_unicode=True)
    return HEAD + body


def main(argv: list[str]) -> int:
    if argv not in ([], ["--check"]):
        print("usage: python -m deploy.kubernetes [--check]", file=sys.stderr)
        return 2
    if not argv:
        RULE.write_text(rendered())
        return 0
    if not RULE.is_file() or RULE.read_text() != rendered():
        print(f"error: {RULE} is not what {ALERTS} says; run python -m deploy.kubernetes", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
