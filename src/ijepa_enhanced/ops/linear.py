"""Linear layers, which on a CPU are most of what a network costs.

PyTorch multiplies float32 matrices on x86 by MKL, which on AMD's processors is half as fast as oneDNN, and applies GELU
in a second pass over fresh memory. oneDNN's product, which PyTorch has for compiled graphs, does both at once
(docs/log.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""PyTorch is built without it for some machines, and promises nothing of a function that it has for itself."""


class Linear(nn.Linear):
    """`nn.Linear`, and on demand GELU (arXiv 1606.08415, exact) of what it gives."""

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """[..., K] -> [..., N]."""
        onednn = HAS_ONEDNN and x.device.type == "cpu" and x.numel() > 0 and not torch.compiler.is_compiling()
        autocast = torch.is_autocast_enabled("cpu")
        if onednn and not torch.is_grad_enabled():
            dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
            return product(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype), gelu)
        if onednn and x.dtype == torch.float32 and not autocast:
            y = _Product.apply(x, self.weight, self.bias)
        else:
            y = super().forward(x)
        return F.gelu(y) if gelu else y


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """x W^T + b by oneDNN, of x [..., K], W [N, K] and b [N], and GELU of it: [..., N]. It has no gradient."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "none")
    return y


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
        x, grad = x.flatten(0, -2), grad.flatten(0, -2)
        return grad_x, product(grad.t(), x.t()), grad.sum(dim=0)
