"""Formats, modes, orientations and boxes against pixels worked out by hand or by numpy."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, JpegImagePlugin

from ijepa_enhanced.data.decode import decode_views, patchify, unpatchify
from ijepa_enhanced.data.opening import MAX_PIXELS, open_image, upright_size
from ijepa_enhanced.errors import UnreadableImage


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def encode(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def photo(height, width):
    """Smooth shapes, a sharp edge and some grain: what JPEG files hold."""
    y, x = np.mgrid[:height, :width] / height
    red = 128 + 100 * np.sin(9 * x + 4 * y)
    green = np.where(x + y > 1, 200, 60)
    blue = 255 * y / y.max()
    grain = np.random.default_rng(0).normal(0, 6, (height, width, 3))
    return np.clip(np.stack([red, green, blue], axis=2) + grain, 0, 255).astype(np.uint8)


def whole(image):
    """The image at its own size, through `decode_views`."""
    height, width = upright_size(image)
    return decode_views(image, np.array([[0, 0, height, width]], dtype=np.float32), np.array([[height, width]]))[0]


def on_white(color, alpha):
    """What a viewer shows: the mean of `color` and white weighted by alpha, rounded to the nearest."""
    alpha = np.asarray(alpha, dtype=np.float64)
    return np.floor((np.asarray(color) * alpha + 255 * (255 - alpha)) / 255 + 0.5).astype(np.uint8)


def png_header(width, height):
    """A grayscale PNG of the given size that holds no pixels: 57 bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def webp_header(width, height):
    """An extended WebP header of the given size without pixels: 30 bytes."""
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<II", 10, 0) + sides


@pytest.mark.parametrize(
    ("file_format", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {})]
)
def test_lossless_formats_give_the_exact_pixels(file_format, options):
    pixels = noise(5, 7)
    image = open_image(encode(Image.fromarray(pixels), file_format, **options))
    assert upright_size(image) == (5, 7)
    shown = whole(image)
    np.testing.assert_array_equal(shown, pixels)
    assert shown.dtype == np.uint8
    assert shown.flags.writeable, "torch.from_numpy warns of arrays that cannot be written to"


@pytest.mark.parametrize("file_format", ["JPEG", "WEBP"])
def test_lossy_formats_give_the_colors(file_format):
    pixels = np.full((16, 24, 3), (200, 100, 50), dtype=np.uint8)
    pixels[:, 16:] = (20, 60, 220)
    shown = whole(open_image(encode(Image.fromarray(pixels), file_format, quality=95)))
    # Away from the edge, where compression rings, flat colors survive, up to rounding in YCbCr.
    np.testing.assert_allclose(shown[:, :12].astype(int), pixels[:, :12], atol=4)
    np.testing.assert_allclose(shown[:, 20:].astype(int), pixels[:, 20:], atol=4)


def test_gray_modes_become_three_equal_channels():
    gray = noise(4, 6, 1)[..., 0]
    three = np.repeat(gray[..., None], 3, axis=2)
    np.testing.assert_array_equal(whole(open_image(encode(Image.fromarray(gray), "PNG"))), three)
    bits = gray > 127
    shown = whole(open_image(encode(Image.fromarray(bits), "PNG")))
    np.testing.assert_array_equal(shown, np.where(bits[..., None], 255, 0).repeat(3, axis=2))


def test_sixteen_bit_gray_keeps_all_bits():
    deep = np.array([[0, 255, 256], [0x1234, 0xABCD, 0xFFFF]], dtype=np.uint16)
    image = open_image(encode(Image.fromarray(deep), "PNG"))
    assert image.mode == "I;16"
    np.testing.assert_allclose(whole(image), deep[..., None].repeat(3, axis=2) / 257, rtol=1e-6)  # of float32


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_modes_without_a_white_point_are_stretched(dtype):
    image = Image.fromarray(np.array([[-1000, 0], [500, 1000]], dtype=dtype))
    assert image.mode in ("I", "F")
    np.testing.assert_array_equal(whole(image)[..., 1], [[0, 128], [191, 255]])
    assert not whole(Image.fromarray(np.full((2, 2), 7, dtype=dtype))).any()


def test_cmyk_and_ycbcr_are_converted():
    red = Image.new("RGB", (16, 16), (220, 30, 40))
    shown = whole(open_image(encode(red.convert("CMYK"), "JPEG", quality=95)))
    np.testing.assert_allclose(shown.astype(int), np.broadcast_to((220, 30, 40), (16, 16, 3)), atol=3)
    np.testing.assert_allclose(whole(red.convert("YCbCr"))[0, 0].astype(int), (220, 30, 40), atol=3)


def test_transparent_pixels_lie_on_white():
    alpha = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    color = np.broadcast_to(np.array([0, 77, 200], dtype=np.uint8), (16, 16, 3))
    rgba = Image.fromarray(np.concatenate([color, alpha], axis=2))
    for data in (encode(rgba, "PNG"), encode(rgba, "WEBP", lossless=True, exact=True)):
        np.testing.assert_array_equal(whole(open_image(data)), on_white(color, alpha))
    la = Image.fromarray(np.concatenate([np.full_like(alpha, 30), alpha], axis=2))
    np.testing.assert_array_equal(whole(open_image(encode(la, "PNG"))), on_white(30, alpha).repeat(3, axis=2))


@pytest.mark.parametrize("transparency", [0, bytes([0, 128, 255])])
def test_transparent_palette_entries_lie_on_white(transparency):
    palette = np.array([[10, 20, 30], [200, 0, 0], [0, 90, 180]])
    alpha = np.array([0, 255, 255]) if transparency == 0 else np.frombuffer(transparency, np.uint8)
    indices = np.array([[0, 1, 2], [2, 1, 0]], dtype=np.uint8)
    image = Image.fromarray(indices).convert("P")
    image.putdata(indices.reshape(-1).tolist())
    image.putpalette(palette.reshape(-1).tolist())
    data = encode(image, "PNG", transparency=transparency)
    assert open_image(data).mode == "P"
    np.testing.assert_array_equal(whole(open_image(data)), on_white(palette, alpha[:, None])[indices])


def test_palette_without_transparency():
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 200, 0, 0])
    np.testing.assert_array_equal(whole(open_image(encode(image, "PNG"))), [[[10, 20, 30], [200, 0, 0]]])


def test_color_keys_of_l_and_rgb_lie_on_white():
    gray = Image.fromarray(np.array([[0, 50]], dtype=np.uint8))
    np.testing.assert_array_equal(whole(open_image(encode(gray, "PNG", transparency=0)))[..., 0], [[255, 50]])
    rgb = Image.fromarray(np.array([[[1, 2, 3], [1, 2, 4]]], dtype=np.uint8))
    shown = whole(open_image(encode(rgb, "PNG", transparency=(1, 2, 3))))
    np.testing.assert_array_equal(shown, [[[255, 255, 255], [1, 2, 4]]])


# How each EXIF orientation stores the upright image (EXIF 2.3, tag 0x0112), in numpy's words.
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


def exif(orientation, order="<"):
    """An EXIF block with another tag before the orientation, in either byte order."""
    block = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HIH", 42, 8, 2)
    block += struct.pack(f"{order}HHII", 0x0100, 4, 1, 99)
    return b"Exif\0\0" + block + struct.pack(f"{order}HHIHHI", 0x0112, 3, 1, orientation, 0, 0)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_exif_orientation(orientation, order, file_format):
    upright = noise(4, 6)
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    data = encode(stored, file_format, lossless=True, exif=exif(orientation, order))
    image = open_image(data)
    assert upright_size(image) == (4, 6)
    np.testing.assert_array_equal(whole(image), upright)
    box, size = np.array([[1, 2, 3, 4]]), np.array([[3, 4]])
    np.testing.assert_array_equal(decode_views(image, box, size)[0], upright[1:4, 2:6])


@pytest.mark.parametrize("orientation", [3, 6])
def test_exif_orientation_of_jpeg_decoded_at_reduced_scale(orientation):
    upright = photo(320, 480)
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    image = open_image(encode(stored, "JPEG", quality=95, exif=exif(orientation)))
    assert upright_size(image) == (320, 480)
    shown = decode_views(image, np.array([[0, 0, 320, 480]]), np.array([[32, 48]]))[0]
    expected = np.asarray(Image.fromarray(upright).resize((48, 32), Image.Resampling.BICUBIC))
    # A wrong turn differs by 50 gray levels and more.
    assert np.abs(shown.astype(int) - expected).mean() < 2


def test_an_image_that_its_owner_has_turned_is_not_turned_again():
    """Pillow keeps the EXIF data of an image that it turns or converts."""
    upright = noise(24, 16)
    block = Image.Exif()
    block[0x0112] = 6
    block.get_ifd(0x8769).update({0xA002: 24, 0xA003: 16})  # width and height as stored
    stored = Image.fromarray(np.ascontiguousarray(STORED[6](upright)))
    image = Image.open(io.BytesIO(encode(stored, "PNG", exif=block)))
    for given in (
        image,
        image.convert("RGB"),
        image.transpose(Image.Transpose.ROTATE_270),
        ImageOps.exif_transpose(image),
    ):
        assert upright_size(given) == (24, 16)
        np.testing.assert_array_equal(whole(given), upright)


def test_exif_orientation_of_tiff():
    upright = noise(4, 6)
    stored = Image.fromarray(np.ascontiguousarray(STORED[6](upright)))
    image = open_image(encode(stored, "TIFF", tiffinfo={0x0112: 6}))
    assert upright_size(image) == (4, 6)
    np.testing.assert_array_equal(whole(image), upright)


@pytest.mark.parametrize(
    "block",
    [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", exif(0), exif(9), exif(6)[:-8], b"Exif\0\0XX" + exif(6)[8:]],
)
def test_damaged_exif_leaves_the_image_as_stored(block):
    pixels = noise(3, 5)
    image = open_image(encode(Image.fromarray(pixels), "PNG", exif=block))
    assert upright_size(image) == (3, 5)
    np.testing.assert_array_equal(whole(image), pixels)


def test_boxes_without_resizing_are_exact_crops():
    pixels = noise(20, 30)
    boxes = np.array([[0, 0, 8, 8], [3, 5, 10, 16], [12, 14, 8, 16], [0, 0, 20, 30]], dtype=np.float32)
    sizes = boxes[:, 2:].astype(np.int64)
    views = decode_views(open_image(encode(Image.fromarray(pixels), "PNG")), boxes, sizes)
    for view, (top, left, height, width) in zip(views, boxes.astype(int), strict=True):
        np.testing.assert_array_equal(view, pixels[top : top + height, left : left + width])


def test_edges_of_boxes_move_to_whole_pixels():
    pixels = noise(12, 24)
    image = Image.fromarray(pixels)
    view = decode_views(image, np.array([[0.4, 2.6, 11.3, 8.2]]), np.array([[12, 8]]))[0]
    np.testing.assert_array_equal(view, pixels[:12, 3:11])
    # A box is never empty, not even at the last pixel.
    (dot,) = decode_views(image, np.array([[11.8, 23.7, 0.2, 0.3]]), np.array([[2, 2]]))
    np.testing.assert_array_equal(dot, np.broadcast_to(pixels[11, 23], (2, 2, 3)))


def test_a_box_may_end_a_rounding_error_beyond_the_image():
    pixels = noise(3, 3)
    beyond = np.nextafter(np.float32(3), np.float32(4))
    view = decode_views(Image.fromarray(pixels), np.array([[0, 0, beyond, beyond]]), np.array([[3, 3]]))[0]
    np.testing.assert_array_equal(view, pixels)


def test_shrinking_antialiases():
    checkers = np.indices((64, 64)).sum(axis=0) % 2 * 255
    image = Image.fromarray(checkers.astype(np.uint8))
    for side in (32, 8):
        view = decode_views(image, np.array([[0, 0, 64, 64]]), np.array([[side, side]]))[0]
        # Beyond the border, where the filter sees fewer pixels, every output pixel is the mean of black and white.
        np.testing.assert_allclose(view[2:-2, 2:-2].astype(int), 128, atol=2)


def filtered(pixels, matrix_of):
    """Rows, then columns, of [h, w, C] as weighted by `matrix_of` their number, in float64."""
    height, width = (matrix_of(side) for side in pixels.shape[:2])
    return np.einsum("ih,jw,hwc->ijc", height, width, pixels.astype(np.float64), optimize=True)


def test_resizing_is_bicubic_with_antialiasing():
    def weights(side, out=48):
        """Keys' cubic with a = -0.5, as wide as the pixels of the result, about the middle of each."""
        scale = max(1.0, side / out)
        x = np.abs((np.arange(side) + 0.5)[None] - ((np.arange(out) + 0.5) * side / out)[:, None]) / scale
        cubic = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
        return cubic / cubic.sum(axis=1, keepdims=True)

    for side in (30, 48, 70, 95):  # fewer than GAP pixels for each of the result
        pixels = photo(side, side)
        exact = filtered(pixels, weights).clip(0, 255)
        view = decode_views(Image.fromarray(pixels), np.array([[0, 0, side, side]]), np.array([[48, 48]]))[0]
        # Rows are rounded to bytes before columns: half a level twice, of which the cubic's sides add a little.
        assert np.abs(view - exact).max() < 1.5


def test_flips_mirror_and_only_the_views_that_are_flipped():
    image = Image.fromarray(photo(60, 90))
    boxes, sizes = np.array([[0, 0, 60, 90], [10, 20, 32, 48]]), np.array([[32, 48], [32, 48]])
    plain = decode_views(image, boxes, sizes)
    flipped = decode_views(image, boxes, sizes, flips=np.array([True, False]))
    np.testing.assert_array_equal(flipped[0], plain[0][:, ::-1])
    np.testing.assert_array_equal(flipped[1], plain[1])


@pytest.mark.parametrize("sigma", [0.2, 0.6, 1.0, 2.0])
def test_blur_is_nearly_gaussian(sigma):
    def weights(side):
        gauss = np.exp(-0.5 * ((np.arange(side)[None] - np.arange(side)[:, None]) / sigma) ** 2)
        return gauss / gauss.sum(axis=1, keepdims=True)

    image = Image.fromarray(photo(100, 120))
    box, size = np.array([[0, 0, 100, 120]]), np.array([[80, 96]])
    (plain,) = decode_views(image, box, size)
    (blurred,) = decode_views(image, box, size, sigmas=np.array([sigma]))
    exact = filtered(plain, weights)
    error, before = (np.sqrt(np.square(view - exact)[8:-8, 8:-8].mean()) for view in (blurred, plain))
    # Measured are 0.6 to 1.3 of 255 levels; without blur, up to 5.
    assert error < 1.5
    assert error < before / 2 or sigma < 0.5


def test_jpeg_at_reduced_scale_is_nearly_the_full_decode(monkeypatch):
    scales = []
    draft = JpegImagePlugin.JpegImageFile.draft

    def spy(image, mode, size):
        before = image.width
        result = draft(image, mode, size)
        scales.append(round(before / image.width))
        return result

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", spy)
    pixels = photo(603, 1001)
    data = encode(Image.fromarray(pixels), "JPEG", quality=90)
    image, full = open_image(data), open_image(data)
    for shrink, scale in [(4, 2), (8, 4), (16, 8), (40, 8)]:
        boxes = np.array([[0, 0, 603, 1001], [101, 200.5, 400, 640]])
        sizes = np.rint(boxes[:, 2:] / shrink - 0.5).astype(np.int64)
        views = decode_views(image, boxes, sizes)
        assert scales.pop() == scale
        for view, (top, left, height, width), (rows, cols) in zip(views, boxes.tolist(), sizes.tolist(), strict=True):
            edges = np.array([left, top, left + width, top + height])
            # They are moved to whole pixels of the smaller image.
            box = np.minimum(np.rint(edges / scale) * scale, [1001, 603, 1001, 603]).astype(int).tolist()
            exact = np.asarray(full.crop(box).resize((cols, rows), Image.Resampling.BICUBIC))
            error = np.abs(view.astype(int) - exact)
            # JPEG's reduced scale is a box filter, and two pixels or more remain for every output pixel: measured
            # are 0.45 gray levels on average, and 25 at the sharp edge, where the last pixel is not a whole one.
            assert error.mean() < 0.5
            assert error.max() < 30
    assert decode_views(image, np.array([[0, 0, 603, 1001]]), np.array([[300, 500]]))[0].shape == (300, 500, 3)
    assert not scales, "a view half the size needs all pixels"


def test_the_largest_view_decides_the_scale():
    pixels = noise(256, 256)
    image = open_image(encode(Image.fromarray(pixels), "JPEG", quality=100, subsampling=0))
    box = [0, 0, 256, 256]
    small, large = decode_views(image, np.array([box, box]), np.array([[16, 16], [256, 256]]))
    assert small.shape == (16, 16, 3)
    np.testing.assert_allclose(large.astype(int), pixels, atol=12)


def test_an_image_can_be_shown_again():
    data = encode(Image.fromarray(photo(256, 384)), "JPEG")
    image = open_image(data)
    box, size = np.array([[0, 0, 256, 384]]), np.array([[16, 24]])
    first = decode_views(image, box, size)[0]
    assert upright_size(image) == (256, 384)
    np.testing.assert_array_equal(decode_views(image, box, size)[0], first)
    assert whole(image).shape == (256, 384, 3)


def test_images_of_other_origin_are_shown(tmp_path):
    pixels = photo(64, 96)
    path = tmp_path / "a.jpg"
    Image.fromarray(pixels).save(path, quality=95)
    with Image.open(path) as image:
        view = decode_views(image, np.array([[0, 0, 64, 96]]), np.array([[8, 12]]))[0]
        assert image.size == (96, 64)
    expected = np.asarray(Image.fromarray(pixels).resize((12, 8), Image.Resampling.BICUBIC))
    assert np.abs(view.astype(int) - expected).mean() < 2


def test_animations_show_their_first_frame():
    frames = [Image.new("RGB", (4, 3), color) for color in ("red", "blue")]
    for file_format, options in [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True})]:
        data = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
        np.testing.assert_array_equal(whole(open_image(data)), np.broadcast_to((255, 0, 0), (3, 4, 3)))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"no image, but words", "not a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000, HEIC or NumPy file"),
        (
            b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            "not a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000, HEIC or NumPy file",
        ),
        (png_header(20000, 20000), "20000 x 20000 px is above the limit of 89,478,485 px"),
        (png_header(10000, 9000), "10000 x 9000 px is above the limit of 89,478,485 px"),
        (encode(Image.new("RGB", (9, 9)), "JPEG")[:40], "damaged header: Truncated File Read"),
        (webp_header(16384, 16384), "damaged header: Image size (268435456 pixels) exceeds limit"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "damaged header: not a WEBP file"),
        (b"\x89PNG\r\n\x1a\n", "damaged header: unpack_from requires a buffer"),
    ],
)
def test_unreadable_headers(data, reason):
    with pytest.raises(UnreadableImage) as error:
        open_image(data)
    assert str(error.value).startswith(reason)


def test_the_limit_itself_is_allowed():
    assert MAX_PIXELS == 5 * 17_895_697
    assert upright_size(open_image(png_header(17_895_697, 5))) == (5, 17_895_697)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "BMP"])
def test_truncated_bodies(file_format):
    data = encode(Image.fromarray(noise(64, 64)), file_format)
    image = open_image(data[: len(data) // 2])
    assert upright_size(image) == (64, 64)
    with pytest.raises(UnreadableImage, match=r"^cannot be decoded: image file is truncated"):
        whole(image)


def test_truncated_jpeg_at_reduced_scale():
    data = encode(Image.fromarray(photo(256, 256)), "JPEG")
    with pytest.raises(
        UnreadableImage, match=r"^cannot be decoded: image file is truncated \(\d+ bytes not processed\)$"
    ):
        decode_views(open_image(data[: len(data) // 2]), np.array([[0, 0, 256, 256]]), np.array([[16, 16]]))


def test_truncated_webp_is_found_at_once_or_on_decoding():
    data = encode(Image.fromarray(noise(64, 64)), "WEBP")
    with pytest.raises(UnreadableImage, match=r"^(damaged header|cannot be decoded): "):
        whole(open_image(data[: len(data) // 2]))


@pytest.mark.parametrize(
    "failure",
    [OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, ZeroDivisionError, struct.error],
)
def test_whatever_damage_makes_pillow_raise_is_a_reason(monkeypatch, failure):
    def fail(image):
        raise failure("broken")

    image = open_image(encode(Image.new("RGB", (4, 4)), "PNG"))
    monkeypatch.setattr(type(image), "load", fail)
    with pytest.raises(UnreadableImage, match=r"^cannot be decoded: '?broken'?$"):
        whole(image)


def test_a_lack_of_memory_is_not_the_image_s_fault(monkeypatch):
    def fail(image):
        raise MemoryError

    image = open_image(encode(Image.new("RGB", (4, 4)), "PNG"))
    monkeypatch.setattr(type(image), "load", fail)
    with pytest.raises(MemoryError):
        whole(image)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "NPY"])
def test_damaged_files_raise_nothing_else(file_format):
    rng = np.random.default_rng(0)
    data = npy(noise(24, 32)) if file_format == "NPY" else encode(Image.fromarray(noise(24, 32)), file_format)
    outcomes = {"shown": 0, "unreadable": 0}
    for _ in range(400):
        damaged = np.frombuffer(data, np.uint8).copy()
        places = rng.integers(8, [60, len(data)], size=2)
        damaged[places] = rng.integers(0, 256, 2)
        length = rng.integers(len(data) // 2, len(data) * 2)
        try:
            image = open_image(damaged[:length].tobytes())
            height, width = upright_size(image)
            decode_views(image, np.array([[0, 0, height, width]]), np.array([[16, 16]]))
            outcomes["shown"] += 1
        except UnreadableImage:
            outcomes["unreadable"] += 1
    assert all(outcomes.values()), outcomes


def test_patchify_by_hand():
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    patches = patchify(pixels, 2)
    assert patches.shape == (6, 12)
    # Rows 0-1 and columns 2-3 of the picture: patch row, then patch column, then channel.
    np.testing.assert_array_equal(patches[1], [6, 7, 8, 9, 10, 11, 24, 25, 26, 27, 28, 29])
    # The second row of patches begins at pixel row 2, value 2 * 6 * 3.
    np.testing.assert_array_equal(patches[3, :6], [36, 37, 38, 39, 40, 41])


@pytest.mark.parametrize("patch_size", [1, 8, 14, 16])
def test_unpatchify_is_the_inverse(patch_size):
    pixels = noise(3 * patch_size, 5 * patch_size)
    np.testing.assert_array_equal(unpatchify(patchify(pixels, patch_size), 3, 5, patch_size), pixels)


def test_patchify_refuses_other_sizes():
    with pytest.raises(ValueError, match=r"^30 x 32 px cannot be cut into patches of 16 px\.$"):
        patchify(noise(30, 32), 16)


def test_big_tiff():
    """TIFF with 64-bit offsets."""
    pixels = noise(5, 4)
    data = encode(Image.fromarray(pixels), "TIFF", big_tiff=True)
    assert data.startswith(b"II+\0")
    np.testing.assert_array_equal(whole(open_image(data)), pixels)
