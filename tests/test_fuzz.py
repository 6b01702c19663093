"""Every parser, on damaged files and on requests that nobody would write: it works, or it says why not in words.

The short test tries a few examples, always the same. The slow one tries new ones, for `FUZZ_MINUTES` a parser.
"""

import asyncio
import base64
import dataclasses
import faulthandler
import io
import itertools
import json
import os
import resource
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import imagecodecs
import numpy as np
import pillow_heif
import pyarrow.parquet
import pytest
import tifffile
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import example as with_example
from hypothesis import strategies as st
from PIL import Image

from damaged import DEEP, altered, damaged, damaged_json, damaged_safetensors
from ijepa_enhanced.config import build, keys_of, read_config
from ijepa_enhanced.data.catalog import catalog_path, open_catalog
from ijepa_enhanced.data.config import DataConfig
from ijepa_enhanced.data.decode import decode_whole
from ijepa_enhanced.data.opening import open_image, upright_size
from ijepa_enhanced.data.sources.base import Source
from ijepa_enhanced.data.sources.folder import FolderSource
from ijepa_enhanced.data.sources.lists import ListSource
from ijepa_enhanced.data.sources.open import anchored, open_source
from ijepa_enhanced.data.sources.tar import TarSource
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import CheckpointError, RequestError, UnreadableImage, UserError
from ijepa_enhanced.jepa import JEPA
from ijepa_enhanced.models.config import Architecture, PredictorConfig
from ijepa_enhanced.models.preprocessing import Preprocessing, Record
from ijepa_enhanced.models.vit import VisionTransformer
from ijepa_enhanced.objective import ObjectiveConfig
from ijepa_enhanced.pretrained import Pretrained, load, save
from ijepa_enhanced.serve.app import Service, make_app
from ijepa_enhanced.serve.config import Limits
from ijepa_enhanced.serve.engine import Engine
from ijepa_enhanced.serve.guard import Access
from ijepa_enhanced.serve.metrics import Metrics
from ijepa_enhanced.train.checkpoint import load_checkpoint, read_progress, save_checkpoint
from ijepa_enhanced.train.config import TrainConfig
from ijepa_enhanced.train.optimizer import make_optimizer
from ijepa_enhanced.visualize.report import write_report
from released import LAYOUTS, network_of, write

EXAMPLES = 8
"""Of each parser in the short test, besides those that it once failed on."""
MINUTES = float(os.environ.get("FUZZ_MINUTES", "1"))
"""For each parser in the slow test."""
MEMORY = 2**30
"""Bytes that a parser may ask for beyond what the process has. The files are a few kilobytes."""
PATIENCE = 60
"""Seconds after which a parser counts as hanging. Each example takes milliseconds."""
LONGEST = 1000
"""Characters of a message."""


pytestmark = pytest.mark.filterwarnings("ignore")  # libraries warn of damage


@contextmanager
def bounded() -> Iterator[None]:
    """End the process with the place where it hangs after `PATIENCE`, and refuse memory beyond `MEMORY`."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    faulthandler.dump_traceback_later(PATIENCE, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        resource.setrlimit(resource.RLIMIT_AS, before)


def check_reason(reason: str) -> None:
    """A reason is there, and is short."""
    assert 0 < len(reason) < LONGEST


def check_message(error: UserError, named: str, given: int = 0) -> None:
    """An error has sentences, is short, and names what it is about.

    Args:
        error: the error.
        named: what it names.
        given: characters that the user wrote, which it may repeat.
    """
    message = str(error)
    assert named in message
    assert message.endswith((".", "?"))
    assert len(message) < LONGEST + 3 * given


class Parser(NamedTuple):
    """A parser and what it is tried on."""

    inputs: st.SearchStrategy[Any]
    check: Callable[[Any], object]
    """Raises an error that is not for users, or an AssertionError, if the parser fails on an input."""
    failed: tuple[Any, ...] = ()
    """Inputs that it once failed on."""


def pixels(dtype: type = np.uint8, channels: int = 3) -> Any:
    return np.random.default_rng(0).integers(0, 256, (9, 7, channels)).astype(dtype)


def encoded(kind: str, **how: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels()).save(file, kind, **how)
    return file.getvalue()


def valid_images() -> list[bytes]:
    """One of each format that is read."""
    pillow_heif.register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = ("PNG", "WEBP", "BMP", "JPEG2000", "AVIF", "HEIF")
    files = [encoded("JPEG", exif=exif), encoded("TIFF", compression="tiff_lzw"), *map(encoded, kinds)]
    files += [encoded("GIF", save_all=True, append_images=[Image.new("RGB", (7, 9))])]
    for array in (pixels(np.float32, 4), pixels(np.uint16)):
        file = io.BytesIO()
        np.save(file, array)
        files.append(file.getvalue())
    for how in ({}, {"bigtiff": True}, {"compression": "zlib", "planarconfig": "separate"}):
        file = io.BytesIO()
        tifffile.imwrite(file, pixels(np.uint16, 5), **how)
        files.append(file.getvalue())
    return [*files, imagecodecs.png_encode(pixels(np.uint16))]


def image_headers(folder: Path) -> Parser:
    """`open_image` on a file, as a scan reads it, and the pixels of those that it takes for small."""
    path = folder / "image"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        try:
            with open(path, "rb", buffering=4096) as file:
                height, width = upright_size(open_image(file))
            assert height > 0
            assert width > 0
            if height * width < 2**16:
                assert decode_whole(open_image(data), 32).ndim == 3
        except UnreadableImage as error:
            check_reason(str(error))

    return Parser(damaged(*valid_images()), check, (b"\x93NUMPY\x02\0" + b"\xff" * 4,))


def shard(members: dict[str, bytes], kind: int) -> bytes:
    """A tar file, which also holds a link."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a.png"
        tar.addfile(link)
    return file.getvalue()


def check_source(source: Source) -> None:
    """List the images of a source, and read them."""
    catalog = open_catalog(source, cache=False)
    for row in range(min(len(catalog.rows), 5)):
        with suppress(UnreadableImage):
            source.open(row)
    assert all(reason for _, reason in catalog.unreadable)


def tar_shards(folder: Path) -> Parser:
    """`TarSource`."""
    path = folder / "train.tar"
    png = encoded("PNG")
    members = {
        "a.png": png,
        "a.cls": b"3",
        f"{'b' * 60}/{'b' * 60}.png": png,
        "c.json": b'{"label": "cat"}',
        "c.png": png,
    }
    valid = [shard(members, kind) for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]

    def check(data: bytes) -> None:
        path.write_bytes(data)
        try:
            check_source(TarSource([path], str(path)))
        except UserError as error:
            check_message(error, path.name)

    start = shard({"a.png": png}, tarfile.USTAR_FORMAT)[:1024]
    sizes = (2**33, 2**63, 2**80, -512, -1024)
    claims = itertools.product(("b.png", "b.json", "b.cls"), (b"0", b"L", b"x", b"Z"), sizes)
    failed = [start + header(*claim) + bytes(1024) for claim in claims]
    failed += [shard({"a.png": png, "a.cls": b"9" * 5000}, tarfile.USTAR_FORMAT)]
    return Parser(damaged(*valid), check, (*failed, start + header("b", b"L", 512) * 500))


def header(name: str, kind: bytes, size: int) -> bytes:
    """A header of a tar file that claims any size: numbers of base 256 can be large or negative."""
    data = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    data[124:136] = b"\x80" + size.to_bytes(11) if size >= 0 else (256**12 + size).to_bytes(12)
    data[148:157] = b" " * 8 + kind
    data[148:156] = b"%06o\0 " % sum(data)
    return bytes(data)


def lists(folder: Path) -> Parser:
    """`ListSource`, of CSV and of lines of JSON."""
    (folder / "a.png").write_bytes(encoded("PNG"))
    table = damaged(b"path,label\na.png,1\nb.png,2\n", b'path,label\n"a.png","cat, dog"\n')
    line = damaged_json({"path": "a.png", "label": 3})

    def check(content: tuple[str, bytes]) -> None:
        path = folder / content[0]
        path.write_bytes(content[1])
        try:
            check_source(ListSource(path))
        except UserError as error:
            check_message(error, path.name)

    inputs = st.tuples(st.just("list.csv"), table) | st.tuples(st.just("list.jsonl"), line)
    return Parser(inputs, check, tuple(("list.jsonl", data) for data in (b"[" * DEEP, b"9" * 5000)))


def catalogs(folder: Path) -> Parser:
    """The file of a catalog: whatever happened to it, the images are listed."""
    images = folder / "images"
    images.mkdir()
    for number, data in enumerate([encoded("PNG"), encoded("JPEG"), b"damaged"]):
        (images / f"{number}.png").write_bytes(data)
    open_catalog(FolderSource(images))
    path = catalog_path(FolderSource(images))

    def check(data: bytes) -> None:
        path.write_bytes(data)
        catalog = open_catalog(FolderSource(images))
        for position in range(len(catalog.rows)):
            catalog.key(position)
        assert len([*catalog.unreadable]) + len(catalog.rows) >= 0

    return Parser(damaged(path.read_bytes()), check)


def checkpoints(folder: Path) -> Parser:
    """`read_progress` and `load_checkpoint`."""
    model = JEPA(Architecture(16, 1, 2, 16, 8), PredictorConfig(16, 1, 1), ObjectiveConfig())
    optimizer = make_optimizer(model)
    checkpoint = save_checkpoint(folder, 3, model, optimizer, {"step": 3, "cursor": [1, 2]})
    progress = checkpoint / "progress.json"
    (weights,) = checkpoint.glob("*.safetensors")
    valid = {path: path.read_bytes() for path in (progress, weights)}

    def check(change: tuple[Path, bytes]) -> None:
        for path, data in (*valid.items(), change):
            path.write_bytes(data)
        try:
            read_progress(checkpoint)
        except CheckpointError as error:
            check_message(error, str(checkpoint))
        try:
            load_checkpoint(checkpoint, model, optimizer)
        except CheckpointError as error:
            check_message(error, str(checkpoint))

    inputs = st.tuples(st.just(progress), damaged_json(json.loads(valid[progress])))
    inputs |= st.tuples(st.just(weights), damaged_safetensors(valid[weights]))
    return Parser(inputs, check, tuple((progress, data) for data in (b"0", b"[0]", b"[" * DEEP)))


def run_folders(folder: Path) -> Parser:
    """`write_report` on a run without checkpoint and encoder."""
    photos, run = folder / "photos", folder / "run"
    for each in (photos, run):
        each.mkdir()
    for number in range(3):
        Image.fromarray(np.tile(pixels(), (6, 6, 1))).save(photos / f"{number}.png")
    config = dataclasses.asdict(TrainConfig(data=DataConfig(str(photos), tokens_per_pack=256), steps=4))
    line = {"step": 2, "loss": 1.5, "fill": 0.9, "tokens_per_second": 10.0, "views_per_second": 1.0, "rankme": 3.0}
    scores = {"settings": {"data": "photos", "resolution": 64}, "scores": {"trained": {"knn20": 0.5, "linear": None}}}
    contents: dict[str, dict[str, Any]] = {"config.yaml": config, "log.jsonl": line, "evaluation.json": scores}

    def check(change: tuple[str, bytes]) -> None:
        for name, content in contents.items():
            (run / name).write_text(json.dumps(content) + "\n")
        (run / change[0]).write_bytes(change[1])
        try:
            write_report([run], folder / "report.html", dataclasses.asdict(TrainConfig()))
        except UserError as error:
            check_message(error, "", len(change[1]))

    return Parser(
        st.one_of([st.tuples(st.just(name), damaged_json(content)) for name, content in contents.items()]), check
    )


def tables(folder: Path) -> Parser:
    """`TableSource`, of Parquet files."""
    path = folder / "train.parquet"
    image = pyarrow.array([{"bytes": encoded("PNG"), "path": "a.png"}] * 3)
    valid = []
    for compression in ("none", "snappy"):
        pyarrow.parquet.write_table(pyarrow.table({"image": image, "label": [0, 1, 1]}), path, compression=compression)
        valid.append(path.read_bytes())

    def check(data: bytes) -> None:
        path.write_bytes(data)
        try:
            check_source(open_source(str(path)))
        except UserError as error:
            check_message(error, path.name)

    return Parser(damaged(*valid), check)


def encoder_folders(folder: Path) -> Parser:
    """`pretrained.load`, of folders of ours and of transformers, and of pickles."""
    network = VisionTransformer(Architecture(16, 1, 2, 16, 8, position_grid=(2, 2)))
    save(folder / "ours", Pretrained(network, Preprocessing(48), None, Record()))
    architecture, layout = LAYOUTS["dinov2 with registers"]
    write(folder / "dinov2", *layout(network_of(architecture)))
    inputs = []
    valid = {}
    for name in ("ours", "dinov2"):
        config, weights = folder / name / "config.json", folder / name / "model.safetensors"
        valid |= {path: path.read_bytes() for path in (config, weights)}
        inputs += [st.tuples(st.just(config), damaged_json(json.loads(valid[config])))]
        inputs += [st.tuples(st.just(weights), damaged_safetensors(valid[weights]))]
    for name, zipped in (("zip.pth", True), ("old.pth", False)):
        path = folder / name
        torch.save({"target_encoder": network.state_dict()}, path, _use_new_zipfile_serialization=zipped)
        inputs += [st.tuples(st.just(path), damaged(path.read_bytes()))]

    def check(change: tuple[Path, bytes]) -> None:
        path, data = change
        path.write_bytes(data)
        place = path if path.suffix == ".pth" else path.parent
        try:
            load(place)
        except UserError as error:
            check_message(error, str(place))
        finally:
            path.write_bytes(valid.get(path, b""))

    config = folder / "ours" / "config.json"
    kept = json.loads(valid[config])
    sizes: list[dict[str, Any]] = [{"depth": 10**6}, {"patch_size": 10**5}, {"width": 10**9}]
    changed = [json.dumps(kept | {"architecture": kept["architecture"] | size}).encode() for size in sizes]
    old = (folder / "old.pth").read_bytes()
    failed = [*((config, data) for data in (*changed, b"{", b"[" * DEEP)), (folder / "old.pth", old[:120] + b"X")]
    return Parser(st.one_of(inputs), check, tuple(failed))


def yaml_files(folder: Path) -> Parser:
    """`read_config` and `build`."""
    path = folder / "config.yaml"
    config = yaml.safe_load(yaml.safe_dump(dataclasses.asdict(TrainConfig())))
    words = [*keys_of(TrainConfig), ": ", "\n", "  ", "- ", "&a ", "*a", "<<: ", "? ", "| ", "> ", "[", "]", "{", "}"]
    words += ["!!int ", "!!bool ", "!!timestamp ", "!!binary ", "!!set ", "!!python/name:os.system ", "2020-13-45"]
    words += ["'", '"', "#", "%YAML 9.9", "---", "...", "\t", "null", "1e999", "9" * 5000, "x", "0x", ".inf"]
    text = st.lists(st.sampled_from(words), max_size=8).map(lambda words: "".join(words).encode())

    def check(data: bytes) -> None:
        path.write_bytes(data)
        try:
            build(TrainConfig, read_config(path, TrainConfig, {}))
        except RequestError as error:
            check_message(error, "", len(data))

    inputs = damaged(yaml.safe_dump(config).encode()) | altered(config).map(lambda value: json.dumps(value).encode())
    values = ("2020-13-45", "!!bool x", "!!timestamp x", "!!float ''", "1" + "0" * 400, "9" * 5000)
    loops = (b"optim: &a {lr: *a}", b"optim: &a {x: *a}", b"&a {x: *a}", b"\xff")
    return Parser(inputs | text, check, (*(f"epochs: {value}".encode() for value in values), *loops))


def source_names(folder: Path) -> Parser:
    """`open_source`, in a folder that has one of each kind. The Hub is not asked."""
    (folder / "photos").mkdir()
    (folder / "photos" / "a.png").write_bytes(encoded("PNG"))
    (folder / "train-00.tar").write_bytes(shard({"a.png": encoded("PNG")}, tarfile.USTAR_FORMAT))
    (folder / "list.csv").write_text("path\nphotos/a.png\n")
    words = ["photos", "train-00.tar", "train-", "list.csv", "synthetic", ".parquet", ".tar", " + ", "@1", "@.5", "@0"]
    words += ["#label=a", "#image=a", ",", "=", "{", "}", "..", "0", "00", "9" * 20, "*", "?", "[", "]", "/", "~", "~x"]
    words += ["\0", "\n", "\ud800", "é", ":", "http://", "x" * 5000, "9" * 5000]
    text = st.lists(st.sampled_from(words) | st.text(max_size=2), max_size=7).map("".join)

    def check(spec: str) -> None:
        try:
            anchored(spec)
            open_source(spec)
        except UserError as error:
            check_message(error, "", len(spec))

    failed = (
        "\0/*",
        "{0..9999999999}",
        "{0..99999}{0..99999}",
        "{9..0}",
        "~x",
        "~x\0",
        "~\ud800",
        f"photos@{'9' * 400} + photos",
    )
    inside = text.filter(lambda spec: "hf:" not in spec and not spec.strip(". ").startswith("/"))
    return Parser(inside, check, failed)


def http_bodies(folder: Path) -> Parser:
    """The routes of `ijepa serve` that have a body."""
    encoder = Encoder.random(Architecture(16, 1, 2, 16, 8), Preprocessing(16), 0)
    metrics = Metrics()
    limits = Limits(max_bytes=200_000, max_pixels=50_000, max_images=6, tokens_per_pack=400, max_wait=1)
    app = make_app(Service(Engine(encoder, limits, metrics.count_pack), metrics, "pets"), Access())
    image = base64.b64encode(encoded("PNG")).decode()
    uri = f"data:image/png;base64,{image}"
    request = {"input": [uri, {"image": image}], "model": "pets", "resolution": 16, "merge_rate": 0.1, "maps": True}
    request |= {"dimensions": 4, "encoding_format": "base64", "user": "me"}
    parts = httpx.Request("POST", "http://x", files={"files": ("a.png", encoded("PNG"))}, data={"resolution": "16"})
    form = parts.headers["Content-Type"]
    json_body = st.tuples(st.just("/v1/embeddings"), st.just("application/json"), damaged_json(request))
    forms = st.sampled_from(["/v1/embeddings/files", "/v1/inspect"])
    form_body = st.tuples(forms, st.just(form), damaged(parts.read()))
    crossed = st.tuples(forms, st.sampled_from(["application/json", "multipart/form-data", form[:40]]), st.binary())

    async def post(path: str, kind: str, body: bytes) -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post(path, content=body, headers={"Content-Type": kind})

    def check(request: tuple[str, str, bytes]) -> None:
        answer = asyncio.run(post(*request))
        content = answer.json()
        if answer.status_code != 200:
            assert 400 <= answer.status_code < 500
            assert content["error"]["message"].endswith((".", "?"))
            assert len(content["error"]["message"]) < LONGEST

    bodies = (r'{"input": "\ud800"}', r'{"input": "", "model": "\ud800"}', f'{{"input": "", "{"k" * 5000}": 1}}')
    failed = (("/v1/embeddings", "application/json", body.encode()) for body in bodies)
    return Parser(json_body | form_body | crossed, check, tuple(failed))


PARSERS = (
    image_headers,
    tar_shards,
    lists,
    catalogs,
    checkpoints,
    run_folders,
    tables,
    encoder_folders,
    yaml_files,
    source_names,
    http_bodies,
)
"""Each makes valid files in a folder, and returns a parser of them."""


def tried(parser: Parser, how: settings) -> int:
    """Try a parser on some inputs, and return how many."""
    count = itertools.count()

    def check(value: Any) -> None:
        next(count)
        with bounded():
            parser.check(value)

    test = given(parser.inputs)(check)
    for value in parser.failed:
        test = with_example(value)(test)
    settings(how, deadline=None, database=None, suppress_health_check=[*HealthCheck])(test)()
    return next(count)


@pytest.fixture
def parser(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Parser:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("IJEPA_CACHE", str(tmp_path / "cache"))
    made: Parser = request.param(tmp_path)
    return made


each = pytest.mark.parametrize("parser", PARSERS, indirect=True, ids=lambda make: make.__name__)


@each
def test_damage_gives_an_error_in_words(parser: Parser) -> None:
    tried(parser, settings(max_examples=EXAMPLES, derandomize=True))


@pytest.mark.slow
@each
def test_damage_gives_an_error_in_words_for_minutes(
    parser: Parser, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    end, count = time.monotonic() + 60 * MINUTES, 0
    while time.monotonic() < end:
        count += tried(parser, settings(max_examples=100))
    with capsys.disabled():
        print(f"\n{request.node.callspec.id}: {count:,} executions")
