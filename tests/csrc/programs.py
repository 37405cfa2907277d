"""The check programs of the emulated kernels with every mutation planted in their sources, built three ways."""

import functools
import os
import resource
import shutil
import signal
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from csrc.mutations import closure, plant

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
INCLUDE = [CSRC, HERE, HERE / "emulate" / "include"]
MODES = {
    "plain": ["-O2"],
    "sanitized": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "raced": ["-O2", "-fsanitize=thread", "-DEMULATE_RACED"],
}
EMULATOR = sorted((HERE / "emulate").glob("*.cpp"))
JOBS = os.cpu_count() or 1
# Which mutation is active is the environment's choice, none if it says nothing. The plain build also writes down which
# ones it comes to: only where a program comes to a mutation can it notice it.
HEADER = """#pragma once
#include <cstdio>
#include <cstdlib>
namespace planted {
inline const int number = std::getenv("PLANTED") ? std::atoi(std::getenv("PLANTED")) : -1;
#ifdef PLANTED_SEEN
struct Seen {
  bool at[PLANTED_SEEN] = {};
  ~Seen() {
    const char* path = std::getenv("PLANTED_SEEN_PATH");
    FILE* file = path ? std::fopen(path, "w") : nullptr;
    for (int i = 0; file && i < PLANTED_SEEN; ++i)
      if (at[i]) std::fprintf(file, "%d\\n", i);
    if (file) std::fclose(file);
  }
};
inline Seen seen;
#endif
inline bool active(int n) {
#ifdef PLANTED_SEEN
  seen.at[n] = true;
#endif
  return n == number;
}
}
"""


@dataclass(frozen=True)
class Program:
    name: str
    sources: tuple[Path, ...]

    @property
    def files(self):
        return set().union(*(closure(INCLUDE, source) for source in self.sources))


def find_nvcc():
    """A toolkit's nvcc, or the one that NVIDIA's wheels on PyPI put into site-packages."""
    places = [Path(os.getenv("CUDA_HOME", "/usr/local/cuda"), "bin")]
    places.append(Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin"))
    nvcc = shutil.which("nvcc", path=os.pathsep.join([os.environ["PATH"], *map(str, places)]))
    assert nvcc, "no nvcc, so no kernel can be compiled for a GPU; pip install 'keeplora[dev]' brings one"
    return nvcc


@functools.cache
def launcher(mode):
    """ThreadSanitizer stops at the start where the kernel lays out addresses too randomly for it."""
    plainly = ["setarch", "-R"]
    able = mode == "raced" and shutil.which("setarch") and not subprocess.run([*plainly, "true"]).returncode
    return plainly if able else []


def checks():
    """A check program for each kernel."""
    found = sorted((HERE / "checks").glob("*.cpp"))
    return [Program(check.stem, (check, CSRC / "kernels" / f"{check.stem}.cu")) for check in found]


def programs():
    """The checks, and the conformance program of the primitives."""
    return [*checks(), Program("conformance", (HERE / "conformance" / "conformance.cu",))]


def each(function, *arguments):
    """``map`` with as many threads as there are jobs at a time."""
    with ThreadPoolExecutor(JOBS) as pool:
        return list(pool.map(function, *arguments))


class Planted:
    """Programs in all modes, with the mutations numbered as in the list."""

    def __init__(self, folder: Path, mutations, programs):
        self.folder, self.mutations, self.programs = folder, mutations, programs
        (folder / "planted.h").write_text(HEADER)
        for file in {m.file for m in mutations}:
            numbers = [i for i, m in enumerate(mutations) if m.file == file]
            assert numbers == list(range(numbers[0], numbers[-1] + 1)), "mutations of a file lie together"
            copy = folder / file
            copy.parent.mkdir(parents=True, exist_ok=True)
            mine = [mutations[i] for i in numbers]
            copy.write_text('#include "planted.h"\n#line 1\n' + plant((CSRC / file).read_text(), mine, numbers[0]))
        emulator = [(mode, source) for mode in MODES for source in EMULATOR]
        parts = [(mode, source) for mode in MODES for program in self.programs for source in program.sources]
        self.objects = dict(zip(emulator + parts, each(self._compile, emulator + parts), strict=True))
        each(self._link, [(mode, program) for mode in MODES for program in self.programs])
        self.seconds = {}  # of CPU, by mode and program; an upper bound, as several run at a time

    def _compile(self, item):
        mode, source = item
        planted = self.folder / source.relative_to(CSRC) if source.is_relative_to(CSRC) else source
        planted = planted if planted.exists() else source
        out = self.folder / f"{source.parent.name}.{source.stem}.{mode}.o"
        quiet = ["-fno-sanitize=thread"] if source in EMULATOR else []
        command = ["g++", "-std=c++20", "-w", "-DKEEPLORA_EMULATE", *MODES[mode], *quiet]
        command += [f"-DPLANTED_SEEN={len(self.mutations)}"] if mode == "plain" else []
        command += [f"-I{folder}" for folder in (self.folder, *INCLUDE)]
        _run(*command, "-xc++", "-c", planted, "-o", out)
        return out

    def _link(self, item):
        mode, program = item
        objects = [self.objects[mode, source] for source in EMULATOR]
        objects += [self.objects[mode, source] for source in program.sources]
        _run("g++", *MODES[mode], *objects, "-o", self.binary(mode, program))

    def binary(self, mode, program):
        return self.folder / f"{program.name}.{mode}"

    def fails(self, mode, program, number=None):
        """What the program reports, "" if nothing is wrong. One that takes ten times as long as it should is wrong."""
        environment = {**os.environ, "PLANTED": "-1" if number is None else str(number)}
        if number is None and mode == "plain":
            environment["PLANTED_SEEN_PATH"] = str(self.folder / f"{program.name}.seen")
        limit = 600 if number is None else 10 + int(10 * self.seconds[mode, program.name])

        def limit_time():
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))

        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [*launcher(mode), self.binary(mode, program)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", preexec_fn=limit_time
        )
        if number is None:
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            self.seconds[mode, program.name] = after.ru_utime - before.ru_utime
        if done.returncode == 0:
            return ""
        if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
            return "does not end"
        lines = (done.stdout + done.stderr).strip().splitlines()
        telling = [line for line in lines if "ERROR" in line or "WARNING" in line or "runtime error" in line]
        return (telling or lines or [f"exit status {done.returncode}"])[0]

    def reaches(self, program, number):
        return str(number) in (self.folder / f"{program.name}.seen").read_text().split()

    def caught(self, number):
        """(mode, program, report) of the first program that fails with this mutation; None if all pass."""
        mine = [p for p in self.programs if self.reaches(p, number)]
        order = not self.mutations[number].put  # a call left out: nothing for AddressSanitizer
        for mode in ("plain", "raced") if order else MODES:
            for program in sorted(mine, key=lambda p: self.seconds[mode, p.name]):
                if report := self.fails(mode, program, number):
                    return mode, program.name, report
        return None


def _run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
