"""What is wrong with an image is found before training, and its pixels come in RGB."""

import os
import warnings

import numpy as np
import pytest
from PIL import Image

from keeplora.tasks.own.pixels import check_image, rgb


def colours(width=8, height=6, channels=3):
    return np.random.default_rng(0).integers(0, 255, (height, width, channels), dtype=np.uint8)


def palette(transparency):
    image = Image.fromarray(colours()).convert("P", palette=Image.Palette.ADAPTIVE)
    image.info["transparency"] = transparency
    return image


MADE = {
    "plain.png": (lambda: Image.fromarray(colours()), []),
    "plain.jpg": (lambda: Image.fromarray(colours()), []),
    "cmyk.jpg": (lambda: Image.fromarray(colours()).convert("CMYK"), []),
    "opaque.png": (lambda: Image.fromarray(colours()).convert("RGBA"), []),
    "grey.png": (lambda: Image.fromarray(colours()).convert("L"), ["grey"]),
    "bits.png": (lambda: Image.fromarray(colours()).convert("1"), ["grey"]),
    "clear.png": (lambda: Image.fromarray(colours(channels=4)), ["alpha"]),
    "key.png": (lambda: palette(0), ["alpha"]),
    "shades.png": (lambda: palette(bytes([0, 128])), ["alpha"]),
    "both.png": (lambda: Image.fromarray(colours(channels=4)).convert("LA"), ["grey", "alpha"]),
    "deep.png": (lambda: Image.fromarray(colours()[..., 0].astype(np.uint16) * 200), ["depth"]),
    "float.tiff": (lambda: Image.fromarray(colours()[..., 0].astype(np.float32)), ["depth"]),
}


@pytest.mark.parametrize("name", MADE)
def test_what_is_wrong_is_told(tmp_path, name):
    make, kinds = MADE[name]
    make().save(tmp_path / name)
    assert [kind for kind, _ in check_image(tmp_path / name)] == kinds
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = rgb(tmp_path / name)
    assert (image.mode, image.size) == ("RGB", (8, 6))


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue", "green")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert check_image(tmp_path / "a.gif") == [("animated", "3 frames")]
    assert rgb(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


def test_two_pictures_of_a_phone_are_no_animation(tmp_path):
    first, second = Image.fromarray(colours()), Image.new("RGB", (8, 6))
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.n_frames == 2
    assert check_image(tmp_path / "a.jpg") == []


def test_corrupt_files(tmp_path):
    Image.fromarray(colours(64, 64)).save(tmp_path / "whole.jpg", quality=95)
    whole = (tmp_path / "whole.jpg").read_bytes()
    for name, raw in {"empty": b"", "text": b"no image", "cut": whole[: len(whole) // 2], "head": whole[:30]}.items():
        (tmp_path / name).write_bytes(raw)
        ((kind, why),) = check_image(tmp_path / name)
        assert kind == "corrupt", name
        assert why, name
        with pytest.raises((OSError, ValueError)):
            rgb(tmp_path / name)
    assert check_image(tmp_path)[0][0] == "corrupt"  # a folder
    with pytest.raises(FileNotFoundError):
        check_image(tmp_path / "none.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert check_image(tmp_path / "pipe.png") == [("corrupt", "a regular file, got a pipe")]
