"""Faults from inside a rank, without a line in the product: on SIGUSR2 the main thread does what the file $FAULT_ACTION_FILE says.

Python imports a module of this name when it starts; the campaign puts this folder on the PYTHONPATH of the cluster that it starts.

    hang        the main thread sleeps for ten minutes: a hang in Python; the other ranks wait in a collective
    nan         the next gradient of the largest parameter contains a NaN
    flip        one bit of one weight changes
"""

import os
import signal
import sys
import time
from types import FrameType

if "FAULT_ACTION_FILE" in os.environ:

    def act(number: int, frame: FrameType | None) -> None:
        with open(os.environ["FAULT_ACTION_FILE"]) as file:
            action = file.read().strip()
        if action == "hang":
            time.sleep(600)
            return
        import gc

        import torch

        models = [thing for thing in gc.get_objects() if isinstance(thing, torch.nn.Module)]
        parameter = max((p for model in models for p in model.parameters() if p.requires_grad), key=torch.Tensor.numel)
        if action == "nan":

            def poison(gradient: torch.Tensor) -> torch.Tensor:
                handle.remove()
                poisoned = gradient.clone()
                poisoned.view(-1)[0] = float("nan")
                return poisoned

            handle = parameter.register_hook(poison)
        elif action == "flip":
            with torch.no_grad():
                parameter.data.view(torch.int32).view(-1)[7] ^= 1 << 3
        print(f"fault injected: {action}", file=sys.stderr, flush=True)

    signal.signal(signal.SIGUSR2, act)
