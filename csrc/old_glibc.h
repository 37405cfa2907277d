// Included before every file: what is built with a newer glibc loads with 2.28, as torch's own wheels do.
// Three symbols got a new version since; the older one of each does the same for us.
#pragma once
#if defined(__x86_64__) && defined(__linux__) && !defined(__CUDA_ARCH__)
#include <features.h>
#if defined(__GLIBC__) && __GLIBC_PREREQ(2, 29)
__asm__(".symver dlsym,dlsym@GLIBC_2.2.5");  // in libdl until 2.34; libtorch_cpu has loaded that
__asm__(".symver log,log@GLIBC_2.2.5");      // the older one also sets errno
#if __GLIBC_PREREQ(2, 32)
// libstdc++ asks whether one thread is enough for its counters. Ours always count atomically.
extern "C" {
__attribute__((visibility("hidden"), weak)) extern char __libc_single_threaded;
__attribute__((visibility("hidden"), weak)) char __libc_single_threaded = 0;
}
#endif
#endif
#endif
