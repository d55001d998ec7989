"""The three dashboards: Run (is it learning, how fast, what is lost), Cluster (each rank, stragglers, hardware, failures), Data (the input
pipeline, quarantine). Content only: panels.py says what a panel is, model.py makes Grafana's JSON.

A panel's number of series does not grow with the run: it shows quantiles over ranks, and tables of the ten worst.
"""

from deploy.grafana.panels import Annotation, Dashboard, Look, Needs, Panel, Query, Row, Unit, Variable

OF_RUN = 'namespace="$namespace",run="$run"'
R = f"{{{OF_RUN}}}"
RANK = f'{{{OF_RUN},rank=~"$rank"}}'
FIRST = f'{{{OF_RUN},rank="0"}}'
"""For metrics that are the same on all ranks."""
I = "[$__rate_interval]"  # noqa: E741
GREEN, ORANGE, RED = "green", "orange", "red"
MANY = 20
"""Maximum number of lines in a panel that shows chosen ranks."""


def per_step(metric: str) -> str:
    """Seconds per step and rank."""
    return f"sum(rate({{{metric}}}{R}{I})) / sum(rate({{steps_total}}{R}{I}))"


def by_rank(metric: str) -> str:
    return f"sum by (rank) (rate({{{metric}}}{R}{I}))"


def spread(expr: str, *, needs: Needs = "", of: str = "rank") -> tuple[Query, ...]:
    """Summarises 1,000 ranks: the extremes and the middle."""
    return tuple(
        Query(expr=f"{how}{expr})", legend=f"{legend} {of}", needs=needs)
        for how, legend in (("max(", "highest"), ("quantile(0.5, ", "median"), ("min(", "lowest"))
    )


def number(
    title: str,
    description: str,
    query: Query,
    *,
    unit: Unit = "short",
    thresholds: tuple[tuple[float, str], ...] = (),
    base: str = GREEN,
    decimals: int | None = None,
    width: int = 3,
    dates: bool = False,
) -> Panel:
    return Panel(
        title=title,
        description=description,
        queries=(query,),
        kind="stat",
        unit=unit,
        thresholds=thresholds,
        base=base,
        decimals=decimals,
        width=width,
        height=4,
        dates=dates,
    )


def worst(title: str, description: str, expr: str, column: str, *, unit: Unit, smallest_first: bool = False) -> Panel:
    return Panel(
        title=title,
        description=description,
        queries=(Query(expr=expr, legend=column, instant=True),),
        kind="table",
        unit=unit,
        sort_by=column,
        smallest_first=smallest_first,
    )


NAMESPACE_VARIABLE = Variable(
    name="namespace",
    label="Namespace",
    values_of="{workers}",
    help="Whose runs: a namespace of Kubernetes, or a user.",
)
RUN_VARIABLE = Variable(
    name="run", label="Run", values_of='{workers}{namespace="$namespace"}', help="A run that Prometheus knows in the chosen time."
)
RANK_VARIABLE = Variable(
    name="rank",
    label="Ranks",
    values_of=f"{{start_time_seconds}}{R}",
    help=f"Ranks of the panels that show single ones; the first {MANY} of them by value are drawn.",
    multiple=True,
)

ANNOTATIONS = (
    Annotation(
        name="Failures",
        expr=f"round(sum by (kind) (increase({{failures_total}}{R}{I}))) > 0",
        title="failure: {{kind}}",
        color=RED,
    ),
    Annotation(
        name="Restarts",
        expr=f"round(sum by (kind) (increase({{restarts_total}}{R}{I}))) > 0",
        title="new attempt after: {{kind}}",
        color=ORANGE,
    ),
    Annotation(
        name="Changes of the number of workers",
        expr=f"sum(changes({{workers}}{R}{I})) > 0",
        title="number of workers changed",
        color="blue",
        needs="resize",
    ),
    Annotation(
        name="Run ended",
        expr=f'max by (state) (max_over_time({{run_state}}{{{OF_RUN},state!="running"}}{I})) > 0',
        title="run {{state}}",
        color=GREEN,
        needs="end",
    ),
)

STATES = {"running": "blue", "finished": GREEN, "stopped": ORANGE, "failed": RED, "taken_over": ORANGE, "vanished": RED}
"""Colours."""
LAST_STATE = f"topk(1, max by (state) (max_over_time({{run_state_time_seconds}}{R}[1d])))"
SILENT = f'(label_replace(vector(1), "state", "running", "", "") unless on () max({{run_state}}{R}))'
"""There if nobody answers for the run."""
STATE = Panel(
    title="State",
    description="The last one within a day. A run that was going on and does not answer any more has vanished: it was killed, or "
    "Prometheus does not reach it.",
    queries=(
        Query(expr=f"{LAST_STATE} unless on (state) {SILENT}", legend="{{state}}", instant=True),
        Query(expr=f"{LAST_STATE} and on (state) {SILENT}", legend="vanished", instant=True, needs="down target"),
    ),
    kind="state",
    unit="none",
    width=4,
    height=4,
    looks={state: Look(color=color) for state, color in STATES.items()},
)
IMAGES = number(
    "Images a second",
    "That all ranks together trained on, evaluations and restarts included.",
    Query(expr=f"sum(rate({{samples_total}}{R}{I}))", legend="images/s"),
    unit="images/s",
    decimals=0,
    base="blue",
    width=4,
)
NEWEST = f"topk(1, max by (instance) (last_over_time({{run_state_time_seconds}}{R}[1d])))"
"""The coordinator that spoke for the run last, within a day."""
LAST_GOODPUT = f"max(last_over_time({{goodput_ratio}}{R}[1d]) and on (instance) {NEWEST})"
LAST_SECONDS = f"sum(last_over_time({{run_seconds}}{R}[1d]) and on (instance) {NEWEST})"
GOODPUT = Panel(
    title="Goodput",
    description="Useful step time over wall time since the run began; of a run that has ended, what it was in the end. Under 90 % "
    "FinetuneGoodputLow fires, after the first hour.",
    queries=(
        Query(expr=f"{LAST_GOODPUT} and on () {LAST_SECONDS} < 3600", legend="first hour", instant=True),
        Query(expr=f"{LAST_GOODPUT} and on () {LAST_SECONDS} >= 3600", legend="goodput", instant=True, needs="hour"),
    ),
    kind="stat",
    unit="percentunit",
    decimals=1,
    base=RED,
    thresholds=((0.8, ORANGE), (0.9, GREEN)),
    looks={"first hour": Look(color="blue")},
    width=4,
    height=4,
)
CAUSES = {
    "data_wait": Look(name="waiting for data"),
    "exchange_wait": Look(name="waiting for other ranks"),
    "checkpoint_stall": Look(name="waiting for checkpoints"),
    "start_up": Look(name="start"),
    "compile": Look(name="compilation"),
    "recovery": Look(name="recovery from failures"),
    "resize": Look(name="changes of the workers"),
    "hang": Look(name="hangs"),
    "lost_work": Look(name="steps done again"),
}
"""Names on panels of the values of `cause`; the others are words already."""
ALERTS = Panel(
    title="Firing alerts",
    description="Of this run; what to do is in docs/alerts.md.",
    queries=(
        Query(
            expr=f'sum by (alertname, severity) (ALERTS{{{OF_RUN},alertstate="firing"}})',
            legend="firing",
            instant=True,
            needs="alert",
        ),
    ),
    kind="table",
    unit="none",
    width=12,
    height=4,
)

SUMMARY = Row(
    title="Now",
    panels=(
        STATE,
        number(
            "Progress",
            "Global step over the steps that the whole run does.",
            Query(expr=f"max({{step}}{R}) / max({{planned_steps}}{R})", legend="done"),
            unit="percentunit",
            decimals=1,
            base="blue",
            width=4,
        ),
        number(
            "Time to go",
            "Steps that are left over the steps a second of now. Evaluations and restarts come on top.",
            Query(
                expr=f"(max({{planned_steps}}{R}) - max({{step}}{R})) / max(rate({{steps_total}}{R}{I}))",
                legend="to go",
            ),
            unit="s",
            decimals=0,
            base="blue",
            width=4,
        ),
        number(
            "Test accuracy",
            "Top-1 on the test split, as of the newest evaluation.",
            Query(expr=f"max({{test_accuracy_ratio}}{R})", legend="accuracy", needs="evaluation"),
            unit="percentunit",
            decimals=2,
            base="blue",
            width=4,
        ),
        IMAGES,
        GOODPUT,
        number(
            "Workers",
            "Ranks of the current attempt.",
            Query(expr=f"max({{workers}}{R})", legend="workers"),
            unit="none",
            decimals=0,
            base="blue",
            width=4,
        ),
        number(
            "Restarts",
            "Attempts after the first of this driver, whatever ended the one before; why is on the Cluster dashboard.",
            Query(expr=f"sum({{restarts_total}}{R})", legend="restarts"),
            unit="none",
            decimals=0,
            thresholds=((1, ORANGE), (5, RED)),
            width=4,
        ),
        number(
            "Since last checkpoint",
            "Work younger than this is lost if the run is killed now.",
            Query(expr=f"time() - max({{checkpoint_commit_time_seconds}}{R})", legend="age"),
            unit="s",
            decimals=0,
            thresholds=((900, ORANGE), (1800, RED)),
            width=4,
        ),
        ALERTS,
    ),
)

RUN = Dashboard(
    name="run",
    title="Fine-tuning / Run",
    description="Is it learning, how fast, and what is lost?",
    variables=(
        NAMESPACE_VARIABLE,
        RUN_VARIABLE,
    ),
    annotations=ANNOTATIONS,
    rows=(
        SUMMARY,
        Row(
            title="Is it learning?",
            panels=(
                Panel(
                    title="Loss",
                    description=(
                        "Mean training loss of the newest logged step, and at each evaluation the mean loss on the validation split; "
                        "without one, on the test split, which is else read once, at the end."
                    ),
                    queries=(
                        Query(expr=f"max({{loss}}{FIRST})", legend="training"),
                        Query(expr=f"max({{test_loss}}{R})", legend="test", needs="evaluation"),
                        Query(expr=f"max({{validation_loss}}{R})", legend="validation", needs="validation"),
                    ),
                    height=9,
                    decimals=3,
                ),
                Panel(
                    title="Test accuracy over time",
                    description="Top-1 at each evaluation, on the validation split; without one, on the test split.",
                    queries=(
                        Query(expr=f"max({{test_accuracy_ratio}}{R})", legend="accuracy", needs="evaluation"),
                        Query(expr=f"max({{validation_accuracy_ratio}}{R})", legend="validation", needs="validation"),
                    ),
                    unit="percentunit",
                    height=9,
                ),
                Panel(
                    title="Test measures",
                    description=(
                        "All measures of the run's task by their names, at each evaluation: on the validation split, without one on the "
                        "test split."
                    ),
                    queries=(
                        Query(expr=f"max by (measure) ({{test_measure}}{R})", legend="{{measure}}", needs="evaluation"),
                        Query(expr=f"max by (measure) ({{validation_measure}}{R})", legend="validation {{measure}}", needs="validation"),
                    ),
                    height=9,
                ),
                Panel(
                    title="Learning rate",
                    description="Of the newest logged step.",
                    queries=(Query(expr=f"max({{learning_rate}}{FIRST})", legend="learning rate"),),
                    minimum=0,
                ),
                Panel(
                    title="Gradient norm",
                    description="L2 norm before any clipping, every few seconds. A rise by powers of ten comes before a diverging loss.",
                    queries=(Query(expr=f"max({{gradient_norm}}{R})", legend="gradient norm"),),
                    log_scale=True,
                ),
                Panel(
                    title="Guesses at images without labels",
                    description=(
                        "Of the images of data.unlabelled: those whose guess counts by more than one half, and the mean of what guesses "
                        "count. Near 0 nothing is learned from them."
                    ),
                    queries=(
                        Query(expr=f"max({{unlabelled_used_ratio}}{R})", legend="count by more than half", needs="unlabelled"),
                        Query(expr=f"max({{unlabelled_weight_ratio}}{R})", legend="mean weight", needs="unlabelled"),
                    ),
                    unit="percentunit",
                ),
                Panel(
                    title="Epoch and steps",
                    description="Epochs as a fraction. It goes back where an attempt begins again from a checkpoint.",
                    queries=(Query(expr=f"max({{epoch}}{R})", legend="epoch"),),
                    minimum=0,
                ),
            ),
        ),
        Row(
            title="How fast?",
            panels=(
                Panel(
                    title="Images a second over time",
                    description="All ranks together: evaluations and restarts included, and as ranks measure it over their newest steps.",
                    queries=(
                        Query(expr=f"sum(rate({{samples_total}}{R}{I}))", legend="all time counted"),
                        Query(expr=f"sum({{images_per_second}}{R})", legend="while stepping"),
                    ),
                    unit="images/s",
                    minimum=0,
                ),
                Panel(
                    title="Tokens a second",
                    description="Of a run on texts: tokens of texts, and with those that pad a batch. Far apart, texts of very different "
                    "lengths share a batch: raise data.sort_steps.",
                    queries=(
                        Query(expr=f"sum(rate({{tokens_total}}{R}{I}))", legend="of texts"),
                        Query(expr=f"sum(rate({{padded_tokens_total}}{R}{I}))", legend="with padding"),
                    ),
                    unit="tokens/s",
                    minimum=0,
                ),
                Panel(
                    title="Where a step's time goes",
                    description="Seconds a step, mean over ranks. Wait for others is the exchange of gradients, slower ranks included; "
                    "checkpoint is what a step waits for a snapshot.",
                    queries=(
                        Query(expr=per_step("forward_backward_seconds_total"), legend="forward + backward"),
                        Query(expr=per_step("optimizer_seconds_total"), legend="optimiser"),
                        Query(expr=per_step("reduce_seconds_total"), legend="wait for others"),
                        Query(expr=per_step("data_wait_seconds_total"), legend="wait for data"),
                        Query(expr=per_step("checkpoint_stall_seconds_total"), legend="checkpoint"),
                    ),
                    unit="s",
                    stacked=True,
                    minimum=0,
                ),
                Panel(
                    title="Step time",
                    description="Quantiles of the wall time of steps, over all ranks, from a histogram: exact to its buckets.",
                    queries=tuple(
                        Query(expr=f"histogram_quantile({q}, sum by (le) (rate({{step_seconds_bucket}}{R}{I})))", legend=legend)
                        for q, legend in ((0.99, "p99"), (0.9, "p90"), (0.5, "median"))
                    ),
                    unit="s",
                    minimum=0,
                ),
                Panel(
                    title="Model FLOP/s utilisation",
                    description="FLOP/s of the model over the device's peak, mean over ranks; there where the peak is known.",
                    queries=(Query(expr=f"avg({{mfu_ratio}}{R})", legend="MFU", needs="peak"),),
                    unit="percentunit",
                    minimum=0,
                ),
                Panel(
                    title="Outside of steps",
                    description="Share of the ranks' time in evaluations, counted when each ends, and in waiting for checkpoints.",
                    queries=(
                        Query(expr=f"avg(rate({{evaluation_seconds_total}}{R}{I}))", legend="evaluation"),
                        Query(expr=f"avg(rate({{checkpoint_stall_seconds_total}}{R}{I}))", legend="checkpoint"),
                    ),
                    unit="percentunit",
                    minimum=0,
                ),
                Panel(
                    title="Steps a second",
                    description="Of the fastest rank; all ranks step together.",
                    queries=(Query(expr=f"max(rate({{steps_total}}{R}{I}))", legend="steps/s"),),
                    unit="steps/s",
                    minimum=0,
                ),
            ),
        ),
        Row(
            title="What is lost?",
            panels=(
                Panel(
                    title="Where the run's time went",
                    description="Every second since the run began, by cause; `steps` are the useful ones.",
                    queries=(Query(expr=f"sort_desc(max by (cause) ({{run_seconds}}{R}) > 0)", legend="{{cause}}", instant=True),),
                    looks=CAUSES,
                    kind="bargauge",
                    unit="s",
                    minimum=0,
                    base="blue",
                ),
                Panel(
                    title="Goodput over time",
                    description="Useful step time over wall time since the run began.",
                    queries=(Query(expr=f"min({{goodput_ratio}}{R})", legend="goodput"),),
                    unit="percentunit",
                    minimum=0,
                    maximum=1,
                    base=RED,
                    thresholds=((0.9, GREEN),),
                    threshold_line=True,
                ),
                Panel(
                    title="Lost time",
                    description="Seconds lost since the run began, by cause; waits inside steps are above.",
                    queries=(
                        Query(
                            expr=f'max by (cause) ({{run_seconds}}{{{OF_RUN},cause!~"steps|data_wait|exchange_wait"}} > 0)',
                            legend="{{cause}}",
                        ),
                    ),
                    looks=CAUSES,
                    unit="s",
                    stacked=True,
                    minimum=0,
                ),
                Panel(
                    title="Steps: done and saved",
                    description="The distance between the two lines is what a crash loses.",
                    queries=(
                        Query(expr=f"max({{step}}{R})", legend="done"),
                        Query(expr=f"max({{checkpoint_commit_step}}{R})", legend="in a checkpoint"),
                    ),
                    unit="none",
                    minimum=0,
                ),
                Panel(
                    title="Checkpoint: time to write and to commit",
                    description="90 % quantiles; both are off the step path.",
                    queries=(
                        Query(
                            expr=f"histogram_quantile(0.9, sum by (le) ({{checkpoint_stage_seconds_bucket}}{R}))",
                            legend="a rank writes its files",
                        ),
                        Query(
                            expr=f"histogram_quantile(0.9, sum by (le) ({{checkpoint_commit_seconds_bucket}}{R}))",
                            legend="last receipt to commit",
                        ),
                    ),
                    unit="s",
                    minimum=0,
                ),
                Panel(
                    title="Checkpoint: size and failures",
                    description="Size of the newest commit, and how many checkpoints could not be committed.",
                    queries=(
                        Query(expr=f"max({{checkpoint_bytes}}{R})", legend="size", instant=True),
                        Query(expr=f"sum({{checkpoint_failures_total}}{R})", legend="failed", instant=True),
                        Query(expr=f"sum({{rollbacks_total}}{R})", legend="rollbacks", instant=True),
                    ),
                    kind="table",
                    unit="none",
                    units={"size": "bytes"},
                ),
            ),
        ),
        Row(
            title="All runs",
            panels=(
                Panel(
                    title="All runs",
                    description="That are up now.",
                    queries=(
                        Query(expr="max by (namespace, run) ({workers})", legend="workers", instant=True),
                        Query(
                            expr="max by (namespace, run) ({step}) / max by (namespace, run) ({planned_steps})",
                            legend="progress",
                            instant=True,
                        ),
                        Query(expr="max by (namespace, run) ({test_accuracy_ratio})", legend="accuracy", instant=True, needs="evaluation"),
                        Query(expr='max by (namespace, run) ({loss}{rank="0"})', legend="loss", instant=True),
                        Query(expr=f"sum by (namespace, run) (rate({{samples_total}}{I}))", legend="images/s", instant=True),
                        Query(expr="min by (namespace, run) ({goodput_ratio})", legend="goodput", instant=True),
                        Query(expr="sum by (namespace, run) ({restarts_total})", legend="restarts", instant=True),
                    ),
                    kind="table",
                    unit="none",
                    units={
                        "progress": "percentunit",
                        "accuracy": "percentunit",
                        "goodput": "percentunit",
                        "images/s": "images/s",
                        "loss": "short",
                    },
                    width=16,
                    height=8,
                ),
                Panel(
                    title="Whose they are",
                    description="Who started each run, what it trains, and on what.",
                    queries=(Query(expr="max by (namespace, run, owner, task, device) ({run_info})", legend="runs", instant=True),),
                    kind="table",
                    unit="none",
                    width=8,
                ),
            ),
        ),
    ),
)

CLUSTER = Dashboard(
    name="cluster",
    title="Fine-tuning / Cluster",
    description="Each rank, stragglers, hardware, failures.",
    variables=(NAMESPACE_VARIABLE, RUN_VARIABLE, RANK_VARIABLE),
    annotations=ANNOTATIONS,
    rows=(
        Row(
            title="Now",
            panels=(
                number(
                    "Workers",
                    "Ranks of the current attempt.",
                    Query(expr=f"max({{workers}}{R})", legend="workers"),
                    unit="none",
                    base="blue",
                    width=4,
                ),
                number(
                    "Processes that answer",
                    "Ranks and coordinator, of those that Prometheus knows.",
                    Query(expr=f"avg(up{R})", legend="up"),
                    unit="percentunit",
                    base=RED,
                    thresholds=((0.999, GREEN),),
                    decimals=0,
                    width=4,
                ),
                number(
                    "Straggler skew",
                    "The slowest rank's own work on a step over the ranks' median. Above 1.5 FinetuneStraggler fires.",
                    Query(expr=f"max({{straggler_skew_ratio}}{R})", legend="skew"),
                    thresholds=((1.2, ORANGE), (1.5, RED)),
                    decimals=2,
                    width=4,
                ),
                number(
                    "Failures",
                    "Of attempts, counted by this driver.",
                    Query(expr=f"sum({{failures_total}}{R})", legend="failures"),
                    unit="none",
                    thresholds=((1, ORANGE), (5, RED)),
                    width=4,
                ),
                number(
                    "Attempt since",
                    "How long ago the youngest rank of the current attempt started.",
                    Query(expr=f"time() - max({{start_time_seconds}}{R})", legend="age"),
                    unit="s",
                    base="blue",
                    decimals=0,
                    width=4,
                ),
                number(
                    "Last commit",
                    "When the newest checkpoint was committed.",
                    Query(expr=f"max({{checkpoint_commit_time_seconds}}{R}) * 1000", legend="commit"),
                    unit="none",
                    base="blue",
                    width=4,
                    dates=True,
                ),
            ),
        ),
        Row(
            title="Ranks",
            panels=(
                Panel(
                    title="Own work a step",
                    description="Seconds of forward, backward and optimiser, by rank. Ranks wait for the highest.",
                    queries=spread(f"{by_rank('compute_seconds_total')} / {by_rank('steps_total')}"),
                    unit="s",
                    minimum=0,
                ),
                Panel(
                    title="Wait for others a step",
                    description="Seconds by rank. A straggler is the one that waits least.",
                    queries=spread(f"{by_rank('reduce_seconds_total')} / {by_rank('steps_total')}"),
                    unit="s",
                    minimum=0,
                ),
                Panel(
                    title="Straggler skew over time",
                    description="The slowest rank's own work over the median; 1 where all are equally fast.",
                    queries=(Query(expr=f"max({{straggler_skew_ratio}}{R})", legend="skew"),),
                    minimum=1,
                    thresholds=((1.5, RED),),
                    threshold_line=True,
                ),
                worst(
                    "Slowest ranks",
                    "The ten with the most work of their own a step.",
                    f"topk(10, {by_rank('compute_seconds_total')} / {by_rank('steps_total')})",
                    "own work",
                    unit="s",
                ),
                worst(
                    "Ranks behind",
                    "The ten that have fewest global steps. After a lost rank its series end, so that only living ones are here.",
                    f"bottomk(10, max by (rank) ({{step}}{R}))",
                    "step",
                    unit="none",
                    smallest_first=True,
                ),
                Panel(
                    title="Silent processes",
                    description="Targets that Prometheus cannot scrape, of those that the run says it has.",
                    queries=(
                        Query(
                            expr=f"topk(10, max by (rank, instance) (1 - up{R}) > 0)",
                            legend="down",
                            instant=True,
                            needs="down target",
                        ),
                    ),
                    kind="table",
                    unit="none",
                ),
            ),
        ),
        Row(
            title="Failures",
            panels=(
                Panel(
                    title="Workers: wanted and there",
                    description="Ranks that the attempt has, and processes of it that answer (the coordinator is not counted).",
                    queries=(
                        Query(expr=f"max({{workers}}{R})", legend="wanted"),
                        Query(expr=f'sum(up{{{OF_RUN},rank!="coordinator"}})', legend="answer"),
                    ),
                    unit="none",
                    minimum=0,
                ),
                Panel(
                    title="Failures by kind",
                    description="Of attempts: infrastructure, preempted, hang, numbers, storage, data, user.",
                    queries=(Query(expr=f"sum by (kind) ({{failures_total}}{R}) > 0", legend="{{kind}}", needs="failure"),),
                    unit="none",
                    stacked=True,
                    minimum=0,
                ),
                Panel(
                    title="Restarts by cause",
                    description="Attempts after the first, by what ended the one before; `grow` is room for more workers.",
                    queries=(Query(expr=f"sum by (kind) ({{restarts_total}}{R}) > 0", legend="{{kind}}", needs="failure"),),
                    unit="none",
                    stacked=True,
                    minimum=0,
                ),
            ),
        ),
        Row(
            title="Hardware",
            panels=(
                Panel(
                    title="Host memory of a rank",
                    description="Resident memory of the ranks' processes, shared libraries included.",
                    queries=spread(f"{{host_memory_bytes}}{R}"),
                    unit="bytes",
                    minimum=0,
                ),
                Panel(
                    title="GPU memory",
                    description="Memory in use on the ranks' GPUs by anybody, and the most that a rank's tensors have taken.",
                    queries=(
                        Query(expr=f"max({{gpu_memory_used_bytes}}{R})", legend="in use, highest rank", needs="gpu"),
                        Query(expr=f"quantile(0.5, {{gpu_memory_used_bytes}}{R})", legend="in use, median rank", needs="gpu"),
                        Query(expr=f"max({{device_memory_bytes}}{R})", legend="tensors, highest rank", needs="gpu"),
                    ),
                    unit="bytes",
                    minimum=0,
                ),
                Panel(
                    title="GPU utilisation",
                    description="Share of time in which a kernel ran (NVML).",
                    queries=spread(f"{{gpu_utilization_ratio}}{R}", needs="gpu"),
                    unit="percentunit",
                    minimum=0,
                    maximum=1,
                ),
                Panel(
                    title="GPU power",
                    description="All GPUs of the run together, and the highest one.",
                    queries=(
                        Query(expr=f"sum({{gpu_power_watts}}{R})", legend="all", needs="gpu"),
                        Query(expr=f"max({{gpu_power_watts}}{R})", legend="highest rank", needs="gpu"),
                    ),
                    unit="watt",
                    minimum=0,
                ),
                Panel(
                    title="Model FLOP/s utilisation",
                    description="By rank; there where the device's peak is known.",
                    queries=spread(f"{{mfu_ratio}}{R}", needs="peak"),
                    unit="percentunit",
                    minimum=0,
                ),
                worst(
                    "Most host memory",
                    "The ten ranks with the most.",
                    f"topk(10, max by (rank) ({{host_memory_bytes}}{R}))",
                    "memory",
                    unit="bytes",
                ),
            ),
        ),
        Row(
            title="Nodes, of all that Prometheus scrapes: Ray's own metrics, node exporter, DCGM exporter",
            panels=(
                Panel(
                    title="CPU of a node (Ray)",
                    description="Share of a node's CPUs that are busy.",
                    queries=spread("ray_node_cpu_utilization / 100", needs="ray", of="node"),
                    unit="percentunit",
                    minimum=0,
                ),
                Panel(
                    title="Memory of a node (Ray)",
                    description="Share that is in use. Ray kills a worker above 95 %.",
                    queries=spread("ray_node_mem_used / ray_node_mem_total", needs="ray", of="node"),
                    unit="percentunit",
                    minimum=0,
                    maximum=1,
                ),
                Panel(
                    title="Object store (Ray)",
                    description="Bytes in all nodes' object stores, by where they are; what is spilled is on the nodes' disks.",
                    queries=(Query(expr="sum by (Location) (ray_object_store_memory)", legend="{{Location}}", needs="ray"),),
                    unit="bytes",
                    stacked=True,
                    minimum=0,
                ),
                Panel(
                    title="Fullest disks (node exporter)",
                    description="The ten file systems with the least room, as share in use; temporary folders hold spilled checkpoints.",
                    queries=(
                        Query(
                            expr="topk(10, max by (instance, mountpoint) "
                            '(1 - node_filesystem_avail_bytes{fstype!~"tmpfs|overlay"} / node_filesystem_size_bytes))',
                            legend="in use",
                            instant=True,
                            needs="node",
                        ),
                    ),
                    kind="table",
                    unit="percentunit",
                    sort_by="in use",
                ),
                Panel(
                    title="Processes killed for memory (node exporter)",
                    description="By the kernel, in each window, by node: the ten nodes with the most.",
                    queries=(
                        Query(
                            expr=f"topk(10, sum by (instance) (increase(node_vmstat_oom_kill{I})) > 0)",
                            legend="{{instance}}",
                            needs="node",
                        ),
                    ),
                    unit="none",
                    minimum=0,
                ),
                Panel(
                    title="Waiting for memory or disk (node exporter)",
                    description="Share of the time in which a process of the node waited (pressure), highest node.",
                    queries=(
                        Query(expr=f"max(rate(node_pressure_memory_waiting_seconds_total{I}))", legend="memory", needs="node"),
                        Query(expr=f"max(rate(node_pressure_io_waiting_seconds_total{I}))", legend="disk", needs="node"),
                    ),
                    unit="percentunit",
                    minimum=0,
                ),
                Panel(
                    title="GPU temperature (DCGM)",
                    description="Over all GPUs. Most slow down between 85 and 95 degrees.",
                    queries=spread("DCGM_FI_DEV_GPU_TEMP", needs="dcgm", of="GPU"),
                    unit="celsius",
                ),
                Panel(
                    title="GPU errors (DCGM)",
                    description="The number of the newest Xid of each GPU that had one: 48, 63, 64, 94, 95 are its memory, 79 is a GPU "
                    "that has fallen off the bus, 74 is NVLink, 13 and 31 are mostly the program.",
                    queries=(
                        Query(
                            expr="topk(10, max by (Hostname, gpu) (DCGM_FI_DEV_XID_ERRORS > 0))",
                            legend="Xid",
                            instant=True,
                            needs="dcgm",
                        ),
                    ),
                    kind="table",
                    unit="none",
                ),
                Panel(
                    title="GPU clock (DCGM)",
                    description="Of the multiprocessors, over all GPUs. One that heat or power holds down is below the others.",
                    queries=spread("DCGM_FI_DEV_SM_CLOCK * 1e6", needs="dcgm", of="GPU"),
                    unit="hertz",
                    minimum=0,
                ),
            ),
        ),
        Row(
            title="Chosen ranks (variable Ranks)",
            panels=(
                Panel(
                    title="Images a second of chosen ranks",
                    description=f"The {MANY} fastest of those chosen above.",
                    queries=(Query(expr=f"topk({MANY}, max by (rank) ({{images_per_second}}{RANK}))", legend="rank {{rank}}"),),
                    unit="images/s",
                    width=12,
                    minimum=0,
                ),
                Panel(
                    title="Own work a step of chosen ranks",
                    description=f"The {MANY} slowest of those chosen above.",
                    queries=(
                        Query(
                            expr=f"topk({MANY}, sum by (rank) (rate({{compute_seconds_total}}{RANK}{I}))"
                            f" / sum by (rank) (rate({{steps_total}}{RANK}{I})))",
                            legend="rank {{rank}}",
                        ),
                    ),
                    unit="s",
                    width=12,
                    minimum=0,
                ),
            ),
        ),
    ),
)

WAIT = f"{by_rank('data_wait_seconds_total')} / {by_rank('step_seconds_sum')}"

DATA = Dashboard(
    name="data",
    title="Fine-tuning / Data",
    description="The input pipeline, streaming, and samples that were set aside.",
    variables=(
        NAMESPACE_VARIABLE,
        RUN_VARIABLE,
    ),
    annotations=ANNOTATIONS,
    rows=(
        Row(
            title="Now",
            panels=(
                number(
                    "Waiting for data",
                    "Share of the steps' time. Above 30 % FinetuneDataWait fires.",
                    Query(expr=f"sum(rate({{data_wait_seconds_total}}{R}{I})) / sum(rate({{step_seconds_sum}}{R}{I}))", legend="wait"),
                    unit="percentunit",
                    thresholds=((0.1, ORANGE), (0.3, RED)),
                    decimals=1,
                    width=4,
                ),
                IMAGES,
                number(
                    "Images of this attempt",
                    "That its ranks trained on.",
                    Query(expr=f"sum({{samples_total}}{R})", legend="images"),
                    base="blue",
                    width=4,
                ),
                number(
                    "Set aside",
                    "Distinct samples that could not be read, over all ranks and attempts; which ones is in quarantine.jsonl.",
                    Query(expr=f"max({{run_quarantined_samples}}{R})", legend="samples"),
                    unit="none",
                    thresholds=((1, ORANGE),),
                    decimals=0,
                    width=4,
                ),
                number(
                    "Loaders' memory",
                    "Images that all ranks hold: decoded, or row groups held or being read.",
                    Query(expr=f"sum({{loader_memory_bytes}}{R})", legend="memory"),
                    unit="bytes",
                    base="blue",
                    width=4,
                ),
                number(
                    "Epoch",
                    "As a fraction.",
                    Query(expr=f"max({{epoch}}{R})", legend="epoch"),
                    unit="none",
                    base="blue",
                    decimals=2,
                    width=4,
                ),
            ),
        ),
        Row(
            title="Does the input keep up?",
            panels=(
                Panel(
                    title="Waiting for data, by rank",
                    description="Share of the steps' time, by rank. Above the line FinetuneDataWait fires.",
                    queries=spread(WAIT),
                    unit="percentunit",
                    minimum=0,
                    thresholds=((0.3, RED),),
                    threshold_line=True,
                ),
                Panel(
                    title="Images a second, and without any wait",
                    description="While stepping, all ranks together; and what it would be if no step waited for its batch.",
                    queries=(
                        Query(expr=f"sum(rate({{samples_total}}{R}{I})) / avg(rate({{step_seconds_sum}}{R}{I}))", legend="as it is"),
                        Query(
                            expr=f"sum(rate({{samples_total}}{R}{I}))"
                            f" / (avg(rate({{step_seconds_sum}}{R}{I})) - avg(rate({{data_wait_seconds_total}}{R}{I})))",
                            legend="without waiting for data",
                        ),
                    ),
                    unit="images/s",
                    minimum=0,
                ),
                worst(
                    "Ranks that wait most",
                    "The ten with the largest share of their steps' time.",
                    f"topk(10, {WAIT})",
                    "waiting",
                    unit="percentunit",
                ),
            ),
        ),
        Row(
            title="Reading and decoding",
            panels=(
                Panel(
                    title="Decoding",
                    description="Share of the time in which a rank's loader reads and decodes, all its threads added up, mean over ranks: "
                    "200 % are two threads at work. Near 0 once images are cached.",
                    queries=(Query(expr=f"avg(rate({{decode_seconds_total}}{R}{I}))", legend="decoding"),),
                    unit="percentunit",
                    minimum=0,
                ),
                Panel(
                    title="Read",
                    description="Bytes of row groups a second, all ranks together; one that is read again counts again.",
                    queries=(Query(expr=f"sum(rate({{read_bytes_total}}{R}{I}))", legend="read"),),
                    unit="Bps",
                    minimum=0,
                ),
                Panel(
                    title="Batches wait for reads",
                    description="Share of the time in which the making of batches waits for a streamed data set; the steps wait only where "
                    "batches run out.",
                    queries=spread(by_rank("read_wait_seconds_total")),
                    unit="percentunit",
                    minimum=0,
                ),
                Panel(
                    title="Loader's memory",
                    description="By rank: what is held of images, decoded or as row groups.",
                    queries=spread(f"{{loader_memory_bytes}}{R}"),
                    unit="bytes",
                    minimum=0,
                ),
                Panel(
                    title="Evaluation",
                    description="Share of the ranks' time in evaluations of a held-out split; counted when each ends.",
                    queries=(Query(expr=f"avg(rate({{evaluation_seconds_total}}{R}{I}))", legend="evaluation"),),
                    unit="percentunit",
                    minimum=0,
                ),
                Panel(
                    title="Images by rank",
                    description="Images a second that ranks trained on.",
                    queries=spread(by_rank("samples_total")),
                    unit="images/s",
                    minimum=0,
                ),
            ),
        ),
        Row(
            title="Quarantine",
            panels=(
                Panel(
                    title="Samples set aside",
                    description="Distinct ones, over all ranks and attempts. The run ends where they pass --data.max-bad-fraction.",
                    queries=(Query(expr=f"max({{run_quarantined_samples}}{R})", legend="samples"),),
                    unit="none",
                    minimum=0,
                    width=12,
                ),
                Panel(
                    title="Found by this attempt, by reason",
                    description="A sample is found again by every attempt that reads it.",
                    queries=(
                        Query(
                            expr=f"sort_desc(sum by (reason) ({{quarantined_samples_total}}{R}) > 0)",
                            legend="{{reason}}",
                            instant=True,
                            needs="bad sample",
                        ),
                    ),
                    kind="bargauge",
                    unit="none",
                    base=ORANGE,
                    minimum=0,
                    width=12,
                ),
            ),
        ),
    ),
)

DASHBOARDS = (RUN, CLUSTER, DATA)
