"""Search is brute force a block at a time, queries are embedded as the folder was, and wrong requests are named."""

import contextlib
import dataclasses
import errno
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from ijepa_enhanced.cli import main
from ijepa_enhanced.commands import search as command
from ijepa_enhanced.commands.options import SearchOptions
from ijepa_enhanced.embed import folder as folder_module
from ijepa_enhanced.embed import search as search_module
from ijepa_enhanced.embed.folder import EmbeddingFolder
from ijepa_enhanced.embed.index import SearchIndex, add_all
from ijepa_enhanced.embed.search import SCALE, Match, duplicates, nearest
from ijepa_enhanced.embed.settings import EmbedSettings, load_settings, save_settings
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.models.config import EncoderConfig
from ijepa_enhanced.models.preprocessing import Preprocessing

CPU = torch.device("cpu")
ROUNDING = 1 / SCALE
"""Scores are multiples of this; rounding moves each by half of it, and float32 by less."""


def ignored(rows: int) -> None:
    """Nobody counts."""


def write_folder(folder: Path, values: NDArray[np.floating], missing: tuple[int, ...] = (), **changes: Any) -> Path:
    """A folder as `ijepa embed` writes it; images in `missing` cannot be decoded."""
    folder.mkdir(exist_ok=True)
    settings = EmbedSettings(
        "run", "", "photos", "", len(values), values.shape[1], 32, 0.0, "float32", "float32", 1, False, "parquet"
    )
    settings = dataclasses.replace(settings, **changes)
    save_settings(settings, folder)
    kind = pa.list_(pa.float16() if settings.dtype == "float16" else pa.float32(), settings.width)
    for file in range(settings.files):
        rows = settings.rows_of(file)
        vectors = [None if row in missing else values[row].astype(settings.dtype) for row in rows]
        table = pa.table(
            {
                "key": [f"{row:05d}.png" for row in rows],
                "path": pa.nulls(len(rows), pa.string()),
                "label": [str(row % 7) for row in rows],
                "error": ["truncated" if row in missing else None for row in rows],
                "embedding": pa.array(vectors, kind),
            }
        )
        pq.write_table(table, folder / f"{settings.name_of(file)}.parquet", row_group_size=700)
    return folder


def unit(values: NDArray[np.floating]) -> NDArray[np.float64]:
    wide = values.astype(np.float64)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def vectors() -> NDArray[np.float32]:
    """Three files of rows of 1 and -1, of several lengths.

    Their products are exact, in any order of the sums, and many are equal.
    """
    rng = np.random.default_rng(0)
    values = rng.choice(np.array([-1, 1], np.float32), (2500, 16))
    return values * rng.choice(np.array([0.25, 1, 8], np.float32), (2500, 1))


MISSING = (0, 7, 1023, 1024, 1500, 2499)


@pytest.fixture(scope="module")
def plain(vectors: NDArray[np.float32], tmp_path_factory: pytest.TempPathFactory) -> EmbeddingFolder:
    return EmbeddingFolder.open(write_folder(tmp_path_factory.mktemp("plain"), vectors, MISSING))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that all sums over blocks have several terms."""
    monkeypatch.setattr(folder_module, "BLOCK", 300)
    monkeypatch.setattr(search_module, "QUERIES", 7)
    monkeypatch.setattr(search_module, "CHUNK", 800)


def brute_force(values: NDArray[np.float32], queries: NDArray[np.float32], own: list[int]) -> list[list[Match]]:
    """All images, by score and row, of a search in float64."""
    scores = unit(queries) @ unit(values).T
    known = [row for row in range(len(values)) if row not in MISSING]
    return [
        sorted((Match(row, score[row]) for row in known if row != left_out), key=lambda each: (-each.score, each.row))
        for score, left_out in zip(scores.tolist(), own, strict=True)
    ]


def test_exact_search_is_brute_force(plain: EmbeddingFolder, vectors: NDArray[np.float32]) -> None:
    queries = np.random.default_rng(1).choice(np.array([-1, 1], np.float32), (40, 16))
    found = nearest(torch.from_numpy(queries / 4), torch.full((40,), -1), plain.blocks(), 25, CPU, ignored)
    assert found == [matches[:25] for matches in brute_force(vectors, queries, [-1] * 40)]


def test_scores_are_rounded_cosines(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values, queries = (rng.standard_normal((count, 33), np.float32) for count in (1100, 20))
    folder = EmbeddingFolder.open(write_folder(tmp_path / "real", values))
    scores = unit(queries) @ unit(values).T
    found = nearest(torch.from_numpy(unit(queries)).float(), torch.full((20,), -1), folder.blocks(), 9, CPU, ignored)
    for each, row in zip(found, scores, strict=True):
        assert [match.score for match in each] == pytest.approx(sorted(row, reverse=True)[:9], abs=ROUNDING)
        assert [match.score for match in each] == pytest.approx(row[[match.row for match in each]], abs=ROUNDING)


def test_equal_images_come_in_the_order_of_the_source_wherever_they_lie(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((2100, 33), np.float32)
    equal = [2099, 3, 1500, 299, 300, 1024, 700]
    values[equal] = values[50]
    folder = EmbeddingFolder.open(write_folder(tmp_path / "ties", values))
    (found,) = nearest(folder.vectors([50]), torch.tensor([50]), folder.blocks(), 5, CPU, ignored)
    assert found == [Match(row, 1.0) for row in sorted(equal)[:5]]


def test_all_images_but_the_query_itself_match(plain: EmbeddingFolder, vectors: NDArray[np.float32]) -> None:
    rows = [10, 2000, 10]
    found = nearest(plain.vectors(rows), torch.tensor(rows), plain.blocks(), 5000, CPU, ignored)
    assert [len(each) for each in found] == [2500 - len(MISSING) - 1] * 3
    assert found == brute_force(vectors, vectors[rows], rows)


@pytest.mark.parametrize("threshold", [0.75, 0.76, 1.0])
def test_duplicates_are_brute_force(plain: EmbeddingFolder, vectors: NDArray[np.float32], threshold: float) -> None:
    scores = np.tril(unit(vectors) @ unit(vectors).T, -1)
    scores[[*MISSING]] = scores[:, [*MISSING]] = 0
    of, best = scores.argmax(axis=1), scores.max(axis=1)  # the first of equals
    rows = np.flatnonzero(best >= threshold)
    assert 10 < len(rows) < 2400
    found = duplicates(plain, threshold, CPU, ignored)
    order = sorted(rows.tolist(), key=lambda row: (-best[row], row))
    assert found == [(row, of[row], best[row]) for row in order]


def test_no_more_than_a_block_is_read_at_once(plain: EmbeddingFolder) -> None:
    sizes = [len(block.rows) for block in plain.blocks()]
    assert max(sizes) <= 300
    assert sum(sizes) == 2500 - len(MISSING)


@pytest.fixture
def clustered(tmp_path: Path) -> EmbeddingFolder:
    """Groups of similar images, neighbors in the source."""
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((150, 1, 24))
    values = (centers + 0.3 * rng.standard_normal((150, 14, 24))).reshape(-1, 24)
    return EmbeddingFolder.open(write_folder(tmp_path / "clustered", values.astype(np.float32)))


def test_an_index_finds_what_exact_search_finds(clustered: EmbeddingFolder) -> None:
    pytest.importorskip("usearch")
    index = SearchIndex(clustered, ignored)
    rows = torch.arange(0, 2100, 21)
    queries = clustered.vectors(rows.tolist())
    exact = nearest(queries, rows, clustered.blocks(), 10, CPU, ignored)
    found = index.nearest(queries, rows, 10)
    hits = sum(len({m.row for m in these} & {m.row for m in those}) for these, those in zip(exact, found, strict=True))
    assert hits >= 0.99 * 10 * len(rows)
    assert all(len(each) == 10 for each in found)
    scores = [{match.row: match.score for match in each} for each in exact]
    for known, each in zip(scores, found, strict=True):
        # Stored as float16: 11 bits of each number.
        assert all(abs(known.get(match.row, match.score) - match.score) < 2**-10 for match in each)
    assert index.nearest(queries[:1], rows[:1], 10) == found[:1]


def test_an_index_finds_duplicates(clustered: EmbeddingFolder) -> None:
    pytest.importorskip("usearch")
    exact = {each.row for each in duplicates(clustered, 0.9, CPU, ignored)}
    found = SearchIndex(clustered, ignored).duplicates(0.9, ignored)
    assert len(exact) > 1000
    # Pairs near the threshold are on its other side in float16.
    assert len(exact ^ {each.row for each in found}) <= 0.01 * len(exact)
    assert all(each.of < each.row for each in found)


def test_images_are_added_to_an_index_in_random_order(plain: EmbeddingFolder) -> None:
    """In the order of the source, some could not be reached later (docs/log.md, 2026-11-28)."""
    added: list[int] = []

    class Index:
        def add(self, rows: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
            added.extend(rows.tolist())
            assert np.array_equal(vectors, plain.vectors(rows.tolist()))

    add_all(Index(), plain, ignored)
    assert sorted(added) == [row for row in range(2500) if row not in MISSING]
    assert [row // 1024 for row in added] != sorted(row // 1024 for row in added)  # files
    assert np.mean(np.abs(np.diff(added)) > 1) > 0.95  # rows


def test_an_index_is_made_once_and_again_when_files_change(clustered: EmbeddingFolder) -> None:
    pytest.importorskip("usearch")
    counted: list[int] = []
    first = SearchIndex(clustered, counted.append).path
    assert sum(counted) == 2100
    assert SearchIndex(clustered, counted.append).path == first
    assert sum(counted) == 2100
    file = clustered.path_of(1)
    table = pq.read_table(file)
    file.unlink()
    pq.write_table(table, file, row_group_size=100)
    second = SearchIndex(clustered, counted.append).path
    assert sum(counted) == 4200
    assert [*clustered.path.glob("*.usearch")] == [second] != [first]


@pytest.mark.parametrize("damage", [b"", b"noise" * 1000, None])
def test_an_index_that_is_damaged_is_made_again(clustered: EmbeddingFolder, damage: bytes | None) -> None:
    pytest.importorskip("usearch")
    path = SearchIndex(clustered, ignored).path
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    counted: list[int] = []
    index = SearchIndex(clustered, counted.append).index
    assert (sum(counted), len(index)) == (2100, 2100)


def test_an_index_on_a_full_disk(clustered: EmbeddingFolder, disk_of: Callable[[int], Any]) -> None:
    pytest.importorskip("usearch")
    with disk_of(2048), pytest.raises(OSError, match="No space left on device"):
        SearchIndex(clustered, ignored)
    assert not [*clustered.path.glob("*_index*")]


# The command, on ten pictures.


class Answer(NamedTuple):
    code: int
    out: list[str]
    err: list[str]

    @property
    def matches(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.out[-1])["matches"]
        return found


def ijepa(*arguments: str | Path) -> Answer:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    said = [line for line in err.getvalue().splitlines() if not line.startswith(("Images: ", "Classes: "))]
    return Answer(code, out.getvalue().splitlines(), said)


def embed(*arguments: str | Path) -> None:
    answer = ijepa("embed", *arguments, "--workers", "0")
    assert answer.code == 0, answer.err


@pytest.fixture(scope="module")
def place(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an encoder, ten photos, and their embeddings."""
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(pictures, place / "photos")
    config = EncoderConfig("Ti", patch_size=8, depth=2).architecture
    Encoder.random(config, Preprocessing(resolution=48), seed=0).save_pretrained(place / "run")
    Encoder.random(config, Preprocessing(resolution=48), seed=1).save_pretrained(place / "other")
    with pytest.MonkeyPatch.context() as patch:  # where the CPU has bfloat16, `ijepa embed` would use that
        patch.setattr("ijepa_enhanced.commands.embed.autocast_dtype", lambda *_: torch.float32)
        embed(place / "photos", "--weights", place / "run", "--out", place / "embeddings")
    return place


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to change; the encoder and the photos that the settings name are the originals."""
    shutil.copytree(place, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path / "here"


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--dtype", "float16"],
        ["--resolution", "native", "--merge-rate", "0.2"],
        ["bfloat16"],
    ],
)
def test_a_query_of_the_folder_is_the_same_as_itself(
    here: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if options == ["bfloat16"]:
        options = []
        monkeypatch.setattr("ijepa_enhanced.commands.embed.autocast_dtype", lambda *_: torch.bfloat16)
    embed("photos", "--weights", "run", "--out", "new", *options)
    photos = sorted(str(path) for path in Path("photos").rglob("*.*"))
    answer = ijepa("search", "new", *photos, "--count", "1", "--json")
    assert answer.code == 0, answer.err
    assert [match["query"] for match in answer.matches] == photos
    assert [Path("photos", match["key"]) for match in answer.matches] == [Path(photo) for photo in photos]
    assert all(abs(match["score"] - 1) <= ROUNDING for match in answer.matches)


@pytest.mark.parametrize(
    ("change", "arguments"),
    [
        ({"resolution": 24}, {"resolution": 24}),
        ({"resolution": None}, {"resolution": "native"}),
        ({"merge_rate": 0.4}, {"merge_rate": 0.4}),
        ({"precision": "bfloat16"}, {"precision": "bf16"}),
        ({"dtype": "float16"}, {}),
    ],
)
def test_a_query_is_embedded_as_the_settings_say(here: Path, change: dict[str, Any], arguments: dict[str, Any]) -> None:
    folder = EmbeddingFolder.open(Path("embeddings"))
    options = SearchOptions(folder="embeddings", queries=("photos/dark/0.png",))
    plain = command.embedded(options, folder)
    found = command.embedded(
        options, dataclasses.replace(folder, settings=dataclasses.replace(folder.settings, **change))
    )
    expected = Encoder.from_pretrained("run").embed(options.queries, **arguments)
    if "dtype" in change:
        expected = expected.half().float()
    assert (found - F.normalize(expected)).norm() < 1e-6  # rounding of the norm
    assert (found - plain).norm() > 1e-4


def test_matches_of_images_and_keys(here: Path) -> None:
    answer = ijepa("search", "embeddings", "photos/dark/1.jpg", "--key", "light/0.png", "--count", "3", "--json")
    assert (answer.code, answer.err) == (0, [])
    found = answer.matches
    assert [match["query"] for match in found] == ["photos/dark/1.jpg"] * 3 + ["light/0.png"] * 3
    assert found[0] | {"score": 1.0} == {
        "query": "photos/dark/1.jpg",
        "key": "dark/1.jpg",
        "path": load_settings(Path("embeddings")).source + "/dark/1.jpg",
        "label": "dark",
        "score": 1.0,
    }
    assert "light/0.png" not in [match["key"] for match in found[3:]]
    for matches in (found[:3], found[3:]):
        assert [match["score"] for match in matches] == sorted((match["score"] for match in matches), reverse=True)
    assert answer.out[-2] == "embeddings/_search.png"
    assert any("dark/1.jpg" in line and "dark" in line for line in answer.out[:-2])


def test_duplicates_of_photos(here: Path) -> None:
    for number in (1, 3):
        shutil.copy(f"photos/dark/{number}.jpg", f"photos/light/copy{number}.jpg")
    embed("photos", "--weights", "run", "--out", "new")
    answer = ijepa("search", "new", "--duplicates", "--threshold", "1", "--out", "pairs.png", "--json")
    assert (answer.code, answer.err) == (0, [])
    assert [(match["key"], match["duplicate_of"], match["score"]) for match in answer.matches] == [
        ("light/copy1.jpg", "dark/1.jpg", 1.0),
        ("light/copy3.jpg", "dark/3.jpg", 1.0),
    ]
    assert answer.out[-3:-1] == [
        "2 of 12 images have an earlier near-duplicate (cosine of at least 1.0).",
        "pairs.png",
    ]
    assert Path("pairs.png").is_file()


def test_the_folder_is_still_a_parquet_folder(here: Path) -> None:
    """Its own readers take a folder: what search adds to it must not be read as rows."""
    pytest.importorskip("usearch")
    assert ijepa("search", "embeddings", "photos/dark/1.jpg", "--index").code == 0
    assert len([path for path in Path("embeddings").iterdir() if path.suffix != ".parquet"]) == 3
    assert pq.read_table("embeddings").num_rows == 10


def test_without_duplicates_there_is_no_sheet(here: Path) -> None:
    answer = ijepa("search", "embeddings", "--duplicates", "--threshold", "1", "--json")
    assert (answer.matches, answer.err) == ([], [])
    assert answer.out[:-1] == ["0 of 10 images have an earlier near-duplicate (cosine of at least 1.0)."]
    assert not Path("embeddings/_search.png").exists()


def test_an_index_is_used_for_many_images(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("usearch")
    exact = ijepa("search", "embeddings", "photos/dark/1.jpg", "--json").matches
    assert not [*Path("embeddings").glob("*.usearch")]
    monkeypatch.setattr(command, "EXACT_ROWS", 9)
    found = ijepa("search", "embeddings", "photos/dark/1.jpg", "--json").matches
    (path,) = Path("embeddings").glob("*.usearch")
    path.unlink()
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert ijepa("search", "embeddings", "photos/dark/1.jpg", "--index", "--json").matches == found
    assert [path.name] == [each.name for each in Path("embeddings").glob("*.usearch")]
    assert {match["key"] for match in found} == {match["key"] for match in exact}


def test_files_that_are_not_there_yet_are_not_searched(plain: EmbeddingFolder, tmp_path: Path) -> None:
    shutil.copytree(plain.path, tmp_path / "part")
    (tmp_path / "part" / "part-00001-of-00003.parquet").unlink()
    answer = ijepa("search", tmp_path / "part", "--key", "02400.png", "--count", "1", "--json")
    assert (answer.code, len(answer.matches)) == (0, 1)
    assert answer.err[0] == "Searching 2 of 3 files. The others do not exist yet."
    folder = EmbeddingFolder.open(tmp_path / "part")
    assert folder.images == 1024 + 452
    rows = [row for block in folder.blocks() for row in block.rows.tolist()]
    assert rows == sorted({*range(1024), *range(2048, 2500)} - {*MISSING})


# The contact sheet.


def colors(path: str | Path) -> NDArray[np.uint8]:
    return np.asarray(Image.open(path))


def test_a_sheet_shows_each_query_and_its_matches(here: Path) -> None:
    embed("photos", "--weights", "run", "--out", "new")
    for name, color in {"red": (255, 0, 0), "lime": (0, 255, 0)}.items():
        Image.new("RGB", (64, 32), color).save(f"photos/dark/{name}.png")
    embed("photos", "--weights", "run", "--out", "colored")
    Image.new("RGB", (64, 32), (255, 0, 0)).save("query.png")
    assert ijepa("search", "colored", "query.png", "--key", "dark/lime.png", "--count", "2").code == 0
    sheet = colors("colored/_search.png")
    # The query and the match are red, the other query is lime: 128 x 64 px each, and a frame outside of it.
    assert (sheet == [255, 0, 0]).all(axis=2).sum() == 2 * 128 * 64
    assert (sheet == [0, 114, 178]).all(axis=2).sum() == 2 * 3 * 2 * (128 + 64 + 2 * 3)
    reds = np.flatnonzero((sheet == [255, 0, 0]).all(axis=2).any(axis=1))
    limes = np.flatnonzero((sheet == [0, 255, 0]).all(axis=2).any(axis=1))
    assert len(reds) == 64
    assert len(limes) in (64, 128)


def test_images_that_are_gone_are_gray(here: Path) -> None:
    embed("photos", "--weights", "run", "--out", "new")
    for path in Path("photos/light").iterdir():
        path.unlink()
    answer = ijepa("search", "new", "photos/dark/0.png")
    assert answer.code == 0
    assert answer.err == [
        "5 images cannot be read any more, so the contact sheet shows gray tiles. The first: "
        f"{answer.err[0].partition('The first: ')[2]}"
    ]
    assert answer.err[0].endswith("No such file or directory: '" + str(here / answer.err[0].split("'")[1]) + "'")
    gray = (colors("new/_search.png") == 210).all(axis=2).sum()
    assert 0 <= gray - 5 * 128 * 128 < 1000  # some pixels of letters are of this gray too


def test_images_of_shards_are_read_from_the_source(here: Path) -> None:
    import tarfile

    with tarfile.open("photos.tar", "w") as tar:
        tar.add("photos/dark/0.png", "a.png")
        tar.add("photos/light/0.png", "b.png")
    embed("photos.tar", "--weights", "run", "--out", "new")
    Path("elsewhere").mkdir()
    with contextlib.chdir("elsewhere"):
        assert ijepa("search", "../new", "--key", "photos.tar:a.png").err == []
    with tarfile.open("photos.tar", "w") as tar:
        tar.add("photos/dark/0.png", "a.png")
        tar.add("photos/dark/2.png", "b.png")
    answer = ijepa("search", "new", "--key", "photos.tar:a.png")
    assert answer.code == 0
    assert answer.err[-1] == (
        "2 images cannot be read any more, so the contact sheet shows gray tiles. The first: photos.tar:a.png: the "
        f"images of {here / 'photos.tar'} have changed since they were embedded"
    )


def test_a_sheet_has_a_limit(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "LINES", 2)
    monkeypatch.setattr(command, "TILES", 3)
    keys = [f"{name}/0.png" for name in ("dark", "light")] + ["dark/2.png"]
    answer = ijepa("search", "embeddings", "--key", *keys, "--count", "5", "--json")
    assert len(answer.matches) == 3 * 5
    assert answer.err == [
        "The contact sheet shows only the first 2 of 3 queries.",
        "The contact sheet shows only the first 3 of 5 matches of each query.",
    ]
    blue = (colors("embeddings/_search.png") == [0, 114, 178]).all(axis=2)
    assert np.diff(np.pad(blue.any(axis=1).astype(int), 1)).clip(0).sum() == 2  # frames, one below the other


# Wrong requests.


def nothing() -> None:
    """The folder as it is."""


def words() -> None:
    Path("notes.txt").write_text("no image, but words")


def spoilt(values: Callable[[NDArray[np.float32]], None]) -> Callable[[], None]:
    """The embedding of dark/2.png with other values."""

    def spoil() -> None:
        (path,) = Path("embeddings").glob("*.parquet")
        table = pq.read_table(path)
        matrix = np.stack(table["embedding"].to_numpy()).copy()
        values(matrix[2])
        column = pa.FixedSizeListArray.from_arrays(matrix.ravel(), matrix.shape[1])
        place = table.column_names.index("embedding")
        pq.write_table(table.set_column(place, table.schema.field(place), column), path)

    return spoil


def one_nan(vector: NDArray[np.float32]) -> None:
    vector[5] = np.nan


def zero(vector: NDArray[np.float32]) -> None:
    vector[:] = 0


def no_file_yet() -> None:
    for path in Path("embeddings").glob("*.parquet"):
        path.unlink()


def other_format() -> None:
    embed("photos", "--weights", "run", "--out", "arrays", "--format", "npy")


def cut_file() -> None:
    (path,) = Path("embeddings").glob("*.parquet")
    path.write_bytes(path.read_bytes()[:-10])


def fewer_rows() -> None:
    (path,) = Path("embeddings").glob("*.parquet")
    pq.write_table(pq.read_table(path).slice(0, 9), path)


def unreadable_image() -> None:
    path = Path("photos/light/2.png")
    path.write_bytes(path.read_bytes()[:-2000])
    embed("photos", "--weights", "run", "--out", "broken")


def moved_encoder() -> None:
    settings = load_settings(Path("embeddings"))
    Path("embeddings", "_embedding.json").write_text(dataclasses.replace(settings, encoder="gone").to_json())


def changed_encoder() -> None:
    settings = load_settings(Path("embeddings"))
    Path("embeddings", "_embedding.json").write_text(dataclasses.replace(settings, encoder="other").to_json())


FILE = "embeddings/part-00000-of-00001.parquet"
SPOILT = (
    f"The embedding of dark/2.png in {FILE} is zero or not finite, so it cannot be compared. Delete this file and run "
    "`ijepa embed` with --resume."
)
PHOTO = "photos/dark/0.png"

WRONG: dict[str, tuple[Callable[[], None], str, str]] = {
    "no query": (nothing, "embeddings", "Nothing to search for. Give QUERY images, --key or --duplicates."),
    "both kinds": (
        nothing,
        f"embeddings {PHOTO} --duplicates",
        "--duplicates compares all images of DIR. Remove QUERY and --key, or --duplicates.",
    ),
    "count": (nothing, f"embeddings {PHOTO} --count 0", "--count must be at least 1, not 0."),
    "threshold 0": (
        nothing,
        "embeddings --duplicates --threshold 0",
        "--threshold must be above 0 and at most 1, not 0.",
    ),
    "threshold 1.5": (
        nothing,
        "embeddings --duplicates --threshold 1.5",
        "--threshold must be above 0 and at most 1, not 1.5.",
    ),
    "threshold nan": (
        nothing,
        "embeddings --duplicates --threshold nan",
        "--threshold must be above 0 and at most 1, not nan.",
    ),
    "threshold without duplicates": (
        nothing,
        f"embeddings {PHOTO} --threshold 0.9",
        "--threshold only has an effect with --duplicates. Remove it.",
    ),
    "count of duplicates": (
        nothing,
        "embeddings --duplicates --count 5",
        "--count only has an effect with QUERY or --key. Remove it.",
    ),
    "weights without images": (
        nothing,
        "embeddings --key dark/0.png --weights run",
        "--weights only has an effect with QUERY images. Remove it.",
    ),
    "sheet": (nothing, f"embeddings {PHOTO} --out sheet.jpg", "--out must be a PNG file, not sheet.jpg."),
    "no image": (
        words,
        "embeddings notes.txt",
        "notes.txt: not a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000, HEIC or NumPy file. A query must be an "
        "image file.",
    ),
    "no such image": (nothing, "embeddings nope.jpg", "No such file: nope.jpg."),
    "a folder as query": (
        nothing,
        "embeddings photos",
        "photos is a folder. Give the paths of image files.",
    ),
    "no such folder": (nothing, f"nope {PHOTO}", "No such folder: nope. `ijepa embed` writes one."),
    "a folder of photos": (
        nothing,
        f"photos {PHOTO}",
        "photos contains no embeddings: it has no _embedding.json. Run `ijepa embed` first.",
    ),
    "no file yet": (
        no_file_yet,
        f"embeddings {PHOTO}",
        "embeddings contains no complete file yet. Run `ijepa embed` with --resume.",
    ),
    "another format": (
        other_format,
        f"arrays {PHOTO}",
        "arrays contains npy files, but only Parquet files can be searched. Run `ijepa embed` with --format parquet "
        "and another output folder.",
    ),
    "another encoder": (
        nothing,
        f"embeddings {PHOTO} --weights other",
        "embeddings contains embeddings of another encoder than other (RUN). Use --weights with the encoder that made "
        "them, or run `ijepa embed` with this one and another output folder.",
    ),
    "an encoder that has changed": (
        changed_encoder,
        f"embeddings {PHOTO}",
        "embeddings contains embeddings of another encoder than other (it has changed). Use --weights with the encoder "
        "that made them, or run `ijepa embed` with this one and another output folder.",
    ),
    "an encoder that has moved": (
        moved_encoder,
        f"embeddings {PHOTO}",
        "No such file or folder: gone. embeddings was made with this encoder. Use --weights if it has moved.",
    ),
    "NaN": (spoilt(one_nan), f"embeddings {PHOTO}", SPOILT),
    "NaN, duplicates": (spoilt(one_nan), "embeddings --duplicates", SPOILT),
    "zero": (spoilt(zero), "embeddings --key light/0.png", SPOILT),
    "key": (
        nothing,
        "embeddings --key light/0.png dark/0.jpg",
        "embeddings has no image with the key 'dark/0.jpg'. Did you mean 'dark/3.jpg'?",
    ),
    "key unlike any": (nothing, "embeddings --key 17", "embeddings has no image with the key '17'."),
    "key of an unreadable image": (
        unreadable_image,
        "broken --key light/2.png",
        "light/2.png has no embedding, because it cannot be decoded: cannot be decoded: image file is truncated.",
    ),
    "a file of fewer rows": (
        fewer_rows,
        f"embeddings {PHOTO}",
        f"{FILE} cannot be read: it has 9 rows, not 10. Delete it and run `ijepa embed` with --resume.",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_is_named(name: str, here: Path, place: Path) -> None:
    prepare, arguments, message = WRONG[name]
    prepare()
    answer = ijepa("search", *arguments.split())
    assert answer == (2, [], [f"ijepa: {message.replace('RUN', str(place / 'run'))}"])
    assert not [*Path("embeddings").glob("*.usearch"), *Path("embeddings").glob("*.png")]


def test_no_index_of_nan_is_left(here: Path) -> None:
    pytest.importorskip("usearch")
    spoilt(one_nan)()
    answer = ijepa("search", "embeddings", PHOTO, "--index")
    assert answer == (2, [], [answer.err[0], f"ijepa: {SPOILT}"])
    assert not [*Path("embeddings").glob("*usearch*")]


def test_a_file_that_is_cut_off(here: Path) -> None:
    cut_file()
    answer = ijepa("search", "embeddings", PHOTO)
    assert answer.code == 2
    assert answer.err[0].startswith(f"ijepa: {FILE} cannot be read: ")
    assert answer.err[0].endswith(" Delete it and run `ijepa embed` with --resume.")


def test_an_index_needs_usearch(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    answer = ijepa("search", "embeddings", PHOTO, "--index")
    assert answer == (
        2,
        [],
        [
            "ijepa: Searching embeddings with an index requires usearch. Install it with: pip install "
            "'ijepa-enhanced[search]'"
        ],
    )


def test_an_encoder_that_has_moved_can_be_named(here: Path) -> None:
    moved_encoder()
    answer = ijepa("search", "embeddings", PHOTO, "--weights", "run", "--count", "1", "--json")
    assert answer.matches[0]["key"] == "dark/0.png"


def test_matches_are_printed_if_the_sheet_cannot_be_written(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(command, "draw_sheet", read_only)
    answer = ijepa("search", "embeddings", "photos/dark/1.jpg", "--json")
    assert (answer.code, len(answer.matches)) == (0, 10)
    assert answer.err == ["embeddings/_search.png cannot be written: Read-only file system. Use --out FILE."]


def test_a_key_that_is_not_text(here: Path) -> None:
    answer = ijepa("search", "embeddings", "--key", "bad\udcff.jpg")
    assert answer.code == 2
    assert answer.err[0].startswith(r"ijepa: embeddings has no image with the key 'bad\xff.jpg'.")
