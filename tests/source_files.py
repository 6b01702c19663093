"""Files of images, as folders and tar shards, that the tests of sources write, and what they ask of a source."""

import io
import tarfile

import numpy as np
from PIL import Image


def png(height=4, width=6, color="red", **options):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), color).save(buffer, "PNG", **options)
    return buffer.getvalue()


def noise_jpeg(height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def write(root, **files):
    """Write files by their paths, folders made as needed."""
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def shard(path, members, tar_format=tarfile.USTAR_FORMAT):
    """A tar file of (name, bytes) members."""
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(*labels, first=0):
    """Members of one image and one label for every label; image n is n + 1 pixels high."""
    members = []
    for number, label in enumerate(labels, start=first):
        members += [(f"{number:04d}.png", png(height=number + 1)), (f"{number:04d}.cls", label.encode())]
    return members


def described(*metadata):
    """Members of one image and its metadata, for every one."""
    members = []
    for number, data in enumerate(metadata):
        members += [(f"{number:04d}.png", png()), (f"{number:04d}.json", data)]
    return members


def keys(source):
    return [*source.listing.keys]


def heights(source):
    return [source.size(row)[0] for row in range(len(source))]
