// FuXi's position and time maps of some rows of one sequence on a CPU, and the sums that the tables' gradients are.
//
// Maps are (H, R, C): heads, rows, columns; tables are (H, P) and (H, K). What heads share of a pair's time map, the
// logarithm of its gap or its bucket, is computed once. Sums run in a fixed order for any number of threads.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

// Loops become vectors only when what they call is part of them.
#define INLINE inline __attribute__((always_inline))

enum Kind : int64_t { NONE, BUCKETS, POWER_LAW, EXPONENTIAL_POWER };

struct Block {
  int64_t heads, rows, columns, first_row, threads;
  const int64_t *a, *b, *c;
  const uint8_t* own;
  const float* table;
  int64_t table_rows;
  const int64_t *q_at, *k_at;
  int64_t kind;
  const float* parameters;
  int64_t num_parameters;
  const int64_t *q_times, *k_times, *first_gaps;
  double unit, bucket_width, largest_exponent;
  float *position_map, *time_map;  // written, or read as gradients
  float* shared;                   // (R, C): what heads share of a pair, written with the maps and read again
  float *d_table, *d_parameters;
};

constexpr float NO_GAP = -1e30f;  // stands for the logarithm of 0

INLINE int32_t bits(float x) {
  int32_t i;
  std::memcpy(&i, &x, 4);
  return i;
}
INLINE float number(int32_t i) {
  float x;
  std::memcpy(&x, &i, 4);
  return x;
}

// By powers of two and a polynomial, as in HSTU attention, but in plain loops that the compiler turns into vectors.
// What is below e^-80 is 0: decays end there in most pairs, and products of smaller numbers are slow.
INLINE float exponential(float exponent) {
  float x = exponent > 88.0f ? 88.0f : exponent;
  x = x < -80.0f ? -80.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const float result = number(bits(p) + (int32_t)((uint32_t)bits(shifted) << 23));
  return exponent > -80.0f ? result : 0.0f;
}

// Of a normal number above 0.
INLINE float logarithm(float x) {
  const int32_t shift = bits(x) - 0x3f3504f3;  // of the square root of a half
  const int32_t e = shift >> 23;
  const float f = number((shift & 0x7fffff) + 0x3f3504f3) - 1.0f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float n = (float)e;
  return f + (p * f * f * f - n * 2.12194440e-4f - 0.5f * f * f) + n * 0.693359375f;
}

struct Run {
  int64_t begin, end;
};

struct Runs {
  Run run[3];
  int count = 0;
  void add(int64_t begin, int64_t end) {
    if (begin < end) run[count++] = {begin, end};
  }
  const Run* begin() const { return run; }
  const Run* end() const { return run + count; }
};

// The runs of columns that row r of the block sees.
Runs seen_by(const Block& x, int64_t r) {
  const int64_t a = std::min(x.a[r], x.columns), b = std::min(x.b[r], x.columns), c = std::min(x.c[r], x.columns);
  const int64_t own = x.first_row + r;
  Runs seen;
  seen.add(0, a);
  seen.add(b, c);
  if (x.own[r] && own < x.columns && own >= a && !(own >= b && own < c)) seen.add(own, own + 1);
  return seen;
}

// What heads share of the pairs of a row: the logarithm in the formula, or the bucket.
void prepare_row(const Block& x, int64_t r, const Runs& seen, float* shared) {
  const int64_t q_time = x.q_times[r];
  const int64_t *k_times = x.k_times, *first_gaps = x.first_gaps;
  const float per_unit = (float)(1.0 / x.unit), per_width = (float)(1.0 / x.bucket_width);
  const int32_t last = (int32_t)x.num_parameters - 1;
  for (const auto [begin, end] : seen) {
    if (x.kind == BUCKETS) {
#pragma omp simd
      for (int64_t j = begin; j < end; ++j) {
        const int64_t gap = std::abs(q_time - k_times[j]);
        // At most one too low, for the logarithm is off by far less than a quarter of a bucket.
        const float guess = logarithm((float)(gap + (gap == 0))) * per_width - 0.25f;
        const int32_t low = guess > 0.0f ? (int32_t)guess : 0, at = low < last ? low : last;
        const int32_t above = at < last ? at + 1 : last;
        shared[j] = number(gap >= first_gaps[above] ? above : at);
      }
    } else if (x.kind == POWER_LAW) {
#pragma omp simd
      for (int64_t j = begin; j < end; ++j)
        shared[j] = logarithm(1.0f + (float)std::abs(q_time - k_times[j]) * per_unit);
    } else {
#pragma omp simd
      for (int64_t j = begin; j < end; ++j) {
        const int64_t gap = std::abs(q_time - k_times[j]);
        const int32_t none = -(int32_t)(gap == 0);
        const int32_t log = bits(logarithm((float)(gap + (gap == 0)) * per_unit));
        shared[j] = number((log & ~none) | (bits(NO_GAP) & none));
      }
    }
  }
}

INLINE float power_of(float log, float beta, float largest) {
  const float exponent = beta * log;
  const float power = exponential(exponent > largest ? largest : exponent);
  return log > -1e29f ? power : 0.0f;
}

// Columns of a run whose distance from the query is within the reach of the table; the rest read its ends.
Run within_reach(int64_t begin, int64_t end, int64_t q_at, int64_t reach) {
  const int64_t low = std::clamp(q_at - reach, begin, end);
  return {low, std::clamp(q_at + reach + 1, low, end)};
}

void position_row(const Block& x, int64_t r, const Runs& seen, const float* table, float* out) {
  const int64_t reach = x.table_rows / 2, q_at = x.q_at ? x.q_at[r] : x.first_row + r;
  const int64_t* k_at = x.k_at;
  for (const auto [begin, end] : seen) {
    if (k_at) {
      for (int64_t j = begin; j < end; ++j) out[j] = table[std::clamp(k_at[j] - q_at, -reach, reach)];
      continue;
    }
    const auto [low, high] = within_reach(begin, end, q_at, reach);
    std::fill(out + begin, out + low, table[-reach]);
    std::copy(table + low - q_at, table + high - q_at, out + low);
    std::fill(out + high, out + end, table[reach]);
  }
}

void add_position_row(const Block& x, int64_t r, const Runs& seen, const float* d, float* sums) {
  const int64_t reach = x.table_rows / 2, q_at = x.q_at ? x.q_at[r] : x.first_row + r;
  const int64_t* k_at = x.k_at;
  for (const auto [begin, end] : seen) {
    if (k_at) {
      for (int64_t j = begin; j < end; ++j) sums[std::clamp(k_at[j] - q_at, -reach, reach)] += d[j];
      continue;
    }
    const auto [low, high] = within_reach(begin, end, q_at, reach);
    float before = 0, after = 0;
#pragma omp simd reduction(+ : before)
    for (int64_t j = begin; j < low; ++j) before += d[j];
#pragma omp simd
    for (int64_t j = low; j < high; ++j) sums[j - q_at] += d[j];
#pragma omp simd reduction(+ : after)
    for (int64_t j = high; j < end; ++j) after += d[j];
    sums[-reach] += before;
    sums[reach] += after;
  }
}

void time_row(const Block& x, const Runs& seen, const float* of, const float* shared, float* out) {
  const float largest = (float)x.largest_exponent;
  for (const auto [begin, end] : seen) {
    if (x.kind == BUCKETS) {
#pragma omp simd
      for (int64_t j = begin; j < end; ++j) out[j] = of[bits(shared[j])];
    } else if (x.kind == POWER_LAW) {
      const float strength = of[0], b = of[1];
#pragma omp simd
      for (int64_t j = begin; j < end; ++j) out[j] = strength * exponential(-b * shared[j]);
    } else {
      const float alpha = of[0], beta = of[1], log_gamma = std::log(of[2]);
#pragma omp simd
      for (int64_t j = begin; j < end; ++j)
        out[j] = alpha * exponential(power_of(shared[j], beta, largest) * log_gamma);
    }
  }
}

// Adds to the sums of a table, or to those that the gradients of a formula's parameters are made of.
void add_time_row(const Block& x, const Runs& seen, const float* of, const float* shared, const float* d, float* sums,
                  double* totals) {
  const float largest = (float)x.largest_exponent;
  for (const auto [begin, end] : seen) {
    float s0 = 0, s1 = 0, s2 = 0;
    if (x.kind == BUCKETS) {
      for (int64_t j = begin; j < end; ++j) sums[bits(shared[j])] += d[j];
    } else if (x.kind == POWER_LAW) {
      const float b = of[1];
#pragma omp simd reduction(+ : s0, s1)
      for (int64_t j = begin; j < end; ++j) {
        const float decayed = d[j] * exponential(-b * shared[j]);
        s0 += decayed;
        s1 += decayed * shared[j];
      }
    } else {
      const float beta = of[1], log_gamma = std::log(of[2]);
#pragma omp simd reduction(+ : s0, s1, s2)
      for (int64_t j = begin; j < end; ++j) {
        const float power = power_of(shared[j], beta, largest);
        const float decayed = d[j] * exponential(power * log_gamma);
        s0 += decayed;
        s1 += decayed * power * shared[j];
        s2 += decayed * power;
      }
    }
    totals[0] += s0, totals[1] += s1, totals[2] += s2;
  }
}

}  // namespace

extern "C" void fuxi_maps(const Block* block) {
  const Block& x = *block;
  const int64_t R = x.rows, C = x.columns, P = x.table_rows, K = x.num_parameters;
#pragma omp parallel for num_threads(x.threads)
  for (int64_t r = 0; r < R; ++r) {
    const Runs seen = seen_by(x, r);
    float* shared = x.shared + r * C;
    if (x.kind != NONE) prepare_row(x, r, seen, shared);
    for (int64_t h = 0; h < x.heads; ++h) {
      const int64_t row = (h * R + r) * C;
      if (x.table) {
        std::memset(x.position_map + row, 0, C * sizeof(float));
        position_row(x, r, seen, x.table + h * P + P / 2, x.position_map + row);
      }
      if (x.kind != NONE) {
        std::memset(x.time_map + row, 0, C * sizeof(float));
        time_row(x, seen, x.parameters + h * K, shared, x.time_map + row);
      }
    }
  }
}

// Adds to d_table and d_parameters what the gradients of the maps come to; either may be null. The block is as it was
// when its maps were made.
extern "C" void fuxi_map_gradients(const Block* block) {
  const Block& x = *block;
  const int64_t R = x.rows, C = x.columns, P = x.table_rows, K = x.num_parameters;
#pragma omp parallel for num_threads(x.threads)
  for (int64_t h = 0; h < x.heads; ++h) {
    const float* of = x.parameters + h * K;
    float* sums = x.d_parameters + h * K;
    double totals[3] = {0, 0, 0};
    for (int64_t r = 0; r < R; ++r) {
      const Runs seen = seen_by(x, r);
      const int64_t row = (h * R + r) * C;
      if (x.d_table) add_position_row(x, r, seen, x.position_map + row, x.d_table + h * P + P / 2);
      if (x.d_parameters) add_time_row(x, seen, of, x.shared + r * C, x.time_map + row, sums, totals);
    }
    if (x.d_parameters && x.kind == POWER_LAW) {
      sums[0] += (float)totals[0];
      sums[1] -= (float)(totals[1] * of[0]);
    } else if (x.d_parameters && x.kind == EXPONENTIAL_POWER) {
      sums[0] += (float)totals[0];
      sums[1] += (float)(totals[1] * of[0] * std::log(of[2]));
      sums[2] += (float)(totals[2] * of[0] / of[2]);
    }
  }
}
