"""What a batch of a user's own images takes to arrive, beside the step that waits for it.

    python -m bench.loader                     1000 JPEGs of 500 x 375 pixels, ViT-B/32, batches of 64, one thread

Three ways: from the file of decoded images, decoded anew by two threads, and by open_clip's own preprocessing one after
another, as a plain loop over `ImageFolder` does. Prints milliseconds a batch, medians, and of the step.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from keeplora.tasks.own import DataSettings, ModelSource, OwnTasks, TaskSource, open_workload


def write_images(folder: Path, images: int) -> None:
    """Pictures whose JPEGs are as large as photographs' (about 60 kB): smooth shapes and a little noise."""
    draw = np.random.default_rng(0)
    for number in range(images):
        place = folder / "data" / f"class{number % 10}"
        place.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        noisy = np.asarray(coarse, np.int16) + draw.normal(0, 8, (375, 500, 3)).astype(np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(place / f"{number:04}.jpg", quality=90)


def per_batch(batches: Iterable[object]) -> float:
    """Median milliseconds between two batches; the first, which fills the pipe, is left out."""
    times, started = [], time.perf_counter()
    for _ in batches:
        times.append(1000 * (time.perf_counter() - started))
        started = time.perf_counter()
    return statistics.median(times[1:])


def main() -> None:
    """Make the folder, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64)
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder, parsed.images)
        size = sum(path.stat().st_size for path in folder.rglob("*.jpg")) / parsed.images

        def workload(cache_gb: float):  # type: ignore[no-untyped-def]
            own = OwnTasks(
                ModelSource(open_clip=parsed.model, pretrained="random"), (TaskSource("a", folder="data"),),
                DataSettings(cache="cache", cache_gb=cache_gb, test_fraction=0.1), base=name,
            )  # fmt: skip
            started = time.perf_counter()
            return open_workload(own), time.perf_counter() - started

        kept, first = workload(8.0)
        _, second = workload(8.0)
        anew, _ = workload(0.0)
        batches = kept.batches(0, parsed.batch, 0)
        from_file, decoded = per_batch(batches), per_batch(anew.batches(0, parsed.batch, 0))
        import open_clip

        _, _, preprocess = open_clip.create_model_and_transforms(parsed.model)
        files = sorted(folder.rglob("*.jpg"))[: 4 * parsed.batch]
        parts = [files[start : start + parsed.batch] for start in range(0, len(files), parsed.batch)]
        plain = per_batch(torch.stack([preprocess(Image.open(file).convert("RGB")) for file in part]) for part in parts)
        model, steps = kept.model().train(), []
        for _, batch in zip(range(4), batches, strict=False):
            started = time.perf_counter()
            kept.loss(model, batch).backward()
            steps.append(1000 * (time.perf_counter() - started))
        print(
            f"{parsed.images} JPEGs of {size / 1000:.0f} kB, {parsed.model}, batches of {parsed.batch}, "
            f"torch {torch.__version__}"
        )
        print(f"opening the task: {first:.1f} s the first time, {second:.1f} s again")
        print(f"ms a batch: {from_file:.1f} from the file, {decoded:.0f} decoded by 2 threads, {plain:.0f} one by one")
        print(
            f"ms a step (float32, one thread, forward and backward of the whole model): {statistics.median(steps):.0f}"
        )


if __name__ == "__main__":
    main()
