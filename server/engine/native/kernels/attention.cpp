// Attention over keys and values in strips, for decoding rows and chunks of prompts. Scores and sums
// are float. A token's sums have the same order whether it is decoded or computed in a chunk. KEY_DIM
// and VALUE_DIM are given by the command line.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <utility>
#include <vector>

#include "tile.h"

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t Places __attribute__((vector_size(LANES * 4)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Places{__VA_ARGS__})
#endif

namespace {

constexpr int64_t QUERIES = 64;  // Tokens of a chunk that are computed at a time.
constexpr int64_t KEYS = 512;    // Keys that they attend to at a time.
constexpr int64_t SHARES = 8;    // Least shares of a thread; heads stay together while there are more.
constexpr int64_t KEY_INPUTS = (KEY_DIM + TOGETHER - 1) / TOGETHER;
constexpr int64_t VALUE_PANELS = (VALUE_DIM + WIDTH - 1) / WIDTH;
constexpr int64_t VALUE_WIDTH = VALUE_PANELS * WIDTH;

// Consecutive tokens of a row, as AttentionKernel describes them.
struct Chunk {
  int64_t strip;   // Where the row's strip begins, in heads of one token.
  int64_t length;  // Of the strip, in tokens.
  int64_t start;   // The first token's position in the row.
  int64_t tokens;
  int64_t first;   // The first token's index in the batch.
};

// A tensor [heads, tokens, dim] whose last stride is 1.
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
  int64_t window;  // The most keys that a token sees; 0: all.
  float softcap;   // Scores are capped to this and its negative; 0: not at all.

  int64_t group() const { return heads / kv_heads; }
  // The first key that the token at position `place` of its row sees.
  int64_t first_seen(int64_t place) const {
    return window > 0 ? std::max<int64_t>(0, place + 1 - window) : 0;
  }
};

// Memory that a thread keeps, aligned for a tile's panels.
template <class Item>
class Buffer {
 public:
  Item* at_least(int64_t count) {
    if (kept_ < count) {
      kept_ = (count + 15) / 16 * 16;
      memory_.reset((Item*)std::aligned_alloc(64, kept_ * sizeof(Item)));
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<Item, decltype(&std::free)> memory_{nullptr, std::free};
  int64_t kept_ = 0;
};

struct Scratch {
  Buffer<Input> queries, keys;
  Buffer<float> scores, values, out;
};

// Lanes before `left`, and those from `right` on, become `value`.
inline void cover(Lanes& lanes, int64_t left, int64_t right, float value) {
#pragma omp simd
  for (int64_t l = 0; l < LANES; ++l) lanes[l] = l < left || l >= right ? value : lanes[l];
}

constexpr float LEAST = -87;  // The least argument of exp, which is slow for smaller ones.

// The softmax of a row whose scores come in parts. Its functions are not inlined, because the compiler
// could change the order of arithmetic at each call.
struct Softmax {
  float most = -FLT_MAX, sum = 0;

  // Turns a query's products with the keys `left` to `right` into weights. Products beside them, up
  // to whole Lanes, become zeros. `out`, the weighted sums so far, are scaled to the new maximum.
  __attribute__((noinline)) void take(const Attention& a, float* products, int64_t left,
                                      int64_t right, float* out) {
    float scaling = a.scaling;
    Lanes* const first = (Lanes*)products + left / LANES;
    Lanes* const last = (Lanes*)products + (right - 1) / LANES;
    if (a.softcap > 0) {
      for (float* score = (float*)first; score < (float*)(last + 1); ++score)
        *score = a.softcap * std::tanh(*score * scaling / a.softcap);
      scaling = 1;
    }
    const int64_t before = left % LANES, until = (right - 1) % LANES + 1;
    cover(*first, before, LANES, -FLT_MAX);
    cover(*last, 0, until, -FLT_MAX);
    Lanes tops = *first, sums{};
    for (const Lanes* some = first + 1; some <= last; ++some) tops = *some > tops ? *some : tops;
    float top = most, factor = 0, added = 0;
    for (int64_t l = 0; l < LANES; ++l) top = std::max(top, tops[l]);
    for (Lanes* some = first; some <= last; ++some)
#pragma omp simd
      for (int64_t l = 0; l < LANES; ++l)
        (*some)[l] = std::exp(std::max(((*some)[l] - top) * scaling, LEAST));
    cover(*first, before, LANES, 0);
    cover(*last, 0, until, 0);
    for (const Lanes* some = first; some <= last; ++some) sums += *some;
    for (int64_t l = 0; l < LANES; ++l) added += sums[l];
    if (sum > 0) factor = std::exp((most - top) * scaling);
    sum = sum * factor + added;
    most = top;
    for (int64_t d = 0; d < VALUE_WIDTH; ++d) out[d] *= factor;
  }

  // Divides the weighted sums by the sum of all weights.
  __attribute__((noinline)) void share(const float* sums, Number* out) const {
    const float each = 1 / sum;
    for (int d = 0; d < VALUE_DIM; ++d) out[d] = sums[d] * each;
  }
};

// Copies a query or a key, padded with zeros to whole inputs.
void take_inputs(const Number* numbers, Input* inputs) {
  inputs[KEY_INPUTS - 1] = 0;
  std::copy_n(numbers, KEY_DIM, (Number*)inputs);
}

typedef Vector<Input>::Type Inputs;

// One step of a transposition: exchanges the second row's inputs whose index lacks the bit S with the
// first row's inputs S further on.
template <int S, size_t... J>
inline void exchange(Inputs& first, Inputs& second, std::index_sequence<J...>) {
  const Inputs low = SHUFFLE(first, second, (J & S ? LANES + J - S : J)...);
  second = SHUFFLE(first, second, (J & S ? LANES + J : J + S)...);
  first = low;
}

template <int S = LANES / 2>
inline void transpose(Inputs (&rows)[LANES]) {
#pragma GCC unroll 16
  for (int r = 0; r < LANES; ++r)
    if ((r & S) == 0) exchange<S>(rows[r], rows[r + S], std::make_index_sequence<LANES>());
  if constexpr (S > 1) transpose<S / 2>(rows);
}

// Transposes up to WIDTH keys to [KEY_INPUTS, WIDTH], padded with zeros. `soon`: the keys after them.
void turn_keys(const Number* keys, int64_t count, const Number* soon, Input* panel) {
  typedef Inputs Unaligned __attribute__((aligned(sizeof(Number))));
  constexpr int64_t WHOLE = KEY_DIM / TOGETHER / LANES * LANES;
  const char* next = (const char*)soon;
  for (int64_t left = 0; left < WIDTH; left += LANES) {
    for (int64_t i = 0; i < WHOLE; i += LANES) {
      for (int line = 0; line < LANES * LANES / LINE; ++line, next += LINE * sizeof(float))
        __builtin_prefetch(next, 0, 2);
      Inputs rows[LANES];
#pragma GCC unroll 16
      for (int64_t k = 0; k < LANES; ++k) {
        const Number* key = keys + (left + k) * KEY_DIM + i * TOGETHER;
        rows[k] = left + k < count ? (Inputs) * (const Unaligned*)key : Inputs{};
      }
      transpose(rows);
#pragma GCC unroll 16
      for (int64_t k = 0; k < LANES; ++k) *(Inputs*)(panel + (i + k) * WIDTH + left) = rows[k];
    }
    for (int64_t k = left; k < left + LANES && WHOLE < KEY_INPUTS; ++k) {
      Input key[KEY_INPUTS] = {};
      if (k < count) take_inputs(keys + k * KEY_DIM, key);
      for (int64_t i = WHOLE; i < KEY_INPUTS; ++i) panel[i * WIDTH + k] = key[i];
    }
  }
}

// Converts LANES numbers to float.
inline Lanes widened(const Number* numbers) {
#if defined(BFLOAT16)
  typedef uint16_t Bits __attribute__((vector_size(LANES * 2), aligned(2)));
  return (Lanes)(__builtin_convertvector(*(const Bits*)numbers, PairLanes) << 16);
#else
  return *(const AnyLanes*)numbers;
#endif
}

// Adds `count` values by their weights, [ROWS, KEYS], to `out`, [ROWS, VALUE_WIDTH].
template <int ROWS>
void weigh(const float* weights, const Number* values, int64_t count, float* out) {
  constexpr int VECTORS = (VALUE_DIM + LANES - 1) / LANES, REST = VALUE_DIM % LANES;
  Lanes sums[ROWS][VECTORS];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) sums[r][v] = ((Lanes*)(out + r * VALUE_WIDTH))[v];
  for (int64_t t = 0; t < count; ++t, values += VALUE_DIM) {
#pragma GCC unroll 32
    for (int v = 0; v < VECTORS; ++v) {
      Lanes value{};
      if (REST == 0 || v + 1 < VECTORS)
        value = widened(values + v * LANES);
      else
        for (int d = 0; d < REST; ++d) value[d] = values[v * LANES + d];
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) sums[r][v] += weights[r * KEYS + t] * value;
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) ((Lanes*)(out + r * VALUE_WIDTH))[v] = sums[r][v];
}

// The function for each number of rows. WEIGHED: the most rows whose sums fit in registers.
constexpr void (*WEIGH[])(const float*, const Number*, int64_t, float*) = {
    nullptr, weigh<1>, weigh<2>, weigh<3>, weigh<4>};
constexpr int64_t WEIGHED = std::clamp<int64_t>(TALL * 2 / ((VALUE_DIM + LANES - 1) / LANES), 1, 4);

// Multiplies queries by a panel's keys: [rows, KEYS].
void score(const Input* queries, int64_t rows, const Input* panel, float* products) {
  const Ahead nothing{(const char*)queries, 0};
  for (; rows > 0; rows -= TALL, queries += TALL * KEY_INPUTS, products += TALL * KEYS)
    TILES<Input>[std::min<int64_t>(TALL, rows)](queries, KEY_INPUTS, panel, KEY_INPUTS, products,
                                                KEYS, true, nothing);
}

// Attends with a decoding row's query heads that share one key head.
void decode(const Attention& a, const Chunk& chunk, int64_t kv_head, Scratch& scratch) {
  const int64_t strip = chunk.strip + kv_head * chunk.length, end = chunk.start + 1;
  const int64_t first = a.first_seen(chunk.start), group = a.group();
  Input* queries = scratch.queries.at_least(group * KEY_INPUTS);
  Input* panel = scratch.keys.at_least(KEYS * KEY_INPUTS);
  float* scores = scratch.scores.at_least(group * KEYS);
  float* out = scratch.out.at_least(group * VALUE_WIDTH);
  std::fill_n(out, group * VALUE_WIDTH, 0.0f);
  std::vector<Softmax> softmax(group);
  for (int64_t h = 0; h < group; ++h)
    take_inputs(a.query.at(kv_head * group + h, chunk.first), queries + h * KEY_INPUTS);
  for (int64_t block = first / KEYS * KEYS; block < end; block += KEYS) {
    const int64_t left = std::max<int64_t>(first - block, 0), right = std::min(KEYS, end - block);
    for (int64_t t = left / WIDTH * WIDTH; t < right; t += WIDTH) {
      const Number* keys = a.keys + (strip + block + t) * KEY_DIM;
      // This thread usually computes the next head too.
      const bool more = t + WIDTH < right;
      const Number* soon = more ? keys + WIDTH * KEY_DIM : a.keys + (strip + chunk.length) * KEY_DIM;
      turn_keys(keys, std::min<int64_t>(WIDTH, right - t), soon, panel);
      score(queries, group, panel, scores + t);
    }
    for (int64_t h = 0; h < group; ++h)
      softmax[h].take(a, scores + h * KEYS, left, right, out + h * VALUE_WIDTH);
    const Number* values = a.values + (strip + block + left) * VALUE_DIM;
    for (int64_t h = 0; h < group; h += WEIGHED)
      WEIGH[std::min(WEIGHED, group - h)](scores + h * KEYS + left, values, right - left,
                                          out + h * VALUE_WIDTH);
  }
  Number* result = a.out + (chunk.first * a.heads + kv_head * group) * VALUE_DIM;
  for (int64_t h = 0; h < group; ++h)
    softmax[h].share(out + h * VALUE_WIDTH, result + h * VALUE_DIM);
}

// Copies values to [panel, KEYS, WIDTH numbers], the last panel padded with zeros.
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

// The rows of a chunk's tokens `from` to `to`: each query head of one key head and each token is one.
struct Rows {
  const Attention& a;
  const Chunk& chunk;
  int64_t kv_head, from, to;

  int64_t count() const { return (to - from) * a.group(); }
  int64_t token(int64_t row) const { return from + row / a.group(); }
  int64_t place(int64_t row) const { return chunk.start + token(row); }
  int64_t head(int64_t row) const { return kv_head * a.group() + row % a.group(); }
};

// Adds the keys `block` to `block + count` to the results of rows `begin` to `begin + some`.
void attend_block(const Rows& rows, int64_t begin, int some, int64_t block, int64_t count,
                  const Input* keys, const float* values, Softmax* softmax, float* out) {
  const Attention& a = rows.a;
  const int64_t seen = std::min(count, rows.place(begin + some - 1) + 1 - block);
  if (seen <= 0 || a.first_seen(rows.place(begin)) >= block + count) return;
  Input queries[TALL][KEY_INPUTS];
  alignas(64) float scores[TALL][KEYS];
  for (int r = 0; r < some; ++r)
    take_inputs(a.query.at(rows.head(begin + r), rows.chunk.first + rows.token(begin + r)),
                queries[r]);
  for (int64_t t = 0; t < seen; t += WIDTH)
    score(queries[0], some, keys + t * KEY_INPUTS, scores[0] + t);
  for (int r = 0; r < some; ++r) {
    const int64_t place = rows.place(begin + r);
    const int64_t right = std::clamp<int64_t>(place + 1 - block, 0, seen);
    const int64_t left = std::clamp<int64_t>(a.first_seen(place) - block, 0, right);
    if (left == right) {
      std::fill_n(scores[r], seen, 0.0f);
      continue;
    }
    for (int64_t t = 0; t < left / LANES * LANES; ++t) scores[r][t] = 0;
    for (int64_t t = (right + LANES - 1) / LANES * LANES; t < seen; ++t) scores[r][t] = 0;
    softmax[begin + r].take(a, scores[r], left, right, out + (begin + r) * VALUE_WIDTH);
  }
  const Ahead nothing{(const char*)queries, 0};
  for (int64_t p = 0; p < VALUE_PANELS; ++p)
    TILES<float>[some](scores[0], KEYS, values + p * KEYS * WIDTH, seen,
                out + begin * VALUE_WIDTH + p * WIDTH, VALUE_WIDTH, false, nothing);
}

void prefill(const Rows& rows, Scratch& scratch) {
  const Attention& a = rows.a;
  const int64_t strip = rows.chunk.strip + rows.kv_head * rows.chunk.length;
  const int64_t end = rows.chunk.start + rows.to;
  Input* keys = scratch.keys.at_least(KEYS * KEY_INPUTS);
  float* values = scratch.values.at_least(KEYS * VALUE_WIDTH);
  float* out = scratch.out.at_least(rows.count() * VALUE_WIDTH);
  std::fill_n(out, rows.count() * VALUE_WIDTH, 0.0f);
  std::vector<Softmax> softmax(rows.count());
  // Blocks of keys begin at the same keys for any chunk.
  int64_t block = a.first_seen(rows.chunk.start + rows.from) / KEYS * KEYS;
  for (; block < end; block += KEYS) {
    const int64_t count = std::min(KEYS, end - block);
    for (int64_t t = 0; t < count; t += WIDTH) {
      const Number* some = a.keys + (strip + block + t) * KEY_DIM;
      turn_keys(some, std::min<int64_t>(WIDTH, count - t), some + WIDTH * KEY_DIM,
                keys + t * KEY_INPUTS);
    }
    part_values(a.values + (strip + block) * VALUE_DIM, count, values);
    for (int64_t begin = 0; begin < rows.count(); begin += TALL)
      attend_block(rows, begin, int(std::min<int64_t>(TALL, rows.count() - begin)), block, count,
                   keys, values, softmax.data(), out);
  }
  for (int64_t row = 0; row < rows.count(); ++row) {
    const int64_t place = (rows.chunk.first + rows.token(row)) * a.heads + rows.head(row);
    softmax[row].share(out + row * VALUE_WIDTH, a.out + place * VALUE_DIM);
  }
}

// The unit of work of a thread.
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

// Writes the chunks' new keys and values, [kv_heads, tokens, dim], into a layer's memory. Then each
// token attends to the keys of its row up to its own.
extern "C" void attend(const Heads* query, const Heads* new_keys, const Heads* new_values,
                       Number* keys, Number* values, const Chunk* chunks, Number* out, int64_t count,
                       int64_t heads, int64_t kv_heads, float scaling, int64_t window,
                       float softcap, int threads) {
  const Attention a{*query, keys, values, out, heads, kv_heads, scaling, window, softcap};
  const std::vector<Work> all = divide(chunks, count, kv_heads);
  const int64_t together = std::clamp<int64_t>(all.size() / threads / SHARES, 1, kv_heads);
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
#pragma omp for schedule(dynamic, together)
    for (size_t each = 0; each < all.size(); ++each) {
      const Work& work = all[each];
      if (work.chunk->tokens == 1)
        decode(a, *work.chunk, work.kv_head, scratch);
      else
        prefill({a, *work.chunk, work.kv_head, work.from, work.to}, scratch);
    }
  }
}
