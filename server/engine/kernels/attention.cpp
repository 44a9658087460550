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

}  // namespace

// query: [heads, rows, KEY_DIM] with these strides; keys and values: a layer's memory;
// out: [rows, heads, VALUE_DIM]. window: a row sees so many keys at most; 0: all.
extern "C" void decode(const float* query, int64_t head_stride, int64_t row_stride,
                       const float* keys, const float* values, const Row* rows, float* out,
                       int64_t count, int64_t heads, int64_t kv_heads, float scaling,
                       int64_t window, int threads) {
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
      const int64_t first = window > 0 ? std::max<int64_t>(0, row.seen - window) : 0;
      const int64_t start = row.start + kv_head * row.length + first;
      for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
        attend(query + head * head_stride + r * row_stride, keys + start * KEY_DIM,
               values + start * VALUE_DIM, out + (r * heads + head) * VALUE_DIM, scores.data(),
               row.seen - first, scaling);
    }
  }
}
