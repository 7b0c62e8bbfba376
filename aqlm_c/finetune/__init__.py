"""Training of what quantization leaves continuous: codebooks, scales, norms and biases."""
