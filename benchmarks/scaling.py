"""Data-parallel scaling: measured with a few workers on this CPU next to the simulator's prediction, and simulated up to 1,024 GPUs.

    python -m benchmarks.scaling [--workers 1 2] [--rounds 9] [--precision bf16] [--json] [--out FILE] [--plot FILE.svg|.png]
    python -m benchmarks.scaling --simulate-only [...]      seconds; nothing is measured

Measured: real processes, gloo on loopback, one thread a worker, the trainer's own step. Each number of workers has its own processes, which
wait on a pipe while the others take their turn, so all rounds are interleaved. "weak" is DDP with the same images for each worker; "same
run" is one run of V virtual ranks (the tree, the same bits) carried by one worker or by more. The prediction uses the step of one worker,
its spread, and the times of a few reduction sizes; since all cores compute, it hides none of the reduction. It does not know how the
workers' memory traffic slows each other; "no reduction" measures that.

Simulated (benchmarks.simulator, which gives the source of each constant): weak scaling of ResNet-18 on nodes of 8 H200-like GPUs. No run is
behind those lines. The published all-reduce times that they rest on, and the model's errors on them, are printed and drawn as well.
"""

import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.common import add_arguments, described, finish, interleave, median_interval, parser_of, spread, target
from benchmarks.simulator import (
    DDP_BUCKET_BYTES,
    LLAMA_MTTF_HOURS,
    MIB,
    NOTED_EFFICIENCY,
    NOTES,
    TABLES,
    VALID_MIB,
    Course,
    Network,
    Setup,
    anchors_left_out,
    band_errors,
    best_bucket,
    efficiencies,
    fit_course,
    fitted,
    measured_recovery_seconds,
    measured_stall_seconds,
    simulate,
    validation,
)

GPUS = tuple(2**power for power in range(11))
GLOBAL_BATCH = 8192
EXCHANGE_MIB = (1, 4, 16, 43)
"""Reduction sizes that calibrate the prediction: ResNet-18's gradients are 43 MiB."""


def main() -> int:
    parser = parser_of("scaling", __doc__)
    add_arguments(parser)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of workers to measure, 1 among them (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=32, help="images a worker (%(default)s)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--simulate-only", action="store_true", help="measure nothing")
    parser.add_argument("--plot", type=Path, help="draw it; .svg or .png")
    options = parser.parse_args()
    if 1 not in options.workers or min(options.workers) < 1:
        parser.error(f"--workers {options.workers}: 1 must be among them, as efficiency is counted from one worker")
    if options.plot is not None and options.plot.suffix not in (".svg", ".png"):
        parser.error(f"--plot {options.plot}: the name must end with .svg or .png")
    os.environ["OMP_NUM_THREADS"] = "1"
    result = described("scaling", options)
    lines: list[str] = []
    if not options.simulate_only:
        workers = sorted(set(options.workers))
        result["measured"] = measure(workers=workers, rounds=options.rounds, batch=options.batch, precision=options.precision)
        lines += measured_lines(result["measured"])
    result |= simulated()
    lines += simulated_lines(result)
    if options.plot is not None:
        draw(result, options.plot)
    return finish(result, options, lines)


# -- measured -------------------------------------------------------------------------------------------------------------------------


def measure(*, workers: Sequence[int], rounds: int, batch: int, precision: str) -> dict[str, Any]:
    """Steps and reductions, interleaved; efficiencies, and the simulator's prediction for them."""
    virtual_ranks = math.lcm(*workers)
    cases = {f"{name}, {count}": (count, name) for count in workers for name in case_names(count, max(workers))}
    rows: dict[str, list[tuple[float, float]]] = {label: [] for label in cases}  # (seconds of the slowest, CPU seconds of all)
    with tempfile.TemporaryDirectory(prefix="finetune-scaling-") as folder, crews(workers, folder, virtual_ranks, batch, precision) as ask:
        for count, name in cases.values():
            ask(count, name)  # the first one allocates buffers
        for _, label in interleave(list(cases), rounds):
            taken = ask(*cases[label])
            rows[label].append((max(wall for wall, _ in taken), sum(cpu for _, cpu in taken)))
    found: dict[str, Any] = {
        label: {"seconds": spread([wall for wall, _ in row]), "cpu_seconds_all_workers": spread([cpu for _, cpu in row]), "rounds": row}
        for label, row in rows.items()
    }
    comparisons = [
        compare(kind, count, rows, batch=batch, virtual_ranks=virtual_ranks, cores=os.cpu_count() or 1)
        for count in workers
        if count > 1
        for kind in ("weak", "same run")
    ]
    return {
        "workers": list(workers),
        "virtual_ranks_of_same_run": virtual_ranks,
        "batch_per_worker": batch,
        "precision": precision,
        "threads_per_worker": 1,
        "cores": os.cpu_count(),
        "cases": found,
        "comparisons": comparisons,
    }


def case_names(workers: int, most: int) -> list[str]:
    names = ["weak", "same run"]
    if workers > 1:
        names += [f"{kind} {mib}" for kind in ("all_reduce", "tree") for mib in EXCHANGE_MIB]
    return [*names, "no reduction"] if workers == most > 1 else names


def compare(
    kind: str, workers: int, rows: Mapping[str, Sequence[tuple[float, float]]], *, batch: int, virtual_ranks: int, cores: int
) -> dict[str, Any]:
    """Efficiency of `workers` against one, round by round, next to the prediction."""
    alone, ours = ([wall for wall, _ in rows[f"{kind}, {count}"]] for count in (1, workers))
    # Weak: the work grows with the workers. Same run: the same work is shared.
    shares = 1 if kind == "weak" else workers
    measured = median_interval([one / shares / many for one, many in zip(alone, ours, strict=True)])
    images = batch if kind == "weak" else batch * virtual_ranks // workers
    compute = statistics.median(alone) / shares
    low, high = spread(alone)["quartiles"]
    exchange = "all_reduce" if kind == "weak" else "tree"
    course = fit_course(
        Course(base_seconds=0.0, nvlink_bytes_per_second=1e9),
        [(mib * MIB, workers, 1, statistics.median([wall for wall, _ in rows[f"{exchange} {mib}, {workers}"]])) for mib in EXCHANGE_MIB],
    )
    setup = Setup(
        network=Network(inside=(course,), between=(), gpus_per_node=workers),
        overlap=cores > workers,
        small_last=kind == "same run",
        images_per_gpu=images,
        images_per_second=images / compute,
        floor_seconds=0.0,
        optimizer_seconds=0.0,
        sigma=(high - low) / 1.349 / statistics.median(alone),  # for a normal distribution with these quartiles
        straggler="normal",
    )
    says, hidden = simulate(workers, setup), simulate(workers, replace(setup, overlap=True))
    contention = knowing_it = None
    if f"no reduction, {workers}" in rows and kind == "weak":
        free = [wall for wall, _ in rows[f"no reduction, {workers}"]]
        contention = median_interval([one / many for one, many in zip(alone, free, strict=True)])
        knowing_it = compute / (statistics.median(free) + says.exposed_seconds)
    return {
        "kind": kind,
        "workers": workers,
        "images_per_second": {"1": images * shares / statistics.median(alone), str(workers): images * workers / statistics.median(ours)},
        "efficiency": measured,
        "predicted_efficiency": says.efficiency,
        "predicted_if_all_overlapped": hidden.efficiency,
        "error": says.efficiency / measured["median"] - 1,
        "efficiency_of_cpu_time": statistics.median([cpu for _, cpu in rows[f"{kind}, 1"]])
        * (workers / shares)
        / statistics.median([cpu for _, cpu in rows[f"{kind}, {workers}"]]),
        "efficiency_without_reduction": contention,
        "predicted_knowing_contention": knowing_it,
        "predicted_step_seconds": says.step_seconds,
        "calibration": {
            "compute_seconds": compute,
            "sigma": setup.sigma,
            "overlap": setup.overlap,
            "exchange": exchange,
            "alpha_seconds": course.base_seconds,
            "bytes_per_second": course.nvlink_bytes_per_second,
        },
    }


Ask = Callable[[int, str], list[tuple[float, float]]]


@contextmanager
def crews(workers: Sequence[int], folder: str, virtual_ranks: int, batch: int, precision: str) -> Iterator[Ask]:
    """Processes for every number of workers; ask(workers, case) makes them do the case once, and returns each one's (wall, CPU) seconds."""
    context = multiprocessing.get_context("spawn")
    processes: list[Any] = []
    pipes: dict[int, list[Connection]] = {}
    try:
        for count in workers:
            pipes[count] = []
            for rank in range(count):
                here, there = context.Pipe()
                process = context.Process(
                    target=crew_member, args=(there, rank, count, max(workers), folder, virtual_ranks, batch, precision), daemon=True
                )
                process.start()
                there.close()
                processes.append(process)
                pipes[count].append(here)

        def ask(count: int, case: str) -> list[tuple[float, float]]:
            for pipe in pipes[count]:
                pipe.send(case)
            try:
                return [pipe.recv() for pipe in pipes[count]]
            except EOFError:
                raise RuntimeError(f"one of {count} workers ended in case {case!r}; what it said is above") from None

        yield ask
        for pipe in (pipe for crew in pipes.values() for pipe in crew):
            pipe.send("")
        for process in processes:
            process.join(30)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()


def crew_member(pipe: Connection, rank: int, workers: int, most: int, folder: str, virtual_ranks: int, batch: int, precision: str) -> None:
    import torch
    import torch.distributed as dist

    from benchmarks.reduction import Case, step_of
    from cluster.reduce import TreeReducer

    torch.set_num_threads(1)
    if workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{workers}", rank=rank, world_size=workers)
    each = virtual_ranks // workers
    cases: dict[str, Callable[[], object]] = {}
    cases["weak"], _ = step_of(Case(reducer="ddp" if workers > 1 else "none"), rank, workers, precision, batch)
    cases["same run"], _ = step_of(Case(reducer="tree", halves=each), rank, workers, precision, batch * each)
    cases["no reduction"], _ = step_of(Case(reducer="none"), rank, workers, precision, batch)

    def exchange(kind: str, mib: int) -> Callable[[], object]:
        values = torch.full((mib * MIB // 4,), 1e-3)
        if kind == "all_reduce":
            return lambda: dist.all_reduce(values.fill_(1e-3))  # otherwise sums of sums would grow
        reducer = TreeReducer([range(each, each + 1) for each in range(workers)], rank)
        reducer.lay_out([values])

        def tree() -> object:
            reducer.begin(rank)
            reducer.put(0, values)
            reducer.end()
            return reducer.finish()

        return tree

    if workers > 1:
        cases |= {f"{kind} {mib}": exchange(kind, mib) for kind in ("all_reduce", "tree") for mib in EXCHANGE_MIB}
    assert set(case_names(workers, most)) <= set(cases)
    while name := pipe.recv():
        if workers > 1:
            dist.barrier()
        begin, cpu = time.perf_counter(), time.process_time()
        cases[name]()
        own = time.perf_counter() - begin
        if workers > 1:
            dist.barrier()  # gloo's threads may still be working for the others
        pipe.send((own, time.process_time() - cpu))
    if workers > 1:
        dist.destroy_process_group()


# -- simulated ------------------------------------------------------------------------------------------------------------------------


def cases() -> dict[str, Setup]:
    """Label -> what to simulate."""
    stall, _ = measured_stall_seconds()
    recovery, _ = measured_recovery_seconds()
    tuned = Setup(small_last=True)
    return {
        "all-reduce, DDP's 25 MiB buckets": Setup(),
        "all-reduce, not overlapped": Setup(overlap=False),
        "all-reduce, small last bucket": tuned,
        "all-reduce, small last bucket, bf16 gradients": replace(tuned, bf16=True),
        "ordered tree": Setup(method="tree"),
        "all-reduce, small last bucket, 1 % stragglers, failures": replace(
            tuned, sigma=0.01, mttf_hours=LLAMA_MTTF_HOURS, stall_seconds=stall, recovery_seconds=recovery
        ),
    }


def simulated() -> dict[str, Any]:
    """{"simulated": ..., "validation": ..., "targets": ...}, a part of the result."""
    setups = cases()
    tuned = setups["all-reduce, small last bucket"]
    stall, recovery = measured_stall_seconds(), measured_recovery_seconds()
    rows = validation()
    held = [row for row in rows if row["claimed"] and row["role"] == "held out"]
    left_out = anchors_left_out()
    bands = band_errors()
    noted = {name: {"noted": NOTED_EFFICIENCY[name], "ours": ours} for name, ours in efficiencies(fitted()).items()}
    notes = {name: {"noted": NOTED_EFFICIENCY[name], "ours": ours} for name, ours in efficiencies(NOTES).items()}
    return {
        "simulated": {
            "note": "simulated: no run is behind these figures",
            "network": asdict(fitted()),
            "checkpoint_stall": {"seconds": stall[0], "source": stall[1]},
            "recovery": {"seconds": recovery[0], "source": recovery[1]},
            "mttf_hours_of_a_gpu": {"hours": LLAMA_MTTF_HOURS, "source": "arXiv 2407.21783, table 5"},
            "setups": {name: {key: value for key, value in asdict(setup).items() if key != "network"} for name, setup in setups.items()},
            "weak": {name: [asdict(simulate(gpus, setup)) for gpus in GPUS] for name, setup in setups.items()},
            "strong": {"global_batch": GLOBAL_BATCH, "rows": [asdict(simulate(gpus, tuned, global_batch=GLOBAL_BATCH)) for gpus in GPUS]},
            "buckets": [bucket_row(gpus) for gpus in (8, 64, 512)],
        },
        "validation": {
            "valid_mib": {str(nodes): list(sizes) for nodes, sizes in VALID_MIB.items()},
            "rows": rows,
            "bands": [{"nodes": nodes, "mib": mib, "outside": outside} for (nodes, mib), outside in bands.items()],
            "anchors_left_out": left_out,
            "efficiencies": noted,
            "efficiencies_with_the_notes_constants": notes,
            "all_reduce_with_the_notes_constants": [
                {"mib": mib, "seconds": 1e-6 * us, "ours": NOTES.all_reduce_seconds(mib * MIB, 8)}
                for mib, us in TABLES["h200"].microseconds.items()
            ],
        },
        "targets": [
            target(
                "all-reduce on 8 x H200: the notes' two times, worst error",
                max(abs(row["error"]) for row in rows if row["table"] == "h200"),
                at_most=0.05,
            ),
            target("the same, each from the other and XLA's bandwidth", max(abs(row["error"]) for row in left_out), at_most=0.05),
            target(
                "all-reduce on 8 x H100 (XLA's), held-out rows of 16 MiB to 1 GiB, worst error",
                max(abs(row["error"]) for row in rows if row["table"] == "xla" and row["role"] == "held out" and row["mib"] >= 16),
                at_most=0.05,
            ),
            target(
                "all-reduce on 2 and 4 nodes, 8 to 64 MiB, farthest outside the held-out tables' range",
                max(abs(outside) for outside in bands.values()),
                at_most=0.05,
            ),
            target(
                "the same, worst single row (the clusters themselves differ by as much)",
                max(abs(row["error"]) for row in held if row["nodes"] > 1),
                at_most=0.05,
            ),
            target(
                "the notes' efficiencies, worst error", max(abs(row["ours"] / row["noted"] - 1) for row in noted.values()), at_most=0.05
            ),
        ],
    }


def bucket_row(gpus: int) -> dict[str, Any]:
    ddp, tuned = Setup(), Setup(small_last=True)
    mib, best = best_bucket(gpus, ddp)
    return {
        "gpus": gpus,
        "ddp_25_mib": simulate(gpus, ddp).efficiency,
        "ddp_best_mib": mib,
        "ddp_best": best.efficiency,
        "small_last_25_mib": simulate(gpus, replace(tuned, bucket_bytes=DDP_BUCKET_BYTES)).efficiency,
    }


# -- shown ----------------------------------------------------------------------------------------------------------------------------


def measured_lines(found: Mapping[str, Any]) -> list[str]:
    lines = [
        f"Measured here: {found['precision']}, {found['batch_per_worker']} images a worker, one thread each, {found['cores']} cores; "
        "median (quartiles)"
    ]
    for label, row in found["cases"].items():
        low, high = row["seconds"]["quartiles"]
        cpu = row["cpu_seconds_all_workers"]["median"]
        lines.append(
            f"  {label:18} {1e3 * row['seconds']['median']:8.1f} ms ({low * 1e3:.1f} to {high * 1e3:.1f})  CPU {1e3 * cpu:8.1f} ms"
        )
    for row in found["comparisons"]:
        one, many = row["images_per_second"].values()
        measured = row["efficiency"]
        lines.append(
            f"  {row['kind']}, {row['workers']} workers: {one:.1f} -> {many:.1f} images/s, efficiency {measured['median']:.1%} "
            f"({measured['low']:.1%} to {measured['high']:.1%}); predicted {row['predicted_efficiency']:.1%}, "
            f"error {row['error']:+.1%} (with all of the reduction hidden: {row['predicted_if_all_overlapped']:.1%}); "
            f"by CPU time {row['efficiency_of_cpu_time']:.1%}"
        )
        if row["efficiency_without_reduction"] is not None:
            lines.append(
                f"    {row['efficiency_without_reduction']['median']:.1%} with no reduction at all: what the workers cost each other; "
                f"predicted knowing that: {row['predicted_knowing_contention']:.1%}"
            )
    return lines


def simulated_lines(result: Mapping[str, Any]) -> list[str]:
    found, checked = result["simulated"], result["validation"]
    names = list(found["weak"])
    lines = [
        "",
        "SIMULATED, weak scaling, 512 images a GPU: efficiency",
        "   GPUs  images/s   " + "  ".join(f"[{i}]  " for i in range(len(names))),
    ]
    for row, gpus in enumerate(GPUS):
        cells = "  ".join(f"{found['weak'][name][row]['efficiency']:6.1%}" for name in names)
        lines.append(f"  {gpus:5}  {found['weak'][names[2]][row]['images_per_second']:9,.0f}  {cells}")
    lines += [f"  [{i}] {name}{' (its images/s)' if i == 2 else ''}" for i, name in enumerate(names)]
    strong = ", ".join(f"{row['gpus']}: {row['efficiency']:.0%}" for row in found["strong"]["rows"])
    lines.append(f"  strong scaling of [2], {found['strong']['global_batch']} images in all: {strong}")
    for row in found["buckets"]:
        lines.append(
            f"  buckets on {row['gpus']} GPUs: 25 MiB {row['ddp_25_mib']:.1%}; {row['ddp_best_mib']} MiB, the best, {row['ddp_best']:.1%}; "
            f"25 MiB and a small last one {row['small_last_25_mib']:.1%}"
        )
    lines += ["", "All-reduce against published tables: error of ours (o = held out, . = fitted, [ ] = outside of the claimed sizes)"]
    for table in TABLES:
        rows = [row for row in checked["rows"] if row["table"] == table]
        errors: list[str] = []
        for row in rows:
            cell = f"{row['mib']:.3g}:{row['error']:+.1%}{'.' if row['role'] == 'fitted' else 'o'}"
            errors.append(cell if row["claimed"] else f"[{cell}]")
        lines += [f"  {rows[0]['what']}", "    " + " ".join(errors)]
    for name, row in checked["efficiencies"].items():
        lines.append(f"  {name}: {row['ours']:.1%}, noted {row['noted']:.1%}")
    return lines


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draws four panels: images/s, efficiency, all-reduce against published times, and the errors."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    plt.rcParams.update(
        {"svg.hashsalt": "scaling", "svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.alpha": 0.25, "legend.fontsize": 7.5}
    )
    figure, ((speed, share), (times, errors)) = plt.subplots(2, 2, figsize=(13, 9.5), layout="constrained")
    figure.suptitle(
        "SIMULATED: ResNet-18, 32x32 images, 512 a GPU at 75,000 images/s (estimated), nodes of 8 H200-like GPUs, 8 NICs of 400 Gb/s\n"
        "Lines are arithmetic, no run is behind them. Points are measurements: published ones, or made here where it says so.",
        fontsize=11,
    )
    _draw_scaling(result, speed, share)
    _draw_network(result["validation"], times, errors)
    for axes in (speed, times):
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _draw_scaling(result: Mapping[str, Any], speed: Any, share: Any) -> None:
    """Draws images/s and efficiency by the number of GPUs into two axes."""
    from matplotlib.ticker import FuncFormatter, MultipleLocator, NullLocator

    found, checked = result["simulated"], result["validation"]
    styles = {
        "all-reduce, DDP's 25 MiB buckets": ("C0", "-"),
        "all-reduce, not overlapped": ("C0", ":"),
        "all-reduce, small last bucket": ("C2", "-"),
        "all-reduce, small last bucket, bf16 gradients": ("C2", "--"),
        "ordered tree": ("C3", "-"),
        "all-reduce, small last bucket, 1 % stragglers, failures": ("C4", "-."),
    }
    per_gpu = found["weak"]["all-reduce, DDP's 25 MiB buckets"][0]["images_per_second"]
    speed.plot(GPUS, [per_gpu * gpus for gpus in GPUS], color="0.6", lw=1, label="ideal")
    for name, rows in found["weak"].items():
        color, dash = styles[name]
        speed.plot(GPUS, [row["images_per_second"] for row in rows], color=color, ls=dash, label=name)
        share.plot(GPUS, [row["efficiency"] for row in rows], color=color, ls=dash)  # labelled in the panel beside it
    strong = found["strong"]
    label = f"strong scaling, {strong['global_batch']:,} images in all"
    speed.plot(GPUS, [row["images_per_second"] for row in strong["rows"]], color="0.4", ls="--", lw=1, label=label)
    for place, row in checked["efficiencies"].items():
        label = "_" if "no overlap" not in place else "the project notes' figures\n(computed there)"
        share.plot(512 if "nodes" in place else 8, row["noted"], "k+", ms=9, label=label)
    lowest = 0.8
    for row in result.get("measured", {}).get("comparisons", ()):
        low, y, high = (row["efficiency"][key] for key in ("low", "median", "high"))
        label = f"MEASURED here: {row['workers']} CPU workers, {row['kind']}\n(hollow: the simulator's {row['predicted_efficiency']:.0%})"
        marker = "*" if row["kind"] == "weak" else "P"
        x = row["workers"] * (0.94 if row["kind"] == "weak" else 1.06)  # so that the two do not overlap
        share.errorbar(x, y, [[y - low], [high - y]], fmt=marker, color="k", ms=8, capsize=3, label=label)
        share.plot(x, row["predicted_efficiency"], marker, mfc="none", mec="k", ms=8)
        lowest = min(lowest, low - 0.03, row["predicted_efficiency"] - 0.03)
    speed.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="images/s", title="Images a second (simulated)")
    share.set(
        xscale="log", ylim=(lowest, 1.01), xlabel="GPUs", ylabel="efficiency", title="Efficiency against one GPU, weak scaling (simulated)"
    )
    share.yaxis.set_major_locator(MultipleLocator(0.05))
    share.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0%}"))
    tree = {row["gpus"]: row["efficiency"] for row in found["weak"]["ordered tree"]}
    bottom = lowest + (1.01 - lowest) / 60
    share.text(68, bottom, "shaded: beyond\nevery published\ntable, extrapolated", fontsize=8)
    below = [f"{tree[gpus]:.0%} on {gpus:,}" for gpus in GPUS if tree[gpus] < lowest]
    share.text(340, bottom, "\n".join(["ordered tree:", *below] if below else []), color="C3", fontsize=8)
    for axes in (speed, share):
        axes.axvspan(64, 1024, color="0.5", alpha=0.08, lw=0)
        axes.set_xticks(GPUS, [str(gpus) for gpus in GPUS])
        axes.xaxis.set_minor_locator(NullLocator())
    speed.legend(loc="upper left")
    share.legend(loc="lower left", bbox_to_anchor=(0.12, 0.0))


def _draw_network(checked: Mapping[str, Any], times: Any, errors: Any) -> None:
    """Draws one all-reduce against published times, and the model's errors, into two axes."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    network = fitted()
    grid = [2 ** (step / 8) for step in range(81)]  # MiB, 1 to 1,024
    colors = {1: "C0", 2: "C1", 4: "C2", 8: "C3"}
    markers = {"h200": "*", "xla": "s", "nvls": "v", "a": "o", "b": "^", "c": "D"}
    short = {"h200": "8 x H200, the notes", "xla": "8 x H100, XLA's table", "nvls": "8 x H100, one process"}
    models = [
        times.plot(grid, [1e6 * network.all_reduce_seconds(mib * MIB, 8 * nodes) for mib in grid], color=color, label=f"{8 * nodes} GPUs")[
            0
        ]
        for nodes, color in colors.items()
    ]
    shown: dict[str, Any] = {}
    for row in checked["rows"]:
        key = row["table"] if row["table"] in markers else row["table"][0]
        color = colors[row["nodes"]]
        face = color if row["role"] == "fitted" else "none"
        size = 9 if key == "h200" else 5
        label = short.get(key, f"H100, cluster {key.upper()}")
        shown.setdefault(key, times.plot(row["mib"], 1e6 * row["seconds"], markers[key], ms=size, mfc=face, mec=color, label=label)[0])
        errors.plot(row["mib"], row["error"], markers[key], ms=size, mfc=face, mec=color, alpha=1 if row["claimed"] else 0.4)
    times.set(
        xscale="log", yscale="log", xlabel="MiB", ylabel="microseconds", title="One all-reduce (filled points: fitted; hollow: held out)"
    )
    times.add_artist(times.legend(handles=models, loc="upper left", title="model"))
    times.legend(handles=list(shown.values()), loc="lower right", title="published (colour: GPUs)")
    errors.axhspan(-0.05, 0.05, color="0.5", alpha=0.15, lw=0)
    errors.axhline(0, color="0.4", lw=0.8)
    errors.axvspan(8, 64, color="C2", alpha=0.06, lw=0)
    errors.text(8.4, 0.24, "claimed sizes: 8 to 64 MiB (one node: from 16)", fontsize=8)
    errors.text(300, -0.047, "±5 %", fontsize=8)
    errors.set(
        xscale="log",
        xlabel="MiB",
        ylabel="model / published - 1",
        ylim=(-0.27, 0.26),
        title="Error of the model (faint: outside of the claimed sizes)",
    )
    errors.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:+.0%}"))
    for axes in (times, errors):
        ticks = [4**power for power in range(6)]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())


if __name__ == "__main__":
    sys.exit(main())
