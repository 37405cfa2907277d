"""MTIL's data sets from small files in their real formats, and what goes wrong with real ones."""

import dataclasses
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tasks.field import made
from torchvision.datasets import Flowers102

from keeplora._files import write_json
from keeplora.methods.settings import ConfigError
from keeplora.tasks.field import class_offsets, image_benchmark, read_image_set, read_images, split_paths
from keeplora.tasks.field.arrays import unpickle_arrays

MTIL = made.small(image_benchmark("mtil"))


@pytest.fixture(autouse=True)
def no_checksums(monkeypatch):
    """torchvision reads Flowers' labels only where they have the checksum of the real ones."""
    unchecked = {key: (name, None) for key, (name, _) in Flowers102._file_dict.items()}
    monkeypatch.setattr(Flowers102, "_file_dict", unchecked)


@pytest.fixture
def root(tmp_path):
    for spec in MTIL.sets.values():
        made.MTIL[spec.name](tmp_path / spec.folders[0])
    return tmp_path


def test_all_of_mtil(root):
    sets = read_images(root, MTIL)
    assert [each.name for each in sets] == list(MTIL.orders["I"])
    assert [each.name for each in read_images(root, MTIL, "II")] == list(MTIL.orders["II"])
    classes = {each.name: each.classes[:2] for each in sets}
    assert classes["Aircraft"] == ("707-320", "A 340")
    assert classes["Caltech101"] == ("off-center face", "centered face")  # the list's, by label
    assert classes["CIFAR100"] == ("aquarium fish", "apple")
    assert classes["DTD"] == ("banded", "zig zag")
    assert classes["EuroSAT"] == ("annual crop land", "forest")
    assert classes["Flowers"] == ("pink primrose", "hard-leaved pocket orchid")
    assert classes["Food"] == ("apple pie", "waffles")
    assert classes["MNIST"] == ("0 - zero", "1 - one")
    assert classes["OxfordPet"] == ("Great Dane", "Birman")
    assert classes["StanfordCars"] == ("AM General Hummer", "Audi TT")
    assert classes["SUN397"] == ("abbey", "zoo/in door")
    for each in sets:
        assert (len(each.train), len(each.test)) == made.SIZES[each.name]
        for source, label in (*each.train, *each.test):
            picture = source.open()
            assert picture.mode == "RGB"
            assert 0 <= label < len(each.classes)
    told = " ".join(note for each in sets for note in each.notes)
    assert "not the published" not in told
    assert "SUN397: 80 % for training, drawn with seed 42; the files are sorted first" in told


def test_labels_are_those_of_the_files(root):
    labels = {each.name: [label for _, label in each.train] for each in read_images(root, MTIL)}
    assert labels["Aircraft"] == [0, 1]
    assert labels["DTD"] == [0, 1]
    assert labels["Flowers"] == [0, 1]
    assert labels["MNIST"] == [0, 1, 2, 3]
    assert labels["CIFAR100"] == [0, 1, 0, 1]
    assert labels["StanfordCars"] == [1, 0]
    cars = read_image_set(root, MTIL, "StanfordCars")
    assert [source.path.name for source, _ in cars.train] == ["1.jpg", "2.jpg"]
    assert [source.path.parent.name for source, _ in cars.test] == ["cars_test"] * 2
    fish, _ = read_image_set(root, MTIL, "CIFAR100").train[0]
    assert np.asarray(fish.open())[5, 7].tolist() == [0, 200, 0]
    three, _ = read_image_set(root, MTIL, "MNIST").train[3]
    assert np.asarray(three.open())[5, 7].tolist() == [60, 60, 60]


def test_80_20_is_zscls_random_split(root):
    paths = sorted((root / "eurosat/2750").glob("*/*.jpg"))
    picked, _ = torch.utils.data.random_split(paths, [8, 2], torch.Generator().manual_seed(42))
    assert [source.path for source, _ in read_image_set(root, MTIL, "EuroSAT").train] == list(picked)


def test_sun397_does_not_depend_on_the_file_system(root, monkeypatch):
    one = read_image_set(root, MTIL, "SUN397")
    walk = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda path, pattern: reversed(list(walk(path, pattern))))
    other = read_image_set(root, MTIL, "SUN397")
    assert split_paths(one, root) == split_paths(other, root)
    for source, label in (*one.train, *one.test):
        assert label == ("zoo" in source.path.parts)


def test_the_split_can_be_written_beside_a_run(root, tmp_path):
    told = split_paths(read_image_set(root, MTIL, "SUN397"), root)
    write_json(tmp_path / "split.json", told)
    assert len(told["train"]) == 8
    assert not set(told["train"]) & set(told["test"])
    assert all((root / path).is_file() for path in told["train"] + told["test"])
    assert split_paths(read_image_set(root, MTIL, "MNIST"), root)["test"] == [0, 1, 2]


def test_another_size_is_told(root):
    sets = {**MTIL.sets, "MNIST": dataclasses.replace(MTIL.sets["MNIST"], test=10000)}
    notes = read_image_set(root, dataclasses.replace(MTIL, sets=sets), "MNIST").notes
    assert notes == ("MNIST: 3 test images, not the published 10000; its accuracy compares with none",)


def test_another_version_is_refused(root):
    with pytest.raises(ConfigError, match=r"data set DTD must have 47 classes, got 2 in .*another version"):
        read_image_set(root, "mtil", "DTD")


def test_all_that_is_missing_is_named_before_anything_is_read(root):
    shutil.rmtree(root / "food-101")
    (root / "MNIST/raw/train-labels-idx1-ubyte").unlink()
    (root / "fgvc-aircraft-2013b/data/variants.txt").write_text("broken")
    with pytest.raises(ConfigError) as caught:
        read_images(root, MTIL)
    told = str(caught.value)
    assert f"got {root} with 2 of 11 missing" in told
    assert "Food: no folder food-101" in told
    assert "MNIST: MNIST has no raw/train-labels-idx1-ubyte" in told
    assert "nothing is downloaded" in told


def test_nothing_is_made_in_an_empty_root(tmp_path):
    with pytest.raises(ConfigError, match="11 of 11 missing"):
        read_images(tmp_path, "mtil")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("Aircraft", "fgvc-aircraft-2013b/data/images/13.jpg"),
        ("Caltech101", "caltech101/101_ObjectCategories/Faces/image_0002.jpg"),
        ("Food", "food-101/images/waffles/test.jpg"),
        ("OxfordPet", "oxford-iiit-pet/images/Birman_1.jpg"),
    ],
)
def test_half_unpacked(root, name, lost):
    (root / lost).unlink()
    with pytest.raises(
        ConfigError, match=rf"data set {name} must have all its images, got none at .*\(1 of \d+ missing"
    ):
        read_image_set(root, MTIL, name)


def test_a_broken_file_names_its_data_set(root):
    (root / "MNIST/raw/t10k-images-idx3-ubyte").write_bytes(b"\x00\x00\x08\x03")
    with pytest.raises(ConfigError, match=r"data set MNIST must be readable, got: .* Unpack it again"):
        read_image_set(root, MTIL, "MNIST")
    (root / "flowers-102/setid.mat").write_bytes(b"none")
    with pytest.raises(ConfigError, match="data set Flowers must be readable"):
        read_image_set(root, MTIL, "Flowers")


def test_a_missing_library_is_named_with_its_command(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ConfigError, match=r"torchvision.* must be installed .* pip install 'keeplora\[fields\]'"):
        read_image_set(root, MTIL, "DTD")


def test_a_few_images_of_each_class(root):
    few = read_image_set(root, MTIL, "SUN397", shots=1)
    assert sorted(label for _, label in few.train) == [0, 1]
    assert any("1 training images of each class, drawn with seed 42" in note for note in few.notes)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_cifar_is_read_from_any_pickle_of_arrays(tmp_path, protocol):
    made.cifar100(tmp_path, protocol=protocol)
    table = unpickle_arrays(tmp_path / "train")
    assert table["data"].array.shape == (4, 3072)
    assert table["data"].array[0, 1024] == 200
    assert table["fine_labels"] == [0, 1, 0, 1]


def test_cifar_as_python_2_wrote_it(tmp_path):
    """The distributed files: protocol 2 with text for bytes, and a columns-first array reads the right way round."""
    kind = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
    array = b"(I1\n(I2\nI2\ntcnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb"
    state = array + b"I%d\nS'\\x00\\xc8\\x02\\x03'\ntb."
    (tmp_path / "rows").write_bytes(kind + state % 0)
    (tmp_path / "columns").write_bytes(kind + state % 1)
    assert unpickle_arrays(tmp_path / "rows").array.tolist() == [[0, 200], [2, 3]]
    assert unpickle_arrays(tmp_path / "columns").array.tolist() == [[0, 2], [200, 3]]


class Harm:
    def __reduce__(self):
        return (os.system, ("touch harmed",))


@pytest.mark.parametrize(
    "harm", [Harm(), {"data": Harm()}, np.array([Harm()], dtype=object), print, np.memmap, np.zeros(2)]
)
def test_cifar_runs_no_code(tmp_path, monkeypatch, harm):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train").write_bytes(pickle.dumps(harm))
    with pytest.raises(ConfigError, match=r"must be a pickle of arrays, got: .*(which is no array|and not bytes)"):
        unpickle_arrays(tmp_path / "train")
    assert not (tmp_path / "harmed").exists()


def test_cifar10_is_not_cifar100(root):
    folder = root / "cifar-100-python"
    (folder / "meta").write_bytes(pickle.dumps({"label_names": ["airplane"]}))
    with pytest.raises(ConfigError, match=r"meta must have 'fine_label_names', got none. It must be CIFAR100's"):
        read_image_set(root, MTIL, "CIFAR100")


def test_offsets(root):
    sets = read_images(root, MTIL)[:3]
    assert class_offsets(sets) == (0, 2, 4)
    assert class_offsets(read_images(root, MTIL)[5:8]) == (0, 102, 104)
