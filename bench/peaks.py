"""What the cores of this machine can do at most: multiply-adds with numbers in registers, and bytes read from memory.

python bench/peaks.py
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from pathlib import Path

import torch
from turns import in_turns

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
PEAKS = """
#include "paths.h"
using hpcprune::in_threads;
typedef float Vector __attribute__((vector_size(64)));
extern "C" float multiply_add(int64_t count, int threads) {
  std::vector<float> sums(16 * threads);
  in_threads(threads, [&](int64_t t) {
    Vector sum[12] = {}, a = {}, b = {};
    a += 1.0f + t, b += 1e-9f;
    for (Vector& each : sum) asm volatile("" : "+v"(each));  // the compiler shall not know what is in them
    for (int64_t i = 0; i < count; ++i)
      for (int j = 0; j < 12; ++j) sum[j] = a * sum[j] + b;
    for (Vector& each : sum) {
      asm volatile("" : "+v"(each));
      sums[16 * t] += each[0];
    }
  });
  return sums[0];
}
extern "C" float read(const float* array, int64_t size, int threads) {
  std::vector<float> sums(16 * threads);
  in_threads(threads, [&](int64_t t) {
    Vector sum[8] = {};
    for (int64_t i = size / threads * t; i + 128 <= size / threads * (t + 1); i += 128)
      for (int j = 0; j < 8; ++j) sum[j] += *reinterpret_cast<const Vector*>(array + i + 16 * j);
    for (Vector& each : sum) for (int k = 0; k < 16; ++k) sums[16 * t] += each[k];
  });
  return sums[0];
}
"""


def measure_peaks(threads: int) -> tuple[float, float]:
    """Multiply-adds and bytes read a second."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "peaks.cpp", Path(folder) / "peaks.so"
        source.write_text(PEAKS)
        command = ["g++", "-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread", "-w"]
        subprocess.run([*command, f"-I{KERNELS}", source, "-o", library], check=True)
        code = ctypes.CDLL(str(library))
    array = torch.zeros(64 << 20)
    start = (-array.data_ptr()) % 64 // 4
    pointer, size = ctypes.c_void_p(array[start:].data_ptr()), ctypes.c_int64(array.numel() - 16)
    count = 3_000_000
    found = in_turns(
        {
            "multiply": lambda: code.multiply_add(ctypes.c_int64(count), threads),
            "read": lambda: code.read(pointer, size, threads),
        }
    )
    return count * 12 * 16 * threads / found["multiply"], array.nbytes / found["read"]


if __name__ == "__main__":
    for threads in (1, torch.get_num_threads()):
        multiply, read = measure_peaks(threads)
        print(f"threads: {threads}; {multiply / 1e9:.0f} G multiply-adds/s, {read / 1e9:.1f} GB/s")
