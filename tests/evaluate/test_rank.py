import math

import pytest
import torch

from ijepa_enhanced.evaluate.rank import rankme


def orthogonal(rows, columns, seed):
    noise = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(noise).Q


def with_spectrum(spectrum, rows=50):
    spectrum = torch.tensor(spectrum, dtype=torch.float64)
    d = len(spectrum)
    return orthogonal(rows, d, 0) * spectrum @ orthogonal(d, d, 1).T


@pytest.mark.parametrize(("rows", "columns"), [(40, 12), (12, 40), (1, 1)])
def test_equal_singular_values_count_the_smaller_side(rows, columns):
    z = orthogonal(max(rows, columns), min(rows, columns), 0)
    z = 3.7 * (z if rows >= columns else z.T)
    assert rankme(z) == pytest.approx(min(rows, columns), rel=1e-4)


def test_rank_one_is_one():
    z = torch.outer(torch.arange(1.0, 30), torch.linspace(-1, 2, 16))
    # Each of the 15 empty directions still adds -1e-7 log 1e-7 of entropy.
    assert rankme(z) == pytest.approx(math.exp(15 * -1e-7 * math.log(1e-7)), rel=1e-6)


def test_known_spectrum():
    # p = 1/2, 1/4, 1/8, 1/8: entropy 1.75 bits. Squared singular values would give 1.11 bits.
    assert rankme(with_spectrum([4.0, 2.0, 1.0, 1.0])) == pytest.approx(2**1.75, rel=1e-5)


def test_epsilon_is_added_to_each_share():
    p = [1 + 1e-7 - 1e-4, 1e-4 + 1e-7, 1e-7]
    expected = math.exp(-sum(share * math.log(share) for share in p))
    assert rankme(with_spectrum([1 - 1e-4, 1e-4, 0.0])) == pytest.approx(expected, rel=1e-9)


def test_scale_does_not_matter_and_the_mean_does():
    z = with_spectrum([4.0, 2.0, 1.0, 1.0])
    assert rankme(1000 * z) == pytest.approx(rankme(z), rel=1e-9)
    assert rankme(z + 100) < 1.1


def test_half_precision_is_computed_in_float64():
    z = with_spectrum([4.0, 2.0, 1.0, 1.0]).bfloat16()
    assert rankme(z) == rankme(z.double())


@pytest.mark.parametrize(
    "z", [torch.zeros(4, 4), torch.zeros(0, 4), torch.ones(4), torch.tensor([[1.0, torch.nan]])], ids=str
)
def test_what_has_no_spectrum_is_an_error(z):
    with pytest.raises(ValueError, match="RankMe needs"):
        rankme(z)
