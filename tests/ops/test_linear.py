"""A linear layer by oneDNN is the linear layer, to float32's rounding, with its gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_enhanced.ops import linear
from ijepa_enhanced.ops.linear import Linear, pad_rows

ROUNDING = 2**-24 * 1536**0.5
"""Of a float32 sum of 1,536 products in any order: roundings of 2 ** -24 that add up as a random walk."""


@pytest.fixture(autouse=True)
def onednn_for_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test oneDNN's product, also on processors where MKL is faster."""
    monkeypatch.setattr(linear, "FAST_FLOAT32", linear.HAS_ONEDNN)


def layer_and_input(tokens: int) -> tuple[Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    return Linear(384, 1536), torch.randn(tokens, 384, requires_grad=True), torch.randn(tokens, 1536)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm().detach() / exact.norm().detach())


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("gelu", [True, False])
def test_values_and_gradients_are_those_of_float64(gelu: bool, onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "FAST_FLOAT32", onednn and linear.HAS_ONEDNN)
    layer, x, grad = layer_and_input(1003)
    y = layer(x, gelu)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    exact = F.gelu(exact) if gelu else exact
    learned = (x, layer.weight, layer.bias)
    assert error(y, exact) < ROUNDING
    for found, expected in zip(
        torch.autograd.grad(y, learned, grad), torch.autograd.grad(exact, learned, grad.double()), strict=True
    ):
        assert error(found, expected) < ROUNDING
    with torch.no_grad():
        assert error(layer(x, gelu), exact) < ROUNDING


@pytest.mark.parametrize("gelu", [True, False])
def test_under_autocast_it_is_as_exact_as_bfloat16(gelu: bool) -> None:
    layer, x, _ = layer_and_input(1003)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    exact = F.gelu(exact) if gelu else exact
    with torch.autocast("cpu", torch.bfloat16):
        learning = layer(x, gelu)
        with torch.no_grad():
            frozen = layer(x, gelu)
    assert learning.dtype == frozen.dtype == torch.bfloat16
    # Inputs, weights and results round by 2 ** -9 at most; far above float32's, so that it is known to be in use.
    for found in (learning, frozen):
        assert 2**-12 < error(found, exact) < 2**-8


def test_an_input_that_needs_no_gradient_gets_none() -> None:
    layer, x, _ = layer_and_input(5)
    layer(x.detach()).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((1536,), 5.0))


@pytest.mark.parametrize("tokens", [0, 1])
def test_streams_of_no_and_of_one_token(tokens: int) -> None:
    layer, x, _ = layer_and_input(tokens)
    y = layer(x, gelu=True)
    assert y.shape == (tokens, 1536)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    with torch.no_grad():
        assert layer(x).shape == (tokens, 1536)


def test_rows_of_views_are_as_a_stream() -> None:
    layer, x, grad = layer_and_input(12)
    rows = layer(x.view(3, 4, 384))
    torch.testing.assert_close(rows.flatten(0, 1), layer(x))
    (found,) = torch.autograd.grad(rows, layer.weight, grad.view(3, 4, -1))
    (expected,) = torch.autograd.grad(layer(x), layer.weight, grad)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_what_onednn_cannot_multiply_is_left_to_pytorch(dtype: torch.dtype) -> None:
    layer, x, _ = layer_and_input(5)
    with torch.no_grad():
        assert layer.to(dtype)(x.to(dtype), True).dtype == dtype
        layer.float()
        with torch.autocast("cpu", torch.float16):
            assert layer(x).dtype == torch.float16
        with pytest.raises(RuntimeError, match="dtype"):
            layer(x.to(dtype))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            layer(x[:, :-1])


def test_without_bfloat16_autocast_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "HAS_BF16", False)
    monkeypatch.setattr(linear, "product", None)
    layer, x, _ = layer_and_input(5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_rows_with_gaps_and_layers_without_bias() -> None:
    torch.manual_seed(0)
    wide = torch.randn(50, 3 * 384)
    layer = Linear(384, 7)
    (found,) = torch.autograd.grad(layer(wide[:, :384]).sum(), layer.weight)
    torch.testing.assert_close(found, wide[:, :384].sum(dim=0).expand(7, -1))
    bare = Linear(384, 7, bias=False)
    with torch.no_grad():
        torch.testing.assert_close(bare(wide[:, :384]), wide[:, :384] @ bare.weight.T)


def test_pad_rows_make_few_numbers_of_many() -> None:
    rows = {tokens: len(pad_rows(torch.ones(tokens, 1))) for tokens in range(1, 5000)}
    assert all(0 <= count - tokens <= max(7, min(63, tokens / 16)) for tokens, count in rows.items())
    # Multiples of 8 up to 256, of 16 up to 512, of 32 up to 1,024, of 64 above.
    assert len(set(rows.values())) == 32 + 16 + 16 + (5056 - 1024) // 64
    assert pad_rows(torch.ones(5, 2)).tolist() == 5 * [[1, 1]] + 3 * [[0, 0]]


def test_it_compiles_into_one_graph() -> None:
    layer, x, _ = layer_and_input(7)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, True), layer(x, True))
