"""Names that a run's writers and its readers share: each is written down here once.

The coordinator and the exporters write by them; trainer, deploy and tests read. This file imports nothing, so that a command which only
reads a run's folder pays for no Ray and no Prometheus client."""

PREFIX = "finetune_"
"""Of every metric's name."""
FILE_SD = "prometheus-targets.json"
"""In the run's folder: where Prometheus finds the run's processes (file_sd)."""
QUARANTINE = "quarantine.jsonl"
"""In the run's folder: the samples that the run could not read."""
