"""What a convolution multiplies in, which for float32 is a setting of PyTorch's.

Tensor cores take float32 in TF32, with 10 bits of mantissa, where ``torch.backends.cudnn.allow_tf32`` or, in PyTorch 2.9 and
newer, ``torch.backends.cudnn.conv.fp32_precision`` says so: cuDNN's convolutions and the Triton kernels alike. Sums are float32
either way.
"""

from __future__ import annotations

import torch

TF32, IEEE = "tf32", "float32"


def arithmetic(dtype: torch.dtype) -> str:
    """``"float16"``, ``"bfloat16"``, ``"tf32"`` for float32 tensors in TF32, or ``"float32"``, as things are set now."""
    if dtype == torch.float32 and takes_tf32():
        return TF32
    return str(dtype).removeprefix("torch.")


def takes_tf32() -> bool:
    """Whether PyTorch lets convolutions of float32 tensors on CUDA multiply in TF32."""
    precision = getattr(getattr(torch.backends.cudnn, "conv", None), "fp32_precision", None)
    # Where the newer setting exists, asking for the older is an error once the two differ.
    return bool(torch.backends.cudnn.allow_tf32) if precision is None else precision == "tf32"
