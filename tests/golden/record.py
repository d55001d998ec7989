"""Records what this machine's runs give into expected.json.

    python -m tests.golden.record             # this machine's rounding, where it is not known yet
    python -m tests.golden.record --again     # everything that differs, after a change that is meant to change results

What is pinned already and comes out otherwise is refused without `--again`: then it is the code that has changed, not the machine.
The interrupted run was made once, at 86cc2bf:

    python -m tests.golden.record --stopped DEST      # starts it under DEST and stops it in the middle of its first epoch
"""

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.golden.commands import NAMED, RESUMED, RUNS, SETTINGS, STOPPED, Goldens, Started, has_bf16, print_config
from tests.golden.probe import probe
from tests.golden.results import bits, differences, facts

EXPECTED = Path(__file__).parent / "expected.json"
STOPPED_WITH = "45011139925cd8f5"
"""The probe of the machine that run_of_86cc2bf was made on: a run there that is not stopped must end in the same bits."""


def load() -> dict[str, Any]:
    expected: dict[str, Any] = json.loads(EXPECTED.read_text())
    return expected


def record(goldens: Goldens, here: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what is the same everywhere, what this machine's rounding gives)."""
    rounded: dict[str, Any] = {}
    everywhere: dict[str, Any] = {
        "settings": {name: print_config(args) for name, args in SETTINGS.items()},
        "names": {name: goldens.name_of(args) for name, args in NAMED.items()},
        "runs": {},
    }
    for name, golden in RUNS.items():
        if golden.needs_bf16 and not has_bf16():
            continue
        print(name, flush=True)
        folder = goldens.finished(name)
        everywhere["runs"][name] = facts(folder)
        found = rounded.setdefault(golden.bits_of, bits(folder))
        if changed := differences(bits(folder), found):
            raise SystemExit("\n".join([f"{name} ends in other bits than another number of workers:", *changed]))
    print("the run that 86cc2bf stopped", flush=True)
    rounded[RESUMED] = bits(goldens.finished(RESUMED))
    if here == STOPPED_WITH:
        whole = goldens.start("whole", tuple(STOPPED))
        if whole.finish(timeout=400):
            raise SystemExit(whole.output())
        if changed := differences(rounded[RESUMED], bits(whole.folder)):
            raise SystemExit("\n".join(["the run that 86cc2bf stopped ends in other bits than one that is not:", *changed]))
    return everywhere, rounded


def make_stopped(storage: Path) -> int:
    run = Started(*STOPPED, storage=storage)
    run.wait_for("checkpoint_committed", step=10)
    run.signal(signal.SIGTERM)
    status = run.finish()
    print(run.output())
    return 0 if status == 128 + signal.SIGTERM else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.golden.record", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--again", action="store_true", help="overwrite what is pinned")
    parser.add_argument("--stopped", type=Path, metavar="DEST", help="make a run that was stopped, and nothing else")
    args = parser.parse_args()
    if args.stopped:
        return make_stopped(args.stopped)
    expected = load() if EXPECTED.exists() else {"everywhere": {}, "by_rounding": {}}
    here = probe()
    if here in expected["by_rounding"] and not args.again:
        print(f"error: what this machine's rounding ({here}) gives is pinned already; --again records it anew", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        goldens = Goldens(Path(folder))
        try:
            everywhere, rounded = record(goldens, here)
        finally:
            goldens.close()
    for name, pinned in expected["everywhere"].get("runs", {}).items():
        everywhere["runs"].setdefault(name, pinned)  # one that this CPU cannot do
    changed = differences(everywhere, expected["everywhere"]) if expected["everywhere"] else []
    if changed and not args.again:
        print("\n".join(["error: this does not depend on rounding, and differs (--again overwrites it):", *changed]), file=sys.stderr)
        return 1
    print("\n".join(changed))
    expected["everywhere"] = everywhere
    expected["by_rounding"][here] = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability(), "runs": rounded}
    EXPECTED.write_text(json.dumps(expected, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
