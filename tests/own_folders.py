"""Tiny folders of a user's data, in every layout that is recognised."""

import json

from PIL import Image


def picture(path, mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (5, 4)).save(path, **options)
    return path


def classes(folder, counts, ending=".png"):
    """Class folders with so many images each."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture(folder / name / f"{number}{ending}")
    return folder


def conversation(image="", question="What is it?", answer="An owl."):
    turns = [
        {"from": "human", "value": f"<image>\n{question}" if image else question},
        {"from": "gpt", "value": answer},
    ]
    return {"id": image, **({"image": image} if image else {}), "conversations": turns}


def write(path, samples):
    """JSON, or JSONL by the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples), encoding="utf-8")
    else:
        path.write_text(json.dumps(samples), encoding="utf-8")
    return path
