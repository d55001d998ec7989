"""A finished model's answers: `predictor` holds the model and answers batches of images; the others answer any number of them on a cluster,
once each, whatever is killed meanwhile. `inputs` lists the images, `plan` cuts the list into shards and writes it down, `shard` answers one
of them, as `columns` stores it, and `job` has Ray Data do them all. `trainer.predict` is the command line.
"""
