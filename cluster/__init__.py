"""Many processes acting as one: launching, failures, checkpoints, metrics, the journal. Knows nothing of images or models."""
