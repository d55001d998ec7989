"""The finished model as files that anybody can use: written by `rank` at a run's end, read by the commands that ask the model.

May be imported by `rank` and the command lines. How a network is built is `models`' and the task's; what a run's folder is, `runs`'.
"""
