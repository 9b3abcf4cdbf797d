// A warp's tensor core: mma.sync.m16n8k16 with bfloat16 in, float out and summed.
//
// Fragments as PTX's manual has them. With group = lane / 4 and pair = 2 (lane % 4), a lane holds
//
//   a[0], a[1]  rows group, group + 8 of A at columns pair, pair + 1; a[2], a[3] the same 8 columns on
//   b[0], b[1]  column group of B at rows pair, pair + 1; and 8 rows on
//   d[0], d[1]  row group of D at columns pair, pair + 1; d[2], d[3] 8 rows on
//
// the first of two bfloat16 in the low half of a register.

#pragma once

#include "warp.h"

namespace cuemu __attribute__((visibility("hidden"))) {

  struct Fragments {
    float* d;
    const uint32_t *a, *b;
  };

  CUEMU_UNSEEN inline float half_of(uint32_t two, unsigned which) {
    return bits_as<float>(which ? two & 0xffff0000u : two << 16);
  }

  CUEMU_UNSEEN inline void meet_at_mma(unsigned warp, unsigned participants) {
    if (participants != ~0u) return give_up("warp %u: mma.sync by the lanes %08x alone", warp, participants);
    float a[16][16], b[16][8];
    for (unsigned lane = 0; lane < LANES; ++lane) {
      const Fragments& from = payload_of<Fragments>(warp, lane);
      const unsigned group = lane / 4, pair = lane % 4 * 2;
      for (unsigned which = 0; which < 2; ++which)
        for (unsigned half = 0; half < 2; ++half) {
          a[group][pair + half * 8 + which] = half_of(from.a[half * 2], which);
          a[group + 8][pair + half * 8 + which] = half_of(from.a[half * 2 + 1], which);
          b[pair + half * 8 + which][group] = half_of(from.b[half], which);
        }
    }
    for (unsigned lane = 0; lane < LANES; ++lane) {
      float* d = payload_of<Fragments>(warp, lane).d;
      for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (unsigned k = 0; k < 16; ++k) d[i] += a[row][k] * b[k][column];
      }
    }
  }

  CUEMU_UNSEEN inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                             Place place = {__builtin_FILE(), __builtin_LINE()}) {
    Fragments fragments{d, a, b};
    meet_lanes(~0u, "mma.sync", place, &fragments, meet_at_mma);
  }

}  // namespace cuemu
