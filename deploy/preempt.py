"""Runs on a node that is about to go: tells the run in time, and waits until the run has committed and left.

    python -m deploy.preempt worker --notice /tmp/preempted --seconds 90     preStop hook of a worker's pod
    python -m deploy.preempt head --seconds 90                               preStop hook of the head's pod
    python -m deploy.preempt watch-spot --notice /tmp/preempted              on an AWS spot instance, in the background

Called by deploy/kubernetes and deploy/vms. The run watches for the file (`--cluster.preemption-notice`) and for nodes that Ray drains;
trainer/drive/attempt.py decides what it does then. This command uses both: the run sees the file within half a second, and a drained node
gets no new worker.
"""

import argparse
import itertools
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

POLL_SECONDS = 0.2
DRAIN_SECONDS = 20.0
HEARD_SECONDS = 1.0
METADATA = "http://169.254.169.254"
SPOT_POLL_SECONDS = 5.0  # the notice comes two minutes before the end; AWS recommends polling this often
ZYGOTE, DRIVER = "cluster.zygote", "trainer.run"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.preempt", description="Tell a run that this node is about to go.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, words in (
        ("worker", "this node's worker: notice, drain, wait until its ranks have left"),
        ("head", "this node's driver: SIGTERM unless it had one, wait until it has committed"),
        ("watch-spot", "wait for AWS to announce the end of this spot instance, then do what `worker` does"),
    ):
        command = commands.add_parser(name, help=words, description=words)
        command.add_argument("--seconds", type=float, default=90.0, help="how long to wait at most")
        if name != "head":
            command.add_argument("--notice", type=Path, required=True, help="the file that --cluster.preemption-notice names")
            command.add_argument("--node-id", default="", help="the Ray node to drain; this machine's, where there is one only")
            command.add_argument("--address", default="", help="of the Ray cluster; RAY_ADDRESS, or the one on this machine")
        if name == "watch-spot":
            command.add_argument("--metadata", default=METADATA, help="address of the instance's metadata")
    args = parser.parse_args(argv)
    if args.command == "head":
        return head(args.seconds)
    if args.command == "watch-spot":
        watch_spot(args.metadata)
    return worker(args.notice, args.seconds, node_id=args.node_id, address=args.address)


def worker(notice: Path, seconds: float, *, node_id: str = "", address: str = "") -> int:
    """0 once no rank is left on this node, 1 if one remains after `seconds`."""
    end = time.monotonic() + seconds
    notice.parent.mkdir(parents=True, exist_ok=True)
    notice.touch()
    drain(max(1.0, seconds), node_id=node_id, address=address)
    return wait_until_gone(ZYGOTE, end)


def head(seconds: float) -> int:
    """0 once no driver is left on this node, 1 if one remains after `seconds`."""
    end = time.monotonic() + seconds
    drivers = processes(DRIVER)
    if drivers:
        time.sleep(HEARD_SECONDS)  # by now a driver that was just told to stop has logged it
    for pid in drivers:
        if not was_told(pid):  # a second SIGTERM would end it without a commit
            try:
                os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:
                continue
    return wait_until_gone(DRIVER, end)


def drain(seconds: float, *, node_id: str = "", address: str = "") -> None:
    """Have Ray place nothing more on this node. If the head is already gone, say so and continue."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", "this node is about to go", "--deadline-remaining-seconds", str(int(seconds))]
    command += ["--node-id", node_id] if node_id else []
    command += ["--address", address] if address else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DRAIN_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        print(f"Ray did not answer in {DRAIN_SECONDS:g} s; this node is not drained", file=sys.stderr)
        return
    if done.returncode != 0:
        last = (done.stdout + done.stderr).strip().splitlines()[-1:]
        print(f"Ray did not drain this node: {''.join(last)}", file=sys.stderr)


def watch_spot(metadata: str) -> None:
    """Return once AWS says that this instance will be stopped or terminated (instance metadata, version 2)."""
    while True:
        try:
            ask = urllib.request.Request(
                f"{metadata}/latest/api/token", method="PUT", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"}
            )
            with urllib.request.urlopen(ask, timeout=5) as answer:
                token = answer.read().decode()
            look = urllib.request.Request(f"{metadata}/latest/meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": token})
            with urllib.request.urlopen(look, timeout=5) as answer:
                print(f"this spot instance is about to go: {answer.read().decode()}", flush=True)
                return
        except urllib.error.HTTPError as error:
            if error.code != 404:  # 404: nothing is planned
                print(f"{metadata}: {error}", file=sys.stderr, flush=True)
        except OSError as error:
            print(f"{metadata}: {error}", file=sys.stderr, flush=True)
        time.sleep(SPOT_POLL_SECONDS)


def processes(module: str) -> list[int]:
    """Living processes here that were started with `-m module`."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:  # the process has ended meanwhile
                continue
            if any(pair == (b"-m", module.encode()) for pair in itertools.pairwise(words)):
                found.append(int(folder.name))
    return sorted(found)


def was_told(pid: int) -> bool:
    """True if the driver's log, which is its standard output, says that it heard SIGTERM."""
    try:
        return b"SIGTERM: " in Path(f"/proc/{pid}/fd/1").read_bytes() if Path(f"/proc/{pid}/fd/1").is_file() else False
    except OSError:
        return False


def wait_until_gone(module: str, end: float) -> int:
    while left := processes(module):
        if time.monotonic() > end:
            print(f"{module} is still at work (process {', '.join(map(str, left))}); going all the same", file=sys.stderr)
            return 1
        time.sleep(POLL_SECONDS)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
