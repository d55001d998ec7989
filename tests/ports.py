"""Ports of this machine that nothing listens on, for servers that must be told one."""

import random
import socket
from pathlib import Path


def free_ports(count: int) -> list[int]:
    """Below those that the kernel gives to clients, any of whose connections could take one before the server that is to have it."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found: list[int] = []
    for port in random.SystemRandom().sample(range(lowest // 2, lowest), lowest // 4):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise AssertionError(f"no {count} free ports from {lowest // 2} to {lowest}")
