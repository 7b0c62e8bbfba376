"""What is read and written: checkpoints, text and tokens."""

from ..errors import require

require("torch")
