// Counting towards the exact k-th smallest score, and packing the mask of what lies above it.
//
//   count_around   how many scores lie below, at and between the two ends of a bracket; those between are collected
//   histogram      how many scores lie in each of the equal bins of a range (for when a bracket misses)
//   pack           one bit a score: 1 = above the threshold, or one of its later ties
//
// Scores are compared as integer keys, made in registers and never stored for the whole array. A float's bits without
// the sign order its magnitude; negated where the sign is set they order the float itself, and -0 equals +0. NaN has a
// magnitude above infinity's: it is noticed here and counted by the caller. float16 and bfloat16 differ in infinity
// only.
//
//   g++ -O3 -std=c++17 -shared -fPIC -pthread kernels/*/*.cpp
//
// 1. portable: short arrays for registers, left to the compiler's vectoriser
// 2. avx2: 32-byte registers, the few keys between are taken out bit by bit
// 3. avx512: 64-byte registers, mask registers, the keys between are compressed; pack stays with version 2, which was
//    measured a quarter faster on the same CPU
//
// Limits: the counts are 64-bit; a call's arrays may be of any length, aligned to their element.

#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>
#include <vector>

#include "../paths.h"
#include "lanes.h"

namespace hpcprune {
namespace {

// How many bytes ahead of its reading the counting pass prefetches.
constexpr int64_t AHEAD = 4096;

// What the arrays hold: floats ranked by value, floats ranked by magnitude, or keys made earlier.
enum View { SIGNED = 0, ABSOLUTE = 1, KEYS = 2 };

template <class Key>
struct Bracket {
  Key lo, hi, infinity;
};

struct Counts {
  int64_t not_above_lo = 0, at_lo = 0, at_hi = 0, between = 0;
  bool nan = false;
};

// The buffer of all threads for the keys between; keys beyond its capacity are counted and dropped.
template <class Key>
struct Candidates {
  Key* keys;
  int64_t capacity;
  std::atomic<int64_t> used{0};
};

// One thread's keys on their way into the candidates: a small buffer in cache, so that storing needs no branch on room.
template <class Key>
class Collector {
 public:
  explicit Collector(Candidates<Key>& all) : all_(all) {}

  Key* room() { return buffer_ + used_; }

  void took(int64_t keys) {
    used_ += keys;
    if (used_ >= FULL) flush();
  }

  void flush() {
    const int64_t start = all_.used.fetch_add(used_);
    const int64_t fitting = std::min(used_, all_.capacity - start);
    if (fitting > 0) std::memcpy(all_.keys + start, buffer_, fitting * sizeof(Key));
    used_ = 0;
  }

 private:
  static constexpr int64_t FULL = 4096 / sizeof(Key), WIDEST = 64;
  Candidates<Key>& all_;
  int64_t used_ = 0;
  Key buffer_[FULL + WIDEST];
};

// Where the ties of a run are that were kept in its mask: the mask's words, and which of their bits are ties.
struct Notes {
  struct Note {
    uint8_t* word;
    int64_t bytes;
    uint64_t ties;
  };
  static constexpr size_t MOST = 4096;
  std::vector<Note> notes;
  int64_t ties = 0;
  bool complete = true;

  void add(const Note& note) {
    ties += __builtin_popcountll(note.ties);
    complete = complete && notes.size() < MOST;
    if (complete) notes.push_back(note);
  }
};

// Clears the first `cut` of the ties that were noted.
void clear_ties(const Notes& noted, int64_t cut) {
  for (const Notes::Note& note : noted.notes) {
    uint64_t word = 0;
    std::memcpy(&word, note.word, note.bytes);
    for (uint64_t ties = note.ties; ties && cut > 0; ties &= ties - 1, --cut) word &= ~(ties & -ties);
    std::memcpy(note.word, &word, note.bytes);
    if (cut <= 0) return;
  }
}

template <class Key, View VIEW>
inline Key to_key(Key bits, uint64_t& nan, Key infinity) {
  if (VIEW == KEYS) return bits;
  const Key magnitude = bits & std::numeric_limits<Key>::max();
  nan |= magnitude > infinity;
  return VIEW == SIGNED && bits < 0 ? -magnitude : magnitude;
}

namespace portable {
#define TARGET
#include "passes.h"
#undef TARGET
}  // namespace portable

#if defined(__x86_64__)
namespace avx2 {
#define TARGET AVX2
#include "passes.h"
#undef TARGET
}  // namespace avx2

namespace avx512 {
#define TARGET AVX512
#include "passes.h"
#undef TARGET
}  // namespace avx512

#endif

// The passes of the path that was asked for.
template <class Key, View VIEW>
auto count_around_on([[maybe_unused]] int path) {
#if defined(__x86_64__)
  if (path == WITH_AVX512) return avx512::count_around<Key, VIEW>;
  if (path == WITH_AVX2) return avx2::count_around<Key, VIEW>;
#endif
  return portable::count_around<Key, VIEW>;
}

template <class Key, View VIEW>
auto pack_on([[maybe_unused]] int path) {
#if defined(__x86_64__)
  if (path >= WITH_AVX2) return avx2::pack<Key, VIEW>;
#endif
  return portable::pack<Key, VIEW>;
}

// The caller's arrays, all of one element type.
struct Arrays {
  const void* const* data;
  const int64_t* lengths;
  int64_t count;
};

template <class Key, View VIEW>
Counts count_all(int path, const Arrays& arrays, const Bracket<Key>& bracket, Candidates<Key>& candidates,
                 int threads) {
  const auto runs = cut(arrays.lengths, arrays.count, threads);
  const auto count_around = count_around_on<Key, VIEW>(path);
  Counts total;
  std::mutex adding;
  in_threads(runs.size(), [&](int64_t run) {
    Collector<Key> inside(candidates);
    Counts counts;
    for (const Slice& slice : runs[run]) {
      const Key* data = static_cast<const Key*>(arrays.data[slice.part]) + slice.start;
      count_around(data, slice.stop - slice.start, bracket, inside, counts);
    }
    inside.flush();
    const std::lock_guard<std::mutex> lock(adding);
    total.not_above_lo += counts.not_above_lo;
    total.at_lo += counts.at_lo;
    total.at_hi += counts.at_hi;
    total.nan |= counts.nan;
  });
  total.between = candidates.used;
  return total;
}

template <class Key, View VIEW>
void histogram_all(const Arrays& arrays, Key lo, Key hi, int shift, int64_t bins, int64_t* histogram, int threads) {
  using Unsigned = std::make_unsigned_t<Key>;
  const auto runs = cut(arrays.lengths, arrays.count, threads);
  std::mutex adding;
  in_threads(runs.size(), [&](int64_t run) {
    std::vector<int64_t> mine(bins);
    uint64_t nan = 0;
    const Unsigned width = static_cast<Unsigned>(hi) - static_cast<Unsigned>(lo);
    for (const Slice& slice : runs[run]) {
      const Key* data = static_cast<const Key*>(arrays.data[slice.part]);
      for (int64_t i = slice.start; i < slice.stop; ++i) {
        const Unsigned from_lo = static_cast<Unsigned>(to_key<Key, VIEW>(data[i], nan, hi)) - static_cast<Unsigned>(lo);
        if (from_lo <= width) ++mine[from_lo >> shift];
      }
    }
    const std::lock_guard<std::mutex> lock(adding);
    for (int64_t bin = 0; bin < bins; ++bin) histogram[bin] += mine[bin];
  });
}

// Packs run by run. Which run the last tie to be cut lies in is known only when the ties of all runs before it are
// counted. So where only some ties go, several runs first keep them all and note where they are: a few are cleared
// afterwards, and for many the runs are packed again, each from where its own cut begins.
template <class Key, View VIEW>
int64_t pack_all(int path, const Arrays& arrays, Key threshold, int64_t first_cut, uint8_t* const* masks, int threads) {
  const auto runs = cut(arrays.lengths, arrays.count, threads);
  const auto pack = pack_on<Key, VIEW>(path);
  std::vector<int64_t> left(runs.size());
  const auto pack_run = [&](int64_t run, Notes* notes) {
    for (const Slice& slice : runs[run]) {
      const Key* data = static_cast<const Key*>(arrays.data[slice.part]) + slice.start;
      uint8_t* mask = masks[slice.part] + slice.start / 8;
      left[run] = pack(data, slice.stop - slice.start, threshold, left[run], mask, notes);
    }
  };
  if (first_cut <= 0 || runs.size() == 1) {
    std::fill(left.begin(), left.end(), first_cut < 0 ? std::numeric_limits<int64_t>::max() : first_cut);
    in_threads(runs.size(), [&](int64_t run) { pack_run(run, nullptr); });
    return first_cut <= 0 ? first_cut : left[0];
  }
  std::vector<Notes> notes(runs.size());
  in_threads(runs.size(), [&](int64_t run) { pack_run(run, &notes[run]); });
  int64_t still = first_cut;
  for (size_t run = 0; run < runs.size(); ++run) {
    left[run] = still;
    still = std::max<int64_t>(0, still - notes[run].ties);
  }
  in_threads(runs.size(), [&](int64_t run) {
    if (left[run] == 0) return;
    if (notes[run].complete) {
      clear_ties(notes[run], left[run]);
    } else {
      pack_run(run, nullptr);
    }
  });
  return still;
}

// Calls work(Key(), std::integral_constant<View, ...>) for the key's bits and the view; false if there are none such.
template <class Work, View VIEW>
bool with_key(int bits, const Work& work, std::integral_constant<View, VIEW> view) {
  switch (bits) {
    case 16: work(int16_t(), view); return true;
    case 32: work(int32_t(), view); return true;
    case 64: work(int64_t(), view); return true;
    default: return false;
  }
}

template <class Work>
bool with_types(int bits, int view, const Work& work) {
  switch (view) {
    case SIGNED: return with_key(bits, work, std::integral_constant<View, SIGNED>());
    case ABSOLUTE: return with_key(bits, work, std::integral_constant<View, ABSOLUTE>());
    case KEYS: return with_key(bits, work, std::integral_constant<View, KEYS>());
    default: return false;
  }
}

}  // namespace
}  // namespace hpcprune

using namespace hpcprune;

// bits: 16, 32 or 64, an element's and a key's size. view: see View. data[0 ... count) are arrays of lengths[i]
// elements. All return 0, or 1 for bits or a view that there is not; hpcprune_pack returns -2 for those.
extern "C" {

// The best path this CPU has.
int hpcprune_best_path() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("popcnt") || !__builtin_cpu_supports("bmi")) {
    return PORTABLE;
  }
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return wide ? WITH_AVX512 : WITH_AVX2;
#else
  return PORTABLE;
#endif
}

// counts[0 ... 5): below lo, at lo, strictly between, at hi (0 if hi == lo), and 1 if there is a NaN (then the rest
// means nothing). Keys between, at most `capacity` of them and in no particular order, go to `candidates`.
int hpcprune_count_around(int path, int bits, int view, const void* const* data, const int64_t* lengths, int64_t count,
                          int64_t lo, int64_t hi, int64_t infinity, void* candidates, int64_t capacity, int64_t* counts,
                          int threads) {
  return !with_types(bits, view, [&](auto key, auto kind) {
    using Key = decltype(key);
    Candidates<Key> all{static_cast<Key*>(candidates), capacity};
    const Bracket<Key> bracket{static_cast<Key>(lo), static_cast<Key>(hi), static_cast<Key>(infinity)};
    const Counts found = count_all<Key, decltype(kind)::value>(path, {data, lengths, count}, bracket, all, threads);
    counts[0] = found.not_above_lo - found.at_lo;
    counts[1] = found.at_lo;
    counts[2] = found.between;
    counts[3] = lo == hi ? 0 : found.at_hi;
    counts[4] = found.nan;
  });
}

// histogram[0 ... bins): keys in lo <= key <= hi by (key - lo) >> shift; (hi - lo) >> shift must be less than bins.
int hpcprune_histogram(int bits, int view, const void* const* data, const int64_t* lengths, int64_t count, int64_t lo,
                       int64_t hi, int shift, int64_t bins, int64_t* histogram, int threads) {
  std::fill(histogram, histogram + bins, 0);
  return !with_types(bits, view, [&](auto key, auto kind) {
    using Key = decltype(key);
    histogram_all<Key, decltype(kind)::value>({data, lengths, count}, static_cast<Key>(lo), static_cast<Key>(hi), shift,
                                              bins, histogram, threads);
  });
}

// masks[i] gets (lengths[i] + 7) / 8 bytes. cut: how many of the first ties go; negative: all. Returns what is left
// of cut, so that a further call can go on.
int64_t hpcprune_pack(int path, int bits, int view, const void* const* data, const int64_t* lengths, int64_t count,
                      int64_t threshold, int64_t cut, uint8_t* const* masks, int threads) {
  int64_t left = -2;
  with_types(bits, view, [&](auto key, auto kind) {
    using Key = decltype(key);
    left = pack_all<Key, decltype(kind)::value>(path, {data, lengths, count}, static_cast<Key>(threshold), cut, masks,
                                                threads);
  });
  return left;
}

}  // extern "C"
