// Lanes of a warp that meet: barriers, shuffles, votes.
//
// A lane leaves what it gives and where it wants the answer in its thread's `payload`, and waits. When the last lane of
// a mask has come, or those that are missing have exited, `meet` answers all of them at once.

#pragma once

#include "block.h"

namespace cuemu __attribute__((visibility("hidden"))) {

  template <class Payload>
  CUEMU_UNSEEN inline Payload& payload_of(unsigned warp, unsigned lane) {
    return *static_cast<Payload*>(block.thread[warp * LANES + lane].payload);
  }

  // Lets go whoever waits for nobody any more.
  CUEMU_UNSEEN inline void release_lanes(unsigned number) {
    Warp& warp = block.warp[number];
    for (unsigned lane = 0; lane < LANES; ++lane) {
      if (!(warp.waiting >> lane & 1)) continue;
      const Thread& first = block.thread[number * LANES + lane];
      const unsigned participants = first.mask & warp.there;
      if (participants & ~warp.waiting) continue;
      for (unsigned other = 0; other < LANES; ++other) {
        if (!(participants >> other & 1)) continue;
        const Thread& thread = block.thread[number * LANES + other];
        if (thread.meet != first.meet || thread.mask != first.mask)
          return give_up("warp %u: lane %u at %s (%s:%d) with the mask %08x meets lane %u at %s (%s:%d) with %08x",
                         number, lane, first.waits_at, first.place.file, first.place.line, first.mask, other,
                         thread.waits_at, thread.place.file, thread.place.line, thread.mask);
      }
      first.meet(number, participants);
      warp.waiting &= ~participants;
      for (unsigned other = 0; other < LANES; ++other)
        if (participants >> other & 1) block.thread[number * LANES + other].state = State::READY;
    }
  }

  CUEMU_UNSEEN inline void leave_warp(Thread & me) {
    block.warp[me.warp()].there &= ~(1u << me.lane());
    release_lanes(me.warp());
  }

  CUEMU_UNSEEN inline void meet_lanes(unsigned mask, const char* intrinsic, Place place, void* payload,
                                      void (*meet)(unsigned warp, unsigned participants)) {
    Thread& me = *block.current;
    me.waits_at = intrinsic;
    me.place = place;
    me.mask = mask;
    me.meet = meet;
    me.payload = payload;
    if (!(mask >> me.lane() & 1))
      give_up("thread %u calls %s (%s:%d) with the mask %08x, in which it is not", me.linear, intrinsic, place.file,
              place.line, mask);
    block.warp[me.warp()].waiting |= 1u << me.lane();
    me.state = State::AT_INTRINSIC;
    release_lanes(me.warp());
    if (me.state != State::READY) switch_fibers(me.fiber, block.host);
  }

  // Shuffles and votes order no accesses to memory; this barrier does.
  CUEMU_UNSEEN inline void meet_at_barrier(unsigned warp, unsigned participants) {
    for (unsigned lane = 0; lane < LANES; ++lane)
      if (participants >> lane & 1) follow(&order.thread[warp * LANES + lane]);
    precede(&order.warp[warp]);
  }

  struct Shuffle {
    uint64_t bits;
    unsigned source;
    uint64_t received;
  };

  CUEMU_UNSEEN inline void meet_at_shuffle(unsigned warp, unsigned participants) {
    for (unsigned lane = 0; lane < LANES; ++lane) {
      if (!(participants >> lane & 1)) continue;
      Shuffle& shuffle = payload_of<Shuffle>(warp, lane);
      if (!(participants >> shuffle.source & 1)) {
        const Thread& reader = block.thread[warp * LANES + lane];
        return give_up("thread %u at %s (%s:%d) reads from lane %u, which %s", reader.linear, reader.waits_at,
                       reader.place.file, reader.place.line, shuffle.source,
                       reader.mask >> shuffle.source & 1 ? "has exited" : "is outside the mask");
      }
      shuffle.received = payload_of<Shuffle>(warp, shuffle.source).bits;
    }
  }

  template <class Value>
  CUEMU_UNSEEN Value shuffle(unsigned mask, Value value, unsigned source, const char* intrinsic, Place place) {
    static_assert(sizeof(Value) == 4 || sizeof(Value) == 8, "CUDA shuffles 4 or 8 bytes");
    Shuffle payload{0, source, 0};
    std::memcpy(&payload.bits, &value, sizeof value);
    meet_lanes(mask, intrinsic, place, &payload, meet_at_shuffle);
    std::memcpy(&value, &payload.received, sizeof value);
    return value;
  }

  struct Vote {
    bool cast;
    unsigned ballot;
  };

  CUEMU_UNSEEN inline void meet_at_vote(unsigned warp, unsigned participants) {
    unsigned ballot = 0;
    for (unsigned lane = 0; lane < LANES; ++lane)
      if (participants >> lane & 1) ballot |= unsigned(payload_of<Vote>(warp, lane).cast) << lane;
    for (unsigned lane = 0; lane < LANES; ++lane)
      if (participants >> lane & 1) payload_of<Vote>(warp, lane).ballot = ballot;
  }

  CUEMU_UNSEEN inline unsigned vote(unsigned mask, bool cast, const char* intrinsic, Place place) {
    Vote payload{cast, 0};
    meet_lanes(mask, intrinsic, place, &payload, meet_at_vote);
    return payload.ballot;
  }

}  // namespace cuemu

#define CUEMU_HERE cuemu::Place place = {__builtin_FILE(), __builtin_LINE()}

inline void __syncwarp(unsigned mask = ~0u, CUEMU_HERE) {
  using namespace cuemu;
  precede(&order.thread[block.current->linear]);
  meet_lanes(mask, "__syncwarp", place, nullptr, meet_at_barrier);
  follow(&order.warp[block.current->warp()]);
}

template <class Value>
Value __shfl_sync(unsigned mask, Value value, int source, int width = 32, CUEMU_HERE) {
  const unsigned lane = cuemu::block.current->lane();
  return cuemu::shuffle(mask, value, (lane & ~(width - 1u)) | (source & (width - 1u)), "__shfl_sync", place);
}

// A lane whose source is outside its part of `width` lanes gets its own value back.
template <class Value>
Value __shfl_xor_sync(unsigned mask, Value value, int flipped, int width = 32, CUEMU_HERE) {
  const unsigned lane = cuemu::block.current->lane(), source = lane ^ flipped;
  return cuemu::shuffle(mask, value, source <= (lane | (width - 1u)) ? source : lane, "__shfl_xor_sync", place);
}

template <class Value>
Value __shfl_down_sync(unsigned mask, Value value, unsigned by, int width = 32, CUEMU_HERE) {
  const unsigned lane = cuemu::block.current->lane();
  return cuemu::shuffle(mask, value, lane % width + by < unsigned(width) ? lane + by : lane, "__shfl_down_sync", place);
}

template <class Value>
Value __shfl_up_sync(unsigned mask, Value value, unsigned by, int width = 32, CUEMU_HERE) {
  const unsigned lane = cuemu::block.current->lane();
  return cuemu::shuffle(mask, value, lane % width >= by ? lane - by : lane, "__shfl_up_sync", place);
}

inline unsigned __ballot_sync(unsigned mask, int cast, CUEMU_HERE) {
  return cuemu::vote(mask, cast != 0, "__ballot_sync", place);
}

inline int __any_sync(unsigned mask, int cast, CUEMU_HERE) {
  return cuemu::vote(mask, cast != 0, "__any_sync", place) != 0;
}
