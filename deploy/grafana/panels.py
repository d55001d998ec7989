"""Defines panels, before Grafana or matplotlib draws them: titles, queries, units, places. dashboards.py fills them in, model.py turns them
into Grafana's JSON, deploy.preview into a picture. `panel_queries()` lists every query with its variables filled in, for tests and the
preview.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from deploy.prometheus.names import fill

Needs = Literal[
    "",
    "gpu",
    "bad sample",
    "alert",
    "down target",
    "evaluation",
    "validation",
    "unlabelled",
    "peak",
    "failure",
    "resize",
    "end",
    "hour",
    "ray",
    "node",
    "dcgm",
]
"""What a query needs besides a run's first steps and commit in order to have data: nothing, a GPU, a quarantined sample, a firing alert,
a process that does not answer, a first evaluation, a validation split, images without labels, a device whose peak is known, a failure and
the restart after it, a change of the number of workers, the run's end, its first hour to be over, the metrics of Ray itself, of a node
exporter, of a DCGM exporter."""
Kind = Literal["stat", "state", "timeseries", "bargauge", "table"]
"""A `state` is a stat that shows a series' name in place of its value."""
Unit = Literal["short", "none", "percentunit", "s", "bytes", "Bps", "watt", "images/s", "tokens/s", "steps/s", "celsius", "hertz"]
COLUMNS = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """`expr` is PromQL with Grafana's variables; `{loss}` is a metric's name without its prefix."""

    expr: str
    legend: str = ""
    """`{{rank}}` is a label's value. For a table's query: the column's name."""
    needs: Needs = ""
    instant: bool = False

    @property
    def promql(self) -> str:
        return fill(self.expr)


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """How a series is shown."""

    name: str = ""
    """In place of its legend."""
    color: str = ""
    """In place of its value's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    title: str
    description: str
    queries: tuple[Query, ...]
    kind: Kind = "timeseries"
    unit: Unit = "short"
    units: Mapping[str, Unit] = field(default_factory=dict)
    """For a table's columns whose unit differs from `unit`."""
    width: int = 8
    height: int = 8
    decimals: int | None = None
    minimum: float | None = None
    maximum: float | None = None
    thresholds: tuple[tuple[float, str], ...] = ()
    """(from this value on, colour); below the first one the colour is `base`."""
    base: str = "green"
    stacked: bool = False
    log_scale: bool = False
    threshold_line: bool = False
    sort_by: str = ""
    """A table's column."""
    smallest_first: bool = False
    dates: bool = False
    """The values are unix times."""
    looks: Mapping[str, "Look"] = field(default_factory=dict)
    """Of series, by their legend."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Annotation:
    """Marks on the time axis where the expression is above zero."""

    name: str
    expr: str
    title: str
    color: str
    needs: Needs = "failure"

    @property
    def promql(self) -> str:
        return fill(self.expr)


@dataclass(frozen=True, kw_only=True, slots=True)
class Variable:
    """`label_values(metric, label)` with `matchers`."""

    name: str
    label: str
    values_of: str
    help: str
    multiple: bool = False

    @property
    def query(self) -> str:
        return f"label_values({fill(self.values_of)}, {self.name})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Dashboard:
    name: str
    """run | cluster | data"""
    title: str
    description: str
    rows: tuple[Row, ...]
    annotations: tuple[Annotation, ...]
    variables: tuple[Variable, ...]

    @property
    def uid(self) -> str:
        return f"finetune-{self.name}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Position on a grid of 24 columns."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PanelQuery:
    """A query as Prometheus receives it."""

    dashboard: str
    panel: str
    query: str
    legend: str
    needs: Needs
    is_annotation: bool = False


def places(dashboard: Dashboard) -> list[tuple[Row, Place, list[tuple[Panel, Place]]]]:
    """Rows from top to bottom, panels from left to right, in lines of 24 columns; a row's title has height one."""
    out: list[tuple[Row, Place, list[tuple[Panel, Place]]]] = []
    y = 0
    for row in dashboard.rows:
        head, x, tallest = Place(x=0, y=y, width=COLUMNS, height=1), 0, 0
        y += 1
        inside: list[tuple[Panel, Place]] = []
        for panel in row.panels:
            if x + panel.width > COLUMNS:
                x, y, tallest = 0, y + tallest, 0
            inside.append((panel, Place(x=x, y=y, width=panel.width, height=panel.height)))
            x, tallest = x + panel.width, max(tallest, panel.height)
        y += tallest
        out.append((row, head, inside))
    return out


def substitute(promql: str, *, run: str, namespace: str = "", rank: str = ".*", rate_interval: str = "1m") -> str:
    """Fill in variables as Grafana does. A run's name is data, so it is escaped for the string that contains it."""

    def escaped(text: str) -> str:
        return text.replace("\\", "\\\\").replace('"', '\\"')

    values = {"run": escaped(run), "namespace": escaped(namespace), "rank": rank, "__rate_interval": rate_interval}
    return re.sub(r"\$(\w+)", lambda match: values[match[1]], promql)


def panel_queries(
    dashboards: Iterable[Dashboard], *, run: str, namespace: str = "", rank: str = ".*", rate_interval: str = "1m"
) -> list[PanelQuery]:
    """Every query of every panel and annotation."""

    def filled(promql: str) -> str:
        return substitute(promql, run=run, namespace=namespace, rank=rank, rate_interval=rate_interval)

    out: list[PanelQuery] = []
    for dashboard in dashboards:
        for row in dashboard.rows:
            for panel in row.panels:
                out += [
                    PanelQuery(
                        dashboard=dashboard.name,
                        panel=panel.title,
                        query=filled(query.promql),
                        legend=query.legend,
                        needs=query.needs,
                    )
                    for query in panel.queries
                ]
        out += [
            PanelQuery(
                dashboard=dashboard.name,
                panel=annotation.name,
                query=filled(annotation.promql),
                legend=annotation.title,
                needs=annotation.needs,
                is_annotation=True,
            )
            for annotation in dashboard.annotations
        ]
    return out
