"""The CUDA binding: the operators of ``torch.ops.aqlm_c`` for GPUs, registered at import (csrc/torch/ops_cuda.cpp).

No names.
"""
