// Attention over keys and values in strips, in float32: decoding rows and prompts' chunks.
// KEY_DIM and VALUE_DIM are given by the command line.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "tile.h"

namespace {

constexpr int64_t QUERIES = 64;  // Tokens of a chunk at a time.
constexpr int64_t VALUE_PANELS = (VALUE_DIM + WIDTH - 1) / WIDTH;

// Tokens of a row that are computed together.
struct Chunk {
  int64_t strip;   // Where the row's begins, in heads of one token.
  int64_t length;  // Of the strip, in tokens.
  int64_t start;   // The first token's place in the row.
  int64_t tokens;
  int64_t first;   // The first token's place in the batch.
};

// [heads, tokens, dim], each head of one token without gaps.
struct Heads {
  const float* first;
  int64_t head_stride, token_stride;

  const float* at(int64_t head, int64_t token) const {
    return first + head * head_stride + token * token_stride;
  }
};

struct Attention {
  Heads query;
  const float *keys, *values;  // A layer's memory.
  float* out;                  // [tokens, heads, VALUE_DIM].
  int64_t heads, kv_heads;
  float scaling;
  int64_t window;  // A token sees so many keys at most; 0: all.
  float softcap;   // Scores lie between it and its opposite; 0: anywhere.

  int64_t group() const { return heads / kv_heads; }
  // The first key that the token at a row's `place` sees.
  int64_t first_seen(int64_t place) const {
    return window > 0 ? std::max<int64_t>(0, place + 1 - window) : 0;
  }
};

// Memory that a thread keeps, aligned for a tile's panels.
class Buffer {
 public:
  float* at_least(int64_t count) {
    if (kept_ < count) {
      kept_ = (count + 15) / 16 * 16;
      memory_.reset((float*)std::aligned_alloc(64, kept_ * sizeof(float)));
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<float, decltype(&std::free)> memory_{nullptr, std::free};
  int64_t kept_ = 0;
};

struct Scratch {
  Buffer scores, keys, values;
};

// Turns scores into weights that add up to the sum that is returned.
float exponentials(float* scores, int64_t count, float softcap) {
  if (softcap > 0)
    for (int64_t t = 0; t < count; ++t) scores[t] = softcap * std::tanh(scores[t] / softcap);
  float most = scores[0];
  for (int64_t t = 1; t < count; ++t) most = std::max(most, scores[t]);
  float sum = 0;
  for (int64_t t = 0; t < count; ++t) {
    scores[t] = std::exp(scores[t] - most);
    sum += scores[t];
  }
  return sum;
}

// One query over `count` keys.
void attend_one(const float* query, const float* keys, const float* values, float* out,
                float* scores, int64_t count, float scaling, float softcap) {
  float q[KEY_DIM];
  for (int d = 0; d < KEY_DIM; ++d) q[d] = query[d] * scaling;
  for (int64_t t = 0; t < count; ++t) {
    const float* key = keys + t * KEY_DIM;
    float score = 0;
    for (int d = 0; d < KEY_DIM; ++d) score += q[d] * key[d];
    scores[t] = score;
  }
  const float share = 1 / exponentials(scores, count, softcap);
  float sum[VALUE_DIM] = {};
  for (int64_t t = 0; t < count; ++t) {
    const float* value = values + t * VALUE_DIM;
    for (int d = 0; d < VALUE_DIM; ++d) sum[d] += scores[t] * value[d];
  }
  for (int d = 0; d < VALUE_DIM; ++d) out[d] = sum[d] * share;
}

// The heads of a chunk's only token that share a key head.
void decode(const Attention& a, const Chunk& chunk, int64_t kv_head, Scratch& scratch) {
  const int64_t strip = chunk.strip + kv_head * chunk.length, first = a.first_seen(chunk.start);
  const int64_t count = chunk.start + 1 - first;
  float* scores = scratch.scores.at_least(count);
  for (int64_t head = kv_head * a.group(); head < (kv_head + 1) * a.group(); ++head)
    attend_one(a.query.at(head, chunk.first), a.keys + (strip + first) * KEY_DIM,
               a.values + (strip + first) * VALUE_DIM,
               a.out + (chunk.first * a.heads + head) * VALUE_DIM, scores, count, a.scaling,
               a.softcap);
}

// Keys `first` to `first + count` as [panel, KEY_DIM, WIDTH keys]; none: zeros.
void turn_keys(const float* keys, int64_t first, int64_t count, float* panels) {
  for (int64_t t = 0; t < count; t += WIDTH) {
    const int64_t some = std::min<int64_t>(WIDTH, count - t);
    float* panel = panels + t * KEY_DIM;
    for (int64_t k = 0; k < WIDTH; ++k)
      for (int d = 0; d < KEY_DIM; ++d)
        panel[d * WIDTH + k] = k < some ? keys[(first + t + k) * KEY_DIM + d] : 0;
  }
}

// Values `first` to `first + count` as [panel, count, WIDTH numbers]; none: zeros.
void gather_values(const float* values, int64_t first, int64_t count, float* panels) {
  for (int64_t p = 0; p < VALUE_PANELS; ++p) {
    const int64_t some = std::min<int64_t>(WIDTH, VALUE_DIM - p * WIDTH);
    for (int64_t t = 0; t < count; ++t) {
      const float* value = values + (first + t) * VALUE_DIM + p * WIDTH;
      float* panel = panels + (p * count + t) * WIDTH;
      for (int64_t d = 0; d < WIDTH; ++d) panel[d] = d < some ? value[d] : 0;
    }
  }
}

// The heads that share a key head, of a chunk's tokens `from` to `to`: rows of small products.
void prefill(const Attention& a, const Chunk& chunk, int64_t kv_head, int64_t from, int64_t to,
             Scratch& scratch) {
  const int64_t strip = chunk.strip + kv_head * chunk.length;
  // Keys are counted from the first that any of the tokens sees.
  const int64_t first = a.first_seen(chunk.start + from), count = chunk.start + to - first;
  const int64_t padded = (count + WIDTH - 1) / WIDTH * WIDTH;
  float* keys = scratch.keys.at_least(padded * KEY_DIM);
  float* values = scratch.values.at_least(count * VALUE_PANELS * WIDTH);
  float* scores = scratch.scores.at_least(padded * TALL);
  turn_keys(a.keys + strip * KEY_DIM, first, count, keys);
  gather_values(a.values + strip * VALUE_DIM, first, count, values);

  const int64_t group = a.group(), rows = (to - from) * group;
  for (int64_t begin = 0; begin < rows; begin += TALL) {
    const int some = int(std::min<int64_t>(TALL, rows - begin));
    const auto token = [&](int r) { return from + (begin + r) / group; };
    const auto head = [&](int r) { return kv_head * group + (begin + r) % group; };
    float query[TALL][KEY_DIM], out[TALL][VALUE_PANELS * WIDTH], shares[TALL];
    for (int r = 0; r < some; ++r) {
      const float* given = a.query.at(head(r), chunk.first + token(r));
      for (int d = 0; d < KEY_DIM; ++d) query[r][d] = given[d] * a.scaling;
    }
    const int64_t seen = chunk.start + token(some - 1) + 1 - first;
    const Ahead nothing{(const char*)query, 0};
    for (int64_t t = 0; t < seen; t += WIDTH)
      TILES[some](query[0], KEY_DIM, keys + t * KEY_DIM, KEY_DIM, scores + t, padded, true,
                  nothing);
    for (int r = 0; r < some; ++r) {
      const int64_t place = chunk.start + token(r);
      const int64_t left = a.first_seen(place) - first, right = place + 1 - first;
      float* row = scores + r * padded;
      shares[r] = 1 / exponentials(row + left, right - left, a.softcap);
      std::fill(row, row + left, 0.0f);
      std::fill(row + right, row + seen, 0.0f);
    }
    for (int64_t p = 0; p < VALUE_PANELS; ++p)
      TILES[some](scores, padded, values + p * count * WIDTH, seen, out[0] + p * WIDTH,
                  VALUE_PANELS * WIDTH, true, nothing);
    for (int r = 0; r < some; ++r) {
      float* taken = a.out + ((chunk.first + token(r)) * a.heads + head(r)) * VALUE_DIM;
      for (int d = 0; d < VALUE_DIM; ++d) taken[d] = out[r][d] * shares[r];
    }
  }
}

// What one thread computes at a time.
struct Work {
  const Chunk* chunk;
  int64_t kv_head, from, to;
};

std::vector<Work> divide(const Chunk* chunks, int64_t count, int64_t kv_heads) {
  std::vector<Work> all;
  all.reserve(count * kv_heads);
  for (const Chunk* chunk = chunks; chunk < chunks + count; ++chunk)
    for (int64_t kv_head = 0; kv_head < kv_heads; ++kv_head)
      for (int64_t from = 0; from < chunk->tokens; from += QUERIES)
        all.push_back({chunk, kv_head, from, std::min(from + QUERIES, chunk->tokens)});
  return all;
}

}  // namespace

// Writes the chunks' new keys and values, [kv_heads, tokens, dim], into a layer's memory; then each
// token attends to what its row has up to itself.
extern "C" void attend(const Heads* query, const Heads* new_keys, const Heads* new_values,
                       float* keys, float* values, const Chunk* chunks, float* out, int64_t count,
                       int64_t heads, int64_t kv_heads, float scaling, int64_t window,
                       float softcap, int threads) {
  const Attention a{*query, keys, values, out, heads, kv_heads, scaling, window, softcap};
  const std::vector<Work> all = divide(chunks, count, kv_heads);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t each = 0; each < count * kv_heads; ++each) {
      const Chunk& chunk = chunks[each / kv_heads];
      const int64_t kv_head = each % kv_heads;
      int64_t place = chunk.strip + kv_head * chunk.length + chunk.start;
      for (int64_t t = chunk.first; t < chunk.first + chunk.tokens; ++t, ++place) {
        std::copy_n(new_keys->at(kv_head, t), KEY_DIM, keys + place * KEY_DIM);
        std::copy_n(new_values->at(kv_head, t), VALUE_DIM, values + place * VALUE_DIM);
      }
    }
    thread_local Scratch scratch;
#pragma omp for schedule(dynamic)
    for (size_t each = 0; each < all.size(); ++each) {
      const Work& work = all[each];
      if (work.chunk->tokens == 1)
        decode(a, *work.chunk, work.kv_head, scratch);
      else
        prefill(a, *work.chunk, work.kv_head, work.from, work.to, scratch);
    }
  }
}
