// Dot products of queries with the rows that they name, and the two gradients: rows are read where they lie.
//
// Every number is summed by one thread in the order of tokens, so results do not depend on the number of threads.

#include <omp.h>

#include <cstdint>

namespace {

constexpr int64_t AHEAD = 4;      // rows fetched before their turn: they lie anywhere in the table
constexpr int64_t CACHE_LINE = 16;  // floats

inline float dot(const float* a, const float* b, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

inline void add(float* out, float weight, const float* row, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] += weight * row[i];
}

inline const float* row_of(const float* rows, const int64_t* names, int64_t k, int64_t K, int64_t D) {
  if (k + AHEAD < K)
    for (int64_t i = 0; i < D; i += CACHE_LINE) __builtin_prefetch(rows + names[k + AHEAD] * D + i);
  return rows + names[k] * D;
}

}  // namespace

extern "C" {

void dots(const float* queries, const float* rows, const int64_t* indices, float* out, int64_t T, int64_t K,
          int64_t D) {
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < T; ++t)
    for (int64_t k = 0; k < K; ++k) out[t * K + k] = dot(queries + t * D, row_of(rows, indices + t * K, k, K, D), D);
}

void queries_gradient(const float* weights, const float* rows, const int64_t* indices, float* out, int64_t T,
                      int64_t K, int64_t D) {
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < T; ++t)
    for (int64_t k = 0; k < K; ++k) add(out + t * D, weights[t * K + k], row_of(rows, indices + t * K, k, K, D), D);
}

// Each thread passes over all pairs and adds those of its own rows, which a hash spreads evenly.
void rows_gradient(const float* weights, const float* queries, const int64_t* indices, float* out, int64_t T,
                   int64_t K, int64_t D) {
#pragma omp parallel
  {
    const uint64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    for (int64_t t = 0; t < T; ++t)
      for (int64_t k = 0; k < K; ++k) {
        const int64_t row = indices[t * K + k];
        const uint32_t hash = uint32_t(row) * 2654435769u;
        if (hash * threads >> 32 == me) add(out + row * D, weights[t * K + k], queries + t * D, D);
      }
  }
}

}  // extern "C"
