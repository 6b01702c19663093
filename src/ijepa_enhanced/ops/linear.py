"""Linear layers, fast on the CPU, where they are most of the cost of a network.

On x86, PyTorch multiplies float32 matrices with MKL and applies GELU in a second pass over memory. oneDNN's product,
which PyTorch has for compiled graphs, applies GELU in the same pass. With AVX-512 it is up to twice as fast, with AVX2
alone it is slower (docs/log.md). oneDNN compiles a kernel for each shape, so `pad_rows` makes the same shapes come up
again.
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
"""Whether this build of PyTorch has oneDNN's product. The function is private, so a later PyTorch may lack it."""
FAST_FLOAT32 = HAS_ONEDNN and not (
    torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX2"
)
"""Whether to multiply float32 matrices with oneDNN. With AVX2 alone, MKL is faster (docs/log.md, 2026-11-28)."""
HAS_BF16 = HAS_ONEDNN and multiplies_bf16(torch.device("cpu"))
"""Whether oneDNN multiplies bfloat16 on this processor."""


class Linear(nn.Linear):
    """`nn.Linear` with an optional GELU (arXiv 1606.08415, exact). In float32 on a CPU it has no second derivative."""

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """Return x W^T + b, with GELU applied if `gelu`: [..., K] -> [..., N]."""
        dtype = self._onednn_dtype(x)
        if dtype is not None and not torch.is_grad_enabled():
            return product(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype), gelu)
        # For gradients GELU stays separate: its backward pass needs y.
        y = super().forward(x) if dtype is None else _Product.apply(x, self.weight, self.bias)
        return F.gelu(y) if gelu else y

    def _onednn_dtype(self, x: Tensor) -> torch.dtype | None:
        """Return the precision in which oneDNN multiplies `x`, or None to leave the product to PyTorch."""
        # Compiled graphs make their own use of oneDNN.
        if torch.compiler.is_compiling() or not (HAS_ONEDNN and torch.backends.mkldnn.enabled) or self.bias is None:
            return None
        if x.device.type != "cpu" or x.ndim < 2 or x.shape[-1] != self.in_features or not x.numel():
            return None
        if torch.is_autocast_enabled("cpu"):
            # Training under autocast is left to PyTorch, since `_Product` is float32.
            half = HAS_BF16 and torch.get_autocast_dtype("cpu") == torch.bfloat16 and x.dtype != torch.float64
            return torch.bfloat16 if half and not torch.is_grad_enabled() else None
        return torch.float32 if FAST_FLOAT32 and x.dtype == self.weight.dtype == torch.float32 else None


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """Return x W^T + b computed by oneDNN, without a gradient: [..., N].

    Args:
        x: [..., K].
        weight: W, [N, K].
        bias: b, [N].
        gelu: whether to apply GELU to the result.
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "none")


def pad_rows(x: Tensor) -> Tensor:
    """Append zero rows to `x` [T, N] on a CPU, so that the same number of rows comes up again.

    oneDNN compiles a kernel for each number of rows, which takes several times as long as a small product, and hardly
    any two packs have the same number of tokens (docs/log.md). T is rounded up to a multiple of the power of two
    between T / 32 and T / 16, of 8 at least and 64 at most. Results in the pad rows are finite, their gradients are 0,
    and the caller cuts them off at the end.
    """
    # Checked before reading len(x), which would specialize a compiled graph on the number of rows.
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return x
    # -T % m is the number of rows to the next multiple of m.
    return F.pad(x, (0, 0, 0, -len(x) % (1 << max(3, min(6, len(x).bit_length() - 5)))))


class _Product(torch.autograd.Function):
    """`product` with a gradient, in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad_x = product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        # On rows with gaps between them, oneDNN's product takes a thousand times as long.
        x, grad = x.flatten(0, -2).contiguous(), grad.flatten(0, -2).contiguous()
        return grad_x, product(grad.t(), x.t()), grad.sum(dim=0)


if HAS_ONEDNN:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x_shape: tuple[int, ...], weight_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
        """Return the operations of the product, for `torch.utils.flop_counter`."""
        return 2 * math.prod(x_shape) * weight_shape[0]
