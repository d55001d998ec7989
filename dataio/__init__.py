"""Reads and converts data: from bytes on disk to uint8 batches on a device. Knows nothing of Ray, torch.distributed or the model."""
