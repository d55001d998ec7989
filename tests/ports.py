"""Ports of this machine that nothing listens on, for servers that must be told one."""

import random
import socket
from pathlib import Path


def free_ports(count: int) -> list[int]:
    """Neither those that the kernel gives to clients, any of whose connections could take one before the server that is to have it, nor
    those below 20,000, which Ray keeps for its workers."""
    lowest, highest = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    candidates = [port for port in range(20_000, 65_536) if not lowest <= port <= highest]
    found: list[int] = []
    for port in random.SystemRandom().sample(candidates, len(candidates)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise AssertionError(f"no {count} free ports from 20,000 up that are not for clients ({lowest} to {highest})")
