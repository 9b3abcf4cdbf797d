// The two passes over the scores, written once and compiled once for each path.
//
// Included by threshold.cpp several times, each time inside another namespace with TARGET set to that path's target
// attribute and with `Lanes<Key>` giving that path's registers:
//
//   WIDTH                   keys in a register
//   load(p)                 WIDTH integers from memory
//   all(key)                a register full of one key
//   magnitude(x)            x without its sign bit
//   signed_key(x, m)        -m where x is negative, else m
//   greater(a, b)           bit i is 1 where a[i] > b[i]
//   equal(a, b)             bit i is 1 where a[i] == b[i]
//   compress(to, ones, x)   stores the lanes of x whose bit is 1, one after another; may write WIDTH lanes

template <class Key, View VIEW>
TARGET inline typename Lanes<Key>::Register to_keys(typename Lanes<Key>::Register x, uint64_t& nan,
                                                    typename Lanes<Key>::Register infinity) {
  if (VIEW == KEYS) return x;
  const typename Lanes<Key>::Register magnitude = Lanes<Key>::magnitude(x);
  nan |= Lanes<Key>::greater(magnitude, infinity);
  return VIEW == ABSOLUTE ? magnitude : Lanes<Key>::signed_key(x, magnitude);
}

// Counts the keys of data[0 ... n) around a bracket and collects those strictly inside.
template <class Key, View VIEW>
TARGET void count_around(const Key* data, int64_t n, const Bracket<Key>& bracket, Collector<Key>& inside,
                         Counts& counts) {
  using Path = Lanes<Key>;
  const auto lo = Path::all(bracket.lo), hi = Path::all(bracket.hi), infinity = Path::all(bracket.infinity);
  uint64_t nan = 0;
  int64_t i = 0;
  for (; i + Path::WIDTH <= n; i += Path::WIDTH) {
    // Collecting keeps the CPU's own prefetcher from running far enough ahead: this takes a third off the pass.
    __builtin_prefetch(data + i + AHEAD / sizeof(Key));
    const auto keys = to_keys<Key, VIEW>(Path::load(data + i), nan, infinity);
    const uint64_t at_lo = Path::equal(keys, lo), at_hi = Path::equal(keys, hi);
    const uint64_t above_lo = Path::greater(keys, lo), between = above_lo & Path::greater(hi, keys);
    counts.not_above_lo += Path::WIDTH - __builtin_popcountll(above_lo);
    counts.at_lo += __builtin_popcountll(at_lo);
    counts.at_hi += __builtin_popcountll(at_hi);
    Path::compress(inside.room(), between, keys);
    inside.took(__builtin_popcountll(between));
  }
  for (; i < n; ++i) {
    const Key key = to_key<Key, VIEW>(data[i], nan, bracket.infinity);
    counts.not_above_lo += key <= bracket.lo;
    counts.at_lo += key == bracket.lo;
    counts.at_hi += key == bracket.hi;
    *inside.room() = key;
    inside.took(key > bracket.lo && key < bracket.hi);
  }
  counts.nan |= nan != 0;
}

// Sets bit i of mask where key i survives: it is above the threshold, or a tie after the first `cut` ties.
// Gives back how many of those ties are still to be cut. The mask's last byte is padded with zeros. With `notes`, it
// is noted where ties are.
template <class Key, View VIEW>
TARGET int64_t pack(const Key* data, int64_t n, Key threshold, int64_t cut, uint8_t* mask, Notes* notes) {
  using Path = Lanes<Key>;
  const auto limit = Path::all(threshold);
  uint64_t nan = 0;  // already ruled out by the first pass
  for (int64_t i = 0; i < n; i += 64) {
    uint64_t above = 0, ties = 0;
    if (i + 64 <= n) {
      for (int j = 0; j < 64; j += Path::WIDTH) {
        const auto keys = to_keys<Key, VIEW>(Path::load(data + i + j), nan, limit);
        above |= Path::greater(keys, limit) << j;
        ties |= Path::equal(keys, limit) << j;
      }
    } else {
      for (int64_t j = 0; i + j < n; ++j) {
        const Key key = to_key<Key, VIEW>(data[i + j], nan, threshold);
        above |= uint64_t(key > threshold) << j;
        ties |= uint64_t(key == threshold) << j;
      }
    }
    if (cut > 0 && ties) {
      const int64_t here = __builtin_popcountll(ties);
      if (cut >= here) {
        cut -= here;
        ties = 0;
      } else {
        for (; cut > 0; --cut) ties &= ties - 1;
      }
    }
    const uint64_t word = above | ties;
    const int64_t bytes = std::min<int64_t>(8, (n - i + 7) / 8);
    std::memcpy(mask + i / 8, &word, bytes);
    if (notes && ties) notes->add({mask + i / 8, bytes, ties});
  }
  return cut;
}
