// A context is a suspended computation with a stack of its own. Switching keeps AddressSanitizer informed; to
// ThreadSanitizer each context is a thread, and a switch orders nothing.
#pragma once
#include <cstddef>

namespace emulate {

class Context {
 public:
  Context() = default;  // the calling thread's own computation; filled in when it is switched away from
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;
  ~Context();

  // To be called on the context of the calling thread before it is switched away from.
  void adopt_calling_thread();

  // Makes this context call `entry` from the start, on its own stack, when it is next switched to. `entry`
  // must not return: its last act is leave_for().
  void prepare(void (*entry)());

  // Tells ThreadSanitizer that what this suspended context wrote happens before whatever acquires the tag.
  void release(void* tag);

  // Suspends the running context `from` and continues `to`.
  static void switch_to(Context& from, Context& to);

  // Continues `to` and never comes back: `from`'s stack may be used again.
  [[noreturn]] static void leave_for(Context& from, Context& to);

 private:
  static void swap(Context& from, Context& to, bool leaving);
  static void begin();

  void* stack_pointer_ = nullptr;  // x86-64: where the saved registers lie; elsewhere a ucontext_t
  char* stack_ = nullptr;          // lowest usable byte; nullptr for the calling thread's own stack
  void (*entry_)() = nullptr;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
  void* fiber_ = nullptr;  // ThreadSanitizer's; outlives the context, which may end in the middle of anything
};

}  // namespace emulate
