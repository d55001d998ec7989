"""Prometheus for runs: its configuration, and alerts as code (`alerts`), written to alerts.yml by `python -m deploy.prometheus`."""

from deploy.prometheus.alerts import ALERTS, Alert, rules

__all__ = ["ALERTS", "Alert", "rules"]
