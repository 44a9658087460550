// Linear layers that also apply each token's IA3 vectors.
//
// A weight [outputs, inputs] lies in panels of WIDTH outputs: [panel, inputs, WIDTH], where two
// numbers in bfloat16 are one input. A tile of up to TALL tokens and WIDTH outputs stays in registers
// while its inputs are summed up, one after the other, so that a token's result depends neither on
// its batch nor on the number of threads.

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <vector>

#include "tile.h"

#if defined(__x86_64__) && defined(__GLIBC__)
// glibc has a vectorised expf, but declares it with -ffast-math only.
#pragma omp declare simd notinbranch
extern "C" float expf(float) noexcept;
#endif

namespace {

constexpr int64_t INPUTS = 768;  // Inputs of a panel at a time, so that they stay in the L1 cache.
constexpr int64_t TOKENS = 48;   // Tokens at a time, likewise.
constexpr int64_t FEW = 1 << 15; // Fewer multiplications are not worth a second thread.

struct Weight {
  const Input* panels;
  const float* bias;  // Or null.
  int64_t outputs;
  int64_t numbers;  // Of one token.

  int64_t inputs() const { return (numbers + TOGETHER - 1) / TOGETHER; }
  const Input* panel(int64_t output) const { return panels + output * inputs(); }
};

// The vectors that rescale the columns `start` to `stop`, in panels as the weights are:
// [panel, entry, WIDTH]. entries[token] is the entry of a token's vector.
struct Rescaling {
  const float* panels;
  int64_t count;  // Of a panel's entries.
  const int64_t* entries;
  int64_t start, stop;

  // A token's vector from column `j` to the end of the panel; `j` counts from `start`.
  const float* at(int64_t token, int64_t j) const {
    return panels + (j / WIDTH * count + entries[token]) * WIDTH + j % WIDTH;
  }
};

struct Scales {
  const Rescaling* input;    // Or null.
  const Rescaling* outputs;  // `count` of them.
  int64_t count;
  const Rescaling* gated;  // Of the gated output; or null.
};

// Rounds sums to what a Number can hold.
void round_sums(float* sums, int64_t count) {
  for (int64_t n = 0; n < count; ++n) sums[n] = rounded(sums[n]);
}

// Rescales the sums [tokens, WIDTH] of the outputs from `left` on.
void rescale(float* sums, int64_t from, int64_t to, int64_t left, const Rescaling& by) {
  const int64_t start = std::max(left, by.start), stop = std::min(left + WIDTH, by.stop);
  for (int64_t token = from; token < to && start < stop; ++token) {
    float* sum = sums + (token - from) * WIDTH - left;
    if (stop - start == WIDTH && by.start % WIDTH == 0) {
      const float* vector = by.at(token, start - by.start);
#pragma omp simd
      for (int64_t o = 0; o < WIDTH; ++o) sum[start + o] *= vector[o];
    } else {
      for (int64_t o = start; o < stop; ++o) sum[o] *= *by.at(token, o - by.start);
    }
  }
}

// The vectors of outputs `left` to `right` that a tile prefetches; `first`: the block's first token.
struct Wanted {
  const Rescaling* rescaled;
  int64_t count, first, left, right;

  // Adds the vectors of some tokens.
  void add(int64_t from, int64_t to, Ahead& ahead) const {
    for (int64_t n = 0; n < count; ++n) {
      const int64_t start = std::max(left, rescaled[n].start);
      if (start >= std::min(right, rescaled[n].stop)) continue;
      for (int64_t token = first + from; token < first + to && ahead.count < TALL; ++token)
        ahead.lines[ahead.count++] = rescaled[n].at(token, start - rescaled[n].start);
    }
  }
};

// sums[tokens, WIDTH] = x[tokens, inputs] * panel.
void multiply(const Input* x, int64_t tokens, const Input* panel, int64_t inputs, float* sums,
              const Wanted& wanted) {
  const int64_t tiles = (tokens + TALL - 1) / TALL;
  for (int64_t i = 0; i < inputs; i += INPUTS) {
    const int64_t some = std::min(INPUTS, inputs - i);
    const Input* part = panel + i * WIDTH;
    // Each of several tiles prefetches its share of the next panel. A single tile prefetches what
    // it will read itself.
    const int64_t step = WIDTH * sizeof(Input) / tiles;
    const char* next = (const char*)(part + (tiles == 1 ? 64 : inputs) * WIDTH);
    for (int64_t n = 0; n < tiles; ++n) {
      const int64_t from = tokens * n / tiles, to = tokens * (n + 1) / tiles;
      Ahead ahead = {next + some * step * n, step};
      if (i == 0) wanted.add(from, to, ahead);
      TILES<Input>[to - from](x + from * inputs + i, inputs, part, some, sums + from * WIDTH, WIDTH,
                              i == 0, ahead);
    }
  }
}

// Rescales some tokens and pads them to whole inputs, in memory that this thread keeps.
const Number* prepared(const Number* x, int64_t from, int64_t to, const Weight& weight,
                       const Rescaling* by) {
  const int64_t numbers = weight.numbers, wide = weight.inputs() * TOGETHER;
  thread_local std::vector<Number> kept;
  if (kept.size() < size_t(TOKENS * wide)) kept.resize(TOKENS * wide);
  for (int64_t i = 0; i < numbers; i += WIDTH)
    for (int64_t token = from; token < to; ++token) {
      const Number* in = x + token * numbers + i;
      Number* out = kept.data() + (token - from) * wide + i;
      const int64_t some = std::min<int64_t>(WIDTH, numbers - i);
      if (by == nullptr) {
        std::copy_n(in, some, out);
        continue;
      }
      const float* vector = by->at(token, i);
      for (int64_t n = 0; n < some; ++n) out[n] = in[n] * vector[n];
    }
  for (int64_t token = 0; token < to - from && wide > numbers; ++token)
    kept[token * wide + numbers] = 0;
  return kept.data();
}

// Adds the bias to the sums of outputs from `left` on and rescales them. The result is not rounded.
void finish(float* sums, int64_t from, int64_t to, int64_t left, const Weight& weight,
            const Scales& scales) {
  const int64_t right = std::min(left + WIDTH, weight.outputs);
  if (weight.bias != nullptr)
    for (int64_t token = 0; token < to - from; ++token)
      for (int64_t o = left; o < right; ++o) sums[token * WIDTH + o - left] += weight.bias[o];
  for (int64_t n = 0; n < scales.count; ++n) {
    const Rescaling& by = scales.outputs[n];
    if (by.start >= right || by.stop <= left) continue;
    round_sums(sums, (to - from) * WIDTH);
    rescale(sums, from, to, left, by);
  }
}

// Computes panel p for some tokens.
void compute(const Weight& weight, const Input* in, Number* y, int64_t from, int64_t to, int64_t p,
             const Scales& scales) {
  const int64_t left = p * WIDTH, right = std::min(left + WIDTH, weight.outputs);
  const Wanted wanted = {scales.outputs, scales.count, from, left, right};
  float sums[TOKENS * WIDTH];
  multiply(in, to - from, weight.panel(left), weight.inputs(), sums, wanted);
  finish(sums, from, to, left, weight, scales);
  for (int64_t token = from; token < to; ++token)
    std::copy_n(sums + (token - from) * WIDTH, right - left, y + token * weight.outputs + left);
}

// Computes panel p of the first half of the outputs as a gate for that panel of the second half.
void compute_gated(const Weight& weight, const Input* in, Number* y, int64_t from, int64_t to,
                   int64_t p, const Scales& scales) {
  static const std::vector<float> ones(WIDTH, 1.0f);
  const int64_t half = weight.outputs / 2, begin = p * WIDTH;
  float halves[2][TOKENS * WIDTH];
  for (int64_t h = 0; h < 2; ++h) {
    const int64_t left = h * half + begin;
    const Wanted wanted = {scales.gated, h == 0 && scales.gated != nullptr, from, begin, begin + WIDTH};
    multiply(in, to - from, weight.panel(left), weight.inputs(), halves[h], wanted);
    finish(halves[h], from, to, left, weight, scales);
  }
  for (int64_t token = 0; token < to - from; ++token) {
    const float *gate = halves[0] + token * WIDTH, *up = halves[1] + token * WIDTH;
    float out[WIDTH];
    const float* vector = scales.gated == nullptr ? ones.data() : scales.gated->at(from + token, begin);
#pragma omp simd
    for (int64_t o = 0; o < WIDTH; ++o) {
      const float opened = rounded(gate[o]);
      const float activated = rounded(opened / (1 + expf(-opened)));
      out[o] = rounded(activated * rounded(up[o])) * vector[o];
    }
    std::copy_n(out, WIDTH, y + (from + token) * half + begin);
  }
}

// The unit of work: a panel for a block of tokens.
struct Piece {
  int64_t block, panel;
};

// The pieces of one thread. A thread that has none left takes pieces of others, whose cores the
// system may have given to another process.
struct alignas(64) Share {
  int64_t first_block, last_block, first_panel, last_panel;
  std::atomic<int64_t> taken{0};

  bool take(Piece& piece) {
    const int64_t wide = last_panel - first_panel;
    const int64_t next = taken.fetch_add(1, std::memory_order_relaxed);
    if (next >= (last_block - first_block) * wide) return false;
    piece = {first_block + next / wide, first_panel + next % wide};
    return true;
  }
};

// Divides panels among threads, and tokens too if there are few panels for each thread.
std::vector<Share> divide(int64_t blocks, int64_t panels, int64_t threads) {
  const int64_t across = std::clamp<int64_t>(panels / 4, 1, threads), down = threads / across;
  std::vector<Share> shares(across * down);
  for (int64_t n = 0; n < across * down; ++n) {
    const int64_t row = n / across, column = n % across;
    shares[n].first_block = blocks * row / down;
    shares[n].last_block = blocks * (row + 1) / down;
    shares[n].first_panel = panels * column / across;
    shares[n].last_panel = panels * (column + 1) / across;
  }
  return shares;
}

}  // namespace

extern "C" int64_t panel_width() { return WIDTH; }

// y[tokens, outputs] = (x * input) * weight + bias, with columns rescaled by `outputs`.
// With `gate`, y[tokens, outputs / 2] = silu(first half of the outputs) * second half * gated.
extern "C" void linear(const Weight* weight, const Number* x, int64_t tokens, Number* y,
                        const Scales* scales, int gate, int threads) {
  const int64_t panels = (weight->outputs + WIDTH - 1) / WIDTH / (gate ? 2 : 1);
  const int64_t blocks = (tokens + TOKENS - 1) / TOKENS;
  if (tokens * weight->outputs * weight->numbers < FEW) threads = 1;
  const bool ready = scales->input == nullptr && weight->numbers % TOGETHER == 0;
  std::vector<Share> shares = divide(blocks, panels, threads);
#pragma omp parallel num_threads(threads)
  {
    const Number* in = nullptr;
    int64_t held = -1;  // The block whose inputs are in `in`.
    for (size_t n = 0; n < shares.size(); ++n) {
      Share& share = shares[(omp_get_thread_num() + n) % shares.size()];
      for (Piece piece; share.take(piece);) {
        const int64_t b = piece.block;
        const int64_t from = tokens * b / blocks, to = tokens * (b + 1) / blocks;
        if (b != held)
          in = ready ? x + from * weight->numbers : prepared(x, from, to, *weight, scales->input);
        held = b;
        (gate ? compute_gated : compute)(*weight, (const Input*)in, y, from, to, piece.panel,
                                         *scales);
      }
    }
  }
}
