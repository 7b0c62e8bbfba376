"""Layers with quantized weights and the operators they run on."""
