"""What images and videos of questions take to arrive: decoded in every pass, or once.

    python -m bench.media                     300 JPEGs of 640 x 480 pixels, 20 videos of 50 frames, LLaVA's 336 pixels

Prints seconds of opening the files and of a pass over them, processor included, without room in the cache and with it,
and the ratios; in one process, one thread of torch and two that decode.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from keeplora.tasks.own import DataSettings, ModelSource, OwnTasks, TaskSource, contents
from keeplora.tasks.own.media import Media


def write_files(folder: Path, images: int, videos: int) -> dict[Path, bool]:
    """JPEGs and mp4s of smooth shapes with a little noise; the values say which are videos."""
    draw = np.random.default_rng(0)

    def picture(width: int, height: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height))
        noisy = np.asarray(coarse, np.int16) + draw.normal(0, 8, (height, width, 3)).astype(np.int16)
        return noisy.clip(0, 255).astype(np.uint8)

    paths = {folder / f"{number}.jpg": False for number in range(images)}
    for path in paths:
        Image.fromarray(picture(640, 480)).save(path, quality=90)
    for number in range(videos):
        with av.open(str(path := folder / f"{number}.mp4"), "w") as container:
            stream: Any = container.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
            for _ in range(50):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(320, 240), format="rgb24")))
            container.mux(stream.encode(None))
        paths[path] = True
    return paths


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Make the files, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--videos", type=int, default=20)
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    size = {"height": 336, "width": 336}
    processor = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=size)
    with tempfile.TemporaryDirectory() as name:
        paths = write_files(Path(name), parsed.images, parsed.videos)

        def media(cache_gb: float) -> Media:
            data = DataSettings(cache="cache", cache_gb=cache_gb)
            own = OwnTasks(ModelSource(transformers="m"), (TaskSource("t", json="t.json"),), data, base=name)
            return Media(own, SimpleNamespace(image_processor=processor))

        def a_pass(held: Media) -> None:
            for path, video in paths.items():
                pixels = held.pixels(path, video=video)
                if not video:
                    steps = held.settings.get("images_kwargs", {})
                    processor(images=[Image.fromarray(pixels)], return_tensors="pt", **steps)

        first, kept, none = media(8.0), media(8.0), media(0.0)
        opening = seconds(lambda: first.look("t", paths))
        contents.forget()  # as a new process has it
        again = seconds(lambda: kept.look("t", paths))
        none.look("t", paths)
        with_cache, without = (min(seconds(lambda held=held: a_pass(held)) for _ in range(3)) for held in (kept, none))
        print(f"{parsed.images} images, {parsed.videos} videos; {kept.notes()[0]}")
        print(f"opening: {opening:.2f} s, again {again:.2f} s: {opening / again:.0f} times as fast")
        ratio = without / with_cache
        print(f"a pass: {without:.2f} s decoded anew, {with_cache:.2f} s from the file: {ratio:.0f} times as fast")


if __name__ == "__main__":
    main()
