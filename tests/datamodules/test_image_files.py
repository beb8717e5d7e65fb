"""Single image files: orientation, transparency, colour, depth, frames."""

import logging
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, features

from bioprop.datamodules.image_files import Form, decoded, look
from bioprop.datamodules.image_listing import Tally, told
from bioprop.errors import UserError
from tests.datamodules.folders import bad, make, pixels

RGB, GREY = (3, 5, 6), (1, 5, 6)
ORIENTATION = 0x0112
#: How a scene is turned for storage, so that EXIF's number undoes it.
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def read(path, shape=RGB, background="white"):
    """Returns a decoded image, and what was said of it."""
    changed: Tally = {}
    ((image,),) = decoded([path], Form(shape, False, background), changed)
    return torch.from_numpy(image), told(changed)


def noise(channels=3, size=(5, 6), most=256, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, most, (*size, channels), dtype=dtype)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(tmp_path, suffix, orientation):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow writes no AVIF")
    scene = np.zeros((16, 24), dtype=np.uint8)
    scene[:, :8], scene[:4] = 128, 255
    image = Image.fromarray(scene).convert("RGB")
    if orientation in STORED:
        image = image.transpose(STORED[orientation])
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / f"x.{suffix}"
    image.save(path, exif=exif)
    assert look(path) == (3, 16, 24)
    upright, said = read(path, (3, 16, 24))
    assert np.abs(upright[0].numpy().astype(float) - scene).mean() < 8
    if suffix != "tif":  # which Pillow turns by itself
        assert said == (f"1 turned upright as EXIF says ('{path}')" if orientation > 1 else "")


def test_a_damaged_orientation_is_none(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(noise()).save(path, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12")
    upright, _ = read(path)
    assert torch.equal(upright, torch.from_numpy(noise()).permute(2, 0, 1))


def drawing(kind):
    """A black circle or cross that is in the transparency alone, in each of the modes that have it."""
    shape = np.zeros((5, 6), dtype=np.uint8)
    shape[1:4, 2] = 255
    black = np.zeros_like(shape)
    if kind == "RGBA":
        return Image.fromarray(np.stack([black, black, black, shape], axis=2)), {}
    if kind == "LA":
        return Image.fromarray(np.stack([black, shape], axis=2)), {}
    if kind == "P":  # every entry of the palette is black, and one of them transparent
        image = Image.fromarray(shape // 255).convert("P")
        image.putpalette([0, 0, 0] * 2)
        return image, {"transparency": bytes([0, 255])}
    image = Image.fromarray(255 - shape).convert(kind)  # the colour white stands for transparency
    return image, {"transparency": 255 if kind == "L" else (255, 255, 255)}


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "L", "RGB"])
@pytest.mark.parametrize("suffix", ["png", "gif"])
@pytest.mark.parametrize(("background", "colour"), [("white", (255, 255, 255)), ("#ff8000", (255, 128, 0))])
def test_transparent_images_are_put_over_the_background(tmp_path, kind, suffix, background, colour):
    if suffix == "gif" and kind != "P":
        pytest.skip("GIF has palettes alone")
    image, how = drawing(kind)
    path = tmp_path / f"x.{suffix}"
    image.save(path, **(how if suffix == "png" else {"transparency": 0}))
    decoded, said = read(path, background=background)
    expected = torch.tensor(colour, dtype=torch.uint8)[:, None, None].repeat(1, 5, 6)
    expected[:, 1:4, 2] = 0
    assert torch.equal(decoded, expected)
    assert f"1 transparent, put over {background} ('{path}')" in said
    grey, _ = read(path, GREY, background)
    assert torch.equal(
        grey, torch.from_numpy(np.array(Image.fromarray(expected.permute(1, 2, 0).numpy()).convert("L")))[None]
    )


def test_half_transparent_is_half_way(tmp_path):
    Image.new("RGBA", (6, 5), (100, 0, 200, 128)).save(tmp_path / "x.png")
    image, _ = read(tmp_path / "x.png")
    assert (image[:, 0, 0].float() - torch.tensor([177.0, 127, 227])).abs().max() <= 1


@pytest.mark.parametrize("channels", [2, 4])
def test_opaque_images_with_an_alpha_channel_keep_their_values(tmp_path, channels):
    values = noise(channels, (16, 16))
    values[..., -1] = 255
    Image.fromarray(values).save(tmp_path / "x.png")
    image, said = read(tmp_path / "x.png", (3, 16, 16), "red")
    assert torch.equal(image, torch.from_numpy(values[..., :-1]).permute(2, 0, 1).expand(3, 16, 16))
    assert "transparent" not in said


def test_the_background_must_be_an_opaque_colour(folder):
    for value in ("whitish", "#12", ""):
        bad(rf"background is '{value}', which is no colour", data_dir=str(folder), background=value)


def png16(channels):
    """A PNG file of 16 bits per channel, which Pillow does not write."""
    kind = {1: 0, 3: 2}[channels]
    rows = b"".join(b"\0" + row.tobytes() for row in noise(channels, most=65536, dtype=np.uint16).astype(">u2"))
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", 6, 5, 16, kind, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    packed = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        ("png", png16(1)),
        ("pgm", b"P5 6 5 4095\n" + noise(1, most=4096, dtype=np.uint16).astype(">u2").tobytes()),
        ("tif", noise(1).squeeze().astype(np.int32)),
        ("tif", noise(1).squeeze().astype(np.float32)),
    ],
)
@pytest.mark.parametrize("shape", [RGB, GREY])
def test_grey_values_of_more_than_8_bits_are_refused_rather_than_cut(tmp_path, suffix, content, shape):
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(content) if isinstance(content, bytes) else Image.fromarray(content).save(path)
    assert look(path)[1:] == (5, 6)
    with pytest.raises(UserError, match=rf"{suffix}' has more than 8 bits per channel .*: scale it to 8 bits\.$"):
        read(path, shape)


def test_colours_of_16_bits_are_scaled_to_8(tmp_path):
    (tmp_path / "x.png").write_bytes(png16(3))
    image, _ = read(tmp_path / "x.png")
    expected = noise(3, most=65536, dtype=np.uint16) >> 8
    assert np.abs(image.numpy().astype(int) - expected.transpose(2, 0, 1)).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_modes_are_converted(tmp_path, mode):
    path = tmp_path / ("x.jpg" if mode in ("CMYK", "YCbCr") else "x.png")
    Image.fromarray(noise()).convert(mode).save(path)
    image, said = read(path)
    assert torch.equal(image, pixels(path))
    assert said == (f"1 grey, used as RGB ('{path}')" if mode in ("1", "L") else "")
    image, said = read(path, GREY)
    assert torch.equal(image, pixels(path, "L"))
    assert said == ("" if mode in ("1", "L") else f"1 coloured, used as grey ('{path}')")


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_of_several_frames_the_first_is_used(tmp_path, suffix):
    frames = [Image.new("RGB", (6, 5), colour) for colour in ("red", "blue")]
    path = tmp_path / f"x.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **({"lossless": True} if suffix == "webp" else {}))
    image, said = read(path)
    assert image[:, 0, 0].tolist() == [255, 0, 0]
    assert said == f"1 of several frames, of which the first is used ('{path}')"


def test_one_coloured_image_makes_a_folder_rgb_wherever_it_is(write_images, caplog):
    folder = write_images("train", {"a": 5, "b": 5}, mode="L")
    caplog.set_level(logging.INFO)
    data = make(["fit"], data_dir=str(folder))
    assert data.image_shape == (1, 5, 6)
    assert "all training images are grey, and so are those that the network sees" in caplog.messages
    Image.fromarray(noise()).save(folder / "train" / "b" / "004.png")
    caplog.clear()
    data = make(["fit"], data_dir=str(folder))
    assert data.image_shape == (3, 5, 6)
    assert [text for text in caplog.messages if "of the images read: 9 grey, used as RGB" in text]
    assert make(data_dir=str(folder), channels=1).image_shape == (1, 5, 6)


def test_coloured_test_images_of_a_grey_folder_are_counted(write_images, caplog):
    write_images("test", {"a": 2, "b": 1})
    folder = write_images("train", {"a": 5, "b": 5}, mode="L")
    caplog.set_level(logging.INFO)
    make(["fit", "test"], data_dir=str(folder))
    assert [text for text in caplog.messages if "of the images read: 3 coloured, used as grey" in text]


def test_only_headers_up_to_the_first_coloured_image_are_read(write_images, monkeypatch):
    folder = write_images("train", {"a": 20, "b": 20})
    for number in range(3):
        Image.fromarray(noise(1).squeeze()).save(folder / "train" / "a" / f"{number:03d}.png")
    opened = []
    open_image = Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(path) or open_image(path))
    make(data_dir=str(folder))
    assert len(opened) == 4
    opened.clear()
    make(data_dir=str(folder), channels=3)
    assert len(opened) == 1


@pytest.mark.parametrize("size", [100_000, 10**12])
def test_images_that_no_memory_holds_are_refused(folder, size):
    sentence = bad(
        rf"of {size}x{size} pixels take .* GB, more than .* choose a smaller image_size",
        data_dir=str(folder),
        image_size=size,
    )
    assert len(sentence) < 300
