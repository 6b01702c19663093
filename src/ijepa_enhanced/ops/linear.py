"""Linear layers, which on a CPU are most of what a network costs.

PyTorch multiplies float32 matrices on x86 by MKL, which on AMD's processors is half as fast as oneDNN, and applies GELU
in a second pass over fresh memory. oneDNN's product, which PyTorch has for compiled graphs, does both at once
(docs/log.md). It compiles a product for each shape, which is why a stream is given pad rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from ijepa_enhanced.devices import multiplies_bf16

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""PyTorch is built without it for some machines, and promises nothing of a function that it has for itself."""
HAS_BF16 = HAS_ONEDNN and multiplies_bf16(torch.device("cpu"))
"""Some processors multiply no bfloat16, or oneDNN does not on them."""


class Linear(nn.Linear):
    """`nn.Linear`, and on demand GELU (arXiv 1606.08415, exact) of what it gives. In float32 on a CPU it has one
    derivative, not two."""

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """[..., K] -> [..., N]."""
        dtype = self._onednn_dtype(x)
        if dtype is not None and not torch.is_grad_enabled():
            return product(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype), gelu)
        y = super().forward(x) if dtype is None else _Product.apply(x, self.weight, self.bias)
        return F.gelu(y) if gelu else y

    def _onednn_dtype(self, x: Tensor) -> torch.dtype | None:
        """The precision in which oneDNN is to multiply `x`; None where PyTorch is to choose its own way."""
        if torch.compiler.is_compiling() or not (HAS_ONEDNN and torch.backends.mkldnn.enabled) or self.bias is None:
            return None
        if x.device.type != "cpu" or x.ndim < 2 or x.shape[-1] != self.in_features or not x.numel():
            return None
        if torch.is_autocast_enabled("cpu"):
            half = HAS_BF16 and torch.get_autocast_dtype("cpu") == torch.bfloat16 and x.dtype != torch.float64
            return torch.bfloat16 if half and not torch.is_grad_enabled() else None
        return torch.float32 if x.dtype == self.weight.dtype == torch.float32 else None


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """x W^T + b by oneDNN, of x [..., K], W [N, K] and b [N], and GELU of it: [..., N]. It has no gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "none")


def pad_rows(x: Tensor) -> Tensor:
    """[T, N], on a CPU with some zero rows behind it, so that their number comes again.

    oneDNN compiles a product for each number of rows, which takes several times as long as a small product itself, and
    no two packs have as many tokens (docs/log.md). T becomes a multiple of the power of two between T / 32 and T / 16,
    but at least of 8 and at most of 64. What is computed of the further rows is finite, their gradients are 0, and they
    are cut off in the end.
    """
    # First of all: a graph that knows how many rows there are would be compiled for each number.
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return x
    return F.pad(x, (0, 0, 0, -len(x) % (1 << max(3, min(6, len(x).bit_length() - 5)))))


class _Product(torch.autograd.Function):
    """`product` with its gradients, in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad_x = product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        # Contiguous: of rows with gaps between them oneDNN's product takes a thousand times as long.
        x, grad = x.flatten(0, -2).contiguous(), grad.flatten(0, -2).contiguous()
        return grad_x, product(grad.t(), x.t()), grad.sum(dim=0)


if HAS_ONEDNN:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x_shape: tuple[int, ...], weight_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
        """For PyTorch's counter, which does not know the product."""
        return 2 * math.prod(x_shape) * weight_shape[0]
