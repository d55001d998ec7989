"""python -m deploy.preview --prometheus URL --run RUN --out FILE.png: draws a dashboard's panels from Prometheus, for use without Grafana.

deploy.grafana defines the queries, titles, units and places; the picture says that it is not Grafana's. Called by hand and by deploy.up
--preview.
"""

import argparse
import json
import math
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import yaml  # type: ignore[import-untyped]
from matplotlib import dates as mdates
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deploy.grafana import DASHBOARDS, Dashboard
from deploy.grafana.panels import COLUMNS, Panel, Query, places, substitute
from trainer.settings.units import duration, size

DASHBOARD_NAMES = tuple(dashboard.name for dashboard in DASHBOARDS)
POINTS = 240
"""Number of points per line."""
MOST_MINUTES = 24 * 60.0
UNIT_INCHES = 0.37
"""Height of one unit of the grid."""
PAPER, CARD, INK, SOFT, RULE = "#eef0f3", "#ffffff", "#1d232b", "#69737f", "#dde1e6"
COLORS = {"green": "#2f9e63", "orange": "#e08a1e", "red": "#d64545", "blue": "#2f6fd0"}
LINES = ("#2f6fd0", "#e08a1e", "#2f9e63", "#d64545", "#8757c6", "#149bad", "#b5739d", "#7a8288", "#a3a91f", "#5c4b8a")
MOST_LEGENDS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    labels: dict[str, str]
    times: list[float]
    values: list[float]


class Source:
    """Prometheus's API for the time between two moments."""

    def __init__(self, url: str, start: float, end: float) -> None:
        self._url, self.start, self.end = url.rstrip("/"), start, end
        self.step = max(1.0, (end - start) / POINTS)
        self.scrape_seconds = scrape_seconds(url)

    def range(self, promql: str) -> list[Series]:
        return self._ask("query_range", {"query": promql, "start": self.start, "end": self.end, "step": self.step}, "values")

    def instant(self, promql: str) -> list[Series]:
        return self._ask("query", {"query": promql, "time": self.end}, "value")

    def _ask(self, path: str, fields: dict[str, object], key: str) -> list[Series]:
        address = f"{self._url}/api/v1/{path}"
        try:
            with urllib.request.urlopen(address, data=urllib.parse.urlencode(fields).encode(), timeout=30) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            raise OSError(f"{address} refused {fields['query']}: {error.read().decode(errors='replace')}") from error
        except (OSError, ValueError) as error:
            raise OSError(f"{address} does not answer as Prometheus does ({error}); is it up? python -m deploy.up starts one") from error
        out = []
        for row in answer["data"]["result"]:
            points = row["values"] if key == "values" else [row["value"]]
            labels = {name: value for name, value in row["metric"].items() if name != "__name__"}
            out.append(Series(labels=labels, times=[float(at) for at, _ in points], values=[float(value) for _, value in points]))
        return out


def runs(prometheus: str) -> list[str]:
    """Names of the runs known to Prometheus."""
    return sorted(_data(prometheus, "label/run/values"))


def scrape_seconds(prometheus: str) -> float:
    """The scrape interval in Prometheus's configuration, or its default, one minute."""
    configuration = yaml.safe_load(_data(prometheus, "status/config")["yaml"])
    parts = re.findall(r"(\d+)(ms|s|m|h|d)", str(configuration["global"]["scrape_interval"]))
    return sum(int(count) * {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}[unit] for count, unit in parts)


def _data(prometheus: str, path: str) -> Any:
    address = f"{prometheus.rstrip('/')}/api/v1/{path}"
    try:
        with urllib.request.urlopen(address, timeout=10) as response:
            return json.load(response)["data"]
    except (OSError, ValueError) as error:
        raise OSError(f"{address} does not answer as Prometheus does ({error}); is it up? python -m deploy.up starts one") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """The run that is drawn."""

    run: str
    namespace: str

    def fill(self, promql: str, rate_interval: str = "1m") -> str:
        """The query with its variables filled in."""
        return substitute(promql, run=self.run, namespace=self.namespace, rate_interval=rate_interval)


def subject(prometheus: str, run: str, namespace: str | None = None) -> Subject:
    """The run of this name. ValueError if there is none, or one in each of several namespaces."""
    known = runs(prometheus)
    if run not in known:
        raise ValueError(f"Prometheus at {prometheus} knows no run {run!r}; it knows: {', '.join(known) or 'none'}")
    match = urllib.parse.urlencode({"match[]": substitute('up{run="$run"}', run=run)})
    found = sorted(_data(prometheus, f"label/namespace/values?{match}"))
    if namespace is None and len(found) > 1:
        raise ValueError(f"there is a run {run!r} in the namespaces {', '.join(found)}; choose one with --namespace")
    if namespace is not None and namespace not in found:
        raise ValueError(f"there is no run {run!r} in the namespace {namespace!r}; there is one in: {', '.join(found) or 'none'}")
    return Subject(run=run, namespace=namespace if namespace is not None else "".join(found))


def draw(
    *, prometheus: str, run: str, out: Path, dashboard: str = "run", minutes: float | None = None, namespace: str | None = None
) -> None:
    """Write the picture. Without `minutes` it begins with the run's metrics, at most a day back. OSError if Prometheus does not answer,
    ValueError for an unknown run, or for one in several namespaces if none is given."""
    of = subject(prometheus, run, namespace)
    chosen = next(board for board in DASHBOARDS if board.name == dashboard)
    start, end = _span(prometheus, of, minutes)
    source = Source(prometheus, start, end)
    _picture(chosen, source, of).savefig(out, dpi=100, facecolor=PAPER)


def _span(prometheus: str, of: Subject, minutes: float | None) -> tuple[float, float]:
    """The times of the run's first and last scrape."""
    now = time.time()
    if minutes is not None:
        return now - 60 * minutes, now
    last_day = Source(prometheus, now - 60 * MOST_MINUTES, now)
    up = of.fill('count(up{namespace="$namespace",run="$run"})')
    rough = [at for series in last_day.range(up) for at in series.times]
    if not rough:
        return now - 60, now
    # The first query has a point every few minutes; the second one finds where the run begins and ends.
    near = Source(prometheus, max(now - 60 * MOST_MINUTES, min(rough) - last_day.step), min(now, max(rough) + last_day.step))
    times = [at for series in near.range(up) for at in series.times]
    return (min(times), max(times)) if times and max(times) > min(times) else (now - 60, now)


def _picture(dashboard: Dashboard, source: Source, of: Subject) -> Figure:
    placed = places(dashboard)
    rows = max(place.y + place.height for _, _, inside in placed for _, place in inside)
    inches, head = rows * UNIT_INCHES, 0.75
    figure = Figure(figsize=(15, inches + head), facecolor=PAPER)
    total = inches + head
    top = total - head

    def box(x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
        """Grid units from the top left -> matplotlib's fractions from the bottom left."""
        return x / COLUMNS, (top - (y + height) * UNIT_INCHES) / total, width / COLUMNS, height * UNIT_INCHES / total

    figure.text(
        0.008,
        1 - 0.26 / total,
        f"{dashboard.title}   ·   {'/'.join(filter(None, [of.namespace, of.run]))}",
        size=15,
        weight="bold",
        color=INK,
        va="center",
    )
    stamps = "  to  ".join(datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M:%S") for at in (source.start, source.end))
    figure.text(0.008, 1 - 0.56 / total, f"{dashboard.description}  {stamps}", size=9, color=SOFT, va="center")
    figure.text(
        0.992,
        1 - 0.30 / total,
        "preview, not Grafana",
        size=11,
        weight="bold",
        color="#8a5a00",
        ha="right",
        va="center",
        bbox={"facecolor": "#fff1cc", "edgecolor": "#e0b84c", "boxstyle": "round,pad=0.4"},
    )
    marks = [
        (at, COLORS[annotation.color])
        for annotation in dashboard.annotations
        for series in source.range(of.fill(annotation.promql, _interval(source)))
        for at in _begins(series.times, source.step)
    ]
    for row, at, inside in placed:
        x, y, _, height = box(at.x, at.y, at.width, at.height)
        figure.text(x + 0.008, y + height / 2, row.title, size=11, weight="bold", color=INK, va="center")
        for panel, place in inside:
            card = figure.add_axes(_inset(box(place.x, place.y, place.width, place.height), total))
            card.set(xticks=[], yticks=[], facecolor=CARD)
            for spine in card.spines.values():
                spine.set_color(RULE)
            found = [(query, _ask(query, panel, source, of)) for query in panel.queries]
            card.text(
                0.5 * 0.18 / (place.width * 15 / COLUMNS) + 0.01,
                1 - 0.17 / (place.height * UNIT_INCHES),
                panel.title,
                transform=card.transAxes,
                size=9 if panel.kind in ("stat", "state") else 10,
                color=SOFT if panel.kind in ("stat", "state") else INK,
                va="center",
            )
            if not any(series for _, series in found):
                needs = sorted({query.needs for query in panel.queries if query.needs})
                text = "no data" + (f"\n(needs: {', '.join(needs)})" if needs and place.height > 4 else "")
                card.text(0.5, 0.42, text, transform=card.transAxes, ha="center", va="center", color=SOFT, size=10)
                continue
            match panel.kind:
                case "stat" | "state":
                    _stat(card, panel, found)
                case "timeseries":
                    _lines(figure, card, panel, found, source, marks, place.height)
                case "bargauge":
                    _bars(figure, card, panel, found, place.height)
                case "table":
                    _table(card, panel, found, place.height)
    return figure


def _ask(query: Query, panel: Panel, source: Source, of: Subject) -> list[Series]:
    promql = of.fill(query.promql, _interval(source))
    found = source.instant(promql) if query.instant or panel.kind in ("bargauge", "table") else source.range(promql)
    return [series for series in found if any(math.isfinite(value) for value in series.values)]


def _interval(source: Source) -> str:
    """Like Grafana's $__rate_interval: four scrapes, or the step plus one scrape if that is more."""
    return f"{math.ceil(max(4 * source.scrape_seconds, source.step + source.scrape_seconds))}s"


def _begins(times: Sequence[float], step: float) -> list[float]:
    """The first time of each consecutive group."""
    return [at for before, at in zip([-math.inf, *times], times, strict=False) if at - before > 1.5 * step]


def _inset(box: tuple[float, float, float, float], total: float) -> tuple[float, float, float, float]:
    x, y, width, height = box
    return x + 0.003, y + 0.04 / total, width - 0.006, height - 0.08 / total


def _inner(card: Axes, left: float, bottom: float, right: float, top: float) -> tuple[float, float, float, float]:
    """A box inside a card, margins in fractions of it."""
    at = card.get_position()
    return at.x0 + left * at.width, at.y0 + bottom * at.height, at.width * (1 - left - right), at.height * (1 - bottom - top)


def _name(panel: Panel, query: Query, series: Series) -> str:
    legend = re.sub(r"\{\{(\w+)\}\}", lambda match: series.labels.get(match[1], ""), query.legend) or "value"
    look = panel.looks.get(legend)
    return look.name if look is not None and look.name else legend


def _color(panel: Panel, value: float) -> str:
    color = panel.base
    for bound, above in panel.thresholds:
        color = above if value >= bound else color
    return COLORS[color]


def _stat(card: Axes, panel: Panel, found: list[tuple[Query, list[Series]]]) -> None:
    query, series = next((query, series) for query, rows in found for series in rows)
    name = _name(panel, query, series)
    finite = [value for value in series.values if math.isfinite(value)]
    value = finite[-1]
    text = f"{duration(max(0.0, time.time() - value / 1000))} ago" if panel.dates else written(value, panel.unit, panel.decimals)
    text = name if panel.kind == "state" else text
    look = panel.looks.get(name)
    color = COLORS[look.color] if look is not None and look.color else _color(panel, value)
    card.text(
        0.5, 0.4, text, transform=card.transAxes, size=19 if len(text) < 11 else 14, weight="bold", color=color, ha="center", va="center"
    )
    if not panel.dates and len(finite) > 1 and max(finite) > min(finite):
        low, high = min(finite), max(finite)
        x = [index / (len(finite) - 1) for index in range(len(finite))]
        y = [0.02 + 0.16 * (v - low) / (high - low) for v in finite]
        card.fill_between(x, y, 0, transform=card.transAxes, color=color, alpha=0.18, linewidth=0)


def _lines(
    figure: Figure,
    card: Axes,
    panel: Panel,
    found: list[tuple[Query, list[Series]]],
    source: Source,
    marks: Sequence[tuple[float, str]],
    height: int,
) -> None:
    lines = [(_name(panel, query, series), series) for query, rows in found for series in rows]
    axes = figure.add_axes(_inner(card, 0.13 if panel.width < 12 else 0.08, 0.24, 0.03, 0.13))
    axes.set_facecolor(CARD)
    if panel.stacked:
        times = sorted({at for _, series in lines for at in series.times})
        columns = [dict(zip(series.times, series.values, strict=True)) for _, series in lines]
        heights = [[value if math.isfinite(value := column.get(at, 0.0)) else 0.0 for at in times] for column in columns]
        axes.stackplot(
            [_day(at) for at in times],
            heights,
            labels=[name for name, _ in lines],
            colors=[LINES[index % len(LINES)] for index in range(len(lines))],
            alpha=0.75,
            linewidth=0,
        )
    else:
        for index, (name, series) in enumerate(lines):
            x, y = _with_gaps(series, source.step)
            single = sum(math.isfinite(value) for value in series.values) == 1
            axes.plot(x, y, label=name, color=LINES[index % len(LINES)], linewidth=1.6, marker="o" if single else None, markersize=4)
    if panel.threshold_line:
        for bound, color in panel.thresholds:
            axes.axhline(bound, color=COLORS[color], linewidth=1, linestyle=(0, (4, 3)))
    for at, color in marks:
        axes.axvline(_day(at), color=color, linewidth=1, linestyle=(0, (2, 2)), alpha=0.8)
    if panel.log_scale and all(value > 0 for _, series in lines for value in series.values):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    else:
        low, high = axes.get_ylim()
        axes.set_ylim(
            panel.minimum if panel.minimum is not None else low,
            panel.maximum if panel.maximum is not None else max(high, (panel.minimum or 0) + 1e-9),
        )
        axes.yaxis.set_major_locator(ticker.MaxNLocator(5, integer=panel.unit == "none"))
    on_axis = "short" if "/s" in panel.unit else panel.unit  # the title says "per second"
    axes.yaxis.set_major_formatter(lambda value, _: written(value, on_axis, None))
    axes.set_xlim(_day(source.start), _day(source.end))
    locator = mdates.AutoDateLocator(minticks=3, maxticks=6)  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_locator(locator)
    pattern = "%H:%M:%S" if source.end - source.start < 900 else "%H:%M"
    axes.xaxis.set_major_formatter(mdates.DateFormatter(pattern))  # type: ignore[no-untyped-call]
    axes.tick_params(labelsize=7.5, colors=SOFT, length=0, pad=3)
    axes.grid(color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    handles, names = axes.get_legend_handles_labels()
    shown = MOST_LEGENDS if panel.width >= 12 else 6
    columns_of_legend = 6 if panel.width >= 12 else 3
    legend = axes.legend(
        handles[:shown],
        [*names[: shown - 1], f"and {len(names) - shown + 1} more"] if len(names) > shown else names,
        loc="upper center",
        bbox_to_anchor=(0.46, -0.13),
        ncols=min(columns_of_legend, len(names)),
        fontsize=7.5,
        frameon=False,
        handlelength=1.2,
        columnspacing=1.1,
        labelcolor=INK,
        borderaxespad=0.2,
    )
    legend.set_in_layout(False)


def _day(unix_seconds: float) -> float:
    """A local time in matplotlib's units."""
    return float(mdates.date2num(datetime.fromtimestamp(unix_seconds)))  # type: ignore[no-untyped-call]


def _with_gaps(series: Series, step: float) -> tuple[list[float], list[float]]:
    """Break the line where there is no data."""
    x: list[float] = []
    y: list[float] = []
    before = math.inf
    for at, value in zip(series.times, series.values, strict=True):
        if at - before > 2.5 * step:
            x.append(_day(before + step))
            y.append(math.nan)
        x.append(_day(at))
        y.append(value if math.isfinite(value) else math.nan)
        before = at
    return x, y


def _bars(figure: Figure, card: Axes, panel: Panel, found: list[tuple[Query, list[Series]]], height: int) -> None:
    rows = sorted(((series.values[-1], _name(panel, query, series)) for query, group in found for series in group), reverse=True)[
        : height + 2
    ]
    axes = figure.add_axes(_inner(card, 0.27 if panel.width < 12 else 0.18, 0.06, 0.17, 0.15))
    axes.barh([name for _, name in rows], [value for value, _ in rows], color=[_color(panel, value) for value, _ in rows], height=0.62)
    axes.invert_yaxis()
    axes.set_ylim(max(len(rows), 4) - 0.5, -0.5)
    axes.set_xlim(0, max((value for value, _ in rows), default=1.0) or 1.0)
    for index, (value, _) in enumerate(rows):
        axes.text(value, index, f" {written(value, panel.unit, panel.decimals)}", va="center", ha="left", size=8, color=INK)
    axes.set_xticks([])
    axes.tick_params(labelsize=8, colors=INK, length=0)
    axes.set_facecolor("none")
    for spine in axes.spines.values():
        spine.set_visible(False)


def _table(card: Axes, panel: Panel, found: list[tuple[Query, list[Series]]], height: int) -> None:
    keys: dict[tuple[tuple[str, str], ...], dict[str, float]] = {}
    for query, rows in found:
        for series in rows:
            keys.setdefault(tuple(sorted(series.labels.items())), {})[query.legend] = series.values[-1]
    labels = sorted({name for key in keys for name, _ in key})
    columns = [query.legend for query, rows in found if rows]
    lines = [(dict(key), values) for key, values in keys.items()]
    if panel.sort_by:
        lines.sort(key=lambda line: line[1].get(panel.sort_by, 0.0), reverse=not panel.smallest_first)
    names = [*labels, *columns]
    each = 1.0 / max(len(names), 1)
    line_height = 0.235 / (height * UNIT_INCHES)
    top = 1 - 0.45 / (height * UNIT_INCHES)
    room = int((top - 0.03) / line_height) - 1

    def put(column: int, y: float, text: str, **how: object) -> None:
        right = column >= len(labels) and len(names) > 1
        x = (column + 1) * each - 0.02 if right else column * each + 0.02
        card.text(x, y, text, transform=card.transAxes, ha="right" if right else "left", va="center", size=8.5, **how)  # type: ignore[arg-type]

    for column, name in enumerate(names):
        put(column, top, name, color=SOFT, weight="bold")
    card.plot([0.015, 0.985], [top - 0.55 * line_height] * 2, transform=card.transAxes, color=RULE, linewidth=1)
    for index, (of, values) in enumerate(lines[:room]):
        y = top - (index + 1.1) * line_height
        for column, name in enumerate(labels):
            put(column, y, of.get(name, ""), color=INK)
        for column, name in enumerate(columns, start=len(labels)):
            put(column, y, written(values[name], panel.units.get(name, panel.unit), panel.decimals) if name in values else "", color=INK)


def written(value: float, unit: str, decimals: int | None) -> str:
    """A value with its unit, as short as is readable."""
    if not math.isfinite(value):
        return str(value)
    match unit:
        case "percentunit":
            return f"{100 * value:.{decimals if decimals is not None else (0 if abs(value) >= 0.095 or value == 0 else 1)}f} %"
        case "s":
            if value and abs(value) < 0.9995:
                return f"{1000 * value:.3g} ms"
            return duration(value) if value >= 0 else f"-{duration(-value)}"
        case "bytes":
            return size(value)
        case "Bps":
            return f"{size(value)}/s"
        case "celsius":
            return f"{value:.0f} °C"
        case "hertz":
            return f"{_short(value)}Hz"
        case "watt":
            return f"{_short(value)} W"
        case "images/s" | "steps/s":
            return f"{_short(value)} {unit}"
        case "none":
            return f"{value:.{decimals}f}" if decimals is not None else f"{value:g}"
    return f"{value:.{decimals}f}" if decimals is not None else _short(value)


def _short(value: float) -> str:
    size_of = abs(value)
    for bound, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size_of >= bound:
            return f"{value / (1e3 if letter == 'k' else bound):.3g} {letter}"
    if size_of >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.preview", description="Draw a dashboard from Prometheus, without Grafana.")
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", metavar="URL", help="default: %(default)s")
    parser.add_argument("--run", required=True, help="name of the run")
    parser.add_argument("--namespace", help="of the run; needed only where several have one of this name")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the PNG to write")
    parser.add_argument("--dashboard", choices=DASHBOARD_NAMES, default="run")
    parser.add_argument("--minutes", type=float, help="how far back; default: from the run's first scrape, a day at most")
    options = parser.parse_args(arguments)
    try:
        if options.minutes is not None and options.minutes <= 0:
            raise ValueError(f"--minutes {options.minutes} must be above 0")
        draw(
            prometheus=options.prometheus,
            run=options.run,
            namespace=options.namespace,
            dashboard=options.dashboard,
            out=options.out,
            minutes=options.minutes,
        )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
