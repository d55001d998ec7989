"""Coordinates the processes of a run: launching, failures, checkpoints, metrics, the journal. Used by trainer; knows nothing of images
or models."""
