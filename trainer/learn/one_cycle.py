"""The one-cycle schedule (Smith and Topin 2018): the learning rate rises to its peak and falls again along half cosines, while the momentum
falls and rises. Pure; trainer.learn.optim calls it. tests/trainer/test_one_cycle.py compares it with torch.optim.lr_scheduler.OneCycleLR.
"""

import math

from trainer.settings.tree import OptimConfig

START_FRACTION = 1 / 25
"""The first learning rate as a fraction of the peak."""
RISE = 0.3
"""The fraction of the run in which it rises, where no warm-up is set."""
LEAST_MOMENTUM = 0.85 / 0.95
"""The momentum at the peak as a fraction of `optim.momentum`."""


def one_cycle_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """The learning rate at a step."""
    start, final = config.lr * START_FRACTION, config.lr * config.final_lr_fraction
    return _along(config, step, total_steps, start, config.lr, final)


def one_cycle_momentum(config: OptimConfig, step: int, total_steps: int) -> float:
    """SGD's momentum, or AdamW's first beta, at a step."""
    return _along(config, step, total_steps, config.momentum, config.momentum * LEAST_MOMENTUM, config.momentum)


def _along(config: OptimConfig, step: int, total_steps: int, first: float, peak: float, last: float) -> float:
    warmup = config.warmup_of(total_steps)
    rises_until = (warmup or RISE * total_steps) - 1
    if rises_until > 0 and step <= rises_until:
        return _cosine(first, peak, step / rises_until)
    begin, end = max(rises_until, 0.0), total_steps - 1
    return _cosine(peak, last, min((step - begin) / (end - begin), 1.0)) if end > begin else peak


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * progress))
