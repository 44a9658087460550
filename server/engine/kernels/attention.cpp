// Attention of decoding rows over keys and values in strips, in float32: one token for each row.
// KEY_DIM and VALUE_DIM are given by the command line.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

struct Row {
  int64_t start;   // Of its strip, in heads of one token.
  int64_t length;  // Of its strip, in tokens.
  int64_t seen;    // Keys, the new one included.
};

// Turns scores into weights that add up to the sum that is returned.
float exponentials(float* scores, int64_t count) {
  float most = scores[0];
  for (int64_t t = 1; t < count; ++t) most = std::max(most, scores[t]);
  float sum = 0;
  for (int64_t t = 0; t < count; ++t) {
    scores[t] = std::exp(scores[t] - most);
    sum += scores[t];
  }
  return sum;
}

void attend(const float* query, const float* keys, const float* values, float* out,
            float* scores, int64_t count, float scaling) {
  float q[KEY_DIM];
  for (int d = 0; d < KEY_DIM; ++d) q[d] = query[d] * scaling;
  for (int64_t t = 0; t < count; ++t) {
    const float* key = keys + t * KEY_DIM;
    float score = 0;
    for (int d = 0; d < KEY_DIM; ++d) score += q[d] * key[d];
    scores[t] = score;
  }
  const float share = 1 / exponentials(scores, count);
  float sum[VALUE_DIM] = {};
  for (int64_t t = 0; t < count; ++t) {
    const float* value = values + t * VALUE_DIM;
    for (int d = 0; d < VALUE_DIM; ++d) sum[d] += scores[t] * value[d];
  }
  for (int d = 0; d < VALUE_DIM; ++d) out[d] = sum[d] * share;
}

// [heads, rows, dim], each head of one token without gaps.
struct Heads {
  const float* first;
  int64_t head_stride, row_stride;

  const float* at(int64_t head, int64_t row) const {
    return first + head * head_stride + row * row_stride;
  }
};

}  // namespace

// keys and values: a layer's memory, into which each row's new key and value go first, where they
// are given; out: [rows, heads, VALUE_DIM]. window: a row sees so many keys at most; 0: all.
extern "C" void decode(const Heads* query, const Heads* new_key, const Heads* new_value, float* keys,
                       float* values, const Row* rows, float* out, int64_t count, int64_t heads,
                       int64_t kv_heads, float scaling, int64_t window, int threads) {
  const int64_t group = heads / kv_heads;
  int64_t longest = 0;
  for (int64_t r = 0; r < count; ++r) longest = std::max(longest, rows[r].seen);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> scores(longest);
#pragma omp for schedule(static)
    for (int64_t each = 0; each < count * kv_heads; ++each) {
      const int64_t r = each / kv_heads, kv_head = each % kv_heads;
      const Row row = rows[r];
      const int64_t strip = row.start + kv_head * row.length, last = strip + row.seen - 1;
      if (new_key != nullptr) {
        std::copy_n(new_key->at(kv_head, r), KEY_DIM, keys + last * KEY_DIM);
        std::copy_n(new_value->at(kv_head, r), VALUE_DIM, values + last * VALUE_DIM);
      }
      const int64_t first = window > 0 ? std::max<int64_t>(0, row.seen - window) : 0;
      for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
        attend(query->at(head, r), keys + (strip + first) * KEY_DIM,
               values + (strip + first) * VALUE_DIM, out + (r * heads + head) * VALUE_DIM,
               scores.data(), row.seen - first, scaling);
    }
  }
}
