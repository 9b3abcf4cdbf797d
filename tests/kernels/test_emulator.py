"""The emulator of CUDA: sound kernels give what numpy gives, and every planted bug is caught.

The kernels are in planted.cu; a bug is planted by its name there.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tests.kernels import emulated
from tests.kernels.emulated import Array, SanitizerError, load, needs_emulator, placed, under

pytestmark = needs_emulator

PLANTED = Path(__file__).with_name("planted.cu")
BUGS = re.findall(r"^  ([A-Z_]+),$", PLANTED.read_text(), re.MULTILINE)


def launch(operation: str, *arguments: float | Array) -> None:
    emulated.launch(load(PLANTED), operation, *arguments)


def reverse_tiles(bug: str) -> None:
    count, tile = 200, 64
    values = np.arange(1, count + 1, dtype=np.float32)
    result = np.zeros(count, np.float32)
    launch("reverse_tiles", BUGS.index(bug), count, values, result)
    padded = np.pad(values, (0, -count % tile)).reshape(-1, tile)[:, ::-1].ravel()
    np.testing.assert_array_equal(result, padded[:count])


def sum_blocks(bug: str) -> None:
    values = np.arange(300, dtype=np.float32)
    sums = np.zeros(3, np.float32)
    launch("sum_blocks", BUGS.index(bug), values.size, values, sums)
    np.testing.assert_array_equal(sums, np.pad(values, (0, 84)).reshape(3, 128).sum(1))


def turn_pairs(bug: str) -> None:
    pairs = np.arange(1, 129, dtype=np.float32).reshape(2, 32, 2)
    pairs[1, 31] = 0
    result = np.zeros_like(pairs)
    launch("turn_pairs", BUGS.index(bug), placed(pairs), result)
    np.testing.assert_array_equal(result, pairs[:, ::-1])


def copy_tiles(bug: str) -> None:
    values = placed(np.arange(3 * 64 * 4, dtype=np.float32).reshape(3, 64, 4))
    result = placed(np.zeros_like(values))
    launch("copy_tiles", BUGS.index(bug), 3, values, result)
    np.testing.assert_array_equal(result, values[:, np.arange(64) ^ 1])


def copy_equal_tiles(bug: str) -> None:
    """What an earlier copy has left in shared memory is right by chance."""
    values = placed(np.ones((4, 64, 4), np.float32))
    result = placed(np.zeros_like(values))
    launch("copy_tiles", BUGS.index(bug), 4, values, result)
    np.testing.assert_array_equal(result, values)


def count_values(bug: str) -> None:
    values = (np.arange(500, dtype=np.int32) ** 2) % 16
    counts, last = np.full(16, 7, np.int32), np.full(1, -1, np.int32)
    launch("count_values", BUGS.index(bug), values.size, values, counts, last)
    np.testing.assert_array_equal(counts, np.bincount(values, minlength=16))
    assert last[0] == values.size // 64


# CuTe's layouts of the fragments, for SM80_16x8x16: of the lane, then of the elements that it holds, the shape and the
# strides of each. What they give is an offset down the columns of a matrix of 16 x 16 (a), 8 x 16 (b transposed) or
# 16 x 8 (d).
Modes = tuple[tuple[int, ...], tuple[int, ...]]
LAYOUTS: dict[str, tuple[Modes, Modes, tuple[int, int]]] = {
    "a": (((4, 8), (32, 1)), ((2, 2, 2), (16, 8, 128)), (16, 16)),
    "b": (((4, 8), (16, 1)), ((2, 2), (8, 64)), (8, 16)),
    "d": (((4, 8), (32, 1)), ((2, 2), (16, 8)), (16, 8)),
}


def offsets(modes: Modes) -> list[int]:
    """The offsets of a layout, its first mode counting fastest."""
    steps = [[i * stride for i in range(size)] for size, stride in zip(*modes, strict=True)]
    return [sum(parts) for parts in itertools.product(*reversed(steps))]


def places(name: str) -> npt.NDArray[np.int64]:
    """Where the elements that each lane holds lie in their matrix, [32, elements a lane], counting along its rows."""
    lanes, elements, (rows, columns) = LAYOUTS[name]
    down: npt.NDArray[np.int64] = np.add.outer(offsets(lanes), offsets(elements))
    assert sorted(down.ravel()) == list(range(rows * columns)), "every element is in one place"
    return down % rows * columns + down // rows


def multiply_fragments(bug: str) -> None:
    # Small integers: bfloat16 has them all, float all their sums.
    rng = np.random.default_rng(0)
    a, b, d = (rng.integers(-9, 10, LAYOUTS[name][2]).astype(np.float32) for name in "abd")
    left, right = ((m.view(np.uint32) >> 16).astype(np.uint16) for m in (a, b))
    left, right, sums = left.ravel()[places("a")], right.ravel()[places("b")], d.ravel()[places("d")]
    launch("multiply_fragments", BUGS.index(bug), left.copy(), right.copy(), sums)
    result = np.empty(128, np.float32)
    result[places("d")] = sums
    np.testing.assert_array_equal(result.reshape(16, 8), d + a @ b.T)


CHECKS = (reverse_tiles, sum_blocks, turn_pairs, copy_tiles, copy_equal_tiles, count_values, multiply_fragments)


@pytest.mark.parametrize("check", CHECKS)
def test_a_sound_kernel_gives_what_numpy_gives(check: Callable[[str], None], seed: None) -> None:
    check("NONE")


@pytest.mark.parametrize(
    ("check", "bug", "message"),
    [
        (reverse_tiles, "MISSING_BARRIER", "nan"),
        (reverse_tiles, "MISSING_SECOND_BARRIER", "not equal"),
        (sum_blocks, "EXITED_LANE", r"__shfl_xor_sync \(.*planted.cu:\d+\) reads from lane 5, which has exited"),
        (sum_blocks, "LANE_OUTSIDE_MASK", r"thread \d+ at __shfl_xor_sync .* reads from lane \d+, which is outside"),
        (sum_blocks, "DIFFERENT_MASKS", r"with the mask [7f]fffffff meets lane \d+ .* with [7f]fffffff"),
        (sum_blocks, "DIFFERENT_INTRINSICS", r"__shfl_xor_sync .* meets lane 7 at __any_sync"),
        (sum_blocks, "NOT_IN_MASK", r"thread \d+ calls __syncwarp .* with the mask 00000001, in which it is not"),
        (
            sum_blocks,
            "LANE_AT_BARRIER",
            r"threads 0 to 6 at __shfl_xor_sync .* lanes ffffffff; thread 7 at __syncthreads",
        ),
        (sum_blocks, "DIVERGENT_BARRIER", r"deadlock: threads 0 to 31 at __syncthreads .*; threads 32 to 127 exited"),
        (sum_blocks, "DIFFERENT_BARRIERS", r"different barriers: threads 0 to 31 at .*; threads 32 to 127 at"),
        (sum_blocks, "BARRIER_AFTER_EXIT", r"deadlock: threads 0 to 31 at .*; threads 32 to 63 exited; threads 64 to"),
        (turn_pairs, "MISSING_SYNCWARP", "nan"),
        (turn_pairs, "WILD_ADDRESS", "turn_pairs, block .*: thread 40 accesses 0x[0-9a-f]+, where no memory is"),
        (copy_tiles, "MISSING_WAIT", "nan"),
        (copy_tiles, "WAIT_FOR_TOO_FEW", "nan"),
        (copy_equal_tiles, "LATE_MISSING_WAIT", "nan"),
        (copy_tiles, "MISSING_COMMIT", "nan"),
        (copy_tiles, "MISSING_BARRIER_AFTER_WAIT", "nan"),
        (copy_tiles, "MISALIGNED_COPY", "no multiple of 16"),
        (multiply_fragments, "FRAGMENT_A", "not equal"),
        (multiply_fragments, "FRAGMENT_B", "not equal"),
        (multiply_fragments, "FRAGMENT_D", "not equal"),
        (multiply_fragments, "FEW_LANES", "mma.sync by the lanes 7fffffff alone"),
    ],
)
def test_a_planted_bug_is_caught(check: Callable[[str], None], bug: str, message: str, seed: None) -> None:
    with pytest.raises(AssertionError, match=message):
        check(bug)


def fail_and_go_on() -> None:
    """A launch that was given up leaves fibers in the middle of their work."""
    for _ in range(2):
        with pytest.raises(AssertionError, match="deadlock"):
            sum_blocks("BARRIER_AFTER_EXIT")
        assert fill((3, 1, 1), (1024, 1, 1)) == 3
        sum_blocks("NONE")


@pytest.mark.parametrize("flavour", ["address", "thread"])
def test_after_a_deadlock_the_next_launch_is_none_the_worse(flavour: str) -> None:
    under(flavour, fail_and_go_on)


def all_sound() -> None:
    for check in CHECKS:
        check("NONE")
    ask_intrinsics()


@pytest.mark.parametrize("flavour", ["address", "thread"])
def test_sound_kernels_leave_sanitizers_silent(flavour: str) -> None:
    under(flavour, all_sound, seed=1)


@pytest.mark.parametrize(
    ("flavour", "check", "bug", "message"),
    [
        ("address", reverse_tiles, "OFF_BY_ONE", r"heap-buffer-overflow[\s\S]*reverse_tiles"),
        ("address", reverse_tiles, "OFF_BY_ONE_IN_SHARED", r"global-buffer-overflow[\s\S]*reverse_tiles"),
        ("address", sum_blocks, "OFF_BY_ONE_IN_DYNAMIC", r"heap-buffer-overflow[\s\S]*sum_blocks"),
        ("address", turn_pairs, "MISALIGNED", r"misaligned address"),
        ("thread", reverse_tiles, "MISSING_BARRIER", r"data race[\s\S]*reverse_tiles"),
        ("thread", reverse_tiles, "MISSING_SECOND_BARRIER", r"data race[\s\S]*reverse_tiles"),
        ("thread", turn_pairs, "MISSING_SYNCWARP", r"data race[\s\S]*turn_pairs"),
        ("thread", copy_tiles, "MISSING_BARRIER_AFTER_WAIT", r"data race[\s\S]*copy_tiles"),
        ("thread", count_values, "NO_ATOMIC", r"data race[\s\S]*count_values"),
        ("thread", count_values, "NO_ATOMIC_BETWEEN_BLOCKS", r"data race[\s\S]*count_values"),
    ],
)
def test_a_sanitizer_names_the_kernel(flavour: str, check: Callable[[str], None], bug: str, message: str) -> None:
    with pytest.raises(SanitizerError, match=message):
        under(flavour, check, bug)


def test_every_bug_is_tried() -> None:
    text = "".join(file.read_text() for file in Path(__file__).parent.glob("test_emulator*.py"))
    assert BUGS[0] == "NONE" and all(f'"{bug}"' in text for bug in BUGS)


def ask_intrinsics() -> None:
    lane = np.arange(32)
    values = np.random.default_rng(1).integers(0, 2**32, 32, dtype=np.uint32)
    values[3], values[4] = 0, 0x80000000
    answers, total = np.zeros((32, 12), np.uint32), np.zeros(1, np.uint64)
    half, extremes = np.zeros(1, np.float32), np.array([0xFFFFFFFF, 0, 5], np.uint32)
    launch("ask_intrinsics", values, answers, half, extremes, total)
    bits = [format(value, "032b") for value in values]
    flipped = (lane ^ 9) <= (lane | 7)
    expected = [
        values[lane * 7 % 32],
        values[lane & ~7 | 3],
        values[lane ^ 5],
        values[np.where(flipped, lane ^ 9, lane)],
        values[np.where(lane + 3 < 32, lane + 3, lane)],
        values[np.where(lane % 16 >= 3, lane - 3, lane)],
        np.full(32, sum(int(value & 1) << i for i, value in enumerate(values))),
        lane < 16,
        [text.count("1") for text in bits],
        [text[::-1].find("1") + 1 for text in bits],
        [(text + "1").index("1") for text in bits],
        np.minimum(lane + 1, 31).astype(np.float32).view(np.uint32),
    ]
    for i, column in enumerate(expected):
        np.testing.assert_array_equal(answers[:, i], column, f"answer {i}")
    assert half[0] == 16 and total[0] == sum(int(value) << 8 for value in values)
    assert extremes.tolist() == [values.min(), values.max(), 37]


def test_intrinsics_give_what_the_programming_guide_says(seed: None) -> None:
    ask_intrinsics()


def fill(grid: Sequence[int], block: Sequence[int], shared: int = 0, allowed: int = 0) -> int:
    count = int(np.prod(grid))
    filled = np.zeros(min(count, 10**6), np.float32)
    sizes = np.array(grid, np.uint32), np.array(block, np.uint32)
    launch("fill", *sizes, shared, allowed, filled.size, 1.0, filled)
    return int(filled.sum())


def test_a_grid_within_the_limits_runs_every_block_once(seed: None) -> None:
    assert fill((3, 2, 5), (4, 1, 1)) == 30
    assert fill((1, 1, 2), (1, 1024, 1)) == 2
    assert fill((1, 1, 1), (1, 1, 1), shared=48 << 10) == 1
    assert fill((1, 1, 1), (1, 1, 1), shared=227 << 10, allowed=227 << 10) == 1
    assert fill((1, 65535, 1), (1, 1, 1)) == 65535


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (((1, 1, 1), (33, 32, 1)), "more than 1024 threads"),
        (((1, 1, 1), (1, 1, 65)), "beyond 1024 x 1024 x 64"),
        (((1, 65536, 1), (1, 1, 1)), "grid.y or grid.z"),
        (((1, 1, 65536), (1, 1, 1)), "grid.y or grid.z"),
        (((2**31, 1, 1), (1, 1, 1)), "grid.x is beyond"),
        (((0, 1, 1), (1, 1, 1)), "no blocks"),
        (((1, 1, 1), (1, 0, 1)), "no threads"),
        (((1, 1, 1), (1, 1, 1), (48 << 10) + 16, 40 << 10), "allowed with cudaFuncSetAttribute"),
        (((1, 1, 1), (1, 1, 1), (227 << 10) + 16), "227 KB"),
        (((1, 1, 1), (1, 1, 1), 0, (227 << 10) + 1), "cudaFuncSetAttribute: attribute 8"),
    ],
)
def test_a_launch_over_the_limits_is_refused(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        fill(*sizes)  # type: ignore[arg-type]
    assert fill((2, 1, 1), (1, 1, 1)) == 2, "the next launch is none the worse"
