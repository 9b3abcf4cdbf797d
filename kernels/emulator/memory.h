// Shared memory, copies into it that go on by themselves, and atomics.
//
// All bits of shared memory are 1 before something is written: NaN as float or bfloat16, -1 as an index. So are the 16
// bytes that a copy is on its way to, until the thread that started it has waited for it. With a seed half of the
// copies are there at once.

#pragma once

#include <cstdlib>

#include "block.h"

extern "C" {
// Of shared.ld.
extern unsigned char cuemu_shared_begin[] __attribute__((visibility("hidden")));
extern unsigned char cuemu_shared_end[] __attribute__((visibility("hidden")));
}

namespace cuemu __attribute__((visibility("hidden"))) {

  inline unsigned char* dynamic_shared = nullptr;

  // Exactly as much as was asked for, so that the address sanitizer sees its end.
  CUEMU_UNSEEN inline void reserve_dynamic(size_t bytes) {
    void* memory = nullptr;
#if defined(__SANITIZE_THREAD__)
    if (bytes) memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) std::abort();
#else
    if (bytes && posix_memalign(&memory, 16, bytes)) std::abort();
#endif
    dynamic_shared = static_cast<unsigned char*>(memory);
  }

  CUEMU_UNSEEN inline void release_dynamic([[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_THREAD__)
    if (bytes) munmap(dynamic_shared, bytes);
#else
    std::free(dynamic_shared);
#endif
    dynamic_shared = nullptr;
  }

  // By an instruction that no sanitizer looks at: between variables lies memory that nobody may touch.
  CUEMU_UNSEEN inline void poison(unsigned char* memory, size_t bytes) {
    asm volatile("rep stosb" : "+D"(memory), "+c"(bytes) : "a"(0xff) : "memory");
  }

  // Each block has shared memory of its own.
  CUEMU_UNSEEN inline void poison_shared(size_t dynamic) {
    const size_t fixed = cuemu_shared_end - cuemu_shared_begin;
    poison(dynamic_shared, dynamic);
    poison(cuemu_shared_begin, fixed);
    forget_accesses(dynamic_shared, dynamic);
    forget_accesses(cuemu_shared_begin, fixed);
  }

  CUEMU_UNSEEN inline void start_copy(Copy copy) {
    Thread& me = *block.current;
    copy.group = me.groups;
    if (me.copies == MOST_COPIES) give_up("thread %u has more than %u copies on their way", me.linear, MOST_COPIES);
    me.copy[(me.oldest + me.copies++) % MOST_COPIES] = copy;
  }

  CUEMU_UNSEEN inline bool lands_at_once() { return block.random && (*block.random)() % 2; }

  // Accesses to `shared` and `global` are the kernel's, for the sanitizers to see: the copy begins here and ends where
  // it was waited for.
  inline void cp_async_16(void* shared, const void* global, bool valid) {
    if (uintptr_t(shared) % 16 || uintptr_t(global) % 16)
      give_up("thread %u copies from %p to %p, of which one is no multiple of 16", block.current->linear, global,
              shared);
    uint4* to = static_cast<uint4*>(shared);
    const uint4 value = valid ? *static_cast<const uint4*>(global) : uint4{0, 0, 0, 0};
    if (lands_at_once()) {
      *to = value;
    } else {
      start_copy({to, value, 0});
      *to = {~0u, ~0u, ~0u, ~0u};
    }
  }

  CUEMU_UNSEEN inline void cp_async_commit() { ++block.current->groups; }

  // The oldest copy of a group that is not among the last `pending`, taken off the list; false if there is none.
  CUEMU_UNSEEN inline bool arrived_copy(int pending, Copy* copy) {
    Thread& me = *block.current;
    if (!me.copies || me.copy[me.oldest].group >= me.groups - pending) return false;
    *copy = me.copy[me.oldest];
    me.oldest = (me.oldest + 1) % MOST_COPIES;
    --me.copies;
    return true;
  }

  inline void cp_async_wait(int pending) {
    for (Copy copy; arrived_copy(pending, &copy);) *copy.to = copy.value;
  }

  // CUDA's atomics order nothing.
  template <class Value, class Change>
  Value change(Value * at, Change changed) {
    Value before;
    __atomic_load(at, &before, __ATOMIC_RELAXED);
    for (;;) {
      Value after = changed(before);
      if (__atomic_compare_exchange(at, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return before;
    }
  }

}  // namespace cuemu

inline float atomicAdd(float* at, float value) {
  return cuemu::change(at, [value](float before) { return before + value; });
}
inline int atomicAdd(int* at, int value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }
inline unsigned atomicAdd(unsigned* at, unsigned value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }
inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long value) {
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}
inline unsigned atomicMax(unsigned* at, unsigned value) {
  return cuemu::change(at, [value](unsigned before) { return std::max(before, value); });
}
inline unsigned atomicMin(unsigned* at, unsigned value) {
  return cuemu::change(at, [value](unsigned before) { return std::min(before, value); });
}
