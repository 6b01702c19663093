"""The packed stream by hand-written numbers: what the rest of the package takes for granted."""

import numpy as np
import pytest
import torch

from ijepa_enhanced.batch import Batch
from ijepa_enhanced.packed import Packed, Segments, Selection, segment_ids


def stream(*grids: tuple[int, int], first: int = 0) -> Packed:
    """Views of the given grids whose tokens carry the numbers from `first` on, in two columns."""
    tokens = sum(rows * cols for rows, cols in grids)
    values = np.arange(first, first + tokens, dtype=np.float32)
    return Packed.of_grids(np.stack([values, -values], axis=1), np.array(grids).reshape(-1, 2))


def test_segments_of_hand_written_lengths() -> None:
    segments = Segments.of([3, 1, 4])
    assert segments.lengths == (3, 1, 4)
    assert segments.cu_seqlens.tolist() == [0, 3, 4, 8]
    assert segments.cu_seqlens.dtype == torch.int32, "what varlen kernels take"
    assert segments.max_seqlen == 4
    assert segments.total == 8
    assert len(segments) == 3


def test_lengths_are_python_ints_whatever_they_were_made_from() -> None:
    for lengths in ([2, 5], np.array([2, 5], dtype=np.int64), np.array([2, 5], dtype=np.uint8)):
        segments = Segments.of(lengths)
        assert [type(length) for length in (*segments.lengths, segments.max_seqlen)] == [int, int, int]
        assert segments.cu_seqlens.tolist() == [0, 2, 7]


def test_lengths_of_a_small_type_do_not_wrap_when_added_up() -> None:
    assert Segments.of(np.full(3, 200, dtype=np.uint8)).cu_seqlens.tolist() == [0, 200, 400, 600]


@pytest.mark.parametrize(("lengths", "least"), [([0], 0), ([4, 0, 2], 0), ([3, -2, 0], -2)])
def test_a_segment_without_tokens_is_refused(lengths: list[int], least: int) -> None:
    with pytest.raises(ValueError, match=f"^Every segment needs at least one token, but one has {least}\\.$"):
        Segments.of(lengths)


def test_an_empty_stream_is_a_stream() -> None:
    segments = Segments.of([])
    assert (segments.lengths, segments.cu_seqlens.tolist(), segments.max_seqlen) == ((), [0], 0)
    assert (len(segments), segments.total) == (0, 0)
    empty = Packed.of_grids(np.empty((0, 12), dtype=np.uint8), np.empty((0, 2), dtype=np.int64))
    assert empty.values.shape == (0, 12)
    assert empty.values.dtype == torch.uint8
    assert empty.positions.shape == (0, 2)
    assert empty.grids.shape == (0, 2)
    assert empty.split() == []
    nothing = Selection(torch.empty(0, dtype=torch.int64), Segments.of([]))
    assert empty.select(nothing).values.shape == (0, 12)
    assert segment_ids(segments.cu_seqlens, 0).tolist() == []


def test_segment_ids_name_the_view_of_every_token() -> None:
    ids = segment_ids(Segments.of([3, 1, 2]).cu_seqlens, 6)
    assert ids.tolist() == [0, 0, 0, 1, 2, 2]
    assert ids.dtype == torch.int64, "it indexes"


def test_of_grids_counts_rows_and_columns_of_each_view() -> None:
    packed = stream((2, 3), (3, 1), (1, 1))
    assert packed.segments.lengths == (6, 3, 1)
    assert packed.grids.tolist() == [[2, 3], [3, 1], [1, 1]]
    assert packed.grids.dtype == torch.int32
    assert packed.positions.tolist() == [
        *([0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]),
        *([0, 0], [1, 0], [2, 0]),
        [0, 0],
    ]
    assert packed.values[:, 0].tolist() == list(range(10))


def test_select_takes_tokens_and_keeps_whole_grids() -> None:
    packed = stream((2, 3), (3, 1))
    chosen = packed.select(Selection(torch.tensor([1, 5, 6, 8]), Segments.of([2, 2])))
    assert chosen.values.tolist() == [[1, -1], [5, -5], [6, -6], [8, -8]]
    assert chosen.positions.tolist() == [[0, 1], [1, 2], [0, 0], [2, 0]]
    assert chosen.grids.tolist() == [[2, 3], [3, 1]]
    assert chosen.segments.lengths == (2, 2)


def test_split_gives_each_view_its_own_tokens() -> None:
    views = stream((2, 2), (1, 1), (1, 3)).split()
    assert [view[:, 0].tolist() for view in views] == [[0, 1, 2, 3], [4], [5, 6, 7]]
    assert [view.shape[1] for view in views] == [2, 2, 2]


def test_concatenate_is_the_views_one_after_another() -> None:
    empty = Packed.of_grids(np.empty((0, 2), dtype=np.float32), np.empty((0, 2)))
    joined = Packed.concatenate([stream((1, 2), (2, 1)), empty, stream((1, 3), first=4)])
    whole = stream((1, 2), (2, 1), (1, 3))
    assert joined.values.tolist() == whole.values.tolist()
    assert joined.positions.tolist() == whole.positions.tolist()
    assert joined.grids.tolist() == whole.grids.tolist()
    assert joined.segments.lengths == whole.segments.lengths == (2, 2, 3)
    assert joined.segments.cu_seqlens.tolist() == whole.segments.cu_seqlens.tolist()
    assert joined.segments.max_seqlen == 3


def test_moving_moves_every_tensor_and_leaves_lengths_on_the_host() -> None:
    packed = stream((2, 3), (1, 1))
    batch = Batch(packed, torch.tensor([7, 9]), None, (2, 5), ((3, "empty file"),))
    moved = batch.to("meta")  # a device that every machine has, and that no number can be read from
    tensors = (moved.packed.values, moved.packed.positions, moved.packed.grids, moved.packed.segments.cu_seqlens)
    assert [tensor.device.type for tensor in (*tensors, moved.image_ids)] == ["meta"] * 5
    assert moved.packed.segments.lengths == (6, 1)
    assert moved.packed.segments.max_seqlen == 6
    assert moved.packed.segments.total == 7
    assert (moved.labels, moved.cursor, moved.unreadable) == (None, (2, 5), ((3, "empty file"),))
    assert type(moved) is Batch
    assert packed.values.device.type == "cpu", "the original stays where it was"


def test_labels_move_too_where_there_are_any() -> None:
    batch = Batch(stream((1, 1)), torch.tensor([0]), torch.tensor([4]), (0, 0), ())
    labels = batch.to("meta").labels
    assert labels is not None
    assert labels.device.type == "meta"


def test_class_tokens_and_registers_lead_each_view() -> None:
    values = np.arange(1, 8, dtype=np.float32)[:, None]
    packed = Packed.of_grids(values, np.array([[2, 2], [1, 3]]), prefix=2)
    assert packed.values.flatten().tolist() == [0, 0, 1, 2, 3, 4, 0, 0, 5, 6, 7]
    assert packed.segments.lengths == (6, 5)
    assert packed.positions.tolist()[2:6] == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert packed.positions.tolist()[8:] == [[0, 0], [0, 1], [0, 2]]
    assert packed.patches.tolist() == [False] * 2 + [True] * 4 + [False] * 2 + [True] * 3
    assert stream((2, 2)).patches.all()
    assert Packed.concatenate([packed, packed]).prefix == 2
