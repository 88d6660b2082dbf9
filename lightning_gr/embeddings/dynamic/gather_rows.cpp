// Gathering rows by place, pooling them in bags, and the sums over equal places that are their gradients.
//
// Sums are in the order of positions, each row's by one thread, so no result depends on the number of threads. Functions
// return how many places are out of range; those are passed over. Sizes: N positions, U rows, B bags, D width.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t AHEAD = 8, LINE = 16;      // floats of a cache line
constexpr int64_t PARALLEL = 1 << 14;        // floats; below, threads take longer to start than to work
constexpr int64_t ROWS_A_TASK = 64, COLUMNS_A_TASK = 32;

inline void fetch(const float* row, int64_t D) {
  for (int64_t d = 0; d < std::min<int64_t>(D, 16 * LINE); d += LINE) __builtin_prefetch(row + d);
}

// to := by * from, or to += by * from.
inline void put(float* __restrict to, const float* __restrict from, float by, int64_t D, bool adds) {
  if (adds) {
    for (int64_t d = 0; d < D; ++d) to[d] += by * from[d];
  } else {
    for (int64_t d = 0; d < D; ++d) to[d] = by * from[d];
  }
}

inline bool has(int64_t place, int64_t U) { return place >= 0 && place < U; }

// out (U, D): for each row the sum of scale[i] * row_of(i) over the positions i of that place; scale null is 1.
template <class RowOf>
int64_t add_up(RowOf row_of, const float* scale, const int64_t* inverse, int64_t N, int64_t U, int64_t D, float* out) {
  // A stable counting sort of the positions by place. Afterwards starts[u] is where row u's end.
  std::vector<int64_t> starts(U + 1), order(N);
  int64_t wrong = 0;
  for (int64_t i = 0; i < N; ++i) {
    if (has(inverse[i], U)) ++starts[inverse[i] + 1];
    else ++wrong;
  }
  for (int64_t u = 0; u < U; ++u) starts[u + 1] += starts[u];
  const int64_t num = starts[U];
  for (int64_t i = 0; i < N; ++i)
    if (has(inverse[i], U)) order[starts[inverse[i]]++] = i;

  // Few rows are shared out by columns.
  const int64_t step = U < ROWS_A_TASK * omp_get_max_threads() ? COLUMNS_A_TASK : D;
  const int64_t parts = (D + step - 1) / std::max<int64_t>(step, 1), rows_a_task = parts > 1 ? 1 : ROWS_A_TASK;
#pragma omp parallel for schedule(dynamic, rows_a_task) if (N * D > PARALLEL)
  for (int64_t task = 0; task < U * parts; ++task) {
    const int64_t u = task / parts, first = task % parts * step, size = std::min(step, D - first);
    float* const to = out + u * D + first;
    const int64_t start = u ? starts[u - 1] : 0, end = starts[u];
    if (start == end) std::fill(to, to + size, 0.0f);
    for (int64_t p = start; p < end; ++p) {
      if (p + AHEAD < num) fetch(row_of(order[p + AHEAD]) + first, size);
      put(to, row_of(order[p]) + first, scale ? scale[order[p]] : 1.0f, size, p > start);
    }
  }
  return wrong;
}

}  // namespace

extern "C" {

// out (N, D) := rows[inverse].
int64_t gather(const float* rows, const int64_t* inverse, int64_t N, int64_t U, int64_t D, float* out) {
  int64_t wrong = 0;
#pragma omp parallel for schedule(static) reduction(+ : wrong) if (N * D > PARALLEL)
  for (int64_t i = 0; i < N; ++i) {
    if (i + AHEAD < N && has(inverse[i + AHEAD], U)) fetch(rows + inverse[i + AHEAD] * D, D);
    if (has(inverse[i], U)) std::memcpy(out + i * D, rows + inverse[i] * D, 4 * D);
    else ++wrong;
  }
  return wrong;
}

// out (U, D): for each row the sum of scale[i] * gradients[source[i]] over the positions i of that place; source null is
// i itself, scale null is 1.
int64_t sum(const float* gradients, const int64_t* source, const float* scale, const int64_t* inverse, int64_t N,
            int64_t U, int64_t D, float* out) {
  const auto row_of = [=](int64_t i) { return gradients + (source ? source[i] : i) * D; };
  return add_up(row_of, scale, inverse, N, U, D, out);
}

// out (U, D): for each row the sum of its positions' gradients, which lie in `count` pieces of `sizes` positions.
int64_t sum_pieces(const float* const* pieces, const int64_t* sizes, int64_t count, const int64_t* inverse, int64_t N,
                   int64_t U, int64_t D, float* out) {
  std::vector<const float*> rows;
  rows.reserve(N);
  for (int64_t piece = 0; piece < count; ++piece)
    for (int64_t i = 0; i < sizes[piece]; ++i) rows.push_back(pieces[piece] + i * D);
  return add_up([&](int64_t i) { return rows[i]; }, nullptr, inverse, N, U, D, out);
}

// out (B, D): for each bag the sum of scale[i] * rows[inverse[i]] over its positions offsets[b] ... offsets[b + 1];
// offsets are known to be in order and within N.
int64_t pool(const float* rows, const int64_t* inverse, const float* scale, const int64_t* offsets, int64_t B,
             int64_t N, int64_t U, int64_t D, float* out) {
  int64_t wrong = 0;
#pragma omp parallel for schedule(dynamic, ROWS_A_TASK) reduction(+ : wrong) if (N * D > PARALLEL)
  for (int64_t b = 0; b < B; ++b) {
    float* const to = out + b * D;
    bool adds = false;
    for (int64_t i = offsets[b]; i < offsets[b + 1]; ++i) {
      if (i + AHEAD < N && has(inverse[i + AHEAD], U)) fetch(rows + inverse[i + AHEAD] * D, D);
      if (!has(inverse[i], U)) {
        ++wrong;
        continue;
      }
      put(to, rows + inverse[i] * D, scale ? scale[i] : 1.0f, D, adds);
      adds = true;
    }
    if (!adds) std::fill(to, to + D, 0.0f);
  }
  return wrong;
}

// out (N): the products of rows[inverse[i]] with gradients[source[i]].
int64_t dot(const float* rows, const float* gradients, const int64_t* inverse, const int64_t* source, int64_t N,
            int64_t U, int64_t D, float* out) {
  int64_t wrong = 0;
#pragma omp parallel for schedule(static) reduction(+ : wrong) if (N * D > PARALLEL)
  for (int64_t i = 0; i < N; ++i) {
    if (i + AHEAD < N && has(inverse[i + AHEAD], U)) fetch(rows + inverse[i + AHEAD] * D, D);
    float total = 0;
    if (has(inverse[i], U)) {
      const float *a = rows + inverse[i] * D, *b = gradients + source[i] * D;
#pragma omp simd reduction(+ : total)
      for (int64_t d = 0; d < D; ++d) total += a[d] * b[d];
    } else {
      ++wrong;
    }
    out[i] = total;
  }
  return wrong;
}
}
