"""Copies of remote sources: in memory, on disk, and from a web server of the test's own, also when it breaks off."""

import functools
import http.server
import io
import tarfile
import threading
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ijepa_enhanced.data import remote
from ijepa_enhanced.data.remote import TRIES, fetch
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.errors import SourceError


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nobody waits long for the next try."""
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)


def shard(path, *labels, first=0):
    """A tar file of an image and a label for each label; image n is n + 1 pixels high."""
    with tarfile.open(path, "w") as tar:
        for number, label in enumerate(labels, start=first):
            buffer = io.BytesIO()
            Image.new("RGB", (6, number + 1)).save(buffer, "PNG")
            for name, data in ((f"{number}.png", buffer.getvalue()), (f"{number}.cls", label.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path):
    """Two training shards, one validation shard and the names of the classes."""
    folder = tmp_path / "there"
    folder.mkdir()
    shard(folder / "train-0.tar", "1", "0")
    shard(folder / "train-1.tar", "1", first=2)
    shard(folder / "val-0.tar", "0", first=5)
    (folder / "classes.txt").write_text("ant\nbee\n")
    return folder


@pytest.fixture
def server(shards):
    """The folder of shards by HTTP; `breaks[name]` is how often that file ends half-way, `asked` what was asked for."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def copyfile(self, source, outputfile):
            name = self.path.rpartition("/")[2]
            Handler.asked.append(name)
            data = source.read()
            if Handler.breaks.get(name, 0):
                Handler.breaks[name] -= 1
                data = data[: len(data) // 2]
                self.close_connection = True
            outputfile.write(data)

    Handler.breaks, Handler.asked = {}, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(shards))) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield Handler, f"http://127.0.0.1:{served.server_address[1]}"
        served.shutdown()
        thread.join()


def heights(source):
    return [source.size(row)[0] for row in range(len(source))]


PATTERNS = {
    "train-{1,0}.tar": ([3, 1, 2], [1, 1, 0]),
    "train-0.tar": ([1, 2], [1, 0]),
    "val-0.tar": ([6], [0]),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_shards_by_http(server, tmp_path, pattern):
    _, address = server
    source = open_source(fetch(f"{address}/{pattern}", tmp_path / "here"))
    assert (heights(source), source.labels.tolist()) == PATTERNS[pattern]
    assert source.classes == ["ant", "bee"]


@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_shards_by_asterisk(shards, tmp_path, protocol):
    address = f"file://{shards}"
    if protocol == "memory":
        address = f"memory://{tmp_path.name}"
        fsspec.filesystem("memory").put(str(shards), f"/{tmp_path.name}", recursive=True)
    here = tmp_path / "here"
    source = open_source(fetch(f"{address}/train-*.tar", here))
    assert (heights(source), source.classes) == ([1, 2, 3], ["ant", "bee"])
    assert sorted(path.name for path in here.iterdir()) == ["classes.txt", "train-0.tar", "train-1.tar"]


def test_more_shards_than_a_path_can_name(tmp_path):
    """Their names take 380 bytes, and a file name has at most 255."""
    for number in range(20):
        shard(tmp_path / f"train-{number:08d}.tar", "1", first=number)
    spec = fetch(f"file://{tmp_path}/train-{{00000000..00000019}}.tar", tmp_path / "here")
    assert heights(open_source(spec)) == [*range(1, 21)]


def test_a_folder_of_images(pictures, tmp_path):
    (tmp_path / "here").mkdir()
    source = open_source(fetch(f"file://{pictures}", tmp_path / "here"))
    here = open_source(str(pictures))
    assert ([*source.listing.keys], source.classes, heights(source)) == (
        [*here.listing.keys],
        here.classes,
        heights(here),
    )


def test_a_folder_of_shards_has_its_parts(shards, tmp_path):
    spec = fetch(f"file://{shards}/", tmp_path / "here")
    assert heights(open_source(spec)) == [1, 2, 3]
    assert heights(open_source(spec, "val")) == [6]


def test_a_column_of_parquet(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 7)).save(buffer, "PNG")
    pq.write_table(pa.table({"front": [buffer.getvalue()], "back": [b""]}), tmp_path / "a.parquet")
    source = open_source(fetch(f"file://{tmp_path}/*.parquet#image=front", tmp_path / "here"))
    assert heights(source) == [7]


@pytest.mark.parametrize("name", ["a,b.tar", "a{1}.tar", "a#1.tar", "a*.tar", "a + b.tar"])
def test_a_shard_that_a_pattern_could_not_name_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(SourceError) as error:
        fetch(f"file://{tmp_path}/*.tar", tmp_path / "here")
    assert str(error.value) == (
        f"{tmp_path}/{name} cannot be read as a shard, because its name contains one of {{ , }} # * ? [ or ' + '. "
        "Rename it, or use its folder as the source."
    )
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("name", ["../out.png", "a/../../out.png", "/out.png"])
def test_nothing_is_written_outside_of_the_folder(tmp_path, monkeypatch, name):
    class Server(fsspec.AbstractFileSystem):
        def find(self, path, **options):
            return [f"{path}/in.png", f"{path}/{name}"]

    monkeypatch.setattr(fsspec, "url_to_fs", lambda spec: (Server(), spec))
    with pytest.raises(SourceError) as error:
        fetch("https://evil.org/d", tmp_path)
    assert str(error.value) == (
        f"https://evil.org/d lists https://evil.org/d/{name}, which is outside of it. Nothing was copied."
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("path", "listed"), [("", ["a.png", "b/c.png"]), ("a.tar", ["a.tar"])])
def test_paths_that_are_relative(tmp_path, monkeypatch, path, listed):
    class Server(fsspec.AbstractFileSystem):
        def find(self, path, **options):
            return listed

        def info(self, path, **options):
            return {"size": 5}

        def get_file(self, file, to, **options):
            Path(to).write_bytes(file[:5].encode())

        def exists(self, path, **options):
            return False

    monkeypatch.setattr(fsspec, "url_to_fs", lambda spec: (Server(), path))
    fetch(f"github://who:what@main/{path}", tmp_path)
    found = {file.relative_to(tmp_path).as_posix(): file.read_text() for file in tmp_path.rglob("*") if file.is_file()}
    assert found == {name: name[:5] for name in listed}


def test_what_breaks_off_is_tried_again(server, tmp_path, caplog):
    handler, address = server
    handler.breaks = {"train-1.tar": TRIES - 1}
    done = []
    source = open_source(fetch(f"{address}/train-{{0..1}}.tar", tmp_path, lambda *counts: done.append(counts)))
    assert heights(source) == [1, 2, 3]
    assert done == [(1, 2), (2, 2)]
    assert [record.getMessage()[: len(address) + 13] for record in caplog.records] == [f"{address}/train-1.tar:"] * 3


def test_what_always_breaks_off_is_named_and_gone_on_with(server, tmp_path):
    handler, address = server
    handler.breaks = {"train-1.tar": TRIES}
    with pytest.raises(SourceError) as error:
        fetch(f"{address}/{{train-0,train-1,val-0}}.tar", tmp_path)
    said = str(error.value)
    assert said.startswith(f"{address}/train-1.tar could not be copied after 4 attempts: ClientPayloadError: ")
    assert said.endswith(
        f" 2 of the 3 files of {address}/{{train-0,train-1,val-0}}.tar have not been copied. "
        "Run the same command again to continue."
    )
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == ["train-0.tar"], "nothing is half there"
    handler.asked.clear()
    assert heights(open_source(fetch(f"{address}/{{train-0,train-1,val-0}}.tar", tmp_path))) == [1, 2, 3, 6]
    assert handler.asked.count("train-0.tar") == 0, "what is there is kept"


def test_a_file_that_is_not_there(server, tmp_path):
    _, address = server
    with pytest.raises(SourceError) as error:
        fetch(f"{address}/nope.tar", tmp_path)
    assert str(error.value) == (
        f"{address}/nope.tar could not be copied after 4 attempts: not found. "
        f"1 of the 1 files of {address}/nope.tar has not been copied. Run the same command again to continue."
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("memory://empty", "No images in memory://empty. It must be a folder of images, or tar or Parquet files."),
        (
            "nope://x/a.tar",
            "nope://x/a.tar cannot be opened: Protocol not known: nope. For https, install 'ijepa-enhanced[data]'. For "
            "other protocols, install the package that the error names.",
        ),
    ],
)
def test_what_is_no_source(tmp_path, spec, message):
    with pytest.raises(SourceError) as error:
        fetch(spec, tmp_path)
    assert str(error.value) == message


def test_remote_sources_are_prepared_first():
    with pytest.raises(SourceError) as error:
        open_source("https://example.org/a.tar")
    assert str(error.value) == (
        "https://example.org/a.tar is a remote source. "
        "Run ijepa prepare https://example.org/a.tar FOLDER, then use FOLDER."
    )
