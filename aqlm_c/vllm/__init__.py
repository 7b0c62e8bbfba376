"""vLLM's plugin: `vllm serve DIR` runs AQLM checkpoints by the kernels of this package.

The entry point `vllm.general_plugins` of pyproject.toml names `register`, which vLLM calls in each of its processes;
the checkpoint's `quant_method` chooses the rest. Written and run against vLLM 0.32.

    loading.py           which tensors a rank keeps of each layer, and whether they are what config.json says
    layers.py            the layers themselves: linears side by side, experts
    config.py            what vLLM asks of a quantization: which layer is loaded by what
    linear.py experts.py   the methods of linears, embeddings and output layers; of routed experts

Only the last three import vLLM.
"""

import logging

log = logging.getLogger("aqlm_c")

METHODS = ("aqlm", "aqlm_c")


def register() -> None:
    """Tell vLLM who loads checkpoints of `METHODS`; a name that it knows already stays as it is.

    In a vLLM whose interfaces are others nothing is registered, with a warning: it serves other models still.
    """
    try:
        from vllm.model_executor.layers import quantization

        from .config import AqlmConfig

        known, take = quantization.QUANTIZATION_METHODS, quantization.register_quantization_config
    except (ImportError, AttributeError) as error:
        log.warning("aqlm_c's plugin for vLLM 0.32 does not go with this one, which cannot load AQLM models: %s", error)
        return
    for name in METHODS:
        if name not in known:
            take(name)(AqlmConfig)
