"""Serves an ONNX export of a finished run over HTTP, with Ray Serve (extra `serve`).

`python -m deploy.serve FOLDER` does so on this machine; `deploy.serve.app:build` is what a Ray Serve config file or a RayService names. Two
deployments make the application: one replica of `front`, which knows tokens, limits and metrics and so has exact ones, and any number of
replicas of `model`, which prepare images or texts and ask the network. The files other than `app` and `__main__` know no Ray.

Nobody imports this package. What an export holds is trainer.formats' to say, how an image is decoded dataio's, what outputs mean
trainer.tasks'.
"""
