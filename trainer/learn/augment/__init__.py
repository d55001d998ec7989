"""Augmentation on the device, after the codec's crop and flip: what is drawn (draws, tables), how pixels follow from it (geometry, colour),
both put together for a virtual rank's batch (views), and the mixing of its samples (mix).

trainer.learn.build puts it into the step, trainer.preview shows it. Evaluation never calls it. With all settings at their defaults there is
nothing here to call.
"""
