// The functions of CUDA's runtime that launchers call, and what is left of an error.

#pragma once

#include <cstdarg>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <map>

#include "limits.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice = 3 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = struct CUstream_st*;

namespace cuemu __attribute__((visibility("hidden"))) {

  inline cudaError_t last_error = cudaSuccess;
  inline char error_text[2048] = "";
  inline std::map<const void*, size_t> shared_allowed;  // by kernel, where it is not SHARED_AS_IT_IS

  // Keeps the first error until somebody asks for it.
  __attribute__((format(printf, 2, 3))) inline cudaError_t fail(cudaError_t error, const char* format, ...) {
    if (last_error != cudaSuccess) return error;
    last_error = error;
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(error_text, sizeof error_text, format, arguments);
    va_end(arguments);
    return error;
  }

}  // namespace cuemu

// What the last error was, for people.
extern "C" __attribute__((visibility("default"), used)) inline const char* cuemu_error() { return cuemu::error_text; }

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = cuemu::last_error;
  cuemu::last_error = cudaSuccess;
  return error;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || size_t(value) > cuemu::SHARED_AT_MOST)
    return cuemu::fail(cudaErrorInvalidValue, "cudaFuncSetAttribute: attribute %d cannot be %d", attribute, value);
  cuemu::shared_allowed[reinterpret_cast<const void*>(kernel)] = value;
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* memory, int byte, size_t bytes, cudaStream_t = nullptr) {
  std::memset(memory, byte, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t = nullptr) {
  std::memmove(to, from, bytes);
  return cudaSuccess;
}
