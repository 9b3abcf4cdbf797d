// What CUDA lets a launch ask for, on every GPU from sm_80 on; shared memory as on sm_90.

#pragma once

#include <cstddef>

namespace cuemu __attribute__((visibility("hidden"))) {

  constexpr size_t SHARED_AS_IT_IS = 48 << 10;  // bytes a block; beyond it a kernel must be allowed more,
  constexpr size_t SHARED_AT_MOST = 227 << 10;  // and this much at most
  constexpr unsigned long long GRID_X = 0x7fffffff, GRID_YZ = 65535;
  constexpr unsigned BLOCK_XY = 1024, BLOCK_Z = 64, BLOCK_THREADS = 1024;

  // What is wrong with a launch, or null; `allowed` are the bytes of dynamic shared memory that the kernel may have.
  template <class Size>
  const char* beyond_limits(const Size& grid, const Size& block, size_t shared, size_t allowed) {
    if (!grid.x || !grid.y || !grid.z) return "the grid has no blocks";
    if (!block.x || !block.y || !block.z) return "a block has no threads";
    if (grid.x > GRID_X) return "grid.x is beyond 2147483647";
    if (grid.y > GRID_YZ || grid.z > GRID_YZ) return "grid.y or grid.z is beyond 65535";
    if (block.x > BLOCK_XY || block.y > BLOCK_XY || block.z > BLOCK_Z) return "a block is beyond 1024 x 1024 x 64";
    if ((unsigned long long)block.x * block.y * block.z > BLOCK_THREADS) return "a block has more than 1024 threads";
    if (shared > SHARED_AT_MOST) return "a block has more than 227 KB of shared memory";
    if (shared > allowed) return "more shared memory than the kernel was allowed with cudaFuncSetAttribute";
    return nullptr;
  }

}  // namespace cuemu
