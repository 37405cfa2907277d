"""LLaVA-style files: every form is read, faults are told by name, and splits keep an image in one part."""

import json
import os
import re
from itertools import chain

import pytest
from PIL import Image
from tiny_vlm import asked, picture

from keeplora.methods.settings import ConfigError
from keeplora.tasks.own import DataSettings, Faults, ModelSource, OwnTasks, TaskSource
from keeplora.tasks.own.instructions import read_samples, read_task
from keeplora.tasks.own.media import Media


def own_of(folder, source, **data):
    return OwnTasks(
        ModelSource(transformers="m"), (source,), DataSettings(**{"cache": ".cache", **data}), base=str(folder)
    )


def read(folder, source=None, **data):
    source = source or TaskSource("t", json="t.json")
    own = own_of(folder, source, **data)
    faults = Faults(own.data)
    return read_task(source, own, faults, Media(own).look), faults


def written(folder, samples, name="t.json"):
    path = folder / name
    lines = name.endswith(".jsonl")
    path.write_text("\n".join(map(json.dumps, samples)) if lines else json.dumps(samples, indent=1))
    return path


@pytest.fixture
def six(tmp_path):
    """Six samples on images of their own."""
    for number in range(6):
        picture(tmp_path / f"{number}.png", "red")
    return [asked(f"{number}.png", f"a{number}") for number in range(6)]


@pytest.mark.parametrize("name", ["t.json", "t.jsonl", "jsonl.json"])
def test_a_list_and_lines_read_alike(tmp_path, name):
    samples = [asked("x/a.png", "red"), {"question_id": 7, "image": "b.png", "text": "<image>\nHow many?", "answer": 3}]
    if name == "jsonl.json":
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf\n" + "\n\n".join(map(json.dumps, samples)).encode())
    else:
        written(tmp_path, samples, name)
    first, second = read_samples(tmp_path / name, tmp_path)
    assert [turn.parts for turn in first.turns] == [(("image", ""), ("text", "What colour?"))]
    assert (first.answer, first.images, first.videos) == ("red", (tmp_path / "x/a.png",), ())
    assert [turn.parts for turn in second.turns] == [(("image", ""), ("text", "How many?"))]
    assert (second.answer, second.images) == ("3", (tmp_path / "b.png",))


def test_turns_and_marks(tmp_path):
    said = [("human", "See <image> and\n<image>"), ("gpt", " one "), ("human", "<video>\nAnd this?"), ("gpt", "two")]
    turns = [{"from": who, "value": value} for who, value in said]
    written(
        tmp_path,
        [
            {"image": ["a.png", "b.png"], "video": "c.mp4", "conversations": turns, "source": "unknown keys stay"},
            {"image": ["a.png", "b.png"], "text": "Same?", "answer": "no"},
            {"text": "1 + 1?", "answer": "2"},
        ],
    )
    several, unmarked, words = read_samples(tmp_path / "t.json", tmp_path)
    assert several.turns[0].parts == (("text", "See"), ("image", ""), ("text", "and"), ("image", ""))
    assert several.turns[1].parts == (("video", ""), ("text", "And this?"))
    assert [turn.answer for turn in several.turns] == ["one", "two"]
    assert several.answer == "two"
    assert [path.name for path in several.files] == ["a.png", "b.png", "c.mp4"]
    assert unmarked.turns[0].parts == (("image", ""), ("image", ""), ("text", "Same?"))
    assert words.turns[0].parts == (("text", "1 + 1?"),)
    assert words.files == ()


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("text", "object"),
        ({"image": "a.png"}, "no text and no answer"),
        ({"conversations": []}, "list of turns"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "'gpt' in turn 1"),
        ({"conversations": [{"from": "human", "value": "x"}, {"from": "human", "value": "y"}]}, "'human' in turn 2"),
        ({"conversations": [{"from": "human", "value": ["x"]}]}, "'x' in turn 1"),
        ({"conversations": [{"from": "human", "value": 1.5}]}, "1.5"),
        ({"conversations": [{"from": "system", "value": "Be brief."}]}, "text of the system in turn 1"),
        ({"conversations": [{"from": "system", "value": ""}]}, "a question in conversations, got none"),
        ({"conversations": [{"from": "human", "role": "user", "value": "x"}]}, "got from and role in turn 1"),
        ({"conversations": [], "messages": []}, "got conversations and messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "'tool' in turn 1"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "'audio' in turn 1"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "name a file"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:x"}}]}]},
            "a data",
        ),
        ({"image": "https://x.org/a.png", "text": "x", "answer": "y"}, "a https address.*Nothing is downloaded"),
        ({"image": "a.png", "images": ["b.png"], "text": "x", "answer": "y"}, "got image and images"),
        (
            {"image": "a.png", "messages": [{"role": "user", "content": [{"type": "image", "image": "b"}]}]},
            "beside them",
        ),
        ({"text": "x", "question": "y", "answer": "z"}, "got text and question"),
        ({"prompt": "x", "response": "y"}, "in prompt, response"),
        ({"image": 3, "text": "x", "answer": "y"}, "3"),
        ({"image": ["a", None], "text": "x", "answer": "y"}, "None"),
        ({"image": "a.png", "text": "<image><image>", "answer": "y"}, "1 and 2"),
        ({"text": "<image> what", "answer": "y"}, "0 and 1"),
        ({"text": "x", "answer": True}, "True"),
    ],
)
def test_what_is_no_conversation_is_named(tmp_path, value, told):
    written(tmp_path, [asked("a.png", "red"), value])
    with pytest.raises(ConfigError, match="1 that is none: sample 2 ") as caught:
        read_samples(tmp_path / "t.json", tmp_path)
    assert re.search(told, str(caught.value))


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (b"", "hold samples"),
        (b"[]", "hold samples"),
        (b"[" * 100_000, "too deep"),
        (b"[\xff]", "JSON"),
        (b'{"a": 1}\n{"a": ', "line 2"),
        (b'{\n "samples": []\n}', "0 lists of samples, under samples"),
        (b'{"train": [{"a": 1}], "test": [{"a": 1}]}', "2 lists of samples, under train, test. Write one list"),
        ("[]".encode("utf-16")[:-1], "UTF-16"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b"\x89PNG\r\n", "line 1"),
    ],
)
def test_hostile_files_are_refused(tmp_path, raw, told):
    (tmp_path / "t.json").write_bytes(raw)
    with pytest.raises(ConfigError, match=r"t\.json") as caught:
        read_samples(tmp_path / "t.json", tmp_path)
    assert told in str(caught.value)


def test_a_file_must_be_there_and_a_file(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="must exist"):
        read_samples(tmp_path / "none.json", tmp_path)
    with pytest.raises(ConfigError, match="a folder"):
        read_samples(tmp_path, tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.json")
        with pytest.raises(ConfigError, match="a pipe"):
            read_samples(tmp_path / "pipe.json", tmp_path)
    written(tmp_path, [asked("a.png", "red" * 100)] * 2, "long.jsonl")
    monkeypatch.setattr("keeplora.tasks.own.json_rows.MOST_JSON", 100)
    with pytest.raises(ConfigError, match="at most 100 bytes"):
        read_samples(tmp_path / "long.jsonl", tmp_path)


def test_faults_are_collected_and_refused_together(tmp_path, six):
    Image.new("L", (8, 8)).save(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes(b"")
    (tmp_path / "2.png").unlink()
    six[3]["conversations"][1]["value"] = "  "
    six[4]["conversations"][0]["value"] = "<image>"
    written(tmp_path, [*six, six[0]])
    task, faults = read(tmp_path)
    assert [fault.kind for fault in faults.found] == ["empty_answer", "empty_answer", "grey", "corrupt", "missing"]
    assert [fault.where for fault in faults.found][:2] == ["t.json: sample 4", "t.json: sample 5"]
    with pytest.raises(ConfigError) as caught:
        faults.refuse()
    assert all(
        part in str(caught.value) for part in ("1.png (an empty file)", "2.png", "0.png (mode L)", "no question")
    )
    assert sum(len(samples) for _, samples in task.splits) == 7  # so that all faults are found first

    kinds = {"grey": "convert", "corrupt": "skip", "missing": "skip", "empty_answer": "skip"}
    task, faults = read(tmp_path, faults=kinds)
    faults.refuse()
    kept = sorted(sample.place for _, samples in task.splits for sample in samples)
    assert kept == ["t.json: sample 1", "t.json: sample 6", "t.json: sample 7"]
    assert len(faults.notes()) == 4


def test_files_for_tests_and_choices(tmp_path, six):
    for name, part in (("t.json", six[:3]), ("test.jsonl", six[3:5]), ("val.json", six[5:])):
        written(tmp_path, part, name)
    (tmp_path / "elsewhere").mkdir()
    written(tmp_path / "elsewhere", six[:3])
    source = TaskSource("t", json="elsewhere/t.json", test="test.jsonl", validation="val.json", images=".")
    task, faults = read(tmp_path, source)
    faults.refuse()
    places = {split: [sample.place for sample in samples] for split, samples in task.splits}
    assert places["train"] == ["t.json: sample 1", "t.json: sample 2", "t.json: sample 3"]
    assert places["test"] == ["test.jsonl: line 1", "test.jsonl: line 2"]
    assert places["validation"] == ["val.json: sample 1"]
    _, faults = read(tmp_path, TaskSource("t", json="elsewhere/t.json"))  # beside the file there are no images
    assert {fault.kind for fault in faults.found} == {"missing"}


def test_shares_are_drawn_by_the_seed_and_keep_an_image_in_one_part(tmp_path):
    for number in range(20):
        picture(tmp_path / f"{number}.png", "blue")
    samples = [asked(f"{number % 20}.png", str(number)) for number in range(40)]
    samples += [{"text": f"{number}?", "answer": "x"} for number in range(20)]
    written(tmp_path, samples)

    def parts(**data):
        task, _ = read(tmp_path, **data)
        return {split: [sample.place for sample in chosen] for split, chosen in task.splits}

    one, again, other = parts(), parts(readers=4), parts(split_seed=1)
    assert one == again
    assert sorted(chain(*one.values())) == sorted(chain(*other.values()))
    assert one["test"] != other["test"]
    assert {split: len(places) for split, places in one.items()} == {"train": 43, "validation": 5, "test": 12}
    task, _ = read(tmp_path)
    images = {split: {path for sample in chosen for path in sample.files} for split, chosen in task.splits}
    assert not images["train"] & images["test"]
    assert not images["train"] & images["validation"]
    assert not images["test"] & images["validation"]
    assert parts(validation_fraction=0.0)["validation"] == []


def test_samples_that_share_images_through_others_stay_together(tmp_path):
    for name in "abcdef":
        picture(tmp_path / f"{name}.png", "blue")
    links = [["a"], ["a", "b"], ["c", "b"], ["d"], ["e"], ["f"]]
    samples = [{"image": [f"{name}.png" for name in names], "text": "Q?", "answer": "A"} for names in links]
    written(tmp_path, samples)
    for seed in range(6):
        task, _ = read(tmp_path, split_seed=seed, test_fraction=0.5, validation_fraction=0.0)
        test = {sample.place[-1] for sample in task.test}
        assert test & {"1", "2", "3"} in (set(), {"1", "2", "3"})
        assert 1 <= len(test) <= 4


def test_videos_need_their_reader(tmp_path, monkeypatch):
    written(tmp_path, [{"video": "a.mp4", "text": "What?", "answer": "this"}])
    monkeypatch.setattr("keeplora.tasks.own.instructions.reads_videos", lambda: False)
    with pytest.raises(ConfigError, match=r"a\.mp4 in t\.json: sample 1 of task 't' and no PyAV"):
        read(tmp_path)
