"""The annotation files of UCIT, MLLM-DCL and CL-VISTA, and what is wrong with public ones."""

import json

import pytest

from keeplora.methods.settings import ConfigError
from keeplora.tasks.field import instruction_benchmark, read_captions, read_instructions
from keeplora.tasks.scoring import Prediction, mllm_dcl_share


def put(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def train_row(file, key="image", sign="<image>"):
    talk = [{"from": "human", "value": f"{sign}\nWhat is this?"}, {"from": "gpt", "value": "goldfish"}]
    return {"id": "0", key: file, "conversations": talk}


def rows_of(images):
    return [{"question_id": str(i), "image": image, "text": "What?", "answer": "x"} for i, image in enumerate(images)]


def coco(count):
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(1, count + 1)],
        "annotations": [
            {"id": 10 * i + k, "image_id": i, "caption": f"{i} {k}"} for i in range(1, count + 1) for k in (0, 1)
        ],
    }


def ucit(root, annotations=".", clevr="CLEVR"):
    for task in instruction_benchmark("ucit").tasks:
        folder = clevr if task.name == "CLEVR-Math" else task.name
        images = [f"{folder}/train/a.jpg", f"{folder}/test/b.jpg"]
        for image in images:
            touch(root / "datasets" / image)
        place = root / annotations / folder
        put(place / task.train, [train_row(images[0])])
        put(place / task.test, rows_of(images[1:]))
        if task.captions:
            put(place / task.captions, coco(1))
    return root


@pytest.mark.parametrize(("annotations", "clevr"), [(".", "CLEVR"), ("instructions", "CLEVR-Math")])
def test_ucit(tmp_path, annotations, clevr):
    sets = read_instructions(ucit(tmp_path, annotations, clevr), "ucit")
    assert [each.task.name for each in sets] == ["ImageNet-R", "ArxivQA", "VizWiz", "IconQA", "CLEVR-Math", "Flickr30k"]
    (trained,), (tested,) = sets[0].train, sets[0].test
    assert (trained.text, trained.answer, trained.id) == ("What is this?", "goldfish", "0")
    assert trained.path == tmp_path / "datasets/ImageNet-R/train/a.jpg"
    assert (tested.text, tested.answer, tested.told_path) == ("What?", "x", "ImageNet-R/test/b.jpg")
    assert [each.captions is not None for each in sets] == [False, False, True, False, False, True]
    assert all(not each.notes for each in sets)
    assert read_captions(sets[2].captions, sets[2].test) == ({"0": ["1 0", "1 1"]}, ())


def test_all_that_is_missing_is_named_with_its_places(tmp_path):
    root = ucit(tmp_path)
    (root / "VizWiz/val_coco_type_3000.json").unlink()
    (root / "CLEVR").rename(root / "clevr")
    with pytest.raises(ConfigError) as caught:
        read_instructions(root, "ucit")
    told = str(caught.value)
    assert f"got {root} with 2 of 6 tasks missing" in told
    assert "VizWiz: no val_coco_type_3000.json in VizWiz" in told
    assert "CLEVR-Math: no train_4w.json, test_3000.json in CLEVR-Math, CLEVR, instructions/CLEVR-Math" in told


def test_a_missing_image_is_refused_or_counted(tmp_path):
    root = ucit(tmp_path)
    put(root / "IconQA/test_3000.json", rows_of(["IconQA/test/b.jpg", "IconQA/test/gone.jpg"]))
    with pytest.raises(ConfigError, match=r"IconQA.*got 1 of 2 in .* without: IconQA/test/gone.jpg"):
        read_instructions(root, "ucit")
    sets = read_instructions(root, "ucit", allow_missing=True)
    assert len(sets[3].test) == 1
    (note,) = sets[3].notes
    assert "1 of 2 questions" in note
    assert "compares with none" in note


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": 0, "image": "a.jpg"}, "row 0 of .* must have conversations of one human question and one gpt answer"),
        ({**train_row("a.jpg"), "conversations": []}, "conversations of one human question"),
        ({**train_row("../a.jpg")}, r"must be below the root, got '\.\./a.jpg'"),
        ({**train_row("/a.jpg")}, "must be below the root, got '/a.jpg'"),
        ({**train_row("a.jpg"), "image": None}, "row 0 of .* must have image or video"),
        ("text", "must be a list of objects"),
    ],
)
def test_wrong_rows_are_refused(tmp_path, row, message):
    root = ucit(tmp_path)
    put(root / "ArxivQA/train_4w.json", [row])
    with pytest.raises(ConfigError, match=message):
        read_instructions(root, "ucit")


def test_a_test_row_without_an_answer_is_refused(tmp_path):
    root = ucit(tmp_path)
    put(root / "ArxivQA/test_3000.json", [{"question_id": "0", "image": "ArxivQA/test/b.jpg", "text": "What?"}])
    with pytest.raises(ConfigError, match=r"row 0 of .* must have answer, got"):
        read_instructions(root, "ucit")
    (root / "ArxivQA/test_3000.json").write_text("[{]")
    with pytest.raises(ConfigError, match=r"test_3000.json must be JSON, got"):
        read_instructions(root, "ucit")


def questions(count, root):
    root = ucit(root)
    for i in range(count):
        touch(root / f"datasets/VizWiz/test/{i}.jpg")
    put(root / "VizWiz/test_3000.json", rows_of([f"VizWiz/test/{i}.jpg" for i in range(count)]))
    return read_instructions(root, "ucit")[2]


def test_the_old_vizwiz_file_is_told(tmp_path):
    viz = questions(3000, tmp_path)
    put(viz.captions, coco(2999))
    captions, notes = read_captions(viz.captions, viz.test)
    assert len(captions) == 2999
    assert "2999" not in captions  # the last question: ids of questions are from 0, of images from 1
    assert captions["0"] == ["1 0", "1 1"]
    assert "2999 image ids for 3000 images" in notes[0]
    assert "1 of 3000 images have no reference caption and are not scored: 2999" in notes[1]
    put(viz.captions, coco(3000))
    assert read_captions(viz.captions, viz.test)[1] == ()


def test_captions_of_other_images_are_refused(tmp_path):
    viz = questions(10, tmp_path)
    put(viz.captions, coco(9))
    with pytest.raises(ConfigError, match="captions for every question, got none for 1 of 10"):
        read_captions(viz.captions, viz.test)
    put(viz.captions, {"images": []})
    with pytest.raises(ConfigError, match="must have images with an id, and annotations"):
        read_captions(viz.captions, viz.test)


@pytest.mark.parametrize("above", [".", "Domain_data"])
def test_mllm_dcl(tmp_path, above):
    for domain in ("RS", "Med", "AD", "Sci", "Fin"):
        place = tmp_path / above / domain
        for name in ("a", "AI2D_b"):
            touch(place / f"images/{name}.jpg")
        put(place / "train.json", [train_row("images/a.jpg")])
        put(place / "test.json", rows_of(["images/AI2D_b.jpg"]))
    sets = read_instructions(tmp_path, "mllm-dcl")
    assert [each.task.name for each in sets] == ["RS", "Med", "AD", "Sci", "Fin"]
    one = sets[3].test[0]
    assert one.path == tmp_path / above / "Sci/images/AI2D_b.jpg"
    assert mllm_dcl_share("Sci", Prediction("x.", one.answer, one.text, one.told_path)) == 0  # by the file's name


def vista(root, json_row="json_row"):
    for task in instruction_benchmark("cl-vista").tasks:
        place = root / task.name
        for name in ("a.mp4", "b.mkv", "c.avi"):
            touch(place / name)
        put(place / task.train, [train_row(f"{task.name}/a.mp4", "video", "<video>")])
        asked = [{"question_id": key, "video_name": f"{task.name}/{key}", "question": f"{key}?"} for key in "bc"]
        put(place / json_row / task.test, asked)
        put(place / json_row / task.answers, [{"question_id": key, "answer": f"of {key}"} for key in "cb"])
    return root


@pytest.mark.parametrize("json_row", ["json_row", "."])
def test_cl_vista_pairs_answers_by_id_and_finds_the_ending(tmp_path, json_row):
    sets = read_instructions(vista(tmp_path, json_row), "cl-vista")
    assert len(sets) == 8
    for each in sets:
        assert [(one.id, one.text, one.answer, one.path.name) for one in each.test] == [
            ("b", "b?", "of b", "b.mkv"), ("c", "c?", "of c", "c.avi")
        ]  # fmt: skip
        assert each.train[0].text == "What is this?"
    assert sets[3].train[0].path == tmp_path / "Movie/a.mp4"


def test_cl_vista_counts_what_is_missing_and_refuses(tmp_path):
    root = vista(tmp_path)
    put(root / "GUI/json_row/test_answers_2k.json", [{"question_id": "b", "answer": "of b"}])
    with pytest.raises(ConfigError, match=r"every question must have an answer in .*got 1 of 2 .* without: c\. Unpack"):
        read_instructions(root, "cl-vista")
    (root / "Science/b.mkv").unlink()
    sets = {each.task.name: each for each in read_instructions(root, "cl-vista", allow_missing=True)}
    assert [one.id for one in sets["GUI"].test] == ["b"]
    assert [one.id for one in sets["Science"].test] == ["c"]
    assert "have not an answer" in sets["GUI"].notes[0]
    assert "have not its image or video on disk (Science): Science/b" in sets["Science"].notes[0]
    assert sets["STAR"].notes == ()


def test_cl_vista_refuses_ids_twice(tmp_path):
    root = vista(tmp_path)
    answers = root / "STAR/json_row/test_answers_2k.json"
    put(answers, [{"question_id": "b", "answer": "1"}, {"question_id": "b", "answer": "2"}])
    with pytest.raises(ConfigError, match="one answer to 'b', got two"):
        read_instructions(root, "cl-vista")
    put(answers, [{"question_id": key, "answer": "1"} for key in "bc"])
    put(
        root / "STAR/json_row/test_questions_2k.json",
        [{"question_id": "b", "video_name": "STAR/b", "question": "?"}] * 2,
    )
    with pytest.raises(ConfigError, match="each question_id once"):
        read_instructions(root, "cl-vista")
