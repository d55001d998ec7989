"""Dashboards as code: dashboards.py (content), panels.py (what a panel is), model.py (Grafana's JSON). `python -m deploy.grafana` writes
dashboards/*.json, which Grafana loads on its first start. `queries()` lists all their queries, for tests and deploy.preview."""

from deploy.grafana.dashboards import DASHBOARDS
from deploy.grafana.panels import Dashboard, PanelQuery, panel_queries

__all__ = ["DASHBOARDS", "Dashboard", "PanelQuery", "queries"]


def queries(*, run: str, namespace: str = "", rank: str = ".*", rate_interval: str = "1m") -> list[PanelQuery]:
    """Every query of every panel and annotation of all dashboards, with variables filled in. Those with an empty `needs` have data as
    soon as a run has made its first steps and its first commit. Annotations are for range queries: they have data around what they mark."""
    return panel_queries(DASHBOARDS, run=run, namespace=namespace, rank=rank, rate_interval=rate_interval)
