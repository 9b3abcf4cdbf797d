// Stacks that one thread of the CPU leaves and enters at will.
//
// A switch saves what a function must leave as it found it, and nothing else. The sanitizers are told of each: the
// address sanitizer where the stack lies, the thread sanitizer that another thread goes on, and, since fibers take
// turns only by accident of emulation, that this alone orders nothing.

#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
// For Java's garbage collector: what the sanitizer knows of some memory moves elsewhere. In multiples of 8 bytes.
extern "C" void __tsan_java_move(unsigned long from, unsigned long to, unsigned long bytes);
#endif

// For the emulator's own bookkeeping, which the thread sanitizer would take for the kernel's accesses.
#define CUEMU_UNSEEN __attribute__((no_sanitize("thread")))

namespace cuemu __attribute__((visibility("hidden"))) {

  constexpr size_t STACK_BYTES = 256 << 10, GUARD_BYTES = 4 << 10;

  struct Fiber {
    void* stack_pointer = nullptr;
    const void* stack = nullptr;  // its lowest byte; for the thread's own stack known only to the address sanitizer
    size_t stack_bytes = 0;
    void* fake_stack = nullptr;  // the address sanitizer's
    // The thread sanitizer's. Identity and stack take turns with others, so that a thread is not the one of the same
    // number in the block before, and does not meet its variables.
    void *identity = nullptr, *resting = nullptr;
    const void* resting_stack = nullptr;
  };

  // Pushes the registers that a function must preserve, leaves the stack pointer in `left` and goes on from `entered`.
  __attribute__((naked, noinline)) CUEMU_UNSEEN inline void swap_stacks([[maybe_unused]] void** left,
                                                                        [[maybe_unused]] void* entered) {
    asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15;"
        "movq %rsp, (%rdi); movq %rsi, %rsp;"
        "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
  }

  // Goes on in `entered`, and returns when somebody switches back to `left`; never, if it is `left` forever.
  CUEMU_UNSEEN inline void switch_fibers(Fiber & left, Fiber & entered, [[maybe_unused]] bool forever = false) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(forever ? nullptr : &left.fake_stack, entered.stack, entered.stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(entered.identity, __tsan_switch_to_fiber_no_sync);
#endif
    swap_stacks(&left.stack_pointer, entered.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(left.fake_stack, nullptr, nullptr);
#endif
  }

  // The first thing that a new fiber does; `from` is who entered it.
  CUEMU_UNSEEN inline void arrive_first([[maybe_unused]] Fiber & from) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &from.stack, &from.stack_bytes);
#endif
  }

  // Makes `fiber` begin with `entry`, which must not return, on a stack that ends in a page that nobody may touch.
  CUEMU_UNSEEN inline void prepare(Fiber & fiber, void (*entry)()) {
#if defined(__SANITIZE_THREAD__)
    std::swap(fiber.stack, fiber.resting_stack);
    std::swap(fiber.identity, fiber.resting);
    if (!fiber.identity) fiber.identity = __tsan_create_fiber(0);
#endif
    if (!fiber.stack) {
      void* memory = mmap(nullptr, GUARD_BYTES + STACK_BYTES, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED || mprotect(memory, GUARD_BYTES, PROT_NONE)) std::abort();
      fiber.stack = static_cast<char*>(memory) + GUARD_BYTES;
      fiber.stack_bytes = STACK_BYTES;
    }
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(fiber.stack, STACK_BYTES);  // a fiber that was abandoned has left its frames there
#endif
    // Six registers, where to go on, and a word that keeps the stack aligned as at the entry of a function.
    void** top = reinterpret_cast<void**>(static_cast<char*>(const_cast<void*>(fiber.stack)) + STACK_BYTES) - 8;
    for (int i = 0; i < 8; ++i) top[i] = nullptr;
    top[6] = reinterpret_cast<void*>(entry);
    fiber.stack_pointer = top;
  }

  // Makes memory new to the thread sanitizer: nobody has accessed it, and as a token it has nothing before it. Not for
  // memory from malloc, of which the sanitizer keeps account.
  CUEMU_UNSEEN inline void forget_accesses([[maybe_unused]] const void* memory, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_THREAD__)
    const uintptr_t from = uintptr_t(memory) / 8 * 8, whole = (uintptr_t(memory) + bytes + 7) / 8 * 8 - from;
    if (!whole) return;
    // Tokens move away with their memory, accesses are cleared where memory moves to; of a new mapping nothing is
    // known.
    void* unknown = mmap(nullptr, 2 * whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (unknown == MAP_FAILED) std::abort();
    __tsan_java_move(from, uintptr_t(unknown), whole);
    __tsan_java_move(uintptr_t(unknown) + whole, from, whole);
    munmap(unknown, 2 * whole);
#endif
  }

  // What the one who calls has done so far comes before what others do once they `follow` the same token.
  CUEMU_UNSEEN inline void precede([[maybe_unused]] void* token) {
#if defined(__SANITIZE_THREAD__)
    __tsan_release(token);
#endif
  }

  CUEMU_UNSEEN inline void follow([[maybe_unused]] void* token) {
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(token);
#endif
  }

  // Ends a fiber in the middle of its work, which comes before what others do who follow the token.
  CUEMU_UNSEEN inline void abandon([[maybe_unused]] Fiber & fiber, [[maybe_unused]] Fiber & host,
                                   [[maybe_unused]] void* token) {
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(fiber.identity, __tsan_switch_to_fiber_no_sync);
    precede(token);
    __tsan_switch_to_fiber(host.identity, __tsan_switch_to_fiber_no_sync);
    __tsan_destroy_fiber(fiber.identity);
    fiber.identity = nullptr;
#endif
  }

}  // namespace cuemu
