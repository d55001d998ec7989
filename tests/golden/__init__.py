"""Golden tests: what the command line gives today, pinned to the last bit, so that a change of the code's shape shows itself.

Runs are started as processes, and read from the files that they leave: nothing of `trainer`, `cluster` or `dataio` is imported, because
what is in them may move. What depends on how a CPU rounds is chosen by a probe (probe.py); everything else is held on every machine.

    commands.py       what is run
    results.py        what is read of a run's folder: `facts`, the same everywhere, and `bits`, which depend on rounding
    probe.py          how this machine rounds, as one hash
    expected.json     what is pinned; written by python -m tests.golden.record
    run_of_86cc2bf/   a run that commit 86cc2bf stopped in the middle of an epoch: later code must go on from it
"""
