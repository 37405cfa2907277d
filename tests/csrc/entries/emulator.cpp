// C functions through which the tests drive the emulator (ctypes). The ops' are in <op>.cpp.
#include <cstdint>

#include "emulate/block.h"

extern "C" {

// order: 0 sequential, 1 reversed, 2 random.
void emulate_set_schedule(int order, uint64_t seed) {
  emulate::set_schedule({static_cast<emulate::Order>(order), seed});
}

const char* emulate_last_error() {
  return emulate::last_error().c_str();
}

}  // extern "C"
