// Compiles the file that BODY names once for every path, in a namespace of the path's own.
//
// BODY is written in vectors of LANES floats (the compiler's vector extension), so one text serves every instruction
// set; where a path has an instruction that the others lack, BODY asks for LANES. The namespaces are the source's
// alone. ON_PATH(path, call) is the call of what BODY defines as it was compiled for that path.

#if defined(__x86_64__)
#define LANES 16
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,popcnt"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,popcnt")
#endif
namespace hpcprune {
namespace {
namespace avx512 {
#include BODY
}
}  // namespace
}  // namespace hpcprune
#undef LANES
#define LANES 8
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,popcnt"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,popcnt")
#endif
namespace hpcprune {
namespace {
namespace avx2 {
#include BODY
}
}  // namespace
}  // namespace hpcprune
#undef LANES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#define LANES 4
namespace hpcprune {
namespace {
namespace portable {
#include BODY
}
}  // namespace
}  // namespace hpcprune
#undef LANES

#if defined(__x86_64__)
#define ON_PATH(path, ...) \
  ((path) == WITH_AVX512 ? avx512::__VA_ARGS__ : (path) == WITH_AVX2 ? avx2::__VA_ARGS__ : portable::__VA_ARGS__)
#else
#define ON_PATH(path, ...) ((void)(path), portable::__VA_ARGS__)
#endif
