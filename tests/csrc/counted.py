"""What every kernel asks of memory, of the tensor cores and of the schedulers, counted without a GPU.

    PYTHONPATH=tests python -m csrc.counted            # prints the tables
    PYTHONPATH=tests python -m csrc.counted --write    # and writes counting/counted.json and docs/kernels.md

Loads, stores and copies come from counting/hooks.cpp, which answers the compiler's calls for the race detector;
instructions from the machine code that nvcc makes. Times are the largest of four lower bounds on GPUs that
counting/gpus.json describes: nothing here ran on one.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from pathlib import Path

from csrc.programs import CSRC, EMULATOR, HERE, INCLUDE, ROOT, each, find_nvcc

COUNTING = HERE / "counting"
STORED, GPUS = COUNTING / "counted.json", COUNTING / "gpus.json"
PAGE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- counted: begin -->", "<!-- counted: end -->"
FLAGS = ["-std=c++20", "-w", "-DKEEPLORA_EMULATE", "-DEMULATE_COUNTED", "-O2", "-fno-tree-vectorize"]
KERNELS = sorted((CSRC / "kernels").glob("*.cu"))
ARCH, NVCC = "90a", "13.0"  # of the machine code
OPERATIONS = {"mma_tf32": 2 * 16 * 8 * 8, "mma_bf16": 2 * 16 * 8 * 16, "mma_f64": 2 * 16 * 8 * 8}
# A benchmark of the table, the case that stands for it, how many times its work that is, and how many times its
# compulsory bytes where that differs. Their inner loops are the tightest, but for ONE_PRODUCT.
CLIP_DK = 48 * (768 * 264 + 512 * 48)
LLAVA_DK = 192 * 4096 * 720 + 32 * 11008 * 1760
LLAVA_WEIGHTS = 128 * 4096 * 4096 + 96 * 11008 * 4096
BENCHMARKS = [
    ("project_rows, CLIP ViT-B/16", "project_rows", "[16, 768], k 264", CLIP_DK / (768 * 264), None),
    ("project_rows, LLaVA-1.5-7B", "project_rows", "[64, 1024], k 224", LLAVA_DK / (1024 * 224), None),
    ("projected_adamw, CLIP ViT-B/16", "projected_adamw", "[16, 768], k 264", CLIP_DK / (768 * 264), None),
    ("projected_adamw, LLaVA-1.5-7B", "projected_adamw", "[64, 1024], k 224", LLAVA_DK / (1024 * 224), None),
    ("merge_weights, CLIP ViT-B/16", "merge_weights", "[768, 768], r 16, float32 to bfloat16", 96, None),
    ("merge_weights, LLaVA-1.5-7B", "merge_weights", "[1024, 1024], r 64, bfloat16", LLAVA_WEIGHTS / 1024**2, None),
    ("lora_grad_b, qkv of ViT-B/16", "lora_grad_b", "[2048, 576], 3 adapters, bfloat16",
     12608 * 2304 / (2048 * 576), None),
    ("orthonormalize, CLIP ViT-B/16", "orthonormalize", "[768, 64], k 264", 48 + 48 * 512 * 48 / (768 * 264), None),
    ("sketch_rows, d 4096, width 256", "sketch_rows", "[1024, 1024], width 64, bfloat16",
     4 * 8192 * 4096 / 1024**2, 8192 * 4096 / 1024**2),
]  # fmt: skip


ONE_PRODUCT = "[1024, 1024], r 64, bfloat16", "[768, 768], r 16, float32 to bfloat16"
"""Cases of the loop that has a third of the tensor instructions."""


def product_names():
    """Names of the products in mma.cuh by the line on which they are emulated."""
    names, name = {}, ""
    for number, line in enumerate((CSRC / "kernels" / "primitives" / "mma.cuh").read_text().splitlines(), 1):
        if found := re.search(r"inline void (mma_\w+)\(", line):
            name = found[1]
        if "lanes::multiply" in line and name:
            names[str(number)] = name
    return names


def built(folder, program=COUNTING / "cases.cpp", kernels=KERNELS):
    """A program that counts, its objects made side by side."""
    plain = [*EMULATOR, COUNTING / "hooks.cpp", program]

    def compiled(source):
        out = folder / f"{source.parent.name}.{source.stem}.o"
        watched = ["-fsanitize=thread"] if source.suffix == ".cu" else []
        include = [f"-I{place}" for place in INCLUDE]
        subprocess.run(["g++", *FLAGS, *watched, *include, "-xc++", "-c", source, "-o", out], check=True)
        return out

    out = folder / "count"
    subprocess.run(["g++", *each(compiled, [*plain, *kernels]), "-o", out], check=True)
    return out


def counted(program):
    """What the program prints, by kernel and case."""
    lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    names, found = product_names(), {}
    for line in map(json.loads, lines):
        line["products"] = {names[at]: count for at, count in line["products"].items()}
        found.setdefault(line.pop("kernel"), {})[line.pop("case")] = line
    return found


def cuobjdump():
    """The toolkit's, or the one that Triton's wheel brings."""
    triton = Path(sysconfig.get_path("purelib"), "triton", "backends", "nvidia", "bin", "cuobjdump")
    found = shutil.which("cuobjdump") or (str(triton) if triton.exists() else "")
    assert found, "no cuobjdump: pip install triton brings one"
    return found


INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)")


def loops(sass):
    """(instructions, tensor instructions by name) of every loop with tensor instructions in it and no such loop."""
    found, body = [], []
    for line in [*sass.splitlines(), "Function :"]:
        if "Function :" in line:
            found += _loops(body)
            body = []
        elif match := INSTRUCTION.match(line):
            body.append((int(match[1], 16), match[2], match[3]))
    return found


def _loops(body):
    index = {address: i for i, (address, *_) in enumerate(body)}
    spans = []
    for i, (address, name, rest) in enumerate(body):
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target and int(target[1], 16) < address and int(target[1], 16) in index:
            spans.append((index[int(target[1], 16)], i))
    inner = []
    for low, high in spans:
        tensor = Counter(name for _, name, _ in body[low : high + 1] if name.startswith(("HMMA", "DMMA")))
        if tensor and not any(low <= a and b <= high and (a, b) != (low, high) for a, b, *_ in inner):
            inner.append((low, high, high + 1 - low, tensor))
    return [(size, tensor) for _, _, size, tensor in inner]


def instructions(folder, kernels=KERNELS):
    """Warp instructions for each tensor instruction in a kernel's inner loops, from the tightest to the loosest.

    Of the code as it stands: both sides of its branches.
    """

    def of(source):
        cubin = folder / f"{source.stem}.cubin"
        command = [find_nvcc(), "-std=c++20", "-O3", f"-I{CSRC}", f"-arch=sm_{ARCH}", "-cubin", source, "-o", cubin]
        subprocess.run([str(part) for part in command], check=True)
        sass = subprocess.run([cuobjdump(), "--dump-sass", cubin], check=True, capture_output=True, text=True).stdout
        ratios = sorted(size / sum(tensor.values()) for size, tensor in loops(sass) if "HMMA" in str(tensor))
        return source.stem, [round(ratios[0], 1), round(ratios[-1], 1)]

    return dict(each(of, kernels))


def seconds(case, ratio, work, compulsory, gpu):
    """The lower bounds on the time of a benchmark, by what they come from."""
    tensor = sum(count * OPERATIONS[name] / gpu[name] for name, count in case["products"].items())
    return {
        "memory": case["compulsory"] * compulsory / gpu["memory"],
        "L2": 32 * (case["read_sectors"] + case["written_sectors"]) * work / gpu["L2"],
        "tensor cores": tensor * work,
        "issue": sum(case["products"].values()) * ratio * work / (4 * gpu["multiprocessors"] * gpu["clock"]),
    }


def table(found):
    """Both tables in Markdown."""
    lines = [
        "| kernel, case | compulsory | to and from L2 | of every sector used | shared memory, of the best | products | "
        "instructions for each |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for kernel, cases in found["kernels"].items():
        low, high = found["instructions"][kernel]
        for name, case in cases.items():
            sectors = case["read_sectors"] + case["written_sectors"]
            products = ", ".join(f"{count} {kind.removeprefix('mma_')}" for kind, count in case["products"].items())
            lines.append(
                f"| {kernel} {name} | {case['compulsory'] / 1e6:.2f} MB | {32 * sectors / case['compulsory']:.1f} × | "
                f"{case['ideal_sectors'] / sectors:.0%} | {case['wavefronts'] / case['ideal_wavefronts']:.2f} × | "
                f"{products} | {low} to {high} |"
            )
    gpus = json.loads(GPUS.read_text())
    lines += ["", f"| benchmark | {' | '.join(gpus)} |", "|---|" + "---:|" * len(gpus)]
    for label, kernel, name, work, compulsory in BENCHMARKS:
        case, ratio = found["kernels"][kernel][name], found["instructions"][kernel][name in ONE_PRODUCT]
        cells = []
        for gpu in gpus.values():
            bounds = seconds(case, ratio, work, work if compulsory is None else compulsory, gpu)
            most = max(bounds, key=bounds.__getitem__)
            cells.append(f"{1e6 * bounds[most]:.0f} µs ({most})")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measure():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return {"kernels": counted(built(folder)), "instructions": instructions(folder)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    found = measure()
    print(table(found))
    if options.write:
        STORED.write_text(json.dumps(found, indent=1) + "\n")
        text = PAGE.read_text()
        before, after = text[: text.index(BEGIN)], text[text.index(END) :]
        PAGE.write_text(f"{before}{BEGIN}\n\n{table(found)}\n\n{after}")


if __name__ == "__main__":
    sys.exit(main())
