"""Calibration: activations on their way through the blocks of a model, and H of each linear's inputs."""
