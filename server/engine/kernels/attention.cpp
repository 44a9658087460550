// Attention over keys and values in strips: decoding rows and prompts' chunks. Scores and sums are
// float. KEY_DIM and VALUE_DIM are given by the command line.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "number.h"
#include "tile.h"

namespace {

constexpr int64_t QUERIES = 64;  // Tokens of a chunk at a time,
constexpr int64_t KEYS = 512;    // over so many keys at a time.
constexpr int64_t VALUE_PANELS = (VALUE_DIM + WIDTH - 1) / WIDTH;
constexpr int64_t VALUE_WIDTH = VALUE_PANELS * WIDTH;

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
  const Number* first;
  int64_t head_stride, token_stride;

  const Number* at(int64_t head, int64_t token) const {
    return first + head * head_stride + token * token_stride;
  }
};

struct Attention {
  Heads query;
  const Number *keys, *values;  // A layer's memory.
  Number* out;                  // [tokens, heads, VALUE_DIM].
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
  Buffer scores, keys, values, out;
};

// The softmax of a row whose scores come in parts.
struct Softmax {
  float most = -FLT_MAX, sum = 0;

  // Turns the next scores into weights, and says what the earlier ones are to be multiplied by.
  float take(float* scores, int64_t count, float softcap) {
    if (softcap > 0)
      for (int64_t t = 0; t < count; ++t) scores[t] = softcap * std::tanh(scores[t] / softcap);
    const float before = most;
    for (int64_t t = 0; t < count; ++t) most = std::max(most, scores[t]);
    const float factor = std::exp(before - most);
    float added = 0;
    for (int64_t t = 0; t < count; ++t) {
      scores[t] = std::exp(scores[t] - most);
      added += scores[t];
    }
    sum = sum * factor + added;
    return factor;
  }
};

// One query over `count` keys.
void attend_one(const Number* query, const Number* keys, const Number* values, Number* out,
                float* scores, int64_t count, float scaling, float softcap) {
  float q[KEY_DIM];
  for (int d = 0; d < KEY_DIM; ++d) q[d] = query[d] * scaling;
  for (int64_t t = 0; t < count; ++t) {
    const Number* key = keys + t * KEY_DIM;
    float score = 0;
    for (int d = 0; d < KEY_DIM; ++d) score += q[d] * key[d];
    scores[t] = score;
  }
  Softmax softmax;
  softmax.take(scores, count, softcap);
  const float share = 1 / softmax.sum;
  float sum[VALUE_DIM] = {};
  for (int64_t t = 0; t < count; ++t) {
    const Number* value = values + t * VALUE_DIM;
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

// Keys as [panel, KEY_DIM, WIDTH keys], the last panel filled with zeros.
void turn_keys(const Number* keys, int64_t count, float* panels) {
  for (int64_t t = 0; t < count; t += WIDTH) {
    const int64_t some = std::min<int64_t>(WIDTH, count - t);
    float* panel = panels + t * KEY_DIM;
    for (int64_t k = 0; k < WIDTH; ++k)
      for (int d = 0; d < KEY_DIM; ++d)
        panel[d * WIDTH + k] = k < some ? float(keys[(t + k) * KEY_DIM + d]) : 0;
  }
}

// Values as [panel, KEYS, WIDTH numbers], the last panel filled with zeros.
void part_values(const Number* values, int64_t count, float* panels) {
  for (int64_t p = 0; p < VALUE_PANELS; ++p) {
    const int64_t some = std::min<int64_t>(WIDTH, VALUE_DIM - p * WIDTH);
    for (int64_t t = 0; t < count; ++t) {
      const Number* value = values + t * VALUE_DIM + p * WIDTH;
      float* panel = panels + (p * KEYS + t) * WIDTH;
      for (int64_t d = 0; d < WIDTH; ++d) panel[d] = d < some ? float(value[d]) : 0;
    }
  }
}

// The heads that share a key head, of a chunk's tokens `from` to `to`: each is a row.
struct Rows {
  const Attention& a;
  const Chunk& chunk;
  int64_t kv_head, from, to;

  int64_t count() const { return (to - from) * a.group(); }
  int64_t token(int64_t row) const { return from + row / a.group(); }
  int64_t place(int64_t row) const { return chunk.start + token(row); }
  int64_t head(int64_t row) const { return kv_head * a.group() + row % a.group(); }
};

// Rows `begin` to `begin + some` over keys `block` to `block + count`, adding to what they have.
void attend_block(const Rows& rows, int64_t begin, int some, int64_t block, int64_t count,
                  const float* keys, const float* values, Softmax* softmax, float* out) {
  const Attention& a = rows.a;
  const int64_t seen = std::min(count, rows.place(begin + some - 1) + 1 - block);
  if (seen <= 0 || a.first_seen(rows.place(begin)) >= block + count) return;
  float query[TALL][KEY_DIM], scores[TALL][KEYS];
  for (int r = 0; r < some; ++r) {
    const Number* given = a.query.at(rows.head(begin + r), rows.chunk.first + rows.token(begin + r));
    for (int d = 0; d < KEY_DIM; ++d) query[r][d] = given[d] * a.scaling;
  }
  const Ahead nothing{(const char*)query, 0};
  for (int64_t t = 0; t < seen; t += WIDTH)
    TILES<float>[some](query[0], KEY_DIM, keys + t * KEY_DIM, KEY_DIM, scores[0] + t, KEYS, true, nothing);
  for (int r = 0; r < some; ++r) {
    const int64_t place = rows.place(begin + r);
    const int64_t right = std::clamp<int64_t>(place + 1 - block, 0, seen);
    const int64_t left = std::clamp<int64_t>(a.first_seen(place) - block, 0, right);
    std::fill(scores[r], scores[r] + left, 0.0f);
    std::fill(scores[r] + right, scores[r] + seen, 0.0f);
    if (left == right) continue;
    const float factor = softmax[begin + r].take(scores[r] + left, right - left, a.softcap);
    for (int64_t d = 0; d < VALUE_WIDTH; ++d) out[(begin + r) * VALUE_WIDTH + d] *= factor;
  }
  for (int64_t p = 0; p < VALUE_PANELS; ++p)
    TILES<float>[some](scores[0], KEYS, values + p * KEYS * WIDTH, seen,
                out + begin * VALUE_WIDTH + p * WIDTH, VALUE_WIDTH, false, nothing);
}

void prefill(const Rows& rows, Scratch& scratch) {
  const Attention& a = rows.a;
  const int64_t strip = rows.chunk.strip + rows.kv_head * rows.chunk.length;
  const int64_t end = rows.chunk.start + rows.to;
  float* keys = scratch.keys.at_least(KEYS * KEY_DIM);
  float* values = scratch.values.at_least(KEYS * VALUE_WIDTH);
  float* out = scratch.out.at_least(rows.count() * VALUE_WIDTH);
  std::fill_n(out, rows.count() * VALUE_WIDTH, 0.0f);
  std::vector<Softmax> softmax(rows.count());
  // Blocks of keys lie where they lie for any chunk.
  int64_t block = a.first_seen(rows.chunk.start + rows.from) / KEYS * KEYS;
  for (; block < end; block += KEYS) {
    const int64_t count = std::min(KEYS, end - block);
    turn_keys(a.keys + (strip + block) * KEY_DIM, count, keys);
    part_values(a.values + (strip + block) * VALUE_DIM, count, values);
    for (int64_t begin = 0; begin < rows.count(); begin += TALL)
      attend_block(rows, begin, int(std::min<int64_t>(TALL, rows.count() - begin)), block, count,
                   keys, values, softmax.data(), out);
  }
  for (int64_t row = 0; row < rows.count(); ++row) {
    const int64_t place = (rows.chunk.first + rows.token(row)) * a.heads + rows.head(row);
    const float share = 1 / softmax[row].sum;
    for (int d = 0; d < VALUE_DIM; ++d)
      a.out[place * VALUE_DIM + d] = out[row * VALUE_WIDTH + d] * share;
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
                       Number* keys, Number* values, const Chunk* chunks, Number* out, int64_t count,
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
        prefill({a, *work.chunk, work.kv_head, work.from, work.to}, scratch);
    }
  }
}
