"""Growth is measured until memory is full, and its exponent is a slope of logarithms."""

import math
from typing import Any

import pytest
import torch

from ijepa_enhanced.benchmarks.growth import exponent, grow, growth_tokens, print_growth


def test_an_exponent_is_a_slope_of_logarithms() -> None:
    rows = [{"tokens": tokens, "ms": 5 * tokens**1.5} for tokens in (10, 30, 70)]
    assert exponent(rows, "ms") == pytest.approx(1.5)
    assert math.isnan(exponent(rows[:1], "ms"))


def test_tokens_to_grow_over() -> None:
    counts = (1024, 2048, 4096, 8192)
    assert growth_tokens(counts, None) == [*counts]
    assert growth_tokens(counts, 1024) == [1024, 2048, 4096]
    assert growth_tokens(counts, 64) == [1024, 2048]


def measured(tokens: int) -> dict[str, Any]:
    if tokens > 32:
        raise torch.OutOfMemoryError
    return {"tokens": tokens, "ms": 2.0 * tokens, "peak_MB": float(tokens**2)}


def test_growth_ends_where_memory_does(capsys: pytest.CaptureFixture[str]) -> None:
    rows = grow("stream", [16, 32, 64, 128], measured)
    assert [row["tokens"] for row in rows] == [16, 32]
    assert capsys.readouterr().out == "A stream of 64 tokens does not fit in memory.\n"


def test_if_nothing_fits_there_is_no_growth() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        grow("stream", [64, 128], measured)


def test_the_exponents_are_printed_and_returned(capsys: pytest.CaptureFixture[str]) -> None:
    found = print_growth("Streams", grow("stream", [16, 32], measured))
    assert found == {"time_exponent": pytest.approx(1), "memory_exponent": pytest.approx(2)}
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0], lines[-1]) == ("Streams", "Time grows as tokens ** 1.00, memory as tokens ** 2.00.")
    assert len(lines) == 5
