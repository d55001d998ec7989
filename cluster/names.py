"""Names that a run's writers and readers share; each is defined once, here.

The coordinator and the exporters write under these names; trainer, deploy and tests read them. This file imports nothing of ours, so a
command that only reads a run's folder does not load Ray or a Prometheus client."""

from typing import Literal, get_args

Kind = Literal["infrastructure", "preempted", "hang", "numbers", "storage", "data", "user"]
"""What a failure means for a retry (docs/fault-tolerance.md has the table; failures.decide acts on it)."""
KINDS: tuple[Kind, ...] = get_args(Kind)
PREFIX = "finetune_"
"""Prefix of every metric's name."""
FILE_SD = "prometheus-targets.json"
"""File in the run's folder: tells Prometheus where the run's processes are (file_sd)."""
QUARANTINE = "quarantine.jsonl"
"""File in the run's folder: the samples that the run could not read."""
