// Products of a linear layer, in float32, with each token's IA3 vectors in them.
//
// A weight [outputs, inputs] lies in panels of WIDTH outputs: [panel, inputs, WIDTH]. A tile of up to
// TALL tokens and WIDTH outputs stays in registers while its inputs are summed up, one after the
// other, so that what a token gets depends neither on its batch nor on the number of threads.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "tile.h"

namespace {

constexpr int64_t INPUTS = 768;  // Of a panel at a time; more would not stay in the nearest cache.
constexpr int64_t TOKENS = 48;   // At a time, likewise.
constexpr int64_t FEW = 1 << 15; // Multiplications that are not worth a second thread.

struct Weight {
  const float* panels;
  const float* bias;  // Or null.
  int64_t outputs, inputs;
};

// The vectors of some columns: that of a token begins at vectors + slots[token] * stride.
struct Rescaling {
  const float* vectors;
  int64_t stride;
  const int64_t* slots;
  int64_t start, stop;

  const float* of(int64_t token) const { return vectors + slots[token] * stride; }
};

// y[tokens, WIDTH] = x[tokens, inputs] * panel.
void multiply(const float* x, int64_t tokens, const float* panel, int64_t inputs, float* y,
              int64_t y_stride) {
  const int64_t tiles = (tokens + TALL - 1) / TALL;
  for (int64_t i = 0; i < inputs; i += INPUTS) {
    const int64_t some = std::min(INPUTS, inputs - i);
    const float* part = panel + i * WIDTH;
    // Each of several tiles asks for its share of the next panel; a single one for what it will
    // read itself.
    const int64_t step = WIDTH * sizeof(float) / tiles;
    const char* next = (const char*)(part + (tiles == 1 ? 64 : inputs) * WIDTH);
    for (int64_t n = 0; n < tiles; ++n) {
      const int64_t from = tokens * n / tiles, to = tokens * (n + 1) / tiles;
      TILES[to - from](x + from * inputs + i, inputs, part, some, y + from * y_stride, y_stride,
                       i == 0, {next + some * step * n, step});
    }
  }
}

// The inputs of some tokens, rescaled, in memory that this thread keeps.
const float* rescaled(const float* x, int64_t from, int64_t to, int64_t inputs,
                      const Rescaling& by) {
  thread_local std::vector<float> kept;
  if (kept.size() < size_t(TOKENS * inputs)) kept.resize(TOKENS * inputs);
  for (int64_t token = from; token < to; ++token) {
    const float *in = x + token * inputs, *vector = by.of(token);
    float* out = kept.data() + (token - from) * inputs;
    for (int64_t i = 0; i < inputs; ++i) out[i] = in[i] * vector[i];
  }
  return kept.data();
}

// What comes after the sums, for some tokens and outputs `left` to `right`.
void finish(float* y, int64_t from, int64_t to, int64_t left, int64_t right, const Weight& weight,
            const Rescaling* by, int64_t count) {
  for (int64_t token = from; token < to; ++token) {
    float* out = y + token * weight.outputs;
    if (weight.bias != nullptr)
      for (int64_t o = left; o < right; ++o) out[o] += weight.bias[o];
    for (int64_t n = 0; n < count; ++n) {
      const int64_t start = std::max(left, by[n].start), stop = std::min(right, by[n].stop);
      const float* vector = by[n].of(token) - by[n].start;
      for (int64_t o = start; o < stop; ++o) out[o] *= vector[o];
    }
  }
}

// Some tokens, panels `first` to `last`.
void compute(const Weight& weight, const float* x, float* y, int64_t from, int64_t to,
             int64_t first, int64_t last, const Rescaling* input, const Rescaling* outputs,
             int64_t count) {
  const float* in = input == nullptr ? x + from * weight.inputs
                                     : rescaled(x, from, to, weight.inputs, *input);
  for (int64_t p = first; p < last; ++p) {
    const float* panel = weight.panels + p * WIDTH * weight.inputs;
    float* out = y + from * weight.outputs + p * WIDTH;
    const int64_t width = std::min<int64_t>(WIDTH, weight.outputs - p * WIDTH);
    if (width == WIDTH) {
      multiply(in, to - from, panel, weight.inputs, out, weight.outputs);
      continue;
    }
    float whole[TOKENS * WIDTH];
    multiply(in, to - from, panel, weight.inputs, whole, WIDTH);
    for (int64_t token = 0; token < to - from; ++token)
      std::memcpy(out + token * weight.outputs, whole + token * WIDTH, width * sizeof(float));
  }
  finish(y, from, to, first * WIDTH, std::min(last * WIDTH, weight.outputs), weight, outputs,
         count);
}

}  // namespace

extern "C" int64_t panel_width() { return WIDTH; }

// y[tokens, outputs] = (x * input) * weight + bias, `count` spans of it rescaled by `outputs`.
extern "C" void product(const Weight* weight, const float* x, int64_t tokens, float* y,
                        const Rescaling* input, const Rescaling* outputs, int64_t count,
                        int threads) {
  const int64_t panels = (weight->outputs + WIDTH - 1) / WIDTH;
  const int64_t blocks = (tokens + TOKENS - 1) / TOKENS;
  if (tokens * weight->outputs * weight->inputs < FEW) threads = 1;
  // Threads share the panels, and the tokens too once there are few panels for each.
  const int64_t across = std::clamp<int64_t>(panels / 4, 1, threads), down = threads / across;
#pragma omp parallel num_threads(threads)
  {
    const int64_t column = omp_get_thread_num() % across, row = omp_get_thread_num() / across;
    if (row < down)
      for (int64_t b = blocks * row / down; b < blocks * (row + 1) / down; ++b)
        compute(*weight, x, y, tokens * b / blocks, tokens * (b + 1) / blocks,
                panels * column / across, panels * (column + 1) / across, input, outputs, count);
  }
}
