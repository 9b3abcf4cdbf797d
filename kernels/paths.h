// What every kernel here shares: the paths (instruction sets) it is compiled for, what it gives back, and how work is
// cut for threads.
//
// All paths live in one library. Functions of a path carry its target attribute, so the library loads on any CPU and
// `hpcprune_best_path` says at run time which of them this CPU may enter. Every path gives the same masks
// and survivors; of products see kernels/README.md.

#pragma once

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,popcnt,bmi,lzcnt")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,popcnt,bmi,lzcnt")))
#define AVX512_VBMI2 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx2,popcnt,bmi,lzcnt")))
#endif

namespace hpcprune {

// What a product gives back: 0, or why there is none.
enum Status { DONE = 0, NO_MEMORY = 1, DOES_NOT_FIT = 2 };

enum Path { PORTABLE = 0, WITH_AVX2 = 1, WITH_AVX512 = 2 };

// A stretch of one of the caller's arrays. `start` is a multiple of 64, so that threads never share a byte of a mask.
struct Slice {
  int64_t part, start, stop;
};

// Below this many elements a thread costs more than it saves.
constexpr int64_t LEAST_PER_THREAD = 1 << 18;

// Cuts all the arrays, seen as one row, into at most `threads` runs of nearly equal length, in order.
inline std::vector<std::vector<Slice>> cut(const int64_t* lengths, int64_t parts, int threads) {
  int64_t total = 0;
  for (int64_t part = 0; part < parts; ++part) total += lengths[part];
  const int64_t runs = std::max<int64_t>(1, std::min<int64_t>(threads, total / LEAST_PER_THREAD));
  std::vector<std::vector<Slice>> result(runs);
  int64_t before = 0;
  for (int64_t part = 0; part < parts; ++part) {
    int64_t start = 0;
    for (int64_t run = 0; run < runs && start < lengths[part]; ++run) {
      int64_t stop = total / runs * (run + 1) - before;
      stop = run == runs - 1 ? lengths[part] : std::min(lengths[part], (stop + 63) / 64 * 64);
      if (stop <= start) continue;
      result[run].push_back({part, start, stop});
      start = stop;
    }
    before += lengths[part];
  }
  return result;
}

// How many of the threads are worth waking for so many steps of an inner loop, about a nanosecond each.
inline int threads_for(int64_t steps, int threads) {
  constexpr int64_t LEAST = 8192;  // a thread comes in a few microseconds
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, steps / LEAST)));
}

// How many parts each of `pieces` of work is cut into, `most` at most: until no thread has much less to do than
// another.
inline int64_t parts_of_each(int64_t pieces, int64_t threads, int64_t most) {
  int64_t parts = 1;
  for (; parts < std::min(threads, most); ++parts) {
    const int64_t rounds = (pieces * parts + threads - 1) / threads;
    if (10 * pieces * parts >= 9 * rounds * threads) break;
  }
  return parts;
}

// Runs work(0) ... work(runs - 1), each on a thread of its own where the system grants one, else here.
template <class Work>
void in_threads(int64_t runs, const Work& work) {
  std::vector<std::thread> threads;
  threads.reserve(runs);
  int64_t next = 1;
  for (; next < runs; ++next) {
    try {
      threads.emplace_back(work, next);
    } catch (const std::system_error&) {
      break;
    }
  }
  for (int64_t run = next; run < runs; ++run) work(run);
  work(0);
  for (std::thread& thread : threads) thread.join();
}

// A pool of threads that is there already: OpenMP's, which torch uses too, found by whoever loads this library. With a
// pool of our own beside it the two would take each other's cores.
struct Pool {
  void (*parallel)(void (*work)(void*), void* data, unsigned threads, unsigned flags);  // GOMP_parallel
  int (*number)();                                                                      // omp_get_thread_num
  int (*count)();                                                                       // omp_get_num_threads
};

// Runs work(0) ... work(runs - 1) on the pool's threads, or as `in_threads` does where there is no pool.
template <class Work>
void in_pool(const Pool* pool, int64_t runs, const Work& work) {
  if (runs == 1) return work(0);
  if (!pool) return in_threads(runs, work);
  struct Call {
    const Pool* pool;
    int64_t runs;
    const Work& work;
  } call{pool, runs, work};
  const auto share = [](void* data) {
    const Call& call = *static_cast<Call*>(data);
    for (int64_t run = call.pool->number(); run < call.runs; run += call.pool->count()) call.work(run);
  };
  pool->parallel(share, &call, static_cast<unsigned>(runs), 0);
}

}  // namespace hpcprune
