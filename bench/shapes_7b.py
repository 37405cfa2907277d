"""A task switch on a 7B model's shapes, layer by layer: python -m bench.shapes_7b [FILE] [SHAPE ...]

Measures the basis of the weight, the adapter's directions (from an exact gradient and from a sketch) and the basis
update for one layer of each shape, on one thread, and adds up what 224 of them take. Matrices are made layer by layer:
nothing but the layer at hand is in memory. The shapes are LLaVA-1.5-7B's, all seven linear kinds of 32 blocks.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness import recorded_bytes
from bench.run import machine
from keeplora.math.lowrank import extend_basis, top_directions, weight_basis

# layers in the model; out, in. q, k, v, o; gate, up; down.
SHAPES = {"attention": (128, 4096, 4096), "gate and up": (64, 11008, 4096), "down": (32, 4096, 11008)}
RANK = 64  # of the published MLLM-DCL runs
SKETCH = 8 * RANK
WEIGHT_ENERGY, FEATURE_ENERGY = 0.6, 0.95
FILE = Path(__file__).parent / "results" / "cpu" / "shapes_7b.json"


def matrix(out: int, d: int, power: float, seed: int) -> Tensor:
    """A random matrix whose singular values fall about as ``i^-power``.

    A Gaussian matrix with scaled columns in random order, turned by reflections: an exact spectrum would take a QR
    factorisation of every matrix, which costs more than what is measured.
    """
    generator = torch.Generator().manual_seed(seed)
    scale = (1 + torch.randperm(d, generator=generator)) ** -power
    x = torch.randn(out, d, generator=generator) * scale
    for _ in range(2):
        v = torch.randn(d, generator=generator)
        v /= v.norm()
        x -= 2 * torch.outer(x @ v, v)
    return x


def second_moment(d: int, power: float, seed: int) -> Tensor:
    """A second moment with eigenvalues ``i^-2 power``, turned in the same way."""
    generator = torch.Generator().manual_seed(seed)
    c = torch.diag((1 + torch.randperm(d, generator=generator)) ** (-2 * power))
    for _ in range(2):
        v = torch.randn(d, generator=generator)
        v /= v.norm()
        w = 2 * (c @ v)
        w -= (v @ w) * v  # so that one update of rank 2 turns both sides
        c -= torch.outer(v, w) + torch.outer(w, v)
    return c


def measured(what: str, call: Callable[..., Any], *arguments: Any) -> tuple[dict[str, Any], Any]:
    """Seconds and the most bytes of one call, which is not repeated: it takes from seconds to minutes."""
    results: list[Any] = []
    seconds = time.process_time()
    peak, _ = recorded_bytes(lambda: results.append(call(*arguments)))
    seconds = time.process_time() - seconds
    print(f"  {what:<28} {seconds:8.2f} s   {peak / 2**20:8.0f} MiB", flush=True)
    return {"what": what, "seconds": seconds, "peak_bytes": peak}, results[0]


def measure(label: str) -> dict[str, Any]:
    """One layer of a shape: what each part takes, and how many directions it found."""
    count, out, d = SHAPES[label]
    print(f"{label}: {count} x [{out}, {d}]", flush=True)
    parts = []
    weight = matrix(out, d, 0.35, seed=0)
    row, (q,) = measured("weight_basis", weight_basis, [weight], WEIGHT_ENERGY)
    parts.append({**row, "directions": q.shape[1]})
    del weight
    gradient = matrix(out, d, 1.0, seed=1)
    row, _ = measured("top_directions, exact", top_directions, [gradient], [q], RANK)
    parts.append({**row, "statistic_bytes": 4 * gradient.numel()})
    signs = torch.randint(2, (SKETCH, out), generator=torch.Generator().manual_seed(2)) * 2.0 - 1
    sketch = signs @ gradient / SKETCH**0.5
    del gradient, signs
    row, _ = measured("top_directions, sketch", top_directions, [sketch], [q], RANK)
    parts.append({**row, "statistic_bytes": 4 * sketch.numel()})
    del sketch
    c = second_moment(d, 0.8, seed=3)
    row, (new,) = measured("extend_basis", extend_basis, [q], [c], FEATURE_ENERGY)
    parts.append({**row, "directions": new.added, "statistic_bytes": 4 * c.numel()})
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"shape": label, "layers": count, "out": out, "in": d, "parts": parts, "resident_bytes": resident}


def whole_model(shapes: list[dict[str, Any]]) -> dict[str, Any]:
    """224 layers one after another: seconds add up; of the memory the largest, and what stays for all of them."""
    seconds: dict[str, float] = {}
    for shape in shapes:
        for part in shape["parts"]:
            seconds[part["what"]] = seconds.get(part["what"], 0.0) + shape["layers"] * part["seconds"]
    bases = sum(
        shape["layers"] * 4 * shape["in"] * sum(part.get("directions", 0) for part in shape["parts"])
        for shape in shapes
    )
    return {
        "layers": sum(shape["layers"] for shape in shapes),
        "seconds": seconds,
        "peak_bytes_of_a_layer": max(part["peak_bytes"] for shape in shapes for part in shape["parts"]),
        "peak_resident_bytes": max(shape["resident_bytes"] for shape in shapes),
        "bytes_of_all_bases": bases,
        "bytes_of_all_sketches": sum(shape["layers"] * 4 * SKETCH * shape["in"] for shape in shapes),
    }


def main() -> None:
    torch.set_num_threads(1)
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    shapes = []
    for label in sys.argv[2:] or SHAPES:
        shapes.append(measure(label))
        total = whole_model(shapes)
        result = {"machine": machine(torch.device("cpu")), "shapes": shapes, "model": total}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{total['layers']} layers: {total['seconds']}", flush=True)


if __name__ == "__main__":
    main()
