"""The kernels that are compared compute the same, and the table's figures agree with each other."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ijepa_enhanced.benchmarks import attention, growth
from ijepa_enhanced.packed import Segments


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in {
        "TURNS": 1,
        "VIEWS": (8, 32, 4096),
        "MIXED": (5, 20),
        "GROWTH_TOKENS": (16, 32, 64, 4096),
        "GROWTH_VIEW": 8,
    }.items():
        monkeypatch.setattr(attention, name, value)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("sizes", [None, torch.arange(1.0, 61.0)])
@pytest.mark.parametrize("key_lengths", [[7, 1, 40, 12], [3, 9, 20, 28]])
def test_all_kernels_compute_the_same(sizes: torch.Tensor | None, key_lengths: list[int]) -> None:
    queries, keys = Segments.of([7, 1, 40, 12]), Segments.of(key_lengths)
    q, k, v = (x.detach() for x in attention.inputs(queries, keys))
    bias = None if sizes is None else sizes.log()
    named = attention.kernels(queries, keys, sizes)
    flex = attention.flex_attention(queries, keys, bias, compiled=False)
    assert list(named) == ["ours", "padded", "dense"]
    for kernel in (named["padded"], named["dense"], flex):
        # Sums of up to 40 float32 numbers of size 4.
        torch.testing.assert_close(kernel(q, k, v), named["ours"](q, k, v), rtol=0, atol=5e-6)


def test_the_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tables: list[list[dict[str, Any]]] = []
    for module in (attention, growth):
        monkeypatch.setattr(module, "print_table", tables.append)
    found = attention.run(tokens=64)
    costs, grown = tables
    # Three cases on views of 8, of 32 and of mixed lengths; none of 4,096 fits. Three kernels.
    assert [row["tokens_per_view"] for row in costs[:9:3]] == ["8", "32", "5-20"]
    assert len(costs) == 3 * 3 * 3
    assert {row["over_ours"] for row in costs if row["kernel"] == "ours"} == {1.0}
    assert found["dense_over_ours"] == min(row["over_ours"] for row in costs if row["kernel"] == "dense")
    assert [row["tokens"] for row in grown] == [16, 32, 64]
    for row in grown:
        assert row["ns_per_token"] == pytest.approx(1e6 * row["ms"] / row["tokens"])
    assert found["memory_exponent"] == growth.exponent(grown, "peak_MB")
    assert "on cpu: 64 tokens" in capsys.readouterr().out


def test_memory_grows_linearly_with_tokens() -> None:
    rows = [attention.grown(tokens, torch.device("cpu")) for tokens in (2048, 4096, 8192)]
    assert growth.exponent(rows, "peak_MB") == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("tokens", [6, 100, 1000])
def test_mixed_lengths_fill_a_stream(tokens: int) -> None:
    lengths = attention.mixed_lengths(tokens)
    assert sum(lengths) == tokens
    assert max(lengths) <= 20
    assert min(lengths[:-1], default=5) >= 5
    assert lengths[-1] >= 1


def test_the_csvs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    attention.run(csv=True, tokens=32)
    written = sorted(path.name.partition("_")[0] for path in Path("benchmarks/results").iterdir())
    assert written == ["attention-growth", "attention-kernels"]
