"""Small data sets in the real formats, in the layouts of torchvision and of CoOp."""

import dataclasses
import json
import pickle

import numpy as np
from PIL import Image
from scipy.io import savemat

COLOURS = [(250, 10, 10), (10, 250, 10), (10, 10, 250)]


def image(path, label=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), COLOURS[label]).save(path)


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def mnist(folder, train=4, test=3):
    for name, count in (("train", train), ("t10k", test)):
        labels = np.arange(count) % 10
        idx(folder / f"{name}-labels-idx1-ubyte", labels)
        idx(folder / f"{name}-images-idx3-ubyte", np.repeat(labels * 20, 28 * 28).reshape(count, 28, 28))


def cifar100(folder, train=4, test=3, protocol=2):
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", train), ("test", test)):
        data = np.zeros((count, 3, 1024), dtype=np.uint8)
        data[:, 1] = 200  # green
        table = {"data": data.reshape(count, 3072), "fine_labels": [i % 2 for i in range(count)], "filenames": ["x"]}
        (folder / name).write_bytes(pickle.dumps(table, protocol=protocol))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["aquarium_fish", "apple"]}, protocol=protocol))


def aircraft(folder):
    text(folder / "data/variants.txt", "707-320\nA_340\n")
    for split, names in (("train", "11 707-320\n12 A_340\n"), ("test", "13 A_340\n"), ("val", "11 707-320\n")):
        text(folder / f"data/images_variant_{split}.txt", names)
    for name in (11, 12, 13):
        image(folder / f"data/images/{name}.jpg")


def caltech101(folder, count=5):
    for name in ("BACKGROUND_Google", "Faces", "accordion"):
        for i in range(count):
            image(folder / f"101_ObjectCategories/{name}/image_{i + 1:04d}.jpg")


def dtd(folder):
    for split in ("train", "test"):
        text(folder / f"dtd/labels/{split}1.txt", f"banded/{split}.jpg\nzig_zag/{split}.jpg\n")
        for name in ("banded", "zig_zag"):
            image(folder / f"dtd/images/{name}/{split}.jpg")


def eurosat(folder):
    for name in ("AnnualCrop", "Forest"):
        for i in range(5):
            image(folder / f"2750/{name}/{name}_{i}.jpg")


def flowers(folder):
    folder.mkdir(parents=True)
    savemat(folder / "imagelabels.mat", {"labels": np.array([[1, 2, 2]])})
    savemat(folder / "setid.mat", {"trnid": np.array([[1, 2]]), "valid": np.array([[2]]), "tstid": np.array([[3, 1]])})
    for i in range(3):
        image(folder / f"jpg/image_{i + 1:05d}.jpg")


def food(folder):
    for split in ("train", "test"):
        names = {name: [f"{name}/{split}"] for name in ("apple_pie", "waffles")}
        text(folder / f"meta/{split}.json", json.dumps(names))
        for name in names:
            image(folder / f"images/{name}/{split}.jpg")


def oxford_pet(folder):
    for n, split in enumerate(("trainval", "test")):
        text(folder / f"annotations/{split}.txt", f"great_dane_{n} 1 2 1\nBirman_{n} 2 1 1\n")
        for name in ("great_dane", "Birman"):
            image(folder / f"images/{name}_{n}.jpg")


def stanford_cars(folder):
    (folder / "devkit").mkdir(parents=True)
    kind = [("fname", "O"), ("class", "O")]
    for path, name in (
        (folder / "devkit/cars_train_annos.mat", "train"),
        (folder / "cars_test_annos_withlabels.mat", "test"),
    ):
        savemat(path, {"annotations": np.array([("1.jpg", 2), ("2.jpg", 1)], dtype=kind)})
        for i in (1, 2):
            image(folder / f"cars_{name}/{i}.jpg")
    names = np.array(["AM General Hummer", "Audi TT"], dtype=object)
    savemat(folder / "devkit/cars_meta.mat", {"class_names": names})


def sun397(folder, count=5):
    text(folder / "ClassName.txt", "/a/abbey\n/z/zoo/in_door\n")
    for i in range(count):
        image(folder / f"a/abbey/sun_a{i}.jpg")
        image(folder / f"z/zoo/in_door/sun_z{i}.jpg")


MTIL = {
    "Aircraft": aircraft,
    "Caltech101": caltech101,
    "CIFAR100": cifar100,
    "DTD": dtd,
    "EuroSAT": eurosat,
    "Flowers": flowers,
    "Food": food,
    "MNIST": lambda folder: mnist(folder / "raw"),
    "OxfordPet": oxford_pet,
    "StanfordCars": stanford_cars,
    "SUN397": sun397,
}
SIZES = {
    "Aircraft": (2, 1), "Caltech101": (8, 2), "CIFAR100": (4, 3), "DTD": (2, 2), "EuroSAT": (8, 2), "Flowers": (2, 2),
    "Food": (2, 2), "MNIST": (4, 3), "OxfordPet": (2, 2), "StanfordCars": (2, 2), "SUN397": (8, 2),
}  # fmt: skip


def small(benchmark, classes=2, sizes=SIZES):
    """A benchmark whose data sets have two classes, MNIST ten (its names are fixed, and so are those of Flowers)."""
    fixed = {"MNIST": 10, "mnist": 10, "Flowers": 102}  # not X-TAIL's flowers, whose names are in its file
    sets = {
        name: dataclasses.replace(
            each,
            classes=fixed.get(name, classes),
            names=each.names[: fixed.get(name, classes)],
            **dict(zip(("train", "test"), sizes.get(name, (each.train, each.test)), strict=True)),
        )
        for name, each in benchmark.sets.items()
    }
    return dataclasses.replace(benchmark, sets=sets)


def zhou(folder, split, images, counts=(20, 3), test=2):
    """``counts`` training images of each class, ``test`` of test and one for validation."""
    rows = {"train": [], "val": [], "test": []}
    for label, count in enumerate(counts):
        for part, size in (("train", count), ("val", 1), ("test", test)):
            for i in range(size):
                name = f"c_{label}/{part}{i}.jpg"
                rows[part].append([name, label, f"c_{label}"])
                image(folder / images / name, label)
    text(folder / split, json.dumps(rows))
