#include "emulate/context.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

#include "emulate/races.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMULATE_ASAN 1
#else
#define EMULATE_ASAN 0
#endif

#ifdef EMULATE_RACED
#include <sanitizer/tsan_interface.h>
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulate {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kStack = EMULATE_ASAN || kRaced ? 256 * 1024 : 64 * 1024;

// What AddressSanitizer needs to know about the calling thread's stack, learnt when a context first starts.
[[maybe_unused]] const void* host_bottom = nullptr;
[[maybe_unused]] size_t host_size = 0;
Context* running = nullptr;

}  // namespace

#if defined(__x86_64__)
// Saves the registers that a callee must keep and the stack pointer, and loads the other context's. (glibc's
// swapcontext also makes a system call, which would be most of the emulator's time.)
extern "C" void emulate_swap(void** save, void* load);
asm(R"(
.text
.type emulate_swap, @function
emulate_swap:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulate_swap, .-emulate_swap
)");
#endif

Context::~Context() {
#if EMULATE_ASAN
  if (stack_) ASAN_UNPOISON_MEMORY_REGION(stack_, kStack);  // it may end in the middle of its functions
#endif
  if (stack_) munmap(stack_ - kPage, kStack + kPage);
#if !defined(__x86_64__)
  delete static_cast<ucontext_t*>(stack_pointer_);
#endif
}

void Context::prepare(void (*entry)()) {
  entry_ = entry;
  if (!stack_) {
    void* memory = mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    mprotect(memory, kPage, PROT_NONE);  // overflow faults instead of writing into a neighbour
    stack_ = static_cast<char*>(memory) + kPage;
#ifdef EMULATE_RACED
    fiber_ = __tsan_create_fiber(0);
#endif
  }
#if defined(__x86_64__)
  // As if begin() had been called from nowhere: six registers to pop, the return address, an aligned frame.
  void** top = reinterpret_cast<void**>(stack_ + kStack - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&Context::begin);
  for (int i = 0; i < 6; ++i)
    *--top = nullptr;
  stack_pointer_ = top;
#else
  auto* context = stack_pointer_ ? static_cast<ucontext_t*>(stack_pointer_) : new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = stack_;
  context->uc_stack.ss_size = kStack;
  context->uc_link = nullptr;
  makecontext(context, &Context::begin, 0);
  stack_pointer_ = context;
#endif
}

void Context::adopt_calling_thread() {
#ifdef EMULATE_RACED
  fiber_ = __tsan_get_current_fiber();
#endif
}

void Context::release([[maybe_unused]] void* tag) {
#ifdef EMULATE_RACED
  void* const me = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(fiber_, __tsan_switch_to_fiber_no_sync);
  __tsan_release(tag);
  __tsan_switch_to_fiber(me, __tsan_switch_to_fiber_no_sync);
#endif
}

void Context::begin() {
#if EMULATE_ASAN
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (!host_bottom) {  // the first context is entered from the calling thread
    host_bottom = bottom;
    host_size = size;
  }
#endif
  running->entry_();
  std::abort();
}

void Context::switch_to(Context& from, Context& to) {
  swap(from, to, false);
}

void Context::leave_for(Context& from, Context& to) {
  swap(from, to, true);
  std::abort();
}

void Context::swap(Context& from, Context& to, bool leaving) {
  running = &to;
#if EMULATE_ASAN
  __sanitizer_start_switch_fiber(leaving ? nullptr : &from.fake_stack_, to.stack_ ? to.stack_ : host_bottom,
                                 to.stack_ ? kStack : host_size);
#else
  static_cast<void>(leaving);
#endif
#ifdef EMULATE_RACED
  __tsan_switch_to_fiber(to.fiber_, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
  emulate_swap(&from.stack_pointer_, to.stack_pointer_);
#else
  if (!from.stack_pointer_) from.stack_pointer_ = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(from.stack_pointer_), static_cast<ucontext_t*>(to.stack_pointer_));
#endif
#if EMULATE_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack_, nullptr, nullptr);
#endif
}

}  // namespace emulate
