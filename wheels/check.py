"""Whether wheels are what their names promise: python -m wheels.check WHEEL ..."""

from __future__ import annotations

import io
import json
import re
import sys
import zipfile
from collections.abc import Iterator, Sequence

from elftools.elf.elffile import ELFFile

NEEDED = re.compile(r"lib(torch_cpu|torch_cuda|c10|stdc\+\+|m|gcc_s|c|cudart)\.so(\.\d+)?|ld-linux-x86-64\.so\.2")
OURS = re.compile(r"keeplora/|keeplora-[^/]+\.dist-info/")
HOST = re.compile(rb"/(?:home|root|tmp|work|build|project|io|opt)/[\w./+-]{4,}")
MANYLINUX = re.compile(r"manylinux_(\d+)_(\d+)_(\w+)")


def faults(path: str) -> Iterator[str]:
    """All that is wrong with a wheel."""
    wheel = zipfile.ZipFile(path)
    names = wheel.namelist()
    libraries = [name for name in names if name.endswith(".so")]
    tags = path.removesuffix(".whl").split("-")[-3:]
    python, abi, platforms = tags[0], tags[1], tags[2].split(".")
    [inside] = [name for name in names if name.endswith(".dist-info/WHEEL")]
    said = set(re.findall(r"^Tag: (\S+)$", wheel.read(inside).decode(), re.MULTILINE))
    if said != {f"{python}-{abi}-{platform}" for platform in platforms}:
        yield f"its name says {'-'.join(tags)}, and it {sorted(said)}"
    if (python, abi) != ("py3", "none"):
        yield f"it must serve every Python 3 as py3-none, got {python}-{abi}"
    if strangers := [name for name in names if not OURS.match(name) or name.endswith((".pyc", ".pyi", ".cpp", ".cu"))]:
        yield f"it must hold the package alone, got {strangers[:3]}"
    facts = json.loads(wheel.read("keeplora/_built.json"))
    built = {f"keeplora/_{device}.so" for device, key in (("cpu", "cpu_kernels"), ("cuda", "kernels")) if facts[key]}
    if built != set(libraries):
        yield f"_built.json says {sorted(built)}, and it holds {libraries}"
    versions = [tuple(map(int, found.groups()[:2])) for found in map(MANYLINUX.fullmatch, platforms) if found]
    if bool(libraries) != bool(versions) or (not libraries and platforms != ["any"]):
        yield f"it must be for manylinux_… with libraries and for any platform without, got {platforms}"
    for name in libraries:
        for fault in library_faults(wheel.read(name), max(versions, default=(0, 0))):
            yield f"{name}: {fault}"


def library_faults(content: bytes, glibc: tuple[int, ...]) -> Iterator[str]:
    """All that is wrong with a library that must load with a version of glibc."""
    elf = ELFFile(io.BytesIO(content))
    tags = list(elf.get_section_by_name(".dynamic").iter_tags())
    for tag in tags:
        if tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH"):
            yield f"it must find libraries through torch, got {tag.entry.d_tag}"
        if tag.entry.d_tag == "DT_NEEDED" and NEEDED.fullmatch(tag.needed) is None:
            yield f"it must need torch and the system alone, got {tag.needed}"
    section = elf.get_section_by_name(".gnu.version_r")
    versions = {version.name for _, each in (section.iter_versions() if section else ()) for version in each}
    newer = [name for name in versions if name.startswith("GLIBC_") and _number(name) > glibc]
    if newer:
        yield f"it must load with glibc {'.'.join(map(str, glibc))}, got {sorted(newer)}"
    if paths := sorted(set(HOST.findall(content))):
        yield f"it must hold no paths of the machine it was built on, got {paths[:3]}"


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def main(paths: Sequence[str]) -> None:
    found = [f"wheels.check: {path}: {fault}" for path in paths for fault in faults(path)]
    if found:
        raise SystemExit("\n".join(found))
    for path in paths:
        print(f"{path}: {sum(each.compress_size for each in zipfile.ZipFile(path).filelist) / 2**20:.1f} MiB, as named")


if __name__ == "__main__":
    main(sys.argv[1:])
