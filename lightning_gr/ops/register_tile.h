// What the matrix loops of CPU operators share: a vector of this processor, and a tile of a product held in registers.

#pragma once

#include <cstdint>
#include <utility>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, MR = 12;
#elif defined(__AVX2__)
constexpr int LANES = 8, MR = 6;
#else
constexpr int LANES = 4, MR = 6;
#endif
constexpr int NR = 2 * LANES;  // columns of a panel: two vectors

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
inline void store(float* p, vec x) { *reinterpret_cast<vec*>(p) = x; }
inline vec all(float x) { return x - vec{}; }  // unlike x + 0, exact for -0 too, so no instruction remains

// C[M][NR] (+)= sum_k A[., k] B[k][NR]; A is read by single elements at row * rs + k * cs.
template <int M>
void tile(float* c, int64_t ldc, const float* a, int64_t rs, int64_t cs, const float* b, int64_t num_k, bool add) {
  vec low[M], high[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    low[m] = add ? load(c + m * ldc) : vec{};
    high[m] = add ? load(c + m * ldc + LANES) : vec{};
  }
  for (int64_t k = 0; k < num_k; ++k) {
    const vec b0 = load(b + k * NR), b1 = load(b + k * NR + LANES);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const vec x = all(a[m * rs + k * cs]);
      low[m] += x * b0;
      high[m] += x * b1;
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    store(c + m * ldc, low[m]);
    store(c + m * ldc + LANES, high[m]);
  }
}

typedef void (*Tile)(float*, int64_t, const float*, int64_t, int64_t, const float*, int64_t, bool);
template <int... M>
constexpr void fill(Tile* tiles, std::integer_sequence<int, M...>) {
  ((tiles[M + 1] = tile<M + 1>), ...);
}
struct Tiles {
  Tile of_rows[MR + 1];
  constexpr Tiles() : of_rows{} { fill(of_rows, std::make_integer_sequence<int, MR>{}); }
};
constexpr Tiles TILES;

}  // namespace
