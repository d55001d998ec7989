"""Bytes on disk to uint8 batches on a device. Knows nothing of Ray, of torch.distributed, or of what is trained."""
