"""The lines of docs/tasks/embed.md that open a folder of embeddings in other programs."""

import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from .test_embed import embed

GUIDE = Path(__file__).parents[2] / "docs" / "tasks" / "embed.md"
PROGRAMS = ("pandas", "polars", "DuckDB", "datasets")


def lines_of(program: str) -> str:
    """The lines that follow the name of a program in the guide."""
    (block,) = re.findall(rf"^# {program}\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    return str(block)


@pytest.fixture(scope="module")
def folder(photos: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("guide")
    embed(photos, encoder, root / "embeddings", "--tokens", "--dtype", "float16")
    return root


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_opens_the_files(program: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(program.lower())
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    found: dict[str, object] = {}
    exec(lines_of(program), found)
    expected = pq.read_table(next(folder.glob("embeddings/*.parquet")))
    vectors = np.array(expected["embedding"].drop_null().to_pylist(), np.float16)
    if program in ("pandas", "polars"):
        np.testing.assert_array_equal(found["features"], vectors)
    if program == "pandas":
        tokens = found["table"].tokens[7]  # type: ignore[attr-defined]
        (line,) = re.findall(r"^(tokens = .*)$", GUIDE.read_text(), re.MULTILINE)
        exec(line, found)
        shape = (*expected["grid"].drop_null()[7].as_py(), 192)
        assert found["tokens"].shape == shape  # type: ignore[attr-defined]
        np.testing.assert_array_equal(found["tokens"].reshape(-1, 192), np.stack(tokens))  # type: ignore[attr-defined]
    if program == "DuckDB":
        assert sorted(found["sizes"]) == [("cats", 9), ("dogs", 10)]  # type: ignore[call-overload]
    if program == "datasets":
        data = found["data"]
        np.testing.assert_array_equal(data.with_format("numpy")[1]["embedding"], vectors[0])  # type: ignore[attr-defined]
