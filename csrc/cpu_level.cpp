// How tests lower what the CPU's kernels may use. keeplora/ops/compiled.py calls it through ctypes: the library
// is no Python module, so it depends on no version of Python.
#include "bind/cpu/levels.h"

// Lets kernels use vector instructions up to `level` (bind/cpu/levels.h); returns the level they now use.
extern "C" __attribute__((visibility("default"))) int keeplora_limit_cpu_level(int level) {
  keeplora::cpu::level_limit = level;
  return keeplora::cpu::level();
}
