// CUDA's runtime as code compiled by nvcc 13 calls it, without a GPU: every launch is written down, none runs.
//
// Linked into a library in the place of libcudart (nvcc -cudart none). A launch over CUDA's limits fails as on a GPU, and
// its record says why. Device memory is never touched, so that pointers may be anything.

#include <cstdio>
#include <cstring>
#include <map>
#include <string>

#include "../../kernels/emulator/limits.h"

namespace {

struct Size {
  unsigned x, y, z;
};

struct Kernel {
  std::string name;
  size_t allowed = cuemu::SHARED_AS_IT_IS;
};

enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_CONFIGURATION = 9, MAX_DYNAMIC_SHARED = 8 };

// By the address of the function that stands for it on the host. Kernels are registered while a library is being loaded,
// when nothing else here may have been made yet.
std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> kernels;
  return kernels;
}

std::string records;
int last_error = SUCCESS;

// A launch is configured and made in two calls.
Size pushed_grid, pushed_block;
size_t pushed_shared;
void* pushed_stream;

int fail(int error) {
  if (last_error == SUCCESS) last_error = error;
  return error;
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  kernels()[host].name = name;
}

unsigned __cudaPushCallConfiguration(Size grid, Size block, size_t shared, void* stream) {
  pushed_grid = grid;
  pushed_block = block;
  pushed_shared = shared;
  pushed_stream = stream;
  return 0;
}

int __cudaPopCallConfiguration(Size* grid, Size* block, size_t* shared, void* stream) {
  *grid = pushed_grid;
  *block = pushed_block;
  *shared = pushed_shared;
  std::memcpy(stream, &pushed_stream, sizeof pushed_stream);
  return SUCCESS;
}

int __cudaGetKernel(const void** kernel, const void* host) {
  *kernel = host;
  return SUCCESS;
}

int __cudaLaunchKernel(const void* host, Size grid, Size block, void**, size_t shared, void* stream) {
  const Kernel& kernel = kernels()[host];
  const char* wrong = cuemu::beyond_limits(grid, block, shared, kernel.allowed);
  char numbers[200];
  std::snprintf(numbers, sizeof numbers, "\t%u %u %u\t%u %u %u\t%zu\t%zu\t", grid.x, grid.y, grid.z, block.x, block.y,
                block.z, shared, reinterpret_cast<size_t>(stream));
  records += kernel.name + numbers + (wrong ? wrong : "") + "\n";
  return wrong ? fail(INVALID_CONFIGURATION) : SUCCESS;
}

int cudaFuncSetAttribute(const void* host, int attribute, int value) {
  if (attribute != MAX_DYNAMIC_SHARED || value < 0 || size_t(value) > cuemu::SHARED_AT_MOST) return fail(INVALID_VALUE);
  kernels()[host].allowed = value;
  return SUCCESS;
}

int cudaMemsetAsync(void*, int, size_t, void*) { return SUCCESS; }
int cudaMemcpyAsync(void*, const void*, size_t, int, void*) { return SUCCESS; }

int cudaGetLastError() {
  const int error = last_error;
  last_error = SUCCESS;
  return error;
}

// A line a launch since the last call: the kernel's mangled name, grid, block, shared bytes, stream, what is wrong.
__attribute__((visibility("default"))) const char* recorded_launches() {
  static std::string taken;
  taken.swap(records);
  records.clear();
  return taken.c_str();
}
}
