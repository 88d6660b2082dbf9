// Position and time encodings on a CPU: one pass over the tokens forward, one a table backward.
//
// Suffixes as in cpu.py: T tokens, D width. Backward, each thread owns some columns and goes through all tokens in
// their order, so sums do not depend on the number of threads.

#include <omp.h>

#include <algorithm>
#include <cstdint>

extern "C" void add_encodings(int64_t T, int64_t D, int64_t threads, float scale, const float* x, float* out,
                              const int64_t* rows_1, const float* table_1, const int64_t* rows_2,
                              const float* table_2) {
#pragma omp parallel for num_threads(threads) if (T * D > 32768)
  for (int64_t t = 0; t < T; ++t) {
    const float* from = x + t * D;
    float* to = out + t * D;
    const float* first = table_1 ? table_1 + rows_1[t] * D : nullptr;
    const float* second = table_2 ? table_2 + rows_2[t] * D : nullptr;
    if (first && second) {
      for (int64_t d = 0; d < D; ++d) to[d] = scale * from[d] + first[d] + second[d];
    } else if (first) {
      for (int64_t d = 0; d < D; ++d) to[d] = scale * from[d] + first[d];
    } else {
      for (int64_t d = 0; d < D; ++d) to[d] = scale * from[d];
    }
  }
}

// sums[rows[t]] += d_out[t] for every token t.
extern "C" void sum_by_row(int64_t T, int64_t D, int64_t threads, const float* d_out, const int64_t* rows,
                           float* sums) {
  const int64_t parts = std::min<int64_t>(threads, (D + 15) / 16);
#pragma omp parallel for num_threads(threads) if (T * D > 32768)
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = D * part / parts, end = D * (part + 1) / parts;
    for (int64_t t = 0; t < T; ++t) {
      const float* from = d_out + t * D;
      float* to = sums + rows[t] * D;
      for (int64_t d = begin; d < end; ++d) to[d] += from[d];
    }
  }
}
