"""Strategies that damage what is valid: the bytes of files and the values of JSON."""

import json
import struct
from typing import Any

from hypothesis import strategies as st

EDGES = [b"\0", b"\xff", b"\x7f", b"\x80", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"]
"""Bytes that are the smallest or the largest number of some width."""

HEAD = 512
"""Half of all damage is done to so many bytes at the beginning, where most formats have their header."""

DEEP = 5000
"""Levels of nesting that no recursive parser survives."""

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 10**9, 10**400, "", "\0", "null", "../x", "\ud800", "9" * 5000]),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
"""Values of JSON, some of which are larger than anything should be."""


@st.composite
def damaged(draw: st.DrawFn, *valid: bytes) -> bytes:
    """One of some valid files with a few of its bytes flipped, lost, copied, overwritten, or taken from another."""
    data = bytearray(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.one_of(st.integers(0, min(len(data), HEAD)), st.integers(0, len(data))))
        length = draw(st.sampled_from([1, 2, 4, 16, 512]))
        match draw(st.sampled_from(["flip", "cut", "lose", "copy", "zero", "edge", "splice", "insert"])):
            case "flip":
                data[at : at + 1] = bytes(byte ^ 1 << draw(st.integers(0, 7)) for byte in data[at : at + 1])
            case "cut":
                del data[at:]
            case "lose":
                del data[at : at + length]
            case "copy":
                data[at:at] = data[at : at + length] * draw(st.integers(1, 3))
            case "zero":
                data[at : at + length] = bytes(len(data[at : at + length]))
            case "edge":
                edge = draw(st.sampled_from(EDGES))
                data[at : at + len(edge)] = edge
            case "splice":
                other = draw(st.sampled_from(valid))
                start = draw(st.integers(0, len(other)))
                data[at : at + length] = other[start : start + length]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=8))
    return bytes(data)


@st.composite
def altered(draw: st.DrawFn, value: Any) -> Any:
    """A value of JSON of which one part is another value, or is missing, or has another key."""
    if not isinstance(value, (dict, list)) or not value or draw(st.integers(0, 3)) == 0:
        return draw(VALUES)
    copy: Any = dict(value) if isinstance(value, dict) else [*value]
    key = draw(st.sampled_from([*value] if isinstance(value, dict) else [*range(len(value))]))
    match draw(st.integers(0, 7)):
        case 0:
            del copy[key]
        case 1 if isinstance(copy, dict):
            copy[draw(st.text(max_size=8))] = copy.pop(key)
        case _:
            copy[key] = draw(altered(value[key]))
    return copy


def damaged_json(value: Any) -> st.SearchStrategy[bytes]:
    """The text of a damaged or altered value, or one that is nested too deeply."""
    return st.one_of(
        damaged(json.dumps(value).encode()),
        altered(value).map(lambda altered: json.dumps(altered).encode()),
        st.sampled_from([b"[" * DEEP, b'{"a":' * DEEP, b"9" * 5000]),
    )


def damaged_safetensors(data: bytes) -> st.SearchStrategy[bytes]:
    """A damaged file of safetensors, or one whose header says something else."""
    (length,) = struct.unpack("<Q", data[:8])
    rest = data[8 + length :]
    headers = damaged_json(json.loads(data[8 : 8 + length]))
    return st.one_of(damaged(data), headers.map(lambda header: struct.pack("<Q", len(header)) + header + rest))
