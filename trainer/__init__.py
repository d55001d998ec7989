"""What is trained: the model, its optimiser, its steps, its evaluation. `trainer.run` puts everything together."""
