"""The codec of texts: tokens, made once at conversion by a model's own tokenizer, and batches of them padded to what a step needs."""
