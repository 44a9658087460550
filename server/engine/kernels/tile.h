// A small product that stays in registers, of which the kernels' larger ones are made.

#pragma once

#include <cstdint>

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

// What a tile asks memory for meanwhile: `step` bytes from `next` on, for each of its inputs; and
// some lines that lie anywhere, one for each stretch of inputs. Processors drop much of what is asked
// for at once.
struct Ahead {
  const char* next;
  int64_t step;
  int64_t count = 0;
  const float* lines[TALL] = {};
};

constexpr int64_t STRETCH = 96;

// y[ROWS, WIDTH] = x[ROWS, inputs] * panel[inputs, WIDTH], or is added to y where it is not `first`.
template <int ROWS>
void tile(const float* x, int64_t x_stride, const float* panel, int64_t inputs, float* y,
          int64_t y_stride, bool first, const Ahead& ahead) {
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
      const Lanes left = *(const Lanes*)panel, right = *(const Lanes*)(panel + LANES);
#pragma GCC unroll 12
      for (int r = 0; r < ROWS; ++r) {
        const Lanes value = x[r * x_stride + i] - Lanes{};
        sums[r][0] += value * left;
        sums[r][1] += value * right;
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

using Tile = void (*)(const float*, int64_t, const float*, int64_t, float*, int64_t, bool,
                      const Ahead&);
// By the number of rows.
constexpr Tile TILES[] = {
    nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>,
#if defined(__AVX512F__)
    tile<7>, tile<8>, tile<9>, tile<10>, tile<11>, tile<12>,
#endif
};

}  // namespace
