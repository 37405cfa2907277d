// The importable module keeplora._C. It carries facts about the build; the ops themselves are registered with
// torch's dispatcher by the files in csrc/bind, which do not depend on the Python version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "bind/cpu/levels.h"

#define KEEPLORA_TEXT_OF(...) #__VA_ARGS__
#define KEEPLORA_TEXT(...) KEEPLORA_TEXT_OF(__VA_ARGS__)

namespace py = pybind11;

namespace {

// Facts come from the build as comma-separated macros: no quoting has to survive a shell.
std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');)
    parts.push_back(part);
  return parts;
}

py::dict build_info() {
  py::dict info;
  info["torch"] = KEEPLORA_TEXT(KEEPLORA_BUILT_TORCH);
  info["torch_target"] = "2.11";
  const std::string cuda = KEEPLORA_TEXT(KEEPLORA_BUILT_CUDA);
  info["cuda"] = cuda.empty() ? py::object(py::none()) : py::object(py::str(cuda));
  info["archs"] = split(KEEPLORA_TEXT(KEEPLORA_BUILT_ARCHS));
  info["kernels"] = split(cuda.empty() ? "" : KEEPLORA_TEXT(KEEPLORA_BUILT_KERNELS));
  info["cpu_kernels"] = split(KEEPLORA_TEXT(KEEPLORA_BUILT_CPU));
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about how keeplora was built.";
  m.def("build_info", &build_info,
        "torch: version built with; torch_target: oldest version it loads under; cuda: toolkit version or "
        "None; "
        "archs: GPU architectures; kernels: ops with a compiled CUDA kernel; cpu_kernels: those with one for "
        "the CPU.");
  m.def(
      "limit_cpu_level",
      [](int level) {
        keeplora::cpu::level_limit = level;
        return keeplora::cpu::level();
      },
      "Let the CPU's kernels use vector instructions up to a level (csrc/bind/cpu/levels.h), for tests; "
      "returns the "
      "level they now use.");
}
