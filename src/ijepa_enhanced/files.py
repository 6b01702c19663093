"""Files that are whole or not there."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to, and rename it to `path` at the end, or remove it on an error.

    No other process has the same temporary path, not even one in another container that shares the folder. The file
    gets the mode that the umask gives to new files.
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
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
