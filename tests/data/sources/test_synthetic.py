"""The built-in images as a source."""

import numpy as np
import pytest

from ijepa_enhanced.data import synthetic
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.data.sources.synthetic import SyntheticSource
from ijepa_enhanced.errors import SourceError


def test_synthetic():
    source = open_source("synthetic", "val")
    assert len(source) == len(source.labels) == synthetic.IMAGES["val"]
    assert source.key(7) == "val-00007"
    assert source.classes == list(synthetic.CLASSES)
    sample = synthetic.render("val", 7)
    assert source.labels[7] == sample.label
    assert source.size(7) == sample.pixels.shape[:2]
    np.testing.assert_array_equal(np.asarray(source.open(7)), sample.pixels)
    assert source.fingerprint() != open_source("synthetic").fingerprint()
    assert len(open_source("synthetic")) == synthetic.IMAGES["train"]


def test_synthetic_parts():
    with pytest.raises(SourceError) as error:
        SyntheticSource("test")
    assert str(error.value) == "The synthetic images have only the splits train and val, not 'test'."
