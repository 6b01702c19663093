"""Columns of images, in memory and in files."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ijepa_enhanced.data.listing import Listing, Sizes, Texts, map_listing, save_listing
from ijepa_enhanced.errors import RunError

# What a file name may be: any text, with lone surrogates for bytes that are not UTF-8.
NAMES = st.binary(max_size=12).map(lambda name: name.decode("utf-8", "surrogateescape"))


def sizes(heights: list[int], reasons: list[str]) -> Sizes:
    return Sizes(np.array(heights, np.int32), np.array(heights, np.int32) * 2, Texts.of(reasons))


def example() -> Listing:
    listing = Listing(
        Texts.of(["a", "b/ü", "c\udcff"]),
        np.array([1, -1, 0]),
        ["ant", "bee"],
        np.arange(6).reshape(3, 2),
        ("x", "y"),
        ("a note",),
        fingerprint="f",
    )
    return listing.with_sizes(sizes([3, 0, 5], ["", "empty file", ""]))


def columns(listing: Listing) -> list[object]:
    assert listing.location is not None
    assert listing.labels is not None
    assert listing.sizes is not None
    found = [[*listing.keys], listing.labels.tolist(), listing.classes, listing.location.tolist(), listing.folders]
    found += [listing.notes, listing.fingerprint, listing.hash, [*listing.sizes.reasons]]
    found += [values.tolist() for values in listing.sizes.readable()]
    return [*found, listing.sizes.heights.tolist(), listing.sizes.widths.tolist()]


@given(st.lists(NAMES))
def test_texts_are_what_they_were_made_of(names: list[str]) -> None:
    texts = Texts.of(names)
    assert [*texts] == names
    assert [texts[row] for row in range(len(texts))] == names


def test_a_listing_comes_back_from_its_file_on_mapped_memory(tmp_path: Path) -> None:
    save_listing(example(), tmp_path / "a.arrow", "photos")
    mapped = map_listing(tmp_path / "a.arrow")
    assert columns(mapped) == columns(example())
    assert isinstance(mapped.keys, Texts)
    assert mapped.sizes is not None
    texts, readable = mapped.keys, mapped.sizes.readable()
    for values in (texts.data, texts.ends, mapped.labels, mapped.location, mapped.sizes.heights, *readable):
        assert values is not None
        assert not values.flags.writeable
    assert [values.tolist() for values in readable] == [[0, 2], [3, 5], [6, 10]]


@pytest.mark.parametrize("reasons", [["", ""], ["a", "b"]])
def test_what_is_not_there_comes_back_as_nothing(tmp_path: Path, reasons: list[str]) -> None:
    listing = Listing(Texts.of(["", ""]))
    save_listing(listing, tmp_path / "a.arrow", "")
    mapped = map_listing(tmp_path / "a.arrow")
    assert (mapped.labels, mapped.classes, mapped.location, mapped.sizes) == (None, None, None, None)
    assert [*mapped.keys] == ["", ""]
    save_listing(listing.with_sizes(sizes([1, 0], reasons)), tmp_path / "b.arrow", "")
    found = map_listing(tmp_path / "b.arrow").sizes
    assert found is not None
    assert [*found.reasons] == reasons


def test_other_programs_can_read_the_file(tmp_path: Path) -> None:
    import pyarrow as pa

    save_listing(example(), tmp_path / "a.arrow", "photos")
    table = pa.ipc.open_file(str(tmp_path / "a.arrow")).read_all()
    assert table.to_pydict() == {
        "key": [b"a", "b/ü".encode(), b"c\xff"],
        "label": [1, -1, 0],
        "location": [[0, 1], [2, 3], [4, 5]],
        "height": [3, 0, 5],
        "width": [6, 0, 10],
        "reason": [None, b"empty file", None],
        "readable_row": [0, 2, 0],
        "readable_height": [3, 5, 0],
        "readable_width": [6, 10, 0],
    }


def test_a_mapped_listing_is_sent_as_its_path(tmp_path: Path) -> None:
    many = Listing(Texts.of(map(str, range(10_000)))).with_sizes(sizes([1] * 10_000, [""] * 10_000))
    save_listing(many, tmp_path / "a.arrow", "")
    sent = pickle.dumps(map_listing(tmp_path / "a.arrow"))
    assert len(sent) < 500
    assert [*pickle.loads(sent).keys] == [*many.keys]
    assert [*pickle.loads(pickle.dumps(many)).keys] == [*many.keys], "one in memory is sent whole"
    save_listing(example(), tmp_path / "a.arrow", "")
    with pytest.raises(RunError, match="Another process scanned the images again"):
        pickle.loads(sent)


def test_the_hash_is_of_keys_labels_and_sizes() -> None:
    keys, more = Texts.of(["a", "bc"]), Texts.of(["ab", "c"])
    labels, found = np.array([0, 1]), sizes([1, 2], ["", ""])
    hashes = {
        Listing(keys, labels).with_sizes(found).hash,
        Listing(more, labels).with_sizes(found).hash,
        Listing(keys, labels[::-1]).with_sizes(found).hash,
        Listing(keys).with_sizes(found).hash,
        Listing(keys, labels).with_sizes(sizes([1, 3], ["", ""])).hash,
    }
    assert len(hashes) == 5
    assert Listing(keys, labels, ["x", "y"], notes=("n",)).with_sizes(found).hash in hashes
