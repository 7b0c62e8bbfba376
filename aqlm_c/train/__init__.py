"""Tuning of what is quantized: codebooks, scales, norms and biases, codes held."""
