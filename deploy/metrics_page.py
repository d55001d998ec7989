"""Writes docs/metrics.md from the table of metrics, so that it cannot differ from the code.

    python -m deploy.metrics_page            writes it
    python -m deploy.metrics_page --check    status 1 if the file is out of date

cluster.metrics defines names, types, units and labels; deploy.grafana shows them, and deploy.prometheus alerts on them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from cluster.metrics import ENDS, LABELS, METRICS, OTHER, RUNNING, Metric, most_series
from cluster.names import FILE_SD
from cluster.readers import MOST_SECONDS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"
NEWLINE = "\n"
MANY = 1000
"""Number of ranks for which the page counts the series."""


def page() -> str:
    rank, coordinator = most_series("rank"), most_series("coordinator")
    buckets = [f"- `{m.full_name}`: {', '.join(f'{bound:g}' for bound in m.buckets)} s" for m in METRICS if m.buckets]
    values = [f"- `{m.full_name}`, `{m.label}`: {_values(m)}" for m in METRICS if m.label]
    everywhere = ", ".join(f"`{label}`" for label in LABELS)
    states = ", ".join(f"`{state}`" for state in (RUNNING, *ENDS))
    return f"""<!-- Written by python -m deploy.metrics_page; change cluster/metrics.py instead. -->
# Metrics

What a run tells Prometheus. Every series has the labels {everywhere} and no others, but for those in the column `label`; never
a sample's name, a path or a host. Prometheus adds `namespace` (whose run it is) and its own `job` and `instance`. `rank` is a number, or
`coordinator`, which outlives attempts and so has `attempt="0"`. Units are in the names: seconds, bytes, ratios of 0 to 1. A gauge is
missing until there is a value; what does not apply (a GPU's power on a CPU) is missing, never 0. Counters begin at 0 with their process:
`rate()` and `increase()` see through restarts.

## Of each rank
{_table("rank")}

## Of the coordinator, once a run
{_table("coordinator")}

## How a run ends
`finetune_run_state` is 1 for the state that the run is in: {states}. A driver that ends exports the last one and waits
until Prometheus has read it and has seen that nothing is left to scrape: a scrape and a refresh, {MOST_SECONDS:.0f} s each at most, and
not at all where no Prometheus reads the run. A run that is killed cannot say so: what was read last is `running`, and then nothing.
`finetune_run_state_time_seconds` orders the states of a run that was resumed. [alerts.md](alerts.md) says what fires when.

## Values of labels
What none of these fits counts as `{OTHER}`.

{NEWLINE.join(values)}

## Buckets
Upper bounds, and one without.

{NEWLINE.join(buckets)}

## Where a step's seconds go
Of a step's wall time (`finetune_step_seconds`), `data_wait`, `reduce` and `compute` seconds are all there is. `compute` holds
`forward_backward` and `optimizer` (with clipping and the moving average) and what the host does besides. On a GPU these two and `data_wait`
are measured on the device, by events that are read steps later: nothing waits for them, and the newest steps are not in them yet. A host
that is steps ahead takes a batch at once that its GPU then waits for; that is a wait. `forward_backward` and `optimizer` add up to less
than `compute` where the GPU waits for the host or for other ranks. With `--train.reduction ddp` the exchange hides in the backward pass,
and is told apart: what follows a rank's last gradient is not its own. Checkpoint stalls and evaluations are between steps.

`finetune_mfu_ratio` is images/s times the multiplications and additions (two operations) of an image's forward and backward pass, counted
once on tensors without data, over the dense peak of the device in the run's precision by its data sheet
(`trainer/rank/device_metrics.py`; in
fp32 that of TF32, where convolutions may use it). For a device that is not in that table, CPUs among them, the peak is what `--profile`
measured, and without that there is no such series. `finetune_gpu_*` come from the driver (NVML, package `nvidia-ml-py`) every 5 s;
without a GPU, or the package, they are missing, and the rank's log says so.

## How Prometheus finds a run
Each rank serves `/metrics` on a free port and tells the coordinator, which serves all of them, and itself, as http_sd at `/sd`
(`--cluster.discovery-port`), and keeps the same list in the run's folder as `{FILE_SD}` (file_sd) where that is local.
Both listen on loopback unless `--cluster.metrics-host` says otherwise. `deploy/prometheus/prometheus.yml` reads them, with
`honor_labels: true`, as the labels are the exporter's own.

Runs on one machine share a discovery port: the first one listens, the others ask it (`POST /join`, from the machine's own addresses only)
to list them too, and when it ends another one takes the port. Each target has the label `namespace`: the pod's namespace in Kubernetes, the
user's name elsewhere, or what `--cluster.metrics-namespace` says. Two users' runs of one name are two runs on every dashboard and in every
alert.

A rank that ends is taken off the list at once, and all ranks of an attempt when the next one begins. Prometheus marks a target's series
stale when it leaves the list: they are gone from queries some seconds after its next refresh (`refresh_interval`), not after five
minutes. No series of the coordinator's names a rank, so nothing outlives one. At the run's end the list is emptied; where the driver is
killed, the process that clears up after it empties the file.

## How many series
Known before anything runs: every label's values are listed above, or how many there may be. A rank has at most {rank} series, the
coordinator {coordinator}; a run of N ranks

    {rank} N + {coordinator}

at a time: {2 * rank + coordinator:,} with 2 ranks, {MANY * rank + coordinator:,} with {MANY:,}. One Prometheus takes millions. A new
attempt is a new value of `attempt`: its series take the place of the old attempt's, which Prometheus keeps on disk as long as all its
data. The list of {MANY:,} ranks is one answer of less than 200 kB.
"""


def _values(metric: Metric) -> str:
    return f"at most {metric.declared}, which the run declares when it begins" if metric.declared else ", ".join(metric.values)


def _table(owner: Literal["rank", "coordinator"]) -> str:
    rows = [_row(metric) for metric in METRICS if metric.owner == owner]
    return "\n".join(["| metric | type | unit | label | meaning |", "|---|---|---|---|---|", *rows])


def _row(metric: Metric) -> str:
    label = ", ".join(f"`{name}`" for name in (*([metric.label] if metric.label else []), *metric.info))
    return f"| `{metric.full_name}` | {metric.kind} | {metric.unit} | {label} | {metric.help} |"


def main(arguments: Sequence[str] | None = None, path: Path = PAGE) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.metrics_page", description="Write docs/metrics.md from the table of metrics.")
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where the page is not what it should be")
    options = parser.parse_args(arguments)
    if not options.check:
        path.write_text(page())
        return 0
    if path.exists() and path.read_text() == page():
        return 0
    print(f"{path} is not what cluster/metrics.py says; run python -m deploy.metrics_page", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
