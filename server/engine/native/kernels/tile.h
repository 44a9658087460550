// A small matmul that stays in registers. The kernels' larger matmuls are made of it.

#pragma once

#include <cstdint>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "number.h"

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, TALL = 12;
#elif defined(__AVX__)
constexpr int LANES = 8, TALL = 6;
#else
constexpr int LANES = 4, TALL = 6;
#endif
constexpr int WIDTH = 2 * LANES;

typedef float Lanes __attribute__((vector_size(LANES * 4)));
typedef float AnyLanes __attribute__((vector_size(LANES * 4), aligned(4)));

// Two bfloat16 inputs, the first in the lower half.
typedef uint32_t Pair;
typedef Pair PairLanes __attribute__((vector_size(LANES * 4)));

// The unit in which a tile reads a token.
#if defined(BFLOAT16)
typedef Pair Input;
#else
typedef float Input;
#endif
constexpr int64_t TOGETHER = sizeof(Input) / sizeof(Number);

template <class Each>
struct Vector;
template <>
struct Vector<float> {
  typedef Lanes Type;
};
template <>
struct Vector<Pair> {
  typedef PairLanes Type;
};

inline void add_product(Lanes& sum, float x, Lanes weights) { sum += x * weights; }

inline void add_product(Lanes& sum, Pair x, PairLanes weights) {
#if defined(__AVX512BF16__)
  const __m512i both = _mm512_set1_epi32(int(x));
  sum = (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512i)weights, (__m512bh)both);
#else
  sum += __builtin_bit_cast(float, x << 16) * (Lanes)(weights << 16);
  sum += __builtin_bit_cast(float, x & 0xffff0000) * (Lanes)(weights & 0xffff0000);
#endif
}

// What a tile prefetches while it computes: `step` bytes from `next` on for each of its inputs, and
// `count` single cache lines, one after each stretch of inputs. Processors drop prefetches that come
// all at once.
struct Ahead {
  const char* next;
  int64_t step;
  int64_t count = 0;
  const float* lines[TALL] = {};
};

constexpr int64_t STRETCH = 96;
constexpr int64_t SOON = 24;  // How many inputs ahead a tile's own panel is prefetched.
constexpr int64_t LINE = 16;  // Floats of a cache line.

// y[ROWS, WIDTH] = x[ROWS, inputs] * panel[inputs, WIDTH]. If not `first`, it is added to y.
template <class Each, int ROWS>
void tile(const Each* x, int64_t x_stride, const Each* panel, int64_t inputs, float* y,
          int64_t y_stride, bool first, const Ahead& ahead) {
  typedef typename Vector<Each>::Type Weights;
  Lanes sums[ROWS][2];
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
    sums[r][0] = first ? Lanes{} : (Lanes) * (const AnyLanes*)(y + r * y_stride);
    sums[r][1] = first ? Lanes{} : (Lanes) * (const AnyLanes*)(y + r * y_stride + LANES);
  }
  const char* next = ahead.next;
  const int64_t step = ahead.step;
  int64_t i = 0;
  const auto sum_until = [&](int64_t end) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (; i < end; ++i, panel += WIDTH, next += step) {
      __builtin_prefetch(next, 0, 2);
#pragma GCC unroll 2
      for (int64_t line = 0; line < WIDTH; line += LINE)
        __builtin_prefetch(panel + SOON * WIDTH + line);
      const Weights left = *(const Weights*)panel, right = *(const Weights*)(panel + LANES);
#pragma GCC unroll 12
      for (int r = 0; r < ROWS; ++r) {
        const Each value = x[r * x_stride + i];
        add_product(sums[r][0], value, left);
        add_product(sums[r][1], value, right);
      }
    }
  };
  for (int64_t n = 0; n < ahead.count; ++n) {
    __builtin_prefetch(ahead.lines[n]);
    sum_until(i + STRETCH < inputs ? i + STRETCH : inputs);
  }
  sum_until(inputs);
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
    *(AnyLanes*)(y + r * y_stride) = sums[r][0];
    *(AnyLanes*)(y + r * y_stride + LANES) = sums[r][1];
  }
}

template <class Each>
using Tile = void (*)(const Each*, int64_t, const Each*, int64_t, float*, int64_t, bool,
                      const Ahead&);
// The tile for each number of rows.
template <class Each>
constexpr Tile<Each> TILES[] = {
    nullptr, tile<Each, 1>, tile<Each, 2>, tile<Each, 3>,
    tile<Each, 4>, tile<Each, 5>, tile<Each, 6>,
#if defined(__AVX512F__)
    tile<Each, 7>, tile<Each, 8>, tile<Each, 9>,
    tile<Each, 10>, tile<Each, 11>, tile<Each, 12>,
#endif
};

}  // namespace
