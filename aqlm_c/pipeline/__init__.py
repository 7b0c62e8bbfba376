"""The run over a model: plan, then for each block capture, quantize, tune, store and advance."""

from ..errors import require

require("torch")
