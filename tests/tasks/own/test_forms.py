"""Files of questions as people write them: the same samples in other forms, wrappers and encodings; broken texts."""

import json
import re

import pytest
from tasks.own.test_instructions import read, written
from tiny_vlm import asked, picture

from keeplora.methods.settings import ConfigError
from keeplora.tasks.own.instructions import read_samples
from keeplora.tasks.own.look import look

TURNS = [("user", "See <image> and\n<image>"), ("assistant", "one"), ("user", "And?"), ("assistant", "two")]
PLAIN = {"image": ["a.png", "b c.png"], "conversations": [{"from": who, "value": said} for who, said in TURNS]}
PARTS = [
    {"type": "text", "text": "See"}, {"type": "image_url", "image_url": {"url": "a.png"}},
    {"type": "text", "text": "and"},
]  # fmt: skip
SAME = {
    "ShareGPT's names": {"images": PLAIN["image"], "conversations": [
        {"from": "system", "value": ""}, *({"role": who, "value": said} for who, said in TURNS)]},
    "messages": {"images": PLAIN["image"], "messages": [{"role": who, "content": said} for who, said in TURNS]},
    "parts": {"messages": [
        {"role": "user", "content": [PARTS[0], PARTS[1], PARTS[2], {"type": "image_url", "image_url": "b c.png"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "one"}]},
        *({"role": who, "content": said} for who, said in TURNS[2:])]},
    "parts without files": {"images": PLAIN["image"], "messages": [
        {"role": "user", "content": [PARTS[0], {"type": "image"}, PARTS[2], {"type": "image", "index": 1}]},
        *({"role": who, "content": said} for who, said in TURNS[1:])]},
}  # fmt: skip


@pytest.mark.parametrize("form", SAME.values(), ids=SAME)
def test_other_forms_say_the_same(tmp_path, form):
    written(tmp_path, [PLAIN, form])
    first, second = read_samples(tmp_path / "t.json", tmp_path)
    assert (second.turns, second.images, second.videos) == (first.turns, first.images, first.videos)
    assert first.images == (tmp_path / "a.png", tmp_path / "b c.png")


def test_a_url_of_a_file_is_its_path(tmp_path):
    written(tmp_path, [{"image": "file:///data/b%20c.png", "question": "x", "answer": "y"}])
    (sample,) = read_samples(tmp_path / "t.json", tmp_path)
    assert [str(path) for path in sample.images] == ["/data/b c.png"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
@pytest.mark.parametrize("form", ["list", "pretty", "lines", "held", "held in lines"])
def test_files_in_other_encodings_and_wrappers(tmp_path, encoding, form):
    samples = [{"text": "Où?", "answer": "là 🦉"}, {"text": "x", "answer": "y"}]
    held = {"version": 2, "license": [], "data": samples}
    text = {
        "list": json.dumps(samples, ensure_ascii=False), "pretty": json.dumps(samples, indent=1, ensure_ascii=False),
        "lines": "\n".join(json.dumps(one, ensure_ascii=False) for one in samples),
        "held": json.dumps(held, ensure_ascii=False), "held in lines": json.dumps(held, indent=1, ensure_ascii=False),
    }[form]  # fmt: skip
    (tmp_path / "t.json").write_bytes(text.encode(encoding))
    read = read_samples(tmp_path / "t.json", tmp_path)
    assert [(sample.question, sample.answer) for sample in read] == [("Où?", "là 🦉"), ("x", "y")]


def test_one_sample_is_a_file(tmp_path):
    for indent in (None, 1):
        (tmp_path / "t.json").write_text(json.dumps(asked("a.png", "red"), indent=indent))
        (sample,) = read_samples(tmp_path / "t.json", tmp_path)
        assert sample.answer == "red"


BROKEN = {
    "question": (["human", "<image>\nWhat \ud800?"], "half a surrogate pair, \\ud800 in question 1"),
    "answer": (["gpt", "a\0b"], "a NUL character in answer 1"),
    "image": ("a\0b.png", "a NUL character in the image's name"),
    "half a name": ("a\udfff.png", "half a surrogate pair"),
    "long name": ("a" * 300 + ".png", "a name of 304 bytes in the image's name"),
}


@pytest.mark.parametrize(("where", "told"), BROKEN.values(), ids=BROKEN)
def test_what_no_tokenizer_or_file_system_takes_is_a_fault(tmp_path, where, told):
    six = [asked(picture(tmp_path / f"{number}.png", "red").name, f"a{number}") for number in range(6)]
    if isinstance(where, str):
        six[2]["image"] = where
    else:
        six[2]["conversations"][where[0] == "gpt"]["value"] = where[1]
    written(tmp_path, six)
    _, faults = read(tmp_path)
    assert [(fault.kind, fault.where) for fault in faults.found] == [("broken_text", "t.json: sample 3")]
    with pytest.raises(ConfigError, match=re.escape(told)):
        faults.refuse()
    task, faults = read(tmp_path, faults={"broken_text": "skip"})
    faults.refuse()
    assert sum(len(samples) for _, samples in task.splits) == 5
    (fault,) = (fault for fault in look(tmp_path).faults if fault.kind == "broken_text")
    assert (fault.where, fault.why in told or told in fault.why) == ("t.json: sample 3", True)
