// What the race detector (ThreadSanitizer) is told. Every CUDA thread is a thread of its own to it, and only
// what these functions say orders their accesses to memory. In other builds they do nothing.
#pragma once

#ifdef EMULATE_RACED
#include <sanitizer/tsan_interface.h>

extern "C" {
void __tsan_ignore_thread_begin();
void __tsan_ignore_thread_end();
}
#endif

namespace emulate {

#ifdef EMULATE_RACED
constexpr bool kRaced = true;

// What the running thread wrote so far happens before whatever follows an acquire of the same address.
inline void release(void* tag) {
  __tsan_release(tag);
}
inline void acquire(void* tag) {
  __tsan_acquire(tag);
}

// While one lives, accesses to memory are the emulator's own: not the kernel's, and ordered by the scheduler.
class Unseen {
 public:
  Unseen() { __tsan_ignore_thread_begin(); }
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;
  ~Unseen() { __tsan_ignore_thread_end(); }
};
#else
constexpr bool kRaced = false;

inline void release(void*) {}
inline void acquire(void*) {}

class Unseen {
 public:
  Unseen() {}
  ~Unseen() {}
};
#endif

}  // namespace emulate
