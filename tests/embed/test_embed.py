"""`ijepa embed`: every image is one row, in order, whatever happens on the way."""

import contextlib
import errno
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch

from ijepa_enhanced import Encoder
from ijepa_enhanced.cli import main
from ijepa_enhanced.data.catalog import open_catalog
from ijepa_enhanced.data.sources.folder import FolderSource
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.embed import rows as embed_rows
from ijepa_enhanced.embed import run as embed_run
from ijepa_enhanced.embed.plan import EmbedPlan, files_of_shard
from ijepa_enhanced.embed.settings import LEAST_ROWS, METADATA, EmbedSettings, load_settings, save_settings
from ijepa_enhanced.evaluate.tokens import Clock

from .conftest import BROKEN, CUT, ROWS

SMALL = f"""
import sys
from ijepa_enhanced.cli import main
from ijepa_enhanced.embed import settings
settings.LEAST_ROWS = {ROWS}
sys.exit(main(sys.argv[1:]))
"""
"""`ijepa` with files of `ROWS` rows, for processes of their own."""

ALL = [f"cats/{n:02d}.{'jpg' if n % 2 else 'png'}" for n in range(10)]
ALL += [f"dogs/{n:02d}.{'jpg' if n % 2 else 'png'}" for n in range(10, 21)]


def ijepa(*arguments: Any) -> tuple[int, list[str], list[str]]:
    """Exit code, and lines of stdout and stderr, of a command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return code, out.getvalue().splitlines(), err.getvalue().splitlines()


def embed(source: Any, encoder: Path, out: Path, *more: Any) -> dict[str, Any]:
    """The JSON of `ijepa embed`, which must succeed."""
    code, printed, errors = ijepa("embed", source, "--weights", encoder, "--out", out, "--workers", 0, "--json", *more)
    assert code == 0, errors
    counts: dict[str, Any] = json.loads(printed[-1])
    return counts


def table(folder: Path) -> dict[str, list[Any]]:
    """All rows of a folder of Parquet files."""
    paths = sorted(folder.glob("*.parquet"))
    columns: dict[str, list[Any]] = pq.ParquetDataset(paths).read().to_pydict()
    return columns


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(*arguments: Any, code: int = 2) -> str:
    """What a command that must fail says last."""
    found, _, errors = ijepa(*arguments)
    assert found == code, errors
    return errors[-1].removeprefix("ijepa: ")


@pytest.mark.usefixtures("small_files", "float32")
def test_every_image_is_one_row_in_order(photos: Path, encoder: Path, tmp_path: Path) -> None:
    counts = embed(photos, encoder, tmp_path / "out")
    assert counts.pop("images_per_second") > 0
    assert counts == {"images": 19, "unreadable": 2, "files": 3}
    found = table(tmp_path / "out")
    assert found["key"] == ALL
    assert found["path"] == [str(photos / key) for key in ALL]
    assert found["label"] == ["cats"] * 10 + ["dogs"] * 11
    errors = {key: error for key, error in zip(ALL, found["error"], strict=True) if error is not None}
    assert errors.keys() == {BROKEN, CUT}
    assert "not a JPEG" in errors[BROKEN]
    assert "truncated" in errors[CUT]
    sizes = dict(zip(ALL, zip(found["height"], found["width"], strict=True), strict=True))
    assert sizes[BROKEN] == (None, None)
    assert None not in sizes[CUT], "its header can be read"
    model = Encoder.from_pretrained(encoder)
    for key, vector in zip(ALL, found["embedding"], strict=True):
        if key in errors:
            assert vector is None
        else:
            # The same products in packs of another length, which the CPU's kernels round in another order.
            torch.testing.assert_close(torch.tensor(vector), model.embed([photos / key])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("float32")
def test_rows_of_many_packs_are_those_of_their_images(
    photos: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ijepa_enhanced.encoder.CPU_TOKENS", 36)  # two images a pack
    embed(photos, encoder, tmp_path / "out", "--tokens")
    (path,) = (tmp_path / "out").glob("*.parquet")
    assert pq.ParquetFile(path).num_row_groups == 1
    found, model = table(tmp_path / "out"), Encoder.from_pretrained(encoder)
    for row, key in enumerate(ALL):
        if key not in (BROKEN, CUT):
            (patches,) = model.patch_tokens([photos / key])
            # Rounding as above, and that of float16.
            torch.testing.assert_close(torch.tensor(found["embedding"][row]), patches.mean(dim=0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(torch.tensor(found["tokens"][row]), patches, rtol=1e-3, atol=2e-3)


@pytest.mark.usefixtures("small_files")
def test_the_settings_are_in_every_file(photos: Path, encoder: Path, tmp_path: Path) -> None:
    embed(photos, encoder, tmp_path / "out", "--resolution", 24, "--merge-rate", 0.1, "--dtype", "float16")
    settings = load_settings(tmp_path / "out")
    assert (settings.resolution, settings.merge_rate, settings.dtype, settings.pooling) == (24, 0.1, "float16", "mean")
    assert (settings.encoder, settings.source, settings.images) == (str(encoder), str(photos), 21)
    for path in (tmp_path / "out").glob("*.parquet"):
        assert EmbedSettings(**json.loads(pq.read_schema(path).metadata[METADATA])) == settings


@pytest.mark.usefixtures("float32")
def test_layers_and_tokens(photos: Path, encoder: Path, tmp_path: Path) -> None:
    embed(photos, encoder, tmp_path / "out", "--layers", 3, "--tokens")
    found = table(tmp_path / "out")
    model = Encoder.from_pretrained(encoder)
    packed = next(model.packs([photos / ALL[1]]))
    outputs = model.last_layers(packed, None, 3)
    for name, output in zip(("layer_1", "layer_2", "embedding"), outputs, strict=True):
        torch.testing.assert_close(torch.tensor(found[name][1]), output.mean(dim=0), rtol=1e-4, atol=1e-5)
    for row, grid in enumerate(found["grid"]):
        if grid is None:
            assert ALL[row] in (BROKEN, CUT)
            assert found["tokens"][row] is None
            continue
        tokens = torch.tensor(found["tokens"][row])
        assert tokens.shape == (grid[0] * grid[1], 192)
        # float16 rounds to 11 bits; values are up to 4 here.
        torch.testing.assert_close(tokens.mean(dim=0), torch.tensor(found["embedding"][row]), rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(torch.tensor(found["tokens"][1]), outputs[-1], rtol=1e-3, atol=2e-3)


@pytest.mark.usefixtures("small_files")
def test_all_formats_hold_the_same_numbers(photos: Path, encoder: Path, tmp_path: Path) -> None:
    for name in ("parquet", "npy", "csv"):
        embed(photos, encoder, tmp_path / name, "--format", name, "--layers", 2)
    found = table(tmp_path / "parquet")
    plain = ("key", "path", "label", "height", "width", "error")
    for name in ("npy", "csv"):
        parts = [pyarrow.csv.read_csv(path).to_pydict() for path in sorted((tmp_path / name).glob("*.csv"))]
        texts = {key: [value or None for part in parts for value in part[key]] for key in plain}
        assert texts == {key: found[key] for key in plain}
    for column in ("layer_2", "embedding"):
        expected = np.array([vector or [np.nan] * 192 for vector in found[column]], np.float32)
        arrays = [np.load(path) for path in sorted((tmp_path / "npy").glob(f"*.{column}.npy"))]
        np.testing.assert_array_equal(np.concatenate(arrays), expected)
        texts = [
            np.array([part[f"{column}_{number}"] for number in range(192)], np.float32).T  # empty cells are NaN
            for part in parts
        ]
        np.testing.assert_array_equal(np.concatenate(texts), expected)


def test_rows_are_written_in_groups(
    photos: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that tokens of a thousand images need not be in memory at once, and unreadable images stay in place."""
    embed(photos, encoder, tmp_path / "one", "--tokens")
    monkeypatch.setattr(embed_rows, "GROUP_BYTES", 1)
    monkeypatch.setattr(
        "ijepa_enhanced.encoder.CPU_TOKENS", 36
    )  # two images a pack, the second of one cannot be decoded
    embed(photos, encoder, tmp_path / "many", "--tokens")
    (path,) = (tmp_path / "many").glob("*.parquet")
    assert pq.ParquetFile(path).num_row_groups > 3
    one, many = table(tmp_path / "one"), table(tmp_path / "many")
    for name in ("key", "path", "label", "height", "width", "error", "grid"):
        assert many[name] == one[name]
    for row in np.flatnonzero([error is None for error in one["error"]]):
        # Packs of another length, as above.
        np.testing.assert_allclose(many["embedding"][row], one["embedding"][row], rtol=1e-4, atol=1e-5)


def test_packs_do_not_cross_files_and_only_those_of_one_file_are_in_memory(
    photos: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ijepa_enhanced.embed.settings.LEAST_ROWS", ROWS)
    source = open_source(str(photos))
    catalog = open_catalog(source)
    settings = EmbedSettings("", "", "", "", 21, 192, 32, 0.0, "float32", "float32", 1, False, "parquet")
    plan = EmbedPlan(settings, catalog, 8, 1024, 40)
    planned = [catalog.rows[np.concatenate([pack.images for pack in plan.packs(file)])] for file in range(3)]
    assert [list(rows) for rows in planned] == [[*range(1, 8)], [*range(8, 16)], [*range(16, 21)]]
    stream = plan.stream(range(3))
    monkeypatch.setattr(EmbedPlan, "packs", lambda self, file: [file])
    assert next(stream) == 0


@pytest.mark.parametrize(
    ("images", "files", "rows"), [(0, 0, 1024), (1, 1, 1024), (1025, 2, 1024), (10**7, 1000, 10**4)]
)
def test_files_have_a_thousand_rows_or_more(images: int, files: int, rows: int) -> None:
    settings = EmbedSettings("", "", "", "", images, 192, 32, 0.0, "float32", "float32", 1, False, "parquet")
    assert LEAST_ROWS == 1024
    assert (settings.files, settings.rows_per_file) == (files, rows)
    assert sum(len(settings.rows_of(file)) for file in range(files)) == images


@pytest.mark.parametrize(("files", "count"), [(3, 2), (3, 5), (10, 3), (0, 2)])
def test_every_file_is_in_one_shard(files: int, count: int) -> None:
    shards = [files_of_shard(files, (number, count)) for number in range(1, count + 1)]
    assert [file for shard in shards for file in shard] == [*range(files)]
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.usefixtures("small_files")
def test_shards_and_workers_write_the_same_files(photos: Path, encoder: Path, tmp_path: Path) -> None:
    embed(photos, encoder, tmp_path / "whole")
    counts = [embed(photos, encoder, tmp_path / "parts", "--shard", f"{i}/2", "--workers", 1) for i in (2, 1)]
    assert [each["files"] for each in counts] == [2, 1]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def start(*arguments: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SMALL, *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.usefixtures("small_files")
def test_killed_at_any_time_and_resumed(photos: Path, encoder: Path, tmp_path: Path) -> None:
    """The rows are those of an undisturbed run, bit for bit, and no half-written file is left."""
    moments, out = random.Random(0), tmp_path / "out"
    for partial in ("_embedding.json", "part-00000*", "part-00002*"):
        process = start("embed", photos, "--weights", encoder, "--resume", "--workers", 1, "--out", out)
        while not [*out.glob(partial)] and process.poll() is None:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.01))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        for complete in out.glob("part-00002*"):  # it was too fast
            complete.unlink()
    (out / ".part-00002-of-00003.parquet.abc.partial").write_text("left by a process that was killed")
    embed(photos, encoder, out, "--resume")
    embed(photos, encoder, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")
    assert table(out)["key"] == ALL


@pytest.mark.usefixtures("small_files")
def test_resume_writes_only_what_is_missing(
    photos: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    embed(photos, encoder, whole)
    embed(photos, encoder, out, "--resume")
    (out / "part-00001-of-00003.parquet").unlink()
    before = {path: path.stat().st_ino for path in out.iterdir()}
    counts = embed(photos, encoder, out, "--resume")
    assert counts["images"] == 19, "those of all files"
    assert contents(out) == contents(whole)
    assert {path: path.stat().st_ino for path in before} == before
    assert embed(photos, encoder, out, "--resume")["images_per_second"] is None


def test_two_ranks_write_what_one_writes(photos: Path, encoder: Path, tmp_path: Path) -> None:
    arguments = ("embed", photos, "--weights", encoder, "--workers", "0", "--json", "--out")
    (tmp_path / "small.py").write_text(SMALL)
    found = []
    for ranks in (1, 2):
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)) if ranks > 1 else ()
        done = subprocess.run(
            [sys.executable, *launcher, tmp_path / "small.py", *map(str, arguments), str(tmp_path / str(ranks))],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        counts = json.loads(done.stdout.splitlines()[-1])
        found.append((counts.pop("images_per_second") > 0, counts, contents(tmp_path / str(ranks))))
    assert found[0] == found[1]


def test_the_time_spent_waiting_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def slow() -> Iterator[int]:
        for number in range(3):
            now[0] += 2
            yield number

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock()
    for _ in clock.timed(slow()):
        now[0] += 10
    assert clock.waited == 6


@pytest.mark.usefixtures("small_files")
def test_a_folder_of_something_else_is_refused(photos: Path, encoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("embed", photos, "--weights", encoder, "--out", out, "--workers", 0)
    embed(photos, encoder, out)
    before = contents(out)
    there = f"{out} already contains 3 of 3 files. Add --resume to continue, or choose another output folder."
    assert refused(*command) == there
    other = tmp_path / "other"
    Encoder.random(
        Encoder.from_pretrained(encoder).config, Encoder.from_pretrained(encoder).preprocessing, 1
    ).save_pretrained(other)
    for change, words in {
        ("--weights", other): f"of another encoder ({encoder})",
        ("--resolution", 24): "with another --resolution (32, not 24)",
        ("--resolution", "native"): "with another --resolution (32, not native)",
        ("--merge-rate", 0.1): "with another --merge-rate (0.0, not 0.1)",
        ("--dtype", "float16"): "with another --dtype (float32, not float16)",
        ("--layers", 2): "with another number of --layers (1, not 2)",
        ("--tokens",): "with another setting of --tokens (False, not True)",
        ("--format", "npy"): "with another --format (parquet, not npy)",
    }.items():
        message = f"{out} contains embeddings {words}. Choose another output folder."
        assert refused(*command, "--resume", *change) == message
    message = f"{out} contains embeddings of other images, or images that have changed since ({photos}). "
    assert refused("embed", photos / "cats", *command[2:], "--resume") == message + "Choose another output folder."
    assert contents(out) == before


@pytest.mark.usefixtures("small_files")
def test_settings_that_cannot_be_read(photos: Path, encoder: Path, tmp_path: Path) -> None:
    embed(photos, encoder, tmp_path)
    command = ("embed", photos, "--weights", encoder, "--out", tmp_path, "--resume")
    settings = tmp_path / "_embedding.json"
    text = settings.read_text()
    settings.write_text(text.replace('"format": 1', '"format": 0'))
    assert "was written by another version" in refused(*command)
    settings.write_text(text[:50])
    assert refused(*command).startswith(f"{settings} cannot be read: ")
    settings.write_text(text)
    (tmp_path / "part-00000-of-00003.parquet").write_bytes(b"PAR1")
    assert "part-00000-of-00003.parquet cannot be read" in refused(*command)


@pytest.mark.parametrize("shard", ["3/2", "0/2", "1", "a/b", "1/2/3", "-1/2", "1/0"])
def test_shards_that_do_not_exist(shard: str) -> None:
    message = f"--shard must be I/N with I from 1 to N, for example 1/4, not {shard}."
    assert refused("embed", "photos", "--weights", "run", "--out", "out", f"--shard={shard}") == message


def test_wrong_requests(photos: Path, encoder: Path, tmp_path: Path) -> None:
    command = ("--weights", encoder, "--out", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert refused("embed", tmp_path / "empty", *command).startswith(f"No images in {tmp_path / 'empty'}.")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.jpg").write_bytes(b"no image")
    assert (
        refused("embed", tmp_path / "bad", *command, code=1)
        == f"None of the 1 images of {tmp_path / 'bad'} can be read."
    )
    assert refused("embed", photos, *command, "--layers", 4) == (
        "--layers must be at most 3, the number of layers of the encoder, not 4."
    )
    assert refused("embed", photos, *command, "--tokens", "--format", "csv") == (
        "--tokens requires --format parquet, not csv."
    )
    assert not (tmp_path / "out").exists()
    inside = photos / "cats" / "new"
    assert refused("embed", photos, "--weights", encoder, "--out", inside) == (
        f"--out {inside} is inside {photos}, where its files would be read as images or tables. Choose a folder "
        "elsewhere."
    )
    assert not inside.exists()
    assert refused("embed", photos, "--weights", encoder, "--out=") == "--out must not be empty."
    (tmp_path / "file").write_text("")
    assert refused("embed", photos, "--weights", encoder, "--out", tmp_path / "file") == (
        f"Cannot create the folder {tmp_path / 'file'}: it is a file."
    )


def scaled(encoder: Path, factor: float, out: Path) -> Path:
    """An encoder whose features are `factor` times as large."""
    model = Encoder.from_pretrained(encoder)
    model.network.blocks.norm.weight.data *= factor
    model.save_pretrained(out)
    return out


@pytest.mark.usefixtures("small_files")
def test_features_that_float16_cannot_hold(photos: Path, encoder: Path, tmp_path: Path) -> None:
    large = scaled(encoder, 1e6, tmp_path / "large")
    command = ("embed", photos, "--weights", large, "--workers", 0, "--out", tmp_path / "out")
    message = refused(*command, "--dtype", "float16")
    assert message == f"The features of {ALL[1]} are too large for float16. Use --dtype float32."
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["_embedding.json"]
    message = refused(*command[:-1], tmp_path / "other", "--tokens")
    assert message == f"The features of patches of {ALL[1]} are too large for float16. Remove --tokens."
    infinite = scaled(encoder, float("1e38"), tmp_path / "infinite")
    message = refused(*command[:3], infinite, *command[4:-1], tmp_path / "third", code=1)
    assert "contain NaN or infinite values" in message


@pytest.mark.usefixtures("small_files")
def test_a_full_disk_loses_nothing(photos: Path, encoder: Path, tmp_path: Path, disk_of: Callable[[int], Any]) -> None:
    out = tmp_path / "out"
    with disk_of(3000):
        message = refused("embed", photos, "--weights", encoder, "--workers", 0, "--out", out, code=1)
    assert message == (
        f"Cannot write to {out}: File too large. When this is solved, run the same command with --resume."
    )
    assert [path.name for path in out.iterdir()] == ["_embedding.json"]
    embed(photos, encoder, out, "--resume")
    assert table(out)["key"] == ALL


@pytest.mark.usefixtures("small_files")
def test_interrupted(photos: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"

    def stop(progress: embed_run.Progress, images: int) -> None:
        if (out / "part-00000-of-00003.parquet").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(embed_run.Progress, "add", stop)
    message = refused("embed", photos, "--weights", encoder, "--workers", 0, "--out", out, code=1)
    assert message == "Interrupted. To continue, run the same command with --resume."
    assert {path.name for path in out.iterdir()} == {"_embedding.json", "part-00000-of-00003.parquet"}


@pytest.mark.usefixtures("small_files")
def test_a_killed_worker(photos: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    monkeypatch.setattr("ijepa_enhanced.commands.embed.embed_files", killed)
    message = refused("embed", photos, "--weights", encoder, "--out", tmp_path / "out", code=1)
    assert message == (
        "A process that decodes images was killed, which happens if memory is full. Use fewer --workers, and run the "
        "same command with --resume."
    )


@pytest.mark.usefixtures("small_files")
def test_a_disk_that_fails_leaves_no_row_with_an_error(
    photos: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a row would never be tried again."""
    out, command = tmp_path / "out", ("embed", photos, "--weights", encoder, "--workers", 0, "--resume", "--out")
    embed(photos, encoder, tmp_path / "whole")
    original = FolderSource._open

    def fail(source: FolderSource, row: int) -> Any:
        if source.key(row) == ALL[12]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(source, row)

    monkeypatch.setattr(FolderSource, "_open", fail)
    assert refused(*command, out, code=1) == (
        f"{ALL[12]} cannot be read: Input/output error. The disk or the network may have failed. When this is solved, "
        "run the same command with --resume."
    )
    assert {path.name for path in out.iterdir()} == {"_embedding.json", "part-00000-of-00003.parquet"}
    monkeypatch.setattr(FolderSource, "_open", original)
    embed(photos, encoder, out, "--resume")
    assert contents(out) == contents(tmp_path / "whole")


def test_of_processes_that_start_together_one_decides(tmp_path: Path) -> None:
    first = EmbedSettings("a", "", "", "", 8, 192, 32, 0.0, "float32", "float32", 1, False, "parquet")
    other = EmbedSettings("b", "", "", "", 8, 192, 48, 0.0, "bfloat16", "float32", 1, False, "parquet")
    assert save_settings(first, tmp_path) == first
    assert save_settings(other, tmp_path) == first
    assert [path.name for path in tmp_path.iterdir()] == ["_embedding.json"]
