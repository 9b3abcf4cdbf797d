// A block of threads: run until all have ended, with the barrier that they share, and what is said where they cannot.
//
// Each round enters every thread that can go on, in their order or, with a seed, at random; and then often one warp
// alone for some rounds, so that it runs far ahead of the others. The last to arrive at a barrier lets the others go.
// Where nobody can go on, somebody waits for what will not come.

#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "fiber.h"
#include "runtime.h"
#include "types.h"

namespace cuemu __attribute__((visibility("hidden"))) {

  constexpr unsigned LANES = 32, NO_WARP = ~0u;
  constexpr unsigned MOST_COPIES = 128;  // of a thread, on their way at once

  // Where a barrier or intrinsic was called; a default argument's builtins tell of the call.
  struct Place {
    const char* file;
    int line;
  };

  // 16 bytes on their way into shared memory.
  struct Copy {
    uint4* to;
    uint4 value;
    int64_t group;
  };

  // SplitMix64 (Steele, Lea, Flood 2014). Threads draw from it too, which is no access of theirs.
  class Random {
   public:
    using result_type = uint64_t;
    explicit Random(uint64_t seed) : state_(seed) {}
    static constexpr uint64_t min() { return 0; }
    static constexpr uint64_t max() { return std::numeric_limits<uint64_t>::max(); }

    CUEMU_UNSEEN uint64_t operator()() {
      uint64_t bits = state_ += 0x9e3779b97f4a7c15;
      bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9;
      bits = (bits ^ bits >> 27) * 0x94d049bb133111eb;
      return bits ^ bits >> 31;
    }

   private:
    uint64_t state_;
  };

  enum class State { READY, AT_BARRIER, AT_INTRINSIC, EXITED };

  struct Thread {
    Fiber fiber;
    dim3 index;
    unsigned linear;
    State state;
    // What it waits at, and for whom.
    const char* waits_at;
    Place place;
    unsigned mask;
    void (*meet)(unsigned warp, unsigned participants);
    void* payload;
    // Asynchronous copies in a ring, the oldest first, and how many groups of them are closed.
    Copy copy[MOST_COPIES];
    unsigned oldest, copies;
    int64_t groups;

    unsigned lane() const { return linear % LANES; }
    unsigned warp() const { return linear / LANES; }
  };

  struct Warp {
    unsigned there, waiting;  // by lane: has not exited; is at an intrinsic
  };

  // What comes before what, for the thread sanitizer, with 8 bytes to each token.
  struct Order {
    uint64_t begun;
    uint64_t thread[BLOCK_THREADS], barrier, warp[BLOCK_THREADS / LANES];
  };

  struct Block {
    Thread thread[BLOCK_THREADS];
    Warp warp[BLOCK_THREADS / LANES];
    Thread* current;
    Fiber host;
    unsigned threads, alive, at_barrier;
    dim3 index, size, grid;
    const char* kernel;
    void (*run)(const void* call);
    const void* call;
    Random* random;  // null: threads and blocks come in their order
  };

  inline Block block;
  inline Order order;         // within a block
  inline uint64_t all_ended;  // of a launch

  // Ends the launch. A thread that calls it is never entered again.
  template <class... Arguments>
  CUEMU_UNSEEN void give_up(const char* format, Arguments... arguments) {
    char text[sizeof error_text - 200];
    std::snprintf(text, sizeof text, format, arguments...);
    fail(cudaErrorLaunchFailure, "%s, block (%u, %u, %u): %s", block.kernel, block.index.x, block.index.y,
         block.index.z, text);
    if (block.current) switch_fibers(block.current->fiber, block.host);
  }

  CUEMU_UNSEEN inline void wait(Thread & me, State state) {
    me.state = state;
    switch_fibers(me.fiber, block.host);
  }

  void leave_warp(Thread & me);

  CUEMU_UNSEEN inline void run_thread() {
    arrive_first(block.host);
    follow(&order.begun);
    block.run(block.call);
    Thread& me = *block.current;
    precede(&all_ended);
    me.state = State::EXITED;
    --block.alive;
    leave_warp(me);
    switch_fibers(me.fiber, block.host, true);
    std::abort();
  }

  // Who waits where, threads that wait together in one item.
  CUEMU_UNSEEN inline void give_up_waiting(const char* why) {
    char text[1500];
    size_t end = 0;
    for (unsigned i = 0; i < block.threads && end < sizeof text - 200;) {
      const Thread& first = block.thread[i];
      const bool exited = first.state == State::EXITED;
      unsigned last = i;
      for (; last + 1 < block.threads; ++last) {
        const Thread& next = block.thread[last + 1];
        if (next.state != first.state) break;
        if (!exited && (next.place.line != first.place.line || next.place.file != first.place.file)) break;
      }
      end += std::snprintf(text + end, sizeof text - end, i == last ? "%sthread %u" : "%sthreads %u to %u",
                           i ? "; " : "", i, last);
      end += exited ? std::snprintf(text + end, sizeof text - end, " exited")
                    : std::snprintf(text + end, sizeof text - end, " at %s (%s:%d)", first.waits_at, first.place.file,
                                    first.place.line);
      if (first.state == State::AT_INTRINSIC)
        end += std::snprintf(text + end, sizeof text - end, " for the lanes %08x", first.mask);
      i = last + 1;
    }
    give_up("%s: %s", why, text);
  }

  CUEMU_UNSEEN inline void prepare_block() {
    block.alive = block.threads;
    block.at_barrier = 0;
    forget_accesses(&order, sizeof order);
    for (unsigned i = 0; i < block.threads; ++i) {
      Thread& thread = block.thread[i];
      prepare(thread.fiber, run_thread);
      thread.linear = i;
      thread.index = dim3(i % block.size.x, i / block.size.x % block.size.y, i / block.size.x / block.size.y);
      thread.state = State::READY;
      thread.oldest = thread.copies = 0;
      thread.groups = 0;
      if (thread.lane() == 0) block.warp[thread.warp()] = {0, 0};
      block.warp[thread.warp()].there |= 1u << thread.lane();
    }
  }

  // Puts the threads that can go on into `ready` and gives their number. At random, all of them are mixed; or those of
  // the warp that is ahead alone, which one of 16 rounds changes.
  CUEMU_UNSEEN inline unsigned find_ready(unsigned (&ready)[BLOCK_THREADS], unsigned* ahead) {
    unsigned count = 0;
    for (unsigned i = 0; i < block.threads; ++i)
      if (block.thread[i].state == State::READY) ready[count++] = i;
    if (!block.random || !count) return count;
    Random& random = *block.random;
    if (random() % 16 == 0) *ahead = random() % 2 ? ready[random() % count] / LANES : NO_WARP;
    unsigned* const rest = std::partition(ready, ready + count, [=](unsigned i) { return i / LANES == *ahead; });
    if (rest != ready) count = rest - ready;
    std::shuffle(ready, ready + count, random);
    return count;
  }

  // Whether the block came to its end.
  CUEMU_UNSEEN inline bool run_block() {
    prepare_block();
#if defined(__SANITIZE_THREAD__)
    block.host.identity = __tsan_get_current_fiber();
#endif
    precede(&order.begun);
    static unsigned ready[BLOCK_THREADS];
    unsigned ahead = NO_WARP;
    while (block.alive && last_error == cudaSuccess) {
      const unsigned count = find_ready(ready, &ahead);
      block.current = nullptr;
      if (!count) give_up_waiting("deadlock");
      for (unsigned i = 0; i < count && last_error == cudaSuccess; ++i) {
        block.current = &block.thread[ready[i]];
        switch_fibers(block.host, block.current->fiber);
      }
    }
    block.current = nullptr;
    if (last_error == cudaSuccess) return true;
    for (unsigned i = 0; i < block.threads; ++i) abandon(block.thread[i].fiber, block.host, &all_ended);
    return false;
  }

}  // namespace cuemu

// For all threads of the block, at the same place: CUDA promises nothing where some have exited or are elsewhere.
CUEMU_UNSEEN inline void __syncthreads(cuemu::Place place = {__builtin_FILE(), __builtin_LINE()}) {
  using namespace cuemu;
  Thread& me = *block.current;
  me.waits_at = "__syncthreads";
  me.place = place;
  precede(&order.thread[me.linear]);
  if (++block.at_barrier < block.threads) {
    wait(me, State::AT_BARRIER);
  } else {
    me.state = State::AT_BARRIER;
    for (unsigned i = 0; i < block.threads; ++i)
      if (block.thread[i].place.line != place.line || block.thread[i].place.file != place.file)
        return give_up_waiting("different barriers");
    block.at_barrier = 0;
    for (unsigned i = 0; i < block.threads; ++i) {
      follow(&order.thread[i]);
      block.thread[i].state = State::READY;
    }
    precede(&order.barrier);
  }
  follow(&order.barrier);
}
