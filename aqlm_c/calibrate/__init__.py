"""Calibration: activations as they pass through the blocks of a model, and H of each linear's inputs."""

from ..errors import require

require("torch")
