"""Turns a dashboard of panels.py into Grafana's JSON, with grafana-foundation-sdk (pinned to the schema of Grafana 11.6, which later
versions read).

Called by `python -m deploy.grafana`. dashboards.py holds the content."""

import json
from typing import Any

from grafana_foundation_sdk.builders import bargauge, common, stat, table, timeseries
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import prometheus as query_builders
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as style
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from deploy.grafana.panels import Annotation, Dashboard, Panel, Query, Variable, places

DATASOURCE = "${datasource}"
TAG = "finetune"
_UNITS = {"images/s": "suffix:images/s", "tokens/s": "suffix:tokens/s", "steps/s": "suffix:steps/s"}


def to_json(dashboard: Dashboard) -> str:
    """The JSON that Grafana imports; deterministic for the same dashboard."""
    return json.dumps(to_dict(dashboard), indent=2, sort_keys=True) + "\n"


def to_dict(dashboard: Dashboard) -> dict[str, Any]:
    board = (
        builders.Dashboard(dashboard.title)
        .uid(dashboard.uid)
        .description(dashboard.description)
        .tags([TAG])
        .timezone("browser")
        .refresh("5s")
        .time("now-30m", "now")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .readonly()
        .link(
            builders.DashboardLink("Fine-tuning").type(models.DashboardLinkType.DASHBOARDS).tags([TAG]).include_vars(True).keep_time(True)
        )
        .with_variable(builders.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    )
    for variable in dashboard.variables:
        board = board.with_variable(_variable(variable))
    number = 0
    for row, head, inside in places(dashboard):
        number += 1
        at = models.GridPos(x=head.x, y=head.y, w=head.width, h=head.height)
        board = board.with_row(builders.Row(row.title).id(number).grid_pos(at))
        for panel, place in inside:
            number += 1
            built = _panel(panel).id(number).grid_pos(models.GridPos(x=place.x, y=place.y, w=place.width, h=place.height))
            board = board.with_panel(built)
    out: dict[str, Any] = json.loads(json.dumps(board.build(), cls=JSONEncoder))
    # The SDK knows only some of the fields of a Prometheus annotation.
    out["annotations"] = {"list": [_annotation(annotation) for annotation in dashboard.annotations]}
    return out


def _variable(variable: Variable) -> builders.QueryVariable:
    built = (
        builders.QueryVariable(variable.name)
        .label(variable.label)
        .description(variable.help)
        .datasource(models.DataSourceRef(type_val="prometheus", uid=DATASOURCE))
        .query({"qryType": 1, "query": variable.query, "refId": f"variable-{variable.name}"})
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.NUMERICAL_ASC if variable.multiple else models.VariableSort.ALPHABETICAL_ASC)
        .multi(variable.multiple)
        .include_all(variable.multiple)
    )
    return built.all_value(".*").current(models.VariableOption(True, "All", "$__all")) if variable.multiple else built


def _annotation(annotation: Annotation) -> dict[str, Any]:
    datasource = {"type": "prometheus", "uid": DATASOURCE}
    return {
        "name": annotation.name,
        "datasource": datasource,
        "enable": True,
        "iconColor": annotation.color,
        "expr": annotation.promql,
        "titleFormat": annotation.title,
        "target": {"refId": annotation.name, "datasource": datasource, "expr": annotation.promql, "legendFormat": annotation.title},
    }


def _query(query: Query, panel: Panel, number: int) -> query_builders.Dataquery:
    built = (
        query_builders.Dataquery()
        .ref_id(chr(ord("A") + number))
        .expr(query.promql)
        .legend_format(query.legend)
        .datasource(models.DataSourceRef(type_val="prometheus", uid=DATASOURCE))
        .format(PromQueryFormat.TABLE if panel.kind == "table" else PromQueryFormat.TIME_SERIES)
    )
    return built.instant() if query.instant else built.range()


def _panel(panel: Panel) -> Any:
    match panel.kind:
        case "timeseries":
            built: Any = _lines(panel)
        case "stat" | "state":
            built = _stat(panel)
        case "bargauge":
            built = _bars(panel)
        case "table":
            built = _table(panel)
    built = (
        built.title(panel.title)
        .description(panel.description)
        .datasource(models.DataSourceRef(type_val="prometheus", uid=DATASOURCE))
        .unit("dateTimeFromNow" if panel.dates else _unit(panel.unit))
        .no_value("no data")
        .thresholds(
            builders.ThresholdsConfig()
            .mode(models.ThresholdsMode.ABSOLUTE)
            .steps(
                [
                    models.Threshold(value=None, color=panel.base),
                    *(models.Threshold(value=float(value), color=color) for value, color in panel.thresholds),
                ]
            )
        )
    )
    for number, query in enumerate(panel.queries):
        built = built.with_target(_query(query, panel, number))
    for legend, look in panel.looks.items():
        properties = []
        if look.color:
            properties.append(models.DynamicConfigValue(id_val="color", value={"mode": "fixed", "fixedColor": look.color}))
        if look.name:
            properties.append(models.DynamicConfigValue(id_val="displayName", value=look.name))
        built = built.override_by_name(legend, properties)
    if panel.decimals is not None:
        built = built.decimals(panel.decimals)
    if panel.minimum is not None:
        built = built.min(panel.minimum)
    if panel.maximum is not None:
        built = built.max(panel.maximum)
    return built


def _lines(panel: Panel) -> timeseries.Panel:
    built = (
        timeseries.Panel()
        .line_width(1.5)
        .fill_opacity(45 if panel.stacked else 8)
        .show_points(style.VisibilityMode.AUTO)
        .legend(
            common.VizLegendOptions().display_mode(style.LegendDisplayMode.LIST).placement(style.LegendPlacement.BOTTOM).show_legend(True)
        )
        .tooltip(common.VizTooltipOptions().mode(style.TooltipDisplayMode.MULTI).sort(style.SortOrder.DESCENDING))
        .color_scheme(builders.FieldColor().mode(models.FieldColorModeId.PALETTE_CLASSIC))
    )
    if panel.stacked:
        built = built.stacking(common.StackingConfig().mode(style.StackingMode.NORMAL).group("A"))
    if panel.log_scale:
        built = built.scale_distribution(common.ScaleDistributionConfig().type(style.ScaleDistribution.LOG).log(10))
    if panel.threshold_line:
        built = built.thresholds_style(common.GraphThresholdsStyleConfig().mode(style.GraphThresholdsStyleMode.DASHED))
    return built


def _stat(panel: Panel) -> stat.Panel:
    return (
        stat.Panel()
        .graph_mode(style.BigValueGraphMode.NONE if panel.dates or panel.kind == "state" else style.BigValueGraphMode.AREA)
        .color_mode(style.BigValueColorMode.VALUE)
        .text_mode(style.BigValueTextMode.NAME if panel.kind == "state" else style.BigValueTextMode.VALUE)
        .color_scheme(builders.FieldColor().mode(models.FieldColorModeId.THRESHOLDS))
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
    )


def _bars(panel: Panel) -> bargauge.Panel:
    return (
        bargauge.Panel()
        .orientation(style.VizOrientation.HORIZONTAL)
        .display_mode(style.BarGaugeDisplayMode.BASIC)
        .color_scheme(builders.FieldColor().mode(models.FieldColorModeId.THRESHOLDS))
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
    )


def _table(panel: Panel) -> table.Panel:
    """One column per label and one per query, joined on the labels that they share."""
    columns = {(f"Value #{chr(ord('A') + i)}" if len(panel.queries) > 1 else "Value"): q.legend for i, q in enumerate(panel.queries)}
    built = table.Panel().filterable(True).with_transformation(models.DataTransformerConfig(id_val="merge", options={}))
    built = built.with_transformation(
        models.DataTransformerConfig(id_val="organize", options={"excludeByName": {"Time": True}, "renameByName": columns})
    )
    for column, unit in panel.units.items():
        built = built.override_by_name(column, [models.DynamicConfigValue(id_val="unit", value=_unit(unit))])
    if panel.sort_by:
        built = built.sort_by([common.TableSortByFieldState().display_name(panel.sort_by).desc(not panel.smallest_first)])
    return built


def _unit(unit: str) -> str:
    return _UNITS.get(unit, unit)
