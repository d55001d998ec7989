"""Names of metrics for queries, taken from cluster.metrics, so that a renamed metric fails here and not on a dashboard.

Used by deploy.prometheus.alerts and deploy.grafana."""

import difflib
import re

from cluster.metrics import METRICS
from cluster.names import PREFIX

_TABLE = {metric.name: metric for metric in METRICS}
_SUFFIXES = ("_bucket", "_sum", "_count")
_WORD = re.compile(rf"\b{PREFIX}\w+")


def name(short: str) -> str:
    """`loss` -> `finetune_loss`. A histogram is queried through one of its series: `step_seconds_bucket`, `_sum`, `_count`. ValueError
    for a name that is not in METRICS."""
    base = metric_of(short)
    metric = _TABLE.get(base)
    if metric is None:
        near = difflib.get_close_matches(base, _TABLE, n=3)
        raise ValueError(f"{short!r} is no metric of cluster.metrics.METRICS; near: {', '.join(near) or 'none'}")
    if (metric.kind == "histogram") != (base != short):
        raise ValueError(f"{short!r} is a {metric.kind}: a histogram, and no other, takes one of {', '.join(_SUFFIXES)}")
    return PREFIX + short


def metric_of(short: str) -> str:
    """The row of METRICS that a series belongs to; both names are without the prefix."""
    for suffix in _SUFFIXES:
        base = short.removesuffix(suffix)
        if base != short and base in _TABLE and _TABLE[base].kind == "histogram":
            return base
    return short


def fill(expression: str) -> str:
    """Replace `{loss}` in an expression by the metric's full name; braces with anything else (label matchers) stay."""
    return re.sub(r"\{([a-z_]+)\}", lambda match: name(match[1]), expression)


def metrics_in(text: str) -> set[str]:
    """The rows of METRICS that a text names. ValueError for a name that has the prefix but is no metric."""
    found = {word.removeprefix(PREFIX) for word in _WORD.findall(text)}
    for short in found:
        name(short)
    return {metric_of(short) for short in found}
