// Rows in chunks: gather, scatter, counting, rounding, and the optimisers' steps where the rows lie.
//
// A row's number is its chunk (the high bits) and its place in there (the `shift` low bits); `chunks` holds addresses.
// Rows of -1 are read as zeros and never written. Functions return how many other numbers are out of range; those are
// passed over. A row is one thread's work, so that no result depends on the number of threads. Memory is asked for well
// before it is used, since almost every row of a large table misses the caches.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t AHEAD = 8, LINE = 64;
constexpr int64_t PARALLEL_BYTES = 1 << 16;  // below, threads take longer to start than to work
constexpr int64_t FP32 = 0, BF16 = 1, FP16 = 2;
constexpr int64_t ROWWISE_ADAGRAD = 0, ADAGRAD = 1, ADAM = 2, SGD = 3, MOMENTUM = 4;

struct Chunks {
  const int64_t* pointers;
  int64_t size, shift, row_bytes;  // size: rows in all chunks

  bool has(int64_t row) const { return row >= 0 && row < size; }

  char* at(int64_t row) const {
    return (char*)pointers[row >> shift] + (row & ((int64_t(1) << shift) - 1)) * row_bytes;
  }

  template <int WRITE>
  void fetch(const int64_t* rows, int64_t i, int64_t N) const {
    if (i + AHEAD >= N || !has(rows[i + AHEAD])) return;
    const char* row = at(rows[i + AHEAD]);
    for (int64_t b = 0; b < std::min<int64_t>(row_bytes, 16 * LINE); b += LINE) __builtin_prefetch(row + b, WRITE);
  }
};

// ---- random bits: as counter_random.counter_bits(seed, step, column) ------------------------------------------------

constexpr uint64_t GAMMA = 0x9E3779B97F4A7C15ull;

inline uint64_t mix64(uint64_t x) {
  x ^= x >> 33;
  x *= 0xFF51AFD7ED558CCDull;
  x ^= x >> 33;
  x *= 0xC4CEB9FE1A85EC53ull;
  return x ^ (x >> 33);
}

inline uint64_t with_part(uint64_t state, uint64_t mixed_part) { return mix64(state * 31 + GAMMA + mixed_part); }

// ---- 16-bit numbers --------------------------------------------------------------------------------------------------

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

template <int64_t TYPE>
inline float widened(uint16_t x) {
  if (TYPE == BF16) return float_of(uint32_t(x) << 16);
  // The exponent is set right by a product, which normalises small numbers too; infinity and NaN keep the highest one.
  const uint32_t sign = uint32_t(x & 0x8000) << 16, rest = uint32_t(x & 0x7FFF) << 13;
  const uint32_t magnitude = bits_of(float_of(rest) * 0x1p112f);
  return float_of(sign | (rest >= 0x0F800000 ? rest | 0x7F800000 : magnitude));
}

// Of the two neighbours in the narrow type the upper one where `uniform` (24 bits) is below the place between them, or,
// beyond the largest finite number and if not STOCHASTIC, the nearest one, the even one of two.
template <int64_t TYPE, bool STOCHASTIC>
inline uint16_t narrowed(float x, uint32_t uniform) {
  constexpr uint32_t INFINITE = TYPE == BF16 ? 0x7F80 : 0x7C00, QUIET = TYPE == BF16 ? 0x40 : 0x200;
  constexpr uint32_t LARGEST = TYPE == BF16 ? 0x7F7F0000 : 0x477FE000;
  constexpr int32_t HALF = 1 << 29;
  const uint32_t magnitude = bits_of(x) & 0x7FFFFFFF, sign = (bits_of(x) >> 16) & 0x8000;
  uint32_t lower;
  int32_t place;  // between the neighbours, of 2^30; the last bit is set where there would be more. In integers and
                  // by masks, since compilers do not vectorise choices between floats that might trap.
  if (TYPE == BF16) {
    lower = magnitude >> 16;
    place = int32_t(magnitude & 0xFFFF) << 14;
  } else {
    const uint32_t small = magnitude < 0x38800000 ? ~0u : 0;  // a mask: subnormal in fp16
    const float scaled = float_of(magnitude & small) * 0x1p24f;
    const int32_t floor = int32_t(scaled);
    const float rest = (scaled - float(floor)) * 0x1p30f;
    const int32_t whole = int32_t(rest);
    const uint32_t small_place = whole | int32_t(bits_of(float(whole)) != bits_of(rest));
    lower = (uint32_t(floor) & small) | (((magnitude >> 13) - (112 << 10)) & ~small);
    place = int32_t((small_place & small) | ((magnitude & 0x1FFF) << 17 & ~small));
  }
  const uint32_t nearest = place + int32_t(lower & 1) > HALF, drawn = int32_t(uniform << 6) < place;
  lower += STOCHASTIC && magnitude <= LARGEST ? drawn : nearest;
  lower = lower < INFINITE ? lower : INFINITE;
  lower = magnitude > 0x7F800000 ? INFINITE | QUIET : lower;
  return uint16_t(sign | lower);
}

// Writes rows of the narrow type; one for each thread.
class Rounding {
 public:
  Rounding(const int64_t* seeds, int64_t step, int64_t D) : seeds_(seeds), D_(D), uniform_(D), columns_(seeds ? D : 0) {
    step_ = mix64(uint64_t(step) + GAMMA);
    for (int64_t d = 0; d < int64_t(columns_.size()); ++d) columns_[d] = mix64(uint64_t(d) + GAMMA);
  }

  template <int64_t TYPE>
  void store(const float* from, uint16_t* to, int64_t i) {
    const int64_t D = D_;
    uint32_t* const uniform = uniform_.data();
    const uint64_t* const columns = columns_.data();
    if (!seeds_) {
      for (int64_t d = 0; d < D; ++d) to[d] = narrowed<TYPE, false>(from[d], 0);
      return;
    }
    const uint64_t state = with_part(with_part(0, mix64(uint64_t(seeds_[i]) + GAMMA)), step_);
    for (int64_t d = 0; d < D; ++d) uniform[d] = uint32_t(with_part(state, columns[d]) >> 40);
    for (int64_t d = 0; d < D; ++d) to[d] = narrowed<TYPE, true>(from[d], uniform[d]);
  }

 private:
  const int64_t* seeds_;
  int64_t D_;
  uint64_t step_;
  std::vector<uint32_t> uniform_;
  std::vector<uint64_t> columns_;
};

// ---- optimisers ------------------------------------------------------------------------------------------------------

struct Settings {
  double lr, eps, beta1, beta2, momentum, weight_decay;
};

// One step on a row of D values `w` with gradient `g` and state `s`.
template <int64_t KIND>
inline void step_row(float* __restrict w, float* __restrict s, const float* __restrict g, int64_t D,
                     const Settings& of) {
  const float keep = float(1 - of.lr * of.weight_decay), lr = float(of.lr), eps = float(of.eps);
  if (KIND == ROWWISE_ADAGRAD) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t d = 0; d < D; ++d) squares += g[d] * g[d];
    s[0] += squares / D;
    const float rate = lr / (std::sqrt(s[0]) + eps);
    // Without a gradient nothing moves, even where eps is 0.
    for (int64_t d = 0; d < D; ++d) w[d] = w[d] * keep - (g[d] == 0 ? 0 : rate * g[d]);
  } else if (KIND == ADAGRAD) {
    for (int64_t d = 0; d < D; ++d) {
      s[d] += g[d] * g[d];
      const float move = lr * g[d] / (std::sqrt(s[d]) + eps);
      w[d] = w[d] * keep - (g[d] == 0 ? 0 : move);
    }
  } else if (KIND == ADAM) {
    float *m = s, *v = s + D;
    const double steps = s[2 * D] += 1;
    const float beta1 = float(of.beta1), beta2 = float(of.beta2);
    const float rest1 = float(1 - of.beta1), rest2 = float(1 - of.beta2);  // of a float they would be less exact
    const float rate = float(of.lr / (1 - std::pow(of.beta1, steps)));
    const float correction = float(1 / (1 - std::pow(of.beta2, steps)));
    for (int64_t d = 0; d < D; ++d) {
      m[d] = beta1 * m[d] + rest1 * g[d];
      v[d] = beta2 * v[d] + rest2 * (g[d] * g[d]);
      const float move = rate * m[d] / (std::sqrt(v[d] * correction) + eps);
      w[d] = w[d] * keep - (m[d] == 0 ? 0 : move);
    }
  } else if (KIND == SGD) {
    for (int64_t d = 0; d < D; ++d) w[d] = w[d] * keep - lr * g[d];
  } else {
    const float momentum = float(of.momentum);
    for (int64_t d = 0; d < D; ++d) {
      s[d] = momentum * s[d] + g[d];
      w[d] = w[d] * keep - lr * s[d];
    }
  }
}

template <int64_t KIND, int64_t TYPE>
int64_t step_rows(const Chunks& values, const Chunks& state, const int64_t* value_rows, const int64_t* state_rows,
                  const float* grads, int64_t N, int64_t D, const Settings& of, const int64_t* seeds, int64_t step) {
  int64_t wrong = 0;
#pragma omp parallel reduction(+ : wrong) if (N * D * 4 > PARALLEL_BYTES)
  {
    std::vector<float> wide(TYPE == FP32 ? 0 : D);
    Rounding rounding(TYPE == FP32 ? nullptr : seeds, step, TYPE == FP32 ? 0 : D);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < N; ++i) {
      values.fetch<1>(value_rows, i, N);
      if (state.row_bytes) state.fetch<1>(state_rows, i, N);
      if (value_rows[i] == -1) continue;
      if (!values.has(value_rows[i]) || !state.has(state_rows[i])) {
        ++wrong;
        continue;
      }
      float* const s = (float*)state.at(state_rows[i]);
      if (TYPE == FP32) {
        step_row<KIND>((float*)values.at(value_rows[i]), s, grads + i * D, D, of);
      } else {
        uint16_t* const row = (uint16_t*)values.at(value_rows[i]);
        float* const w = wide.data();
        for (int64_t d = 0; d < D; ++d) w[d] = widened<TYPE>(row[d]);
        step_row<KIND>(w, s, grads + i * D, D, of);
        rounding.store<TYPE>(w, row, i);
      }
    }
  }
  return wrong;
}

}  // namespace

extern "C" {

// out (N, row_bytes): the rows; a row of -1 is zeros, or left as it is if `keeps`.
int64_t gather(const int64_t* chunks, int64_t size, int64_t shift, int64_t row_bytes, const int64_t* rows, int64_t N,
               char* out, int64_t keeps) {
  const Chunks of{chunks, size, shift, row_bytes};
  int64_t wrong = 0;
#pragma omp parallel for schedule(static) reduction(+ : wrong) if (N * row_bytes > PARALLEL_BYTES)
  for (int64_t i = 0; i < N; ++i) {
    of.fetch<0>(rows, i, N);
    if (of.has(rows[i])) {
      std::memcpy(out + i * row_bytes, of.at(rows[i]), row_bytes);
    } else {
      wrong += rows[i] != -1;
      if (!keeps) std::memset(out + i * row_bytes, 0, row_bytes);
    }
  }
  return wrong;
}

// The rows, which are distinct, become those of `from` (N, row_bytes), or zeros where it is null.
int64_t scatter(const int64_t* chunks, int64_t size, int64_t shift, int64_t row_bytes, const int64_t* rows, int64_t N,
                const char* from) {
  const Chunks of{chunks, size, shift, row_bytes};
  int64_t wrong = 0;
#pragma omp parallel for schedule(static) reduction(+ : wrong) if (N * row_bytes > PARALLEL_BYTES)
  for (int64_t i = 0; i < N; ++i) {
    of.fetch<1>(rows, i, N);
    if (!of.has(rows[i])) {
      wrong += rows[i] != -1;
    } else if (from) {
      std::memcpy(of.at(rows[i]), from + i * row_bytes, row_bytes);
    } else {
      std::memset(of.at(rows[i]), 0, row_bytes);
    }
  }
  return wrong;
}

// Metadata are three int64: count, last step, last time. A row may occur several times.
int64_t touch(const int64_t* chunks, int64_t size, int64_t shift, const int64_t* rows, int64_t N, const int64_t* counts,
              int64_t step, int64_t time) {
  const Chunks of{chunks, size, shift, 24};
  int64_t wrong = 0;
#pragma omp parallel for schedule(static) reduction(+ : wrong) if (N * 24 > PARALLEL_BYTES)
  for (int64_t i = 0; i < N; ++i) {
    of.fetch<1>(rows, i, N);
    if (!of.has(rows[i])) {
      wrong += rows[i] != -1;
      continue;
    }
    int64_t* const row = (int64_t*)of.at(rows[i]);
    int64_t before;
#pragma omp atomic
    row[0] += counts[i];
#pragma omp atomic write
    row[1] = step;
#pragma omp atomic read
    before = row[2];
    if (before < time) {  // whoever else writes here writes the same
#pragma omp atomic write
      row[2] = time;
    }
  }
  return wrong;
}

// values (N, D) in the 16-bit type, stochastically by (seed, step, column).
int64_t round_rows(const float* values, uint16_t* out, int64_t N, int64_t D, int64_t type, const int64_t* seeds,
                   int64_t step) {
#pragma omp parallel if (N * D * 4 > PARALLEL_BYTES)
  {
    Rounding rounding(seeds, step, D);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < N; ++i) {
      if (type == BF16) rounding.store<BF16>(values + i * D, out + i * D, i);
      else rounding.store<FP16>(values + i * D, out + i * D, i);
    }
  }
  return 0;
}

// One step of an optimiser on distinct rows, whose values and state may have different numbers.
int64_t update(const int64_t* value_chunks, int64_t value_size, const int64_t* state_chunks, int64_t state_size,
               int64_t shift, const int64_t* value_rows, const int64_t* state_rows, const float* grads, int64_t N,
               int64_t D, int64_t S, int64_t type, int64_t kind, double lr, double eps, double beta1, double beta2,
               double momentum, double weight_decay, const int64_t* seeds, int64_t step) {
  const Chunks values{value_chunks, value_size, shift, D * (type == FP32 ? 4 : 2)};
  const Chunks state{state_chunks, state_size, shift, S * 4};
  const Settings of{lr, eps, beta1, beta2, momentum, weight_decay};
  const auto run = [&](auto step_of_kind) {
    return step_of_kind(values, state, value_rows, state_rows, grads, N, D, of, seeds, step);
  };
#define BY_TYPE(KIND)                                                                       \
  case KIND:                                                                                \
    return run(type == FP32 ? step_rows<KIND, FP32>                                         \
                            : (type == BF16 ? step_rows<KIND, BF16> : step_rows<KIND, FP16>))
  switch (kind) {
    BY_TYPE(ROWWISE_ADAGRAD);
    BY_TYPE(ADAGRAD);
    BY_TYPE(ADAM);
    BY_TYPE(SGD);
    BY_TYPE(MOMENTUM);
  }
#undef BY_TYPE
  return N;
}
}
