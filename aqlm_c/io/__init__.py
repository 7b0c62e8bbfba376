"""What is read and written: checkpoints, text and tokens."""
