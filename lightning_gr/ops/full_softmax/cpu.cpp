// Exponentials of a tile of logits, in place: one sweep over the memory, a row at a time, which stays in the cache.
//
// A row of a tile (M tokens, C items) is one thread's work, summed in an order that depends on its length alone.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int CHAINS = 4;  // vectors side by side, so that none waits for the one before
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int64_t lvec __attribute__((vector_size(8 * LANES), aligned(8), may_alias));

// e^x for x up to 88, 0 below -87, by powers of two and a polynomial of degree 6 (relative error 1e-7). NaN stays.
inline vec exponential(vec x) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const vec shifted = x * 1.44269504f + shift, n = shifted - shift;
  const vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const vec power = (vec)(((ivec)shifted << 23) + (127 << 23));  // the bits of 1.5 * 2^23 fall out above
  return x < -87.0f ? vec{} : p * power;
}

// Logits of a row with weights, and -inf where an item has the excluded id.
struct Row {
  float* logits;
  const float* log_weights;  // null where there are none
  const int64_t* ids;        // null where nothing is excluded
  int64_t excluded, size;

  // f(logits of LANES items, their place), which are stored again; the last ones are filled up with -inf.
  template <class F>
  void each(F f) {
    int64_t c = 0;
    for (; c + LANES <= size; c += LANES) {
      const vec x = f(*(const vec*)(logits + c), c);
      *(vec*)(logits + c) = x;
    }
    if (c == size) return;
    vec last = vec{} + NOTHING;
    std::memcpy(&last, logits + c, 4 * (size - c));
    last = f(last, c);
    std::memcpy(logits + c, &last, 4 * (size - c));
  }

  vec complete(vec x, int64_t c) const {
    const int64_t left = std::min<int64_t>(LANES, size - c);
    if (log_weights) {
      vec w = {};
      if (left == LANES) w = *(const vec*)(log_weights + c);
      else std::memcpy(&w, log_weights + c, 4 * left);
      x += w;
    }
    if (ids) {
      lvec id = {};
      if (left == LANES) id = *(const lvec*)(ids + c);
      else std::memcpy(&id, ids + c, 8 * left);
      x = __builtin_convertvector(id == excluded, ivec) ? vec{} + NOTHING : x;
    }
    return x;
  }
};

inline float folded(const vec* chains, bool largest) {
  float all = chains[0][0];
  for (int i = 1; i < CHAINS * LANES; ++i) {
    const float x = chains[i / LANES][i % LANES];
    all = largest ? std::max(all, x) : all + x;
  }
  return all;
}

}  // namespace

extern "C" {

// logits := exp(logits - maximum); maximum (M) and sum (M), of earlier tiles of the same rows, now cover this one too.
void add_exponentials(float* logits, const float* log_weights, const int64_t* ids, const int64_t* excluded,
                      float* maximum, float* sum, int64_t M, int64_t C) {
#pragma omp parallel for schedule(static)
  for (int64_t m = 0; m < M; ++m) {
    Row row{logits + m * C, log_weights, ids, ids ? excluded[m] : 0, C};
    vec chains[CHAINS];
    std::fill(chains, chains + CHAINS, vec{} + maximum[m]);
    const bool plain = !log_weights && !ids;
    row.each([&](vec x, int64_t c) {
      if (!plain) x = row.complete(x, c);
      vec& high = chains[c / LANES % CHAINS];
      high = x > high ? x : high;
      return x;
    });
    const float high = folded(chains, true);
    std::fill(chains, chains + CHAINS, vec{});
    row.each([&](vec x, int64_t c) {
      x = exponential(x - high);
      chains[c / LANES % CHAINS] += x;
      return x;
    });
    sum[m] = sum[m] * std::exp(maximum[m] - high) + folded(chains, false);
    maximum[m] = high;
  }
}

// logits := exp(logits - total) * factor, by rows.
void slopes(float* logits, const float* log_weights, const int64_t* ids, const int64_t* excluded, const float* total,
            const float* factor, int64_t M, int64_t C) {
#pragma omp parallel for schedule(static)
  for (int64_t m = 0; m < M; ++m) {
    Row row{logits + m * C, log_weights, ids, ids ? excluded[m] : 0, C};
    const bool plain = !log_weights && !ids;
    row.each([&](vec x, int64_t c) {
      if (!plain) x = row.complete(x, c);
      return exponential(x - total[m]) * factor[m];
    });
  }
}
}
