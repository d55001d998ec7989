"""The finished model as files that anybody can use. `rank` writes them at a run's end; `trainer.predict` and `trainer.evaluate` read them.

`rank` and the command lines may import it. `models` and the tasks build networks; `runs` defines a run's folder.
"""
