"""The switch for the CUDA fast paths: `refine_triton`, `fusion_triton` and the recorded diffusion step.

They equal the plain formulas in Triton's interpreter but have not run on a GPU yet, so they have to be enabled:
CLIPER_CUDA_KERNELS=1 in the environment of every worker.
"""

import importlib.util
import os

import torch
from torch import Tensor


def asked_for() -> bool:
    """Whether CLIPER_CUDA_KERNELS=1 enables the CUDA fast paths in this process."""
    return os.environ.get("CLIPER_CUDA_KERNELS") == "1"


def available(heads: Tensor) -> bool:
    """Whether the kernels run on heads [..., D]: enabled, on CUDA, without gradients, with Triton installed.

    D must be a power of two from 16, as in every CLIP and in Stable Diffusion 2.
    """
    width = heads.shape[-1]
    fits = width >= 16 and width & (width - 1) == 0
    return heads.is_cuda and fits and not torch.is_grad_enabled() and _INSTALLED and asked_for()


_INSTALLED = importlib.util.find_spec("triton") is not None
