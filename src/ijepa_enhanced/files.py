"""Files that are whole or not there, and the folders for them."""

import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ijepa_enhanced.errors import RequestError


def make_folder(folder: Path, new: bool = False) -> None:
    """Create a folder, and those above it.

    Args:
        folder: where. If it exists, nothing happens.
        new: it must not exist.

    Raises:
        RequestError: it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=not new)
    except OSError as error:
        reason = "it is a file" if folder.is_file() else error.strerror
        raise RequestError(f"Cannot create the folder {folder}: {reason}.") from error


@contextmanager
def replacing(path: Path, new: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to, and rename it to `path` at the end, or remove it on an error.

    No other process has the same temporary path, not even one in another container that shares the folder. The file
    gets the mode that the umask gives to new files. It is on disk when the context ends.

    Args:
        path: of the file.
        new: `path` must not exist.

    Raises:
        FileExistsError: `path` exists and should not.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        temporary.unlink()  # only its owner can read a file of mkstemp
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        temporary.unlink()
        yield temporary
        temporary.chmod(mode)  # safetensors writes a file that only its owner can read
        flush(temporary)  # first: after a power cut, a renamed file must have its contents
        if new:
            _link(temporary, path)
        else:
            temporary.replace(path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _link(temporary: Path, path: Path) -> None:
    """Give a file the name `path`, unless another file has it: then raise FileExistsError."""
    try:
        os.link(temporary, path)
    except OSError:
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        temporary.replace(path)  # the file system has no links


def flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on disk.

    Raises:
        OSError: they cannot be written.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS):  # some network file systems cannot flush a folder
            raise
    finally:
        os.close(descriptor)


def remove_partials(folder: Path, of: str = "") -> None:
    """Remove the files and folders in `folder` that killed processes have left half-written.

    No other process may be writing to them.

    Args:
        folder: where they are.
        of: how the names of the whole files begin.
    """
    for partial in folder.glob(f".{glob.escape(of)}*.partial"):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
