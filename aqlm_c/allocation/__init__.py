"""Bits where they count: a scheme for each layer, by what its error does to the model's predictions."""
