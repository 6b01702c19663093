"""Under load, good requests get the right features and broken ones one clear refusal."""

import pytest

from ijepa_enhanced.benchmarks import serve


@pytest.mark.slow
@pytest.mark.parametrize("way", serve.WAYS)
def test_good_answers_are_right_while_others_are_broken(way: str) -> None:
    # Each kind of broken request twice; the benchmark checks every answer.
    found = serve.run(variant="Ti", clients=8, requests=60, turns=1, hostile=30, ways=(way,))
    assert found["images_per_second"] > 0
