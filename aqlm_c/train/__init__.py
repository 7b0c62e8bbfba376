"""Tuning of what is quantized: codebooks, scales, norms and biases, codes held."""

from ..errors import require

require("torch")
