"""Layers with quantized weights and the operators they run on."""

from ..errors import require

require("torch")
