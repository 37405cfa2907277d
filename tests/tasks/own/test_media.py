"""Images and videos of questions are decoded once, by what they hold, and the model is given the same."""

import json
import os

import numpy as np
import pytest
import tiny_vlm
import torch

from keeplora.tasks.own import TaskSource, decoded, media
from keeplora.tasks.own.answer_workload import AnswerWorkload
from keeplora.tasks.own.pixels import rgb
from keeplora.tasks.own.videos import frames

SIZES = [(8, 8), (31, 17), (40, 90), (33, 8)]


@pytest.fixture(scope="module", params=["llava", "qwen"])
def model(request, tmp_path_factory):
    return getattr(tiny_vlm, request.param)(tmp_path_factory.mktemp("model") / request.param)


def video(path, shades):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for shade in shades:
            frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), shade, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def written(folder, model):
    """Samples with an image each, of several sizes; of Qwen2-VL two with videos, too."""
    samples = []
    for number, size in enumerate(SIZES):
        tiny_vlm.picture(folder / f"{number}.png", "red", seed=number, size=size)
        samples.append(tiny_vlm.asked(f"{number}.png", "red"))
    if model.name == "qwen":
        for name, shades in (("a.mp4", range(0, 200, 10)), ("b.mp4", range(200, 100, -20))):
            video(folder / name, shades)
            samples.append({"video": name, "text": "What?", "answer": "red"})
    (folder / "s.json").write_text(json.dumps(samples))
    return samples


def opened(folder, model, **data):
    source = TaskSource("s", json="s.json", test="s.json")
    return AnswerWorkload(tiny_vlm.own(folder, model, source, validation_fraction=0.0, **data))


def plain(workload, samples):
    """What the processor makes of the files themselves."""
    processor, prompts = workload._processor, workload._prompts
    given = {"images": [[rgb(path) for path in sample.images] for sample in samples]}
    if any(sample.videos for sample in samples):
        given["videos"] = [frames(path) for sample in samples for path in sample.videos]
        given["do_sample_frames"] = False
    texts = [prompts.whole(sample) for sample in samples]
    return processor(
        text=texts, **given, padding=True, padding_side="right", return_tensors="pt",
        add_special_tokens=prompts.adds_specials(texts[0]),
    )  # fmt: skip


def same(batch, wanted):
    tensors = {name for name, value in wanted.items() if isinstance(value, torch.Tensor)}
    assert tensors <= set(batch)
    for name in tensors:
        assert torch.equal(batch[name], wanted[name]), name


def test_the_model_is_given_the_same_with_the_cache_and_without(tmp_path, model, monkeypatch):
    written(tmp_path, model)
    first = opened(tmp_path, model)
    samples = first.samples(0, "train")
    resized = bool(first._media._decoder.as_they_are)
    assert resized == (model.name == "llava")  # Qwen2-VL's gives patches, of which no image is made again
    wanted = plain(first, samples)
    (batch,) = first.batches(0, len(samples), 0)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
    same(batch, plain(first, [samples[place] for place in order]))
    kept = next(tmp_path.joinpath("cache").glob("*.pixels")).stat().st_size
    assert f"decoded files: {kept / 1e9:.2g} GB" in "\n".join(first.notes())

    with monkeypatch.context() as patch:  # nothing is decoded again
        patch.setattr(decoded, "_look", None)
        patch.setattr(media._Decoder, "pixels", None)
        again = opened(tmp_path, model)
        (batch,) = again.batches(0, len(samples), 0)
    assert again.fingerprint() == first.fingerprint()
    for other, room in ((opened(tmp_path, model, cache_gb=0.0), 0.0), (opened(tmp_path, model, cache_gb=4e-7), 4e-7)):
        same(other.training_batch(samples, other._loaded([samples]).__next__()[1]), wanted)
        assert f"decoded again in every pass, beyond cache_gb = {room:g}: s (" in "\n".join(other.notes())
        assert other.fingerprint() == first.fingerprint()


def test_files_are_known_by_what_they_hold(tmp_path, model, monkeypatch):
    samples = written(tmp_path, model)
    before = opened(tmp_path, model)
    pixels = before._media.pixels(tmp_path / "1.png", video=False)
    (tmp_path / "1.png").rename(tmp_path / "other.png")
    samples[1]["image"] = "other.png"
    (tmp_path / "s.json").write_text(json.dumps(samples))
    with monkeypatch.context() as patch:
        patch.setattr(decoded, "_look", None)
        moved = opened(tmp_path, model)
    assert np.array_equal(moved._media.pixels(tmp_path / "other.png", video=False), pixels)
    path = tmp_path / "other.png"
    status = path.stat()
    tiny_vlm.picture(path, "blue", size=SIZES[1])
    path.write_bytes(path.read_bytes().ljust(status.st_size, b"\0")[: status.st_size])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    changed = opened(tmp_path, model)
    assert not np.array_equal(changed._media.pixels(path, video=False), pixels)
