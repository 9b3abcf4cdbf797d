// What every CUDA kernel here is written against: CUDA itself, or with CUDA_ON_CPU the emulator, from the same source.
//
// bfloat16 is uint16_t in memory, so that a source needs no header of CUDA's. Every function that Python calls is plain
// C, takes the stream last, and returns a cudaError_t.

#pragma once

#include <cstdint>

#ifdef CUDA_ON_CPU
#include "emulator/cuda_on_cpu.h"
#else
#include <cuda_runtime.h>
// The kernel may be a template's instance, in parentheses.
#define LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
// Shared memory of the size that the launch gives.
#define DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(dynamic_shared)
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace hpcprune {

constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(uint16_t value) { return __uint_as_float(uint32_t(value) << 16); }

__device__ __forceinline__ void narrow(float value, float* to) { *to = value; }

// To the nearest, ties to even; NaN stays NaN.
__device__ __forceinline__ void narrow(float value, uint16_t* to) {
  const uint32_t bits = __float_as_uint(value);
  *to = value != value ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// d += a b on a tensor core: a is 16 x 16, b 16 x 8, both bfloat16 in pairs; d 16 x 8. Fragments as PTX lays them out.
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef CUDA_ON_CPU
  cuemu::mma_m16n8k16_bf16(d, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Copies 16 bytes from global to shared memory while the thread goes on; zeros where `valid` is false.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
#ifdef CUDA_ON_CPU
  cuemu::cp_async_16(shared, global, valid);
#else
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(global), "r"(valid ? 16 : 0));
#endif
}

// Closes a group of copies.
__device__ __forceinline__ void commit_copies() {
#ifdef CUDA_ON_CPU
  cuemu::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;\n" ::);
#endif
}

// Waits until at most PENDING of this thread's groups are still on their way. Others see the copies after a barrier.
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
#ifdef CUDA_ON_CPU
  cuemu::cp_async_wait(PENDING);
#else
  asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING));
#endif
}

}  // namespace hpcprune
