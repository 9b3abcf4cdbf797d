// A launch: checked against CUDA's limits, then its blocks, one after the other.

#pragma once

#include <cstdlib>
#include <mutex>
#include <numeric>
#include <tuple>

#include "block.h"
#include "faults.h"
#include "limits.h"
#include "memory.h"
#include "warp.h"

namespace cuemu __attribute__((visibility("hidden"))) {

  inline std::mutex one_launch_at_a_time;

  // Runs the blocks that `block` and `call` are prepared for. At random they come a random stride apart: each once,
  // from anywhere, and no list of them is needed.
  CUEMU_UNSEEN inline void run_blocks(size_t dynamic) {
    const uint64_t blocks = uint64_t(block.grid.x) * block.grid.y * block.grid.z;
    uint64_t number = 0, stride = 1;
    if (block.random) {
      number = (*block.random)() % blocks;
      do stride = (*block.random)() % blocks + 1;
      while (std::gcd(stride, blocks) != 1);
    }
    for (uint64_t done = 0; done < blocks; ++done, number = (number + stride) % blocks) {
      block.index =
          dim3(number % block.grid.x, number / block.grid.x % block.grid.y, number / block.grid.x / block.grid.y);
      poison_shared(dynamic);
      if (!run_block()) break;
    }
    follow(&all_ended);
  }

  template <class... Parameters, class... Arguments>
  CUEMU_UNSEEN void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 size, size_t dynamic,
                           cudaStream_t, Arguments... arguments) {
    const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
    if (last_error != cudaSuccess) return;
    const auto allowed = shared_allowed.find(reinterpret_cast<const void*>(kernel));
    const char* wrong =
        beyond_limits(grid, size, dynamic, allowed == shared_allowed.end() ? SHARED_AS_IT_IS : allowed->second);
    if (wrong) {
      fail(cudaErrorInvalidConfiguration, "%s: %s (grid %u, %u, %u; block %u, %u, %u; %zu bytes of shared memory)",
           name, wrong, grid.x, grid.y, grid.z, size.x, size.y, size.z, dynamic);
      return;
    }
    using Call = std::tuple<void (*)(Parameters...), Parameters...>;
    const Call call(kernel, arguments...);
    block.kernel = name;
    block.grid = grid;
    block.size = size;
    block.threads = size.x * size.y * size.z;
    block.call = &call;
    block.run = [](const void* call) {
      std::apply([](auto* run, const auto&... values) { run(values...); }, *static_cast<const Call*>(call));
    };
    const char* seed = std::getenv("CUEMU_SEED");
    Random random(seed ? std::strtoull(seed, nullptr, 10) : 0);
    block.random = seed ? &random : nullptr;
    const Faults faults;
    reserve_dynamic(dynamic);
    run_blocks(dynamic);
    release_dynamic(dynamic);
  }

}  // namespace cuemu
