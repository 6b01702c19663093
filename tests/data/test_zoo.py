"""A folder of every format, mode and kind of damage that people have: what each file gives.

All pictures are the same four colors, so that a file that is read wrongly shows others.
"""

import io
import itertools
import struct
import zipfile
import zlib

import numpy as np
import pillow_heif
import pytest
import tifffile
from PIL import Image, ImageCms, PngImagePlugin

from ijepa_enhanced.data.catalog import open_catalog
from ijepa_enhanced.data.decode import decode_views
from ijepa_enhanced.data.sources.folder import FolderSource
from ijepa_enhanced.errors import UnreadableImage

COLORS = np.array([[[220, 30, 40], [40, 200, 60]], [[50, 60, 210], [230, 220, 40]]], dtype=np.uint8)
RGB = COLORS.repeat(16, axis=0).repeat(24, axis=1)
"""[32, 48, 3]: red, green, blue and yellow, a quarter each, their edges on those of JPEG's blocks."""
GRAY = RGB[..., 1].repeat(3).reshape(RGB.shape)
BITS = np.where(RGB[..., 1:2] > 127, 255, 0).repeat(3, axis=2).astype(np.uint8)
WHITE = np.full_like(RGB, 255)
DEEP = RGB.astype(np.uint16) * 257
"""The same in 16 bits: 255 is 65535."""

picture = Image.fromarray(RGB)
gray = Image.fromarray(RGB[..., 1])
other = Image.new("RGB", picture.size, "white")


def names(index):
    return [index.key(position) for position in range(len(index.rows))]


def encode(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def jpeg(image=picture, **options):
    return encode(image, "JPEG", quality=95, subsampling=0, **options)


def stored(orientation):
    """The pixels of the picture as a camera stores it that was held that way."""
    pixels = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.swapaxes(0, 1),
        6: np.rot90(RGB, 1),
        7: RGB[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(RGB, -1),
    }[orientation]
    return Image.fromarray(np.ascontiguousarray(pixels))


def exif(orientation, kind="H", order="<"):
    """An EXIF block whose orientation is a number of 16 (H) or 32 (I) bits."""
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HIH", 42, 8, 1)
    value = struct.pack(f"{order}{kind}", orientation).ljust(4, b"\0")
    return b"Exif\0\0" + head + struct.pack(f"{order}HHI", 0x0112, {"H": 3, "I": 4}[kind], 1) + value + bytes(4)


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def text_of_png(name, text, zip=False):
    info = PngImagePlugin.PngInfo()
    info.add_text(name, text, zip=zip)
    return encode(stored(6), "PNG", pnginfo=info)


def profile_of_png():
    """EXIF data as ImageMagick keeps them: as hexadecimal text."""
    block = exif(6)
    return text_of_png("Raw profile type exif", f"\nexif\n{len(block):8}\n{block.hex()}\n", zip=True)


def chunk(kind, data):
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def ycck():
    """As Adobe Photoshop writes CMYK: libjpeg is made to store YCC and K by giving it these as if they were CMYK."""
    cmyk = np.asarray(picture.convert("CMYK"))
    ycc = np.asarray(Image.fromarray(cmyk[..., :3], "RGB").convert("YCbCr"))
    stored = np.concatenate([ycc, 255 - cmyk[..., 3:]], axis=2)
    data = bytearray(jpeg(Image.frombytes("CMYK", picture.size, (255 - stored).tobytes())))
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


def png(pixels, depth, color_type, transparent=b""):
    """A PNG of unsigned whole numbers of any depth, which Pillow reads but does not write."""
    height, width = pixels.shape[:2]
    lines = pixels.astype(f">u{depth // 8}").reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    body = b"".join(b"\0" + line.tobytes() for line in lines)
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + (chunk(b"tRNS", transparent) if transparent else b"")
    return head + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def bomb(width, height):
    """The first bytes of a PNG of that size."""
    data = bytearray(png(np.zeros((1, 1), np.uint8), 8, 0))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def tiff(pixels, order="<", white=65535):
    """A TIFF of 16 bits a channel in either byte order, whose white is 65535 or 0."""
    height, width, channels = pixels.shape
    data = pixels.astype(f"{order}u2").tobytes()
    tags = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, channels, 16 if channels == 1 else 8),
        (259, 3, 1, 1),
        (262, 3, 1, (1 if white else 0) if channels == 1 else 2),
        (273, 4, 1, 200),
        (277, 3, 1, channels),
        (278, 4, 1, height),
        (279, 4, 1, len(data)),
    ]
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, 14)
    head += struct.pack(f"{order}3H", 16, 16, 16) + struct.pack(f"{order}H", len(tags))
    for tag, kind, count, value in tags:
        short = kind == 3 and count == 1
        head += struct.pack(f"{order}HHI", tag, kind, count) + struct.pack(
            f"{order}HH" if short else f"{order}I", *((value, 0) if short else (value,))
        )
    return head.ljust(200, b"\0") + data


def swapped_profile():
    """An ICC profile of a screen whose red lamp is where sRGB has blue, and the other way round."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))
    return profile.replace(b"rXYZ", b"?XYZ").replace(b"bXYZ", b"rXYZ").replace(b"?XYZ", b"bXYZ")


def linear_profile():
    """An ICC profile of the primaries of sRGB whose values are proportional to light."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    curve = profile.index(b"para")  # one for all three channels; function 0 of ICC.1:2010, 10.16: x ** 1
    profile[curve : curve + 16] = b"para" + struct.pack(">IHHi", 0, 0, 0, 65536)
    return bytes(profile)


def ink_profile():
    """An ICC profile of a printer whose cyan and yellow inks are in each other's place; it cannot be printed with.

    Without black ink, light is a sum of the primaries of sRGB, so two grid points an ink behind the curve of sRGB give
    naive CMYK, to within a gray level for 140,608 colors. That takes XYZ, and so 'mft2': in Lab, colors between the
    grid points would be others.
    """

    def fixed(*numbers):
        return struct.pack(f">{len(numbers)}i", *(round(number * 65536) for number in numbers))

    white = (0.9642, 1.0, 0.8249)  # D50, by ICC.1:2001-04, 6.1.4
    # The columns are the primaries of sRGB adapted to D50, as every profile of sRGB has them.
    to_xyz = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
    value = 1 - np.arange(256) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)  # IEC 61966-2-1
    paper = 1 - np.array(list(itertools.product((0, 1), repeat=4)))
    # Naive CMYK would not reverse the first three: cyan takes away red.
    xyz = paper[:, 3:] * (paper[:, 2::-1] @ to_xyz.T)
    table = b"mft2" + struct.pack(">IBBBx", 0, 4, 3, 2) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + struct.pack(">HH", 256, 2)
    for scale, numbers in ((65535, np.tile(1 - linear, (4, 1))), (32768, xyz), (65535, np.tile([0, 1], (3, 1)))):
        table += np.rint(numbers * scale).astype(">u2").tobytes()

    tags = {
        # After the name, which ends in a zero, none in Unicode and none for the Macintosh.
        b"desc": b"desc" + struct.pack(">II", 0, 5) + b"inks\0" + bytes(4 + 4 + 2 + 1 + 67),
        b"cprt": b"text" + struct.pack(">I", 0) + b"none\0",
        b"wtpt": b"XYZ " + struct.pack(">I", 0) + fixed(*white),
        b"A2B0": table,
    }
    entries, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        entries += name + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = 128 + len(entries) + len(body)
    header = struct.pack(">I4xI", size, 0x02400000) + b"prtrCMYKXYZ " + struct.pack(">6H", 2026, 1, 1, 0, 0, 0)
    return (header + b"acsp").ljust(68, b"\0") + fixed(*white).ljust(60, b"\0") + entries + body


SWAPPED = swapped_profile()
INKS = ink_profile()
LINEAR = linear_profile()
light = np.where(RGB / 255 <= 0.04045, RGB / 255 / 12.92, ((RGB / 255 + 0.055) / 1.055) ** 2.4)  # IEC 61966-2-1
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
mirrored = Image.fromarray(np.ascontiguousarray(RGB[..., ::-1]))
"""Red and blue, and so cyan and yellow, in each other's place."""


def half_transparent():
    """Red and green as they are, the lower half wholly transparent."""
    alpha = np.full((32, 48, 1), 255, np.uint8)
    alpha[16:] = 0
    return Image.fromarray(np.concatenate([RGB, alpha], axis=2))


def measured():
    """Numbers without a white point, and the gray levels they give."""
    values = 1000 + GRAY[..., 0].astype(np.float32)
    return encode(Image.fromarray(values), "TIFF"), ((GRAY - np.float64(30)) * (255 / (220 - 30))).round()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def heic(**options):
    """A photo of a phone."""
    buffer = io.BytesIO()
    pillow_heif.from_pillow(picture).save(buffer, quality=95, chroma=444, **options)
    return buffer.getvalue()


def tiff_of_bands(pixels, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


BANDS = np.concatenate([DEEP, DEEP], axis=2)
SPARSE = GRAY[..., 0] / 255.0
SPARSE[3, 4] = np.nan


UPPER = np.concatenate([RGB[:16], WHITE[16:]])
LUMA = np.asarray(picture.convert("L").convert("RGB")).copy()
LUMA[16:] = 255


def heif(brand):
    return b"\0\0\0\x14ftyp" + brand + b"\0\0\0\0" + brand + bytes(200)


def zip_behind(data):
    buffer = io.BytesIO(data)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("page.html", "<script>")
    return buffer.getvalue()


EXACT, LOSSY, PRINT = 0, 4, 12
"""Most gray levels by which any pixel is off: none, JPEG's or a profile's, and those of colors for print."""

SHOWN = {
    "plain.jpg": (jpeg(), RGB, LOSSY),
    "progressive.jpg": (jpeg(progressive=True), RGB, LOSSY),
    "gray.jpg": (jpeg(gray), GRAY, LOSSY),
    "cmyk.jpg": (jpeg(picture.convert("CMYK")), RGB, PRINT),
    "CMYK with a profile.jpg": (jpeg(mirrored.convert("CMYK"), icc_profile=INKS), RGB, LOSSY),
    "ycck.jpg": (ycck(), RGB, PRINT),
    "profile.jpg": (jpeg(mirrored, icc_profile=SWAPPED), RGB, LOSSY),
    "srgb profile.jpg": (jpeg(icc_profile=SRGB), RGB, LOSSY),
    "damaged profile.jpg": (jpeg(icc_profile=SWAPPED[:300]), RGB, LOSSY),
    "profile of other colors.jpg": (jpeg(gray, icc_profile=SWAPPED), GRAY, LOSSY),
    **{
        f"held {orientation}.jpg": (jpeg(stored(orientation), exif=exif(orientation)), RGB, LOSSY)
        for orientation in range(1, 9)
    },
    "orientation of 32 bits.jpg": (jpeg(stored(6), exif=exif(6, "I")), RGB, LOSSY),
    "orientation of 32 bits, big-endian.jpg": (jpeg(stored(6), exif=exif(6, "I", ">")), RGB, LOSSY),
    "orientation in XMP.jpg": (jpeg(stored(6), xmp=XMP), RGB, LOSSY),
    "orientation in XMP.png": (text_of_png("XML:com.adobe.xmp", XMP.decode()), RGB, EXACT),
    "orientation in a profile.png": (profile_of_png(), RGB, EXACT),
    "orientation.png": (encode(stored(6), "PNG", exif=exif(6)), RGB, EXACT),
    "orientation.webp": (encode(stored(6), "WEBP", lossless=True, exif=exif(6)), RGB, EXACT),
    "orientation.avif": (encode(stored(6), "AVIF", quality=95, subsampling="4:4:4", exif=exif(6)), RGB, PRINT),
    "linear.png": (
        encode(Image.fromarray((light * 255).round().astype(np.uint8)), "PNG", icc_profile=LINEAR),
        RGB,
        LOSSY,
    ),
    "polyglot.jpg": (zip_behind(jpeg()), RGB, LOSSY),
    "really a png.jpg": (encode(picture, "PNG"), RGB, EXACT),
    "CAPITALS.JPEG": (jpeg(), RGB, LOSSY),
    "plain.png": (encode(picture, "PNG"), RGB, EXACT),
    "palette.png": (encode(picture.quantize(4), "PNG"), RGB, EXACT),
    "1 bit.png": (encode(gray.point(lambda value: 255 * (value > 127), "1"), "PNG"), BITS, EXACT),
    "gray.png": (encode(gray, "PNG"), GRAY, EXACT),
    "16 bits gray.png": (png(DEEP[..., 1], 16, 0), GRAY, EXACT),
    "16 bits gray, transparent.png": (
        png(DEEP[..., 1], 16, 0, DEEP[0, 0, 1].tobytes()[::-1]),
        np.where(GRAY[0, 0] == GRAY, WHITE, GRAY),
        EXACT,
    ),
    "16 bits.png": (png(DEEP, 16, 2), RGB, EXACT),
    "16 bits, alpha.png": (png(np.concatenate([DEEP, np.full_like(DEEP[..., :1], 65535)], axis=2), 16, 6), RGB, EXACT),
    "transparent.png": (encode(half_transparent(), "PNG"), UPPER, EXACT),
    "gray, transparent.png": (encode(half_transparent().convert("LA"), "PNG"), LUMA, EXACT),
    "profile, transparent.png": (
        encode(Image.fromarray(np.asarray(half_transparent())[..., [2, 1, 0, 3]].copy()), "PNG", icc_profile=SWAPPED),
        UPPER,
        LOSSY,
    ),
    "profile of a palette.png": (encode(mirrored.quantize(4), "PNG", icc_profile=SWAPPED), RGB, LOSSY),
    "animated.png": (encode(picture, "PNG", save_all=True, append_images=[other]), RGB, EXACT),
    "plain.webp": (encode(picture, "WEBP", lossless=True), RGB, EXACT),
    "animated.webp": (encode(picture, "WEBP", lossless=True, save_all=True, append_images=[other]), RGB, EXACT),
    "transparent.webp": (encode(half_transparent(), "WEBP", lossless=True), UPPER, EXACT),
    "plain.gif": (encode(picture.quantize(4), "GIF"), RGB, EXACT),
    "animated.gif": (
        encode(picture.quantize(4), "GIF", save_all=True, append_images=[other.quantize(4)]),
        RGB,
        EXACT,
    ),
    "plain.bmp": (encode(picture, "BMP"), RGB, EXACT),
    "palette.bmp": (encode(picture.quantize(4), "BMP"), RGB, EXACT),
    "1 bit.bmp": (encode(gray.point(lambda value: 255 * (value > 127), "1"), "BMP"), BITS, EXACT),
    "plain.tif": (encode(picture, "TIFF"), RGB, EXACT),
    "pages.tiff": (encode(picture, "TIFF", save_all=True, append_images=[other]), RGB, EXACT),
    "lzw.tif": (encode(picture, "TIFF", compression="tiff_lzw"), RGB, EXACT),
    "fax.tif": (
        encode(gray.point(lambda value: 255 * (value > 127), "1"), "TIFF", compression="group4"),
        BITS,
        EXACT,
    ),
    "cmyk.tif": (encode(picture.convert("CMYK"), "TIFF"), RGB, EXACT),
    "CMYK with a profile.tif": (encode(mirrored.convert("CMYK"), "TIFF", icc_profile=INKS), RGB, LOSSY),
    "lab.tif": (
        encode(
            ImageCms.profileToProfile(
                picture, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
            ),
            "TIFF",
        ),
        RGB,
        PRINT,
    ),
    "16 bits gray.tif": (tiff(DEEP[..., 1:2]), GRAY, EXACT),
    "16 bits gray, big-endian.tif": (tiff(DEEP[..., 1:2], ">"), GRAY, EXACT),
    "16 bits gray, white is 0.tif": (tiff(65535 - DEEP[..., 1:2], white=0), GRAY, EXACT),
    "no white point.tif": (*measured(), EXACT),
    "16 bits.tif": (tiff(DEEP), RGB, EXACT),
    "plain.jp2": (encode(picture, "JPEG2000", irreversible=False), RGB, EXACT),
    "16 bits, compressed.tif": (tiff_of_bands(DEEP, photometric="rgb", compression="lzw", predictor=True), RGB, EXACT),
    "16 bits, planes.tif": (
        tiff_of_bands(np.moveaxis(DEEP, 2, 0), photometric="rgb", planarconfig="separate", byteorder=">"),
        RGB,
        EXACT,
    ),
    "8 bits.npy.tif": (npy(RGB), RGB, EXACT),
    "16 bits gray.npy.tif": (npy(DEEP[..., 1]), GRAY, EXACT),
    "16 bits, by columns, big-endian.npy.tif": (npy(np.asfortranarray(DEEP.astype(">u2"))), RGB, EXACT),
    "floats.npy.tif": (npy(RGB / 255.0), RGB, 1),  # truncated below
    "photo.heic": (heic(), RGB, PRINT),
    "renamed.jpg": (heic(), RGB, PRINT),
    "bare.j2k": (encode(picture, "JPEG2000", irreversible=False, no_jp2=True), RGB, EXACT),
    "16 bits gray.jp2": (encode(Image.fromarray(DEEP[..., 1]), "JPEG2000", irreversible=False), GRAY, EXACT),
    "plain.avif": (encode(picture, "AVIF", quality=95, subsampling="4:4:4"), RGB, PRINT),
    "animated.avif": (
        encode(picture, "AVIF", quality=95, subsampling="4:4:4", save_all=True, append_images=[other]),
        RGB,
        PRINT,
    ),
    "transparent.avif": (encode(half_transparent(), "AVIF", quality=95, subsampling="4:4:4"), UPPER, PRINT),
    "brand of a container.avif": (
        encode(picture, "AVIF", quality=95, subsampling="4:4:4").replace(b"ftypavif", b"ftypmif1", 1),
        RGB,
        PRINT,
    ),
}
whole = encode(picture, "PNG")

NO_FORMAT = "not a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000, HEIC or NumPy file"
UNREADABLE = {
    "empty.jpg": (b"", "empty file"),
    "text.jpg": (b"no image, but words", NO_FORMAT),
    "page.png": (b"<!DOCTYPE html><html>", NO_FORMAT),
    "drawing.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", NO_FORMAT),
    "film.jpg": (b"\0\0\0\x18ftypisom\0\0\0\0isommp42" + bytes(99), NO_FORMAT),
    "damaged.heic": (heif(b"heic"), "damaged header: "),
    "damaged.heif": (heif(b"mif1"), "damaged header: "),
    "objects.npy.tif": (
        npy(np.full((32, 48), "x", dtype=object)),
        "holds Python objects, which could run any code when loaded: save numbers instead",
    ),
    "counts.npy.tif": (
        npy(np.zeros((32, 48), np.int64)),
        "has values of type int64: save them as uint8, uint16 or floats",
    ),
    "film.npy.tif": (
        npy(np.zeros((2, 32, 48, 3), np.uint8)),
        "has the shape [2, 32, 48, 3]: only [height, width] and [height, width, channels] are read",
    ),
    "cut in the header.npy.tif": (npy(GRAY)[:40], "damaged header: "),
    "cut in the middle.npy.tif": (npy(GRAY)[:-1], "cannot be decoded: buffer"),
    "not a number.npy.tif": (npy(SPARSE), "contains NaN or infinite values: replace them"),
    "not a number.tif": (
        encode(Image.fromarray(SPARSE.astype(np.float32)), "TIFF"),
        "contains NaN or infinite values: replace them",
    ),
    "six channels.npy.tif": (npy(BANDS), "has 6 channels instead of 3 (data.channels)"),
    "six channels.tif": (
        tiff_of_bands(BANDS, photometric="minisblack", planarconfig="contig", compression="deflate", predictor=True),
        "has 6 channels instead of 3 (data.channels)",
    ),
    "bomb.png": (bomb(20000, 20000), "20000 x 20000 px is above the limit of 89,478,485 px"),
    "orientation behind the pixels.png": (
        whole[:-12] + chunk(b"eXIf", exif(6)[6:]) + whole[-12:],
        "the EXIF orientation is stored after the pixel data, where it is not read: save the image again with the EXIF "
        "data before the pixels",
    ),
    "cut in the signature.jpg": (jpeg()[:2], NO_FORMAT),
    "cut in the header.jpg": (jpeg()[:40], "damaged header: Truncated File Read"),
    "cut in the header.png": (whole[:20], "damaged header: Truncated File Read"),
    "cut in the middle.jpg": (jpeg()[:-60], "cannot be decoded: image file is truncated"),
    "cut in the middle.png": (whole[: len(whole) // 2], "cannot be decoded: image file is truncated"),
    "cut in the middle.avif": (
        encode(picture, "AVIF")[:-20],
        "cannot be decoded: Failed to decode frame 0: Truncated data",
    ),
    "cut in the middle.webp": (encode(picture, "WEBP", lossless=True)[:-20], ""),
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    for name, (data, *_) in (SHOWN | UNREADABLE).items():
        (folder / name).write_bytes(data)
    return FolderSource(folder)


def shown(source, name):
    """All pixels of an image, and its size as the index tells it."""
    row = [*source.listing.keys].index(name)
    height, width = source.size(row)
    return decode_views(source.open(row), np.array([[0, 0, height, width]]), np.array([[height, width]]))[0]


def test_the_zoo_is_large_enough(zoo):
    assert len(zoo) == len(SHOWN) + len(UNREADABLE) >= 60


@pytest.mark.parametrize("name", SHOWN)
def test_what_is_shown(zoo, name):
    _, expected, tolerance = SHOWN[name]
    pixels = shown(zoo, name)
    assert pixels.shape == RGB.shape
    assert np.abs(pixels.astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_not_and_why(zoo, name):
    with pytest.raises(UnreadableImage) as error:
        shown(zoo, name)
    assert str(error.value).startswith(UNREADABLE[name][1])


def test_the_index_of_the_zoo(zoo):
    """Headers tell of all but damaged bodies, at 32 x 48 px."""
    index = open_catalog(zoo, cache=False)
    bodies = {name for name in names(index) if name in UNREADABLE}
    assert {*names(index)} == {*SHOWN, *bodies}
    assert bodies >= {"cut in the middle.jpg", "cut in the middle.png"}
    assert {*index.heights.tolist()} == {32}
    assert {*index.widths.tolist()} == {48}
    for name, reason in index.unreadable:
        assert reason.startswith(UNREADABLE[name][1])
