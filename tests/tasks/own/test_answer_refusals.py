"""What a model that answers cannot learn from, or not with these settings, is refused before anything is trained."""

import json
import shutil

import numpy as np
import pytest
import tiny_vlm
import torch
from safetensors.torch import load_file, save_file

from keeplora.methods.settings import ConfigError
from keeplora.tasks.own import videos
from keeplora.tasks.own.answer_workload import AnswerWorkload
from keeplora.tasks.own.config import TaskSource


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return tiny_vlm.llava(tmp_path_factory.mktemp("llava"), context=48)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return tiny_vlm.qwen(tmp_path_factory.mktemp("qwen"))


def of_samples(folder, model, samples, test=None, **data):
    tiny_vlm.picture(folder / "a.png", "red")
    for name, part in (("s.json", samples), ("t.json", samples if test is None else test)):
        (folder / name).write_text(json.dumps(part))
    source = TaskSource("s", json="s.json", test="t.json")
    return AnswerWorkload(tiny_vlm.own(folder, model, source, validation_fraction=0.0, **data))


SHORT = tiny_vlm.asked("a.png", "red")


def test_faults_of_the_data(tmp_path, llava):
    with pytest.raises(ConfigError, match=r"none\.png"):
        of_samples(tmp_path, llava, [SHORT, tiny_vlm.asked("none.png", "red")])
    with pytest.raises(ConfigError, match="no answer"):
        of_samples(tmp_path, llava, [SHORT, tiny_vlm.asked("a.png", "")])
    with pytest.raises(ConfigError, match="'s' must have samples to test"):
        of_samples(tmp_path, llava, [SHORT], [tiny_vlm.asked("none.png", "red")], faults={"missing": "skip"})


SPECIAL = {
    "the end of an answer": ("llava", tiny_vlm.asked("a.png", "red </s>"), "</s> in answer 1"),
    "an image's mark": ("llava", tiny_vlm.asked("a.png", "an <image>"), "<image> in answer 1"),
    "another model's mark": ("qwen", tiny_vlm.asked("a.png", "an <image>"), "<image> in answer 1"),
    "an image's token": ("qwen", tiny_vlm.asked("a.png", "red", "What <|image_pad|>?"), "<|image_pad|> in question 1"),
    "a turn": ("qwen", tiny_vlm.asked("a.png", "red", "x<|im_start|>assistant"), "<|im_start|> in question 1"),
}


@pytest.mark.parametrize(("model", "sample", "told"), SPECIAL.values(), ids=SPECIAL)
def test_special_tokens_of_the_model_in_words(tmp_path, request, model, sample, told):
    samples = [SHORT, tiny_vlm.asked("a.png", "red < 3 & [a] </p>"), sample]
    folder = request.getfixturevalue(model)
    with pytest.raises(ConfigError, match=r"1 are samples with special tokens .* in s: s\.json: sample 3") as caught:
        of_samples(tmp_path, folder, samples, [SHORT])
    assert f"({told})" in str(caught.value)
    assert 'special_token = "skip"' in str(caught.value)
    made = of_samples(tmp_path, folder, samples, [SHORT], faults={"special_token": "skip"})
    assert [one.place for one in made.samples(0, "train")] == ["s.json: sample 1", "s.json: sample 2"]
    assert any(told in note and note.endswith("left out, as [data.faults] says") for note in made.notes())


def test_marks_of_a_template_that_are_no_special_tokens(tmp_path, llava):
    folder = shutil.copytree(llava, tmp_path / "model")
    template = (folder / "chat_template.jinja").read_text() if (folder / "chat_template.jinja").is_file() else ""
    assert not template  # LLaVA's own: words without brackets, which questions may hold
    made = of_samples(tmp_path, folder, [tiny_vlm.asked("a.png", "red", "USER: [INST]")])
    assert len(made.samples(0, "train")) == 1
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '[INST]' if m['role'] == 'user' }}{% for c in m['content'] %}"
        "{{ c['text'] if c['type'] == 'text' else '<image>' }}{% endfor %}{{ '[/INST]' if m['role'] == 'user' }}"
        "{% endfor %}"
    )
    with pytest.raises(ConfigError, match=r"\[INST\] in question 1"):
        of_samples(tmp_path, folder, [tiny_vlm.asked("a.png", "red", "USER: [INST]")])


def test_texts_longer_than_the_context(tmp_path, llava):
    """48 tokens: of a question about one of 8 × 8 pixels 14 are there, and 4 new ones are wanted."""
    long_answer = tiny_vlm.asked("a.png", " red" * 60)
    long_question = tiny_vlm.asked("a.png", "red", " red" * 60)
    late = {"image": "a.png", "text": " red" * 60 + "<image>", "answer": "red"}
    with pytest.raises(ConfigError, match=r"2 are texts longer than .* in s: s\.json: sample 2") as caught:
        of_samples(tmp_path, llava, [SHORT, long_answer], [SHORT, long_question])
    assert "and 4 new ones in a context of 48" in str(caught.value)

    made = of_samples(tmp_path, llava, [SHORT, long_answer, long_question, late], [SHORT, long_question],
                      faults={"long_text": "cut"})  # fmt: skip
    assert [sample.place for sample in made.samples(0, "train")] == ["s.json: sample 1", "s.json: sample 2"]
    assert len(made.samples(0, "test")) == 1
    cut, left_out = made.notes()[-2:]
    assert cut.startswith("1 are texts longer than the model's context in s: s.json: sample 2")
    assert left_out.startswith("3 samples longer than the model's context are left out")
    assert all(place in left_out for place in ("s.json: sample 3 (", "s.json: sample 4 (", "t.json: sample 2 ("))
    (batch,) = made.batches(0, 2, 0)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (2, 48)
    whole = (batch["labels"] != -100).sum(1)
    assert sorted(whole.tolist()) == [2, 48 - 14]
    made.loss(made.model(), batch).backward()


def test_the_length_counts_every_image_token(tmp_path, qwen):
    """Of Qwen2-VL, whose images have as many tokens as their size asks for: the context ends where it is said to."""
    tiny_vlm.picture(tmp_path / "b.png", "red", size=(32, 16))
    made = of_samples(tmp_path, qwen, [SHORT, tiny_vlm.asked("b.png", "red")])
    for sample in made.samples(0, "train"):
        ((group, media),) = made._loaded([[sample]])
        length = made.training_batch(group, media)["input_ids"].shape[1]
        assert len(made._prompts.tokens(made._prompts.whole(sample))) + made._expansion(sample) == length
    assert length > 19  # of the one with a single token


def test_the_context_may_be_filled(tmp_path, llava):
    def length(count):
        made = of_samples(tmp_path, llava, [tiny_vlm.asked("a.png", "red", " red" * count)], [SHORT])
        return next(iter(made.batches(0, 1, 0)))["input_ids"].shape[1]

    full = 10 + 48 - length(10)
    assert length(full) == 48
    with pytest.raises(ConfigError, match="49 tokens in a context of 48"):
        length(full + 1)


def test_weights_that_are_not_there(tmp_path, llava):
    model = shutil.copytree(llava, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    lost = next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))
    del weights[lost]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"got none for 1 of LlavaForConditionalGeneration: .*up_proj"):
        of_samples(tmp_path, model, [SHORT])


def test_what_is_no_model_or_no_processor(tmp_path, llava):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="transformers must find a model and a processor"):
        of_samples(tmp_path, tmp_path / "empty", [SHORT])
    words = shutil.copytree(llava, tmp_path / "words")
    for name in ("processor_config.json", "preprocessor_config.json"):
        (words / name).unlink(missing_ok=True)
    with pytest.raises(ConfigError, match=r"the processor of .*words|find a model and a processor"):
        of_samples(tmp_path, words, [SHORT])


def test_encoders_with_decoders(tmp_path, llava):
    model = shutil.copytree(llava, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "is_encoder_decoder": True}))
    with pytest.raises(ConfigError, match="got llava, an encoder with a decoder"):
        of_samples(tmp_path, model, [SHORT])


def test_a_template_must_add_to_what_it_wrote(tmp_path, llava):
    model = shutil.copytree(llava, tmp_path / "model")
    template = "{{ messages | length }}{% for m in messages %}{% for c in m['content'] %}{{ c['text'] or '<image>' }}"
    (model / "chat_template.jinja").write_text(template + "{% endfor %}{% endfor %}")
    with pytest.raises(ConfigError, match="adding to a shorter one"):
        of_samples(tmp_path, model, [SHORT])


VIDEO = {"video": "v.mp4", "text": "What?", "answer": "red"}


def test_a_processor_without_videos(tmp_path, llava, monkeypatch):
    monkeypatch.setattr("keeplora.tasks.own.instructions.reads_videos", lambda: True)
    monkeypatch.setattr("keeplora.tasks.own.media.check_video", lambda raw: [])
    monkeypatch.setattr("keeplora.tasks.own.media.frames", lambda raw: np.zeros((8, 8, 8, 3), np.uint8))
    (tmp_path / "v.mp4").write_bytes(b"decoded elsewhere")
    with pytest.raises(ConfigError, match=r"LlavaProcessor, which does not, for s\.json: sample 1 of"):
        of_samples(tmp_path, llava, [VIDEO])


def test_videos_in_a_batch_with_images(tmp_path, qwen, monkeypatch):
    def frames(path):
        return np.stack([np.full((8, 8, 3), 20 * i, np.uint8) for i in range(videos.FRAMES)])

    monkeypatch.setattr("keeplora.tasks.own.instructions.reads_videos", lambda: True)
    monkeypatch.setattr("keeplora.tasks.own.media.check_video", lambda path: [])
    monkeypatch.setattr("keeplora.tasks.own.media.frames", frames)
    (tmp_path / "v.mp4").write_bytes(b"decoded elsewhere")
    made = of_samples(tmp_path, qwen, [VIDEO, SHORT, {"text": "red?", "answer": "red"}])
    (batch,) = made.batches(0, 3, 0)
    assert batch["video_grid_thw"].tolist() == [[4, 2, 2]]  # 8 frames, two at a time
    assert batch["image_grid_thw"].tolist() == [[1, 2, 2]]
    made.loss(made.model(), batch).backward()
    assert len(made.predictions(made.model(), 0, "test", 3)) == 3
    assert any("8 frames" in note for note in made.notes())


def test_frames_of_a_file(tmp_path):
    import av

    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for number in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), 10 * number, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert videos.check_video(tmp_path / "v.mp4") == []
    taken = videos.frames(tmp_path / "v.mp4")
    assert taken.shape == (8, 16, 32, 3)
    means = torch.tensor(taken).double().mean((1, 2, 3))
    wanted = torch.tensor([10.0 * (i * 20 // 8) for i in range(8)]).double()
    torch.testing.assert_close(means, wanted, rtol=0, atol=4)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "v.mp4").read_bytes()[:300])
    assert [kind for kind, _ in videos.check_video(tmp_path / "cut.mp4")] == ["corrupt"]
    with pytest.raises(FileNotFoundError):
        videos.check_video(tmp_path / "none.mp4")
