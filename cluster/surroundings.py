"""The environment variables that a rank's process finds: those of another launcher are dropped, those that name a network are checked.

rank.py calls both before ranks form their group. A rank inherits the environment of whoever started Ray on its node, so what torchrun,
a batch system or another job left there reaches it.
"""

import os
import socket
from collections.abc import MutableMapping, Sequence

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"

# torch and libraries on it read these to find their place among the processes; ours is in the Task. Other variables are the user's.
_PLACE = frozenset(
    {
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE"),
        *("ROLE_NAME", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"),
        *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_NPROCS"),
    }
)
_PLACE_PREFIXES = ("TORCHELASTIC_", "PMI_", "PMIX_", "OMPI_COMM_WORLD_")


class NoSuchInterface(ValueError):
    """An environment variable names a network interface that this node does not have."""

    failure_kind = "user"


def drop_foreign(environment: MutableMapping[str, str]) -> None:
    """Remove what another launcher says about ranks, addresses and ports."""
    for name in [name for name in environment if name in _PLACE or name.startswith(_PLACE_PREFIXES)]:
        del environment[name]


def check_interface(variable: str, value: str, interfaces: Sequence[str] | None = None) -> None:
    """NoSuchInterface if `value` of GLOO or NCCL fits none of this node's `interfaces`. gloo takes names; NCCL beginnings of names, whole
    names after "=", and what to leave out after "^"."""
    found = [name for _, name in socket.if_nameindex()] if interfaces is None else list(interfaces)
    if variable == GLOO:
        missing = [name for name in value.split(",") if name not in found]
    else:
        words = value.lstrip("^=").split(",")
        named = {name for name in found if (name in words if value.startswith(("=", "^=")) else name.startswith(tuple(words)))}
        missing = [] if (set(found) - named if value.startswith("^") else named) else [value]
    if missing:
        raise NoSuchInterface(
            f"{variable}={value}: {os.uname().nodename} has no network interface {', '.join(missing)}; it has {', '.join(found)}. "
            f"Unset {variable}, or give an interface that every node has"
        )
