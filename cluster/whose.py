"""Whose run this is, for Prometheus: `namespace` tells the runs of several users apart where their names are the same. Called by
trainer/drive/session.py."""

import getpass
import os
from collections.abc import Mapping
from pathlib import Path

KUBERNETES = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def owner_here() -> str:
    """The account's name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13 on
        return f"uid{os.getuid()}"


def namespace_here(environment: Mapping[str, str] = os.environ, mounted: Path = KUBERNETES) -> str:
    """The pod's namespace in Kubernetes (POD_NAMESPACE, or what is mounted with a service account's token), elsewhere the account's
    name."""
    if name := environment.get("POD_NAMESPACE", ""):
        return name
    try:
        name = mounted.read_text().strip()
    except (OSError, ValueError):
        name = ""
    return name or owner_here()
