// HSTU attention over jagged sequences on a CPU: forward and backward in tiles held in registers, nothing padded.
//
// One task is a head of a sequence. Its keys and values are packed into panels of NR columns; then row groups of MR
// queries pass over the panels that they see. The forward pass packs and passes a few hundred columns at a time, which
// stay in the cache and need little memory, where the weights do not compete. Scores exist for one block of rows at a
// time only. The backward pass computes them again. Tasks are given to threads by a rule that depends on sizes alone, so
// sums repeat bit for bit.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "../register_tile.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int FORWARD_PANELS = 256 / NR;  // columns whose scores are held at once
constexpr int PACKED_PANELS = 128 / NR;   // columns whose keys and values are packed at once
constexpr int BACKWARD_PANELS = 256 / NR;
constexpr int BACKWARD_ROWS = 48 / MR * MR;

inline ivec iota() {
  ivec x;
  for (int i = 0; i < LANES; ++i) x[i] = i;
  return x;
}

// The NR columns of a panel. The two halves of every step stand side by side in the program, so that the long chains of
// steps behind a weight overlap; one vector after the other, the processor waits.
template <class V>
struct Two {
  V low, high;
};
typedef Two<vec> Floats;
typedef Two<ivec> Ints;

#define OPERATOR(op)                                                                          \
  template <class V> inline auto operator op(Two<V> x, Two<V> y) {                            \
    return Two<decltype(x.low op y.low)>{x.low op y.low, x.high op y.high};                   \
  }                                                                                           \
  template <class V, class S> inline auto operator op(Two<V> x, S y) {                        \
    return Two<decltype(x.low op y)>{x.low op y, x.high op y};                                \
  }
OPERATOR(+) OPERATOR(-) OPERATOR(*) OPERATOR(&) OPERATOR(|) OPERATOR(^) OPERATOR(<<) OPERATOR(>>) OPERATOR(<)
OPERATOR(>) OPERATOR(>=) OPERATOR(==)
#undef OPERATOR

inline Floats load_two(const float* p) { return {load(p), load(p + LANES)}; }
inline Ints load_two(const int32_t* p) {
  return {*reinterpret_cast<const ivec*>(p), *reinterpret_cast<const ivec*>(p + LANES)};
}
inline void store(float* p, Floats x) { store(p, x.low), store(p + LANES, x.high); }
inline void store(int32_t* p, Ints x) {
  *reinterpret_cast<ivec*>(p) = x.low, *reinterpret_cast<ivec*>(p + LANES) = x.high;
}
inline Floats both(float x) { return {all(x), all(x)}; }
inline Ints both(int32_t x) { return {ivec{} + x, ivec{} + x}; }
inline Ints columns(int32_t j) { return {iota() + j, iota() + (j + LANES)}; }
template <class I> inline Ints ints(Two<I> x) { return {(ivec)x.low, (ivec)x.high}; }
inline Floats floats(Ints x) { return {(vec)x.low, (vec)x.high}; }
inline Ints rounded(Floats x) {
  return {__builtin_convertvector(x.low, ivec), __builtin_convertvector(x.high, ivec)};
}
inline Floats numbers(Ints x) { return {__builtin_convertvector(x.low, vec), __builtin_convertvector(x.high, vec)}; }
template <class I, class V> inline Two<V> choose(Two<I> where, Two<V> yes, Two<V> no) {
  return {where.low ? yes.low : no.low, where.high ? yes.high : no.high};
}
template <class I> inline Floats keep(Floats x, Two<I> where) { return choose(where, x, both(0.0f)); }
inline float sum(Floats x) {
  float total = 0;
  for (int i = 0; i < LANES; ++i) total += x.low[i] + x.high[i];
  return total;
}
inline bool any(Ints x) {
  const ivec found = x.low | x.high;
#ifdef __AVX512F__
  return _mm512_test_epi32_mask((__m512i)found, (__m512i)found);
#else
  int32_t bits = 0;
  for (int i = 0; i < LANES; ++i) bits |= found[i];
  return bits;
#endif
}

// e^x by powers of two and a polynomial of degree 6 (relative error about 1e-7), for x between -87 and 88.
inline Floats exponential(Floats x) {
  x = choose(x > -87.0f, x, both(-87.0f));
  x = choose(x < 88.0f, x, both(88.0f));
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Floats shifted = x * 1.44269504f + shift, n = shifted - shift;
  const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return floats(ints(p) + (ints(shifted) << 23));
}

inline vec reciprocal(vec x) {
#ifdef __AVX512F__
  vec y = (vec)_mm512_rcp14_ps((__m512)x);
  return y * (2.0f - x * y);
#else
  return 1.0f / x;
#endif
}

inline Floats sigmoid(Floats x) {
  const Floats y = exponential(x * -1.0f) + 1.0f;
  return {reciprocal(y.low), reciprocal(y.high)};
}

// table[at] of each column, one by one: since its mitigation against data sampling, a gather takes longer than that.
inline Floats gather(const float* table, Ints at) {
  int32_t from[NR];
  float found[NR];
  store(from, at);
  for (int i = 0; i < NR; ++i) found[i] = *static_cast<const volatile float*>(table + from[i]);
  return load_two(found);
}

// The same from a short table, which is padded to whole blocks of NR.
inline Floats look_up(const float* table, int64_t size, Ints at) {
#ifdef __AVX512F__
  if (size <= 256) {
    Floats found = both(0.0f);
    for (int64_t block = 0; block * NR < size; ++block, table += NR) {
      const __m512 first = (__m512)load(table), second = (__m512)load(table + LANES);
      const Floats here = {(vec)_mm512_permutex2var_ps(first, (__m512i)at.low, second),
                           (vec)_mm512_permutex2var_ps(first, (__m512i)at.high, second)};
      found = choose((at >> 5) == (int32_t)block, here, found);
    }
    return found;
  }
#endif
  return gather(table, at);
}

inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

}  // namespace

extern "C" {

// Mirrored by `_Arguments` in cpu.py. Tensors are float32 unless said otherwise; null where there is none.
struct Arguments {
  int64_t num_sequences, num_heads, qk_dim, v_dim;
  const int64_t *q_offsets, *k_offsets;
  const float *q, *k, *v;  // last dimension contiguous; strides of a token and of a head:
  int64_t q_token, q_head, k_token, k_head, v_token, v_head;
  const int64_t *mask_a, *mask_b, *mask_c;
  const uint8_t* mask_self;
  const float* scale;  // (B)
  double alpha;
  const float* position_table;  // (H, P)
  int64_t position_rows;
  const int64_t *q_positions, *k_positions;
  const float* time_table;  // (H, N)
  int64_t time_rows;
  const int64_t *q_times, *k_times;
  const int64_t* time_thresholds;  // (N): the smallest gap of each bucket
  double time_bucket_width;
  int64_t softmax;
  double dropout;
  uint64_t seed;
  int64_t num_threads;
  float *out, *lse;    // (T, H, V), and (T, H) for softmax
  const float* d_out;  // (T, H, V); what follows is of the backward pass
  float *d_q, *d_k, *d_v;
  float *d_position_table, *d_time_table, *d_scale;  // (threads, H, P), (threads, H, N), (B, H), zero at first
};
}

namespace {

uint32_t mixed(uint32_t x) {
  x ^= x >> 16, x *= 0x85ebca6bu, x ^= x >> 13, x *= 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// Panels first ... last - 1; nobody sees a column from `end` on.
struct Run {
  int64_t first, last, end;
};

// One head of one sequence.
struct Head {
  const Arguments& x;
  int64_t b, h, num_q, num_k, q0, k0, num_panels;
  const float *q, *k, *v;
  float scale;
  const float *position_bias, *time_table;  // of the head; see `Places`
  int64_t reach;

  Head(const Arguments& x, int64_t b, int64_t h, const float* position_bias, const float* time_table)
      : x(x), b(b), h(h), num_q(x.q_offsets[b + 1] - x.q_offsets[b]), num_k(x.k_offsets[b + 1] - x.k_offsets[b]),
        q0(x.q_offsets[b]), k0(x.k_offsets[b]), num_panels(ceil_div(num_k, NR)),
        q(x.q + q0 * x.q_token + h * x.q_head), k(x.k + k0 * x.k_token + h * x.k_head),
        v(x.v + k0 * x.v_token + h * x.v_head), scale(x.scale[b]),
        position_bias(position_bias),
        time_table(time_table), reach((x.position_rows - 1) / 2) {}

  int64_t a(int64_t i) const { return std::min(x.mask_a[q0 + i], num_k); }
  int64_t begin(int64_t i) const { return std::max<int64_t>(x.mask_b[q0 + i], 0); }
  int64_t end(int64_t i) const { return std::min(x.mask_c[q0 + i], num_k); }

  // Which panels some row of [i0, i1) sees, as runs in ascending order; at most three.
  int runs(int64_t i0, int64_t i1, Run* found) const {
    int64_t ranges[3][2] = {{0, 0}, {INT64_MAX, 0}, {INT64_MAX, 0}};
    for (int64_t i = i0; i < i1; ++i) {
      ranges[0][1] = std::max(ranges[0][1], a(i));
      if (begin(i) < end(i)) {
        ranges[1][0] = std::min(ranges[1][0], begin(i));
        ranges[1][1] = std::max(ranges[1][1], end(i));
      }
      if (x.mask_self[q0 + i] && i < num_k) {
        ranges[2][0] = std::min(ranges[2][0], i);
        ranges[2][1] = std::max(ranges[2][1], i + 1);
      }
    }
    int count = 0;
    if (ranges[1][0] > ranges[2][0]) std::swap(ranges[1], ranges[2]);
    for (auto& range : ranges) {
      if (range[0] >= range[1]) continue;
      const int64_t first = range[0] / NR, last = ceil_div(range[1], NR);
      if (count && first <= found[count - 1].last) {
        found[count - 1].last = std::max(found[count - 1].last, last);
        found[count - 1].end = std::max(found[count - 1].end, range[1]);
      } else {
        found[count++] = {first, last, range[1]};
      }
    }
    return count;
  }

};

// The position table's columns as the kernels read and add to them. Positions that are places in the sequence give each
// distance of a key to a query a place of its own, clipped or not, so that neighbouring keys read neighbouring numbers.
struct Places {
  const Arguments& x;
  int64_t longest_q = 0, longest_k = 0, size = 0;

  explicit Places(const Arguments& x) : x(x) {
    if (!x.position_table) return;
    for (int64_t b = 0; b < x.num_sequences; ++b) {
      longest_q = std::max(longest_q, x.q_offsets[b + 1] - x.q_offsets[b]);
      longest_k = std::max(longest_k, x.k_offsets[b + 1] - x.k_offsets[b]);
    }
    size = x.q_positions ? x.position_rows : longest_q + longest_k + NR;
  }
  // Where distance 0 lies.
  int64_t origin() const { return x.q_positions ? 0 : longest_q; }
  int64_t row(int64_t place) const {
    if (x.q_positions) return place;
    const int64_t reach = (x.position_rows - 1) / 2;
    return std::max(-reach, std::min(reach, place - longest_q)) + reach;
  }
  std::vector<float> biases() const {
    std::vector<float> found(x.num_heads * size);
    for (int64_t h = 0; h < x.num_heads; ++h) {
      for (int64_t place = 0; place < size; ++place) {
        found[h * size + place] = x.position_table[h * x.position_rows + row(place)];
      }
    }
    return found;
  }
};

// (tokens, width) as panels of NR features: [panel][token][NR].
void pack_features(float* to, const float* from, int64_t token, int64_t num_tokens, int64_t width) {
  for (int64_t panel = 0; panel < ceil_div(width, NR); ++panel) {
    const int64_t count = std::min<int64_t>(NR, width - panel * NR);
    for (int64_t t = 0; t < num_tokens; ++t, to += NR) {
      const float* row = from + t * token + panel * NR;
      __builtin_prefetch(row + 8 * token), __builtin_prefetch(row + 8 * token + LANES);
      if (count == NR) {
        store(to, load(row)), store(to + LANES, load(row + LANES));
      } else {
        std::copy(row, row + count, to), std::fill(to + count, to + NR, 0.0f);
      }
    }
  }
}

// Rows become columns: blocks of 1, 2, 4, ... lanes change places.
inline void transpose(vec* rows) {
#pragma GCC unroll 8
  for (int step = 1; step < LANES; step *= 2) {
    const ivec upper = (iota() & step) != 0;
    const ivec first = upper ? iota() - step + LANES : iota(), second = first + step;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) {
      if (i & step) continue;
      const vec x = rows[i], y = rows[i + step];
      rows[i] = __builtin_shuffle(x, y, first);
      rows[i + step] = __builtin_shuffle(x, y, second);
    }
  }
}

// (tokens, width) as panels of NR tokens: [panel][feature][NR].
void pack_tokens(float* to, const float* from, int64_t token, int64_t num_tokens, int64_t width) {
  for (int64_t panel = 0; panel < ceil_div(num_tokens, NR); ++panel, to += width * NR) {
    const int64_t count = std::min<int64_t>(NR, num_tokens - panel * NR);
    if (count < NR) std::fill(to, to + width * NR, 0.0f);
    const float* rows = from + panel * NR * token;
    int64_t t = 0;
    for (; t + LANES <= count; t += LANES) {
      int64_t d = 0;
      for (; d + LANES <= width; d += LANES) {
        vec block[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) block[i] = load(rows + (t + i) * token + d);
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) store(to + (d + i) * NR + t, block[i]);
      }
      for (; d < width; ++d) {
        for (int i = 0; i < LANES; ++i) to[d * NR + t + i] = rows[(t + i) * token + d];
      }
    }
    for (; t < count; ++t) {
      for (int64_t d = 0; d < width; ++d) to[d * NR + t] = rows[t * token + d];
    }
  }
}

// Buffers of a thread, aligned to cache lines: a vector that lies across two costs twice.
struct Scratch {
  static constexpr size_t LINE = 64 / sizeof(float);
  std::unique_ptr<float[]> memory;
  size_t size = 0, used = 0;
  void reserve(size_t floats, int buffers) {
    floats += (buffers + 1) * LINE;
    if (floats > size) memory.reset(new float[size = floats]);
    used = (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) / sizeof(float) % LINE;
  }
  float* take(size_t floats) {
    float* part = memory.get() + used;
    used += (floats + LINE - 1) / LINE * LINE;
    return part;
  }
};

// What a head's rows read of the keys besides their vectors, whole vectors at a time also at the end. Times count from
// the earliest of the sequence; a span of more than 2^31 (24 days of milliseconds) is left to whole numbers, lane by lane.
struct Keys {
  std::vector<int32_t> positions, times;
  int64_t first_time = 0;
  bool long_span = false;

  explicit Keys(const Head& head) {
    const Arguments& x = head.x;
    const int64_t size = head.num_panels * NR;
    if (x.k_positions) {
      positions.resize(size);
      for (int64_t j = 0; j < head.num_k; ++j) positions[j] = narrow(x.k_positions[head.k0 + j]);
    }
    if (head.time_table && head.num_q && head.num_k) {
      const auto q = std::minmax_element(x.q_times + head.q0, x.q_times + head.q0 + head.num_q);
      const auto k = std::minmax_element(x.k_times + head.k0, x.k_times + head.k0 + head.num_k);
      first_time = std::min(*q.first, *k.first);
      long_span = std::max(*q.second, *k.second) - first_time > INT32_MAX;
      times.resize(size);
      for (int64_t j = 0; j < head.num_k && !long_span; ++j) times[j] = (int32_t)(x.k_times[head.k0 + j] - first_time);
    }
  }
  static int32_t narrow(int64_t position) {
    return (int32_t)std::max<int64_t>(INT32_MIN / 2, std::min<int64_t>(INT32_MAX / 2, position));
  }
};

// A row of a result; the one 8 tokens further on is asked for, since rows of a head do not lie side by side.
inline void write(float* to, const float* from, float factor, int64_t width, int64_t token) {
  int64_t d = 0;
  for (; d + LANES <= width; d += LANES) {
    __builtin_prefetch(to + 8 * token + d, 1);
    store(to + d, factor * load(from + d));
  }
  for (; d < width; ++d) to[d] = factor * from[d];
}

// Bias, dropout and mask of the columns of one row.
struct Row {
  const Head& head;
  const Keys& keys;
  int32_t i, a, begin, end, own_column;
  int32_t position = 0;
  int64_t time = 0;
  uint32_t dropout_key = 0, dropped_below = 0;
  float kept_factor = 1;

  Row(const Head& head, const Keys& keys, int64_t row)
      : head(head), keys(keys), i((int32_t)row), a((int32_t)head.a(row)), begin((int32_t)head.begin(row)),
        end((int32_t)head.end(row)), own_column(head.x.mask_self[head.q0 + row] && row < head.num_k ? i : -1) {
    const Arguments& x = head.x;
    if (x.q_positions) position = Keys::narrow(x.q_positions[head.q0 + row]);
    if (head.time_table) time = x.q_times[head.q0 + row] - keys.first_time;
    if (x.dropout > 0) {
      const uint64_t at = (uint64_t)(head.q0 + row) * x.num_heads + head.h;
      dropout_key = mixed((uint32_t)at ^ mixed((uint32_t)(at >> 32) ^ (uint32_t)x.seed) ^ (uint32_t)(x.seed >> 32));
      dropped_below = (uint32_t)(x.dropout * 2147483648.0);
      kept_factor = (float)(1.0 / (1.0 - x.dropout));
    }
  }

  // Whether it sees all of the columns j ... j + NR - 1; if not, which of them.
  bool sees_all(int64_t j) const { return j + NR <= a || (j >= begin && j + NR <= end); }
  Ints visible(int64_t j) const {
    const Ints column = columns((int32_t)j);
    return ints((column < a) | ((column >= begin) & (column < end)) | (column == own_column));
  }

  // Rows of the position table, where positions are given.
  Ints positions(int64_t j) const {
    const int32_t reach = (int32_t)head.reach;
    Ints gap = load_two(keys.positions.data() + j) - position;
    gap = choose(gap > reach, both(reach), gap);
    gap = choose(gap < -reach, both(-reach), gap);
    return gap + reach;
  }

  // Rows of the time table: floor(ln(gap) / width), exact by whole numbers where the estimate is near a boundary.
  Ints buckets(int64_t j) const {
    const Arguments& x = head.x;
    const int32_t last = (int32_t)x.time_rows - 1;
    int32_t found[NR];
    if (keys.long_span) {
      for (int column = 0; column < NR; ++column) {
        const int64_t key = head.k0 + std::min(j + column, head.num_k - 1);
        found[column] = exact_bucket(std::abs(x.k_times[key] - keys.first_time - time));
      }
      return load_two(found);
    }
    Ints gap = load_two(keys.times.data() + j) - (int32_t)time;
    gap = choose(gap < 0, gap * -1, gap);
    const Floats number = numbers(choose(gap > 1, gap, both(1)));
    // ln: the exponent, and a polynomial of the mantissa around 1.
    const Ints bits = ints(number) - 0x3f3504f3;  // sqrt(1/2)
    const Floats m = floats((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
    Floats p = m * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    const Floats square = m * m, ln = m - square * 0.5f + p * (square * m);
    const Floats place = (numbers(bits >> 23) * 0.69314718f + ln) * (float)(1 / x.time_bucket_width);
    Ints bucket = rounded(place);
    const Floats rest = place - numbers(bucket), slack = place * 1e-6f + 1e-5f;
    const Ints unsure = ints(((rest < slack) | (rest + slack > 1.0f)) & (gap > 1));
    bucket = choose(bucket > last, both(last), bucket);
    if (any(unsure)) {
      int32_t gaps[NR], exact[NR];
      store(gaps, gap), store(exact, unsure), store(found, bucket);
      for (int column = 0; column < NR; ++column) {
        if (exact[column]) found[column] = exact_bucket(gaps[column]);
      }
      return load_two(found);
    }
    return bucket;
  }

  int32_t exact_bucket(int64_t gap) const {
    const int64_t* from = head.x.time_thresholds;
    return (int32_t)(std::upper_bound(from + 1, from + head.x.time_rows, gap) - from) - 1;
  }

  // Scores of NR columns from their dot products. `bucket`, if wanted, tells the rows of the time table.
  Floats score(Floats dot, int64_t j, Ints* bucket = nullptr) const {
    Floats s = dot * (float)head.x.alpha;
    if (head.position_bias) {
      s = s + (head.x.q_positions ? gather(head.position_bias, positions(j)) : load_two(head.position_bias + j - i));
    }
    if (head.time_table) {
      const Ints rows = buckets(j);
      if (bucket) *bucket = rows;
      s = s + look_up(head.time_table, head.x.time_rows, rows);
    }
    return s;
  }

  // Factors of dropout: 0, or 1 / (1 - rate).
  Floats dropout(int64_t j) const {
    typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
    const Ints column = columns((int32_t)j);
    Two<uvec> n = Two<uvec>{(uvec)column.low, (uvec)column.high} * 0x9e3779b1u ^ dropout_key;
    n = n ^ n >> 16, n = n * 0x85ebca6bu, n = n ^ n >> 13, n = n * 0xc2b2ae35u, n = n ^ n >> 16;
    return keep(both(kept_factor), ints(n >> 1) >= (int32_t)dropped_below);
  }
};

// Of some runs, what lies among the panels p0 ... p1 - 1.
int within(int64_t p0, int64_t p1, Run* runs, int count) {
  int kept = 0;
  for (int run = 0; run < count; ++run) {
    const Run found = {std::max(runs[run].first, p0), std::min(runs[run].last, p1), std::min(runs[run].end, p1 * NR)};
    if (found.first < found.last) runs[kept++] = found;
  }
  return kept;
}

// Buffers of the forward pass: the packed columns, then the scores and results of a row group.
struct Forward {
  int64_t at_once, packed;  // panels whose scores are held, and that are packed
  float *k_tokens, *v_features, *scores, *out;

  Forward(const Head& head, Scratch& scratch) {
    const Arguments& x = head.x;
    const int64_t v_panels = ceil_div(x.v_dim, NR), all = std::max<int64_t>(head.num_panels, 1);
    at_once = x.softmax ? all : FORWARD_PANELS, packed = x.softmax ? all : std::min<int64_t>(all, PACKED_PANELS);
    scratch.reserve(packed * NR * (x.qk_dim + v_panels * NR) + MR * (at_once + v_panels) * NR, 4);
    k_tokens = scratch.take(packed * NR * x.qk_dim);
    v_features = scratch.take(packed * NR * v_panels * NR);
    scores = scratch.take(MR * at_once * NR);
    out = scratch.take(MR * v_panels * NR);
  }
};

// Adds to the results of all rows what they see of the packed panels p0 ... p1 - 1.
void forward_packed(const Head& head, const Keys& keys, const Forward& buffers, int64_t p0, int64_t p1) {
  const Arguments& x = head.x;
  const int64_t D = x.qk_dim, V = x.v_dim, v_panels = ceil_div(V, NR), ldo = v_panels * NR;
  const int64_t at_once = buffers.at_once, lds = at_once * NR;
  const int64_t c0 = p0 * NR, columns = std::min(p1 * NR, head.num_k) - c0;
  const bool is_first = p0 == 0, is_last = p1 == head.num_panels;
  float *k_tokens = buffers.k_tokens, *v_features = buffers.v_features, *scores = buffers.scores, *out = buffers.out;
  pack_tokens(k_tokens, head.k + c0 * x.k_token, x.k_token, columns, D);
  pack_features(v_features, head.v + c0 * x.v_token, x.v_token, columns, V);

  for (int64_t i0 = 0; i0 < head.num_q; i0 += MR) {
    const int64_t m = std::min<int64_t>(MR, head.num_q - i0);
    float totals[MR] = {}, highest[MR];
    Run runs[3];
    const int num_runs = within(p0, p1, runs, head.runs(i0, i0 + m, runs));
    if (!num_runs && !is_first && !is_last) continue;
    std::fill(out, out + m * ldo, 0.0f);
    for (int64_t r = 0; r < m && !is_first; ++r) {
      std::copy_n(x.out + ((head.q0 + i0 + r) * x.num_heads + head.h) * V, V, out + r * ldo);
    }
    if (x.softmax) {
      // The weights compete, so all of a row's scores are needed before any; they lie one run after the other.
      std::fill(highest, highest + m, -INFINITY);
      int64_t at = 0;
      for (int run = 0; run < num_runs; ++run) {
        for (int64_t panel = runs[run].first; panel < runs[run].last; ++panel, at += NR) {
          TILES.of_rows[m](scores + at, lds, head.q + i0 * x.q_token, x.q_token, 1,
                           k_tokens + (panel - p0) * D * NR, D, false);
          for (int64_t r = 0; r < m; ++r) {
            const Row row(head, keys, i0 + r);
            float* place = scores + r * lds + at;
            Floats s = row.score(load_two(place), panel * NR);
            if (!row.sees_all(panel * NR)) s = choose(row.visible(panel * NR), s, both(-INFINITY));
            store(place, s);
            for (int column = 0; column < NR; ++column) highest[r] = std::max(highest[r], place[column]);
          }
        }
      }
      for (int64_t r = 0; r < m; ++r) {
        const Row row(head, keys, i0 + r);
        Floats total = both(0.0f);
        int64_t from = 0;
        for (int run = 0; run < num_runs; ++run) {
          for (int64_t j0 = runs[run].first * NR; j0 < runs[run].last * NR; j0 += NR, from += NR) {
            const Floats s = load_two(scores + r * lds + from);
            Floats w = keep(exponential(s - highest[r]), s > -INFINITY);
            total = total + w;
            if (x.dropout > 0) w = w * row.dropout(j0);
            store(scores + r * lds + from, w);
          }
        }
        totals[r] = sum(total);
        if (x.lse) x.lse[(head.q0 + i0 + r) * x.num_heads + head.h] = highest[r] + std::log(totals[r]);
      }
      at = 0;
      for (int run = 0; run < num_runs; ++run) {
        const int64_t j0 = runs[run].first * NR, count = runs[run].end - j0;
        for (int64_t panel = 0; panel < v_panels; ++panel) {
          TILES.of_rows[m](out + panel * NR, ldo, scores + at, lds, 1, v_features + (panel * columns + j0 - c0) * NR,
                           count, true);
        }
        at += (runs[run].last - runs[run].first) * NR;
      }
    } else {
      for (int run = 0; run < num_runs; ++run) {
        for (int64_t first = runs[run].first; first < runs[run].last; first += at_once) {
          const int64_t last = std::min(first + at_once, runs[run].last), j0 = first * NR;
          for (int64_t panel = first; panel < last; ++panel) {
            TILES.of_rows[m](scores + (panel - first) * NR, lds, head.q + i0 * x.q_token, x.q_token, 1,
                             k_tokens + (panel - p0) * D * NR, D, false);
          }
          for (int64_t r = 0; r < m; ++r) {
            const Row row(head, keys, i0 + r);
            for (int64_t j = j0; j < last * NR; j += NR) {
              float* place = scores + r * lds + j - j0;
              const Floats s = row.score(load_two(place), j);
              Floats w = s * sigmoid(s);
              if (!row.sees_all(j)) w = keep(w, row.visible(j));
              if (x.dropout > 0) w = w * row.dropout(j);
              store(place, w);
            }
          }
          const int64_t count = std::min(last * NR, runs[run].end) - j0;
          for (int64_t panel = 0; panel < v_panels; ++panel) {
            TILES.of_rows[m](out + panel * NR, ldo, scores, lds, 1, v_features + (panel * columns + j0 - c0) * NR,
                             count, true);
          }
        }
      }
    }
    for (int64_t r = 0; r < m; ++r) {
      const float factor = x.softmax ? (totals[r] > 0 ? 1 / totals[r] : 0.0f) : is_last ? head.scale : 1.0f;
      write(x.out + ((head.q0 + i0 + r) * x.num_heads + head.h) * V, out + r * ldo, factor, V, x.num_heads * V);
    }
  }
}

void forward(const Head& head, Scratch& scratch) {
  const Keys keys(head);
  const Forward buffers(head, scratch);
  int64_t p0 = 0;
  do {  // once where there are no keys, for the zeros
    const int64_t p1 = std::min(p0 + buffers.packed, head.num_panels);
    forward_packed(head, keys, buffers, p0, p1);
    p0 = p1;
  } while (p0 < head.num_panels);
}

// `d_time` has eight copies of each bucket, which are zero before and after: a bucket may be that of every pair, too many
// for one float32 sum, so each block of rows goes to the float64 totals.
void backward(const Head& head, Scratch& scratch, float* d_position, float* d_time, double* d_time_total) {
  const Keys keys(head);
  const Arguments& x = head.x;
  const int64_t D = x.qk_dim, V = x.v_dim, H = x.num_heads;
  const int64_t d_panels = ceil_div(D, NR), v_panels = ceil_div(V, NR), ldd = d_panels * NR, ldv = v_panels * NR;
  const int64_t lds = BACKWARD_PANELS * NR, rows = BACKWARD_ROWS, columns = head.num_panels * NR;
  scratch.reserve(columns * (D + V + 2 * ldd + ldv) + rows * (2 * ldd + ldv + 2 * lds), 10);
  float* k_tokens = scratch.take(columns * D);
  float* v_tokens = scratch.take(columns * V);
  float* k_features = scratch.take(columns * ldd);
  float* d_k = scratch.take(columns * ldd);
  float* d_v = scratch.take(columns * ldv);
  float* q_features = scratch.take(rows * ldd);
  float* d_q = scratch.take(rows * ldd);
  float* d_out_features = scratch.take(rows * ldv);
  float* weights = scratch.take(rows * lds);
  float* d_scores = scratch.take(rows * lds);
  pack_tokens(k_tokens, head.k, x.k_token, head.num_k, D);
  pack_tokens(v_tokens, head.v, x.v_token, head.num_k, V);
  pack_features(k_features, head.k, x.k_token, head.num_k, D);
  std::fill(d_k, d_k + columns * ldd, 0.0f);
  std::fill(d_v, d_v + columns * ldv, 0.0f);
  Floats d_scale = both(0.0f);

  for (int64_t i0 = 0; i0 < head.num_q; i0 += rows) {
    const int64_t num_rows = std::min(rows, head.num_q - i0), num_groups = ceil_div(num_rows, MR);
    const float* d_out = x.d_out + ((head.q0 + i0) * H + head.h) * V;
    pack_features(q_features, head.q + i0 * x.q_token, x.q_token, num_rows, D);
    pack_features(d_out_features, d_out, H * V, num_rows, V);
    std::fill(d_q, d_q + num_rows * ldd, 0.0f);
    Run runs[3];
    const int num_runs = head.runs(i0, i0 + num_rows, runs);
    for (int run = 0; run < num_runs; ++run) {
      for (int64_t first = runs[run].first; first < runs[run].last; first += BACKWARD_PANELS) {
        const int64_t last = std::min<int64_t>(first + BACKWARD_PANELS, runs[run].last);
        // Of each panel, the row groups that see it: the first, and the one after the last.
        int64_t seen_from[BACKWARD_PANELS], seen_to[BACKWARD_PANELS];
        std::fill(seen_from, seen_from + BACKWARD_PANELS, num_groups);
        std::fill(seen_to, seen_to + BACKWARD_PANELS, 0);
        for (int64_t g = 0; g < num_groups; ++g) {
          const int64_t r0 = g * MR, m = std::min<int64_t>(MR, num_rows - r0);
          Run own[3];
          const int num_own = head.runs(i0 + r0, i0 + r0 + m, own);
          int64_t from = last, to = first, seen_end = 0;  // panels of this group within the chunk
          for (int o = 0; o < num_own; ++o) {
            const int64_t begin = std::max(own[o].first, first), end = std::min(own[o].last, last);
            if (begin < end) from = std::min(from, begin), to = std::max(to, end), seen_end = own[o].end;
          }
          // Rows outside read zeros where a group between others does not see a panel.
          for (int64_t panel = first; panel < last; ++panel) {
            if (panel >= from && panel < to) continue;
            for (int64_t r = r0; r < r0 + m; ++r) {
              std::fill_n(weights + r * lds + (panel - first) * NR, NR, 0.0f);
              std::fill_n(d_scores + r * lds + (panel - first) * NR, NR, 0.0f);
            }
          }
          if (from >= to) continue;
          for (int64_t panel = from; panel < to; ++panel) {
            const int64_t p = panel - first, at = r0 * lds + p * NR;
            seen_from[p] = std::min(seen_from[p], g), seen_to[p] = g + 1;
            TILES.of_rows[m](weights + at, lds, head.q + (i0 + r0) * x.q_token, x.q_token, 1, k_tokens + panel * D * NR,
                             D, false);
            TILES.of_rows[m](d_scores + at, lds, d_out + r0 * H * V, H * V, 1, v_tokens + panel * V * NR, V, false);
          }
          for (int64_t r = r0; r < r0 + m; ++r) {
            const int64_t i = i0 + r;
            const Row row(head, keys, i);
            float lse = 0, delta = 0;
            if (x.softmax) {
              lse = x.lse[(head.q0 + i) * H + head.h];
              const float* out = x.out + ((head.q0 + i) * H + head.h) * V;
              for (int64_t d = 0; d < V; ++d) delta += out[d] * d_out[r * H * V + d];
            }
            for (int64_t j = from * NR; j < to * NR; j += NR) {
              float *weight = weights + r * lds + j - first * NR, *d_score = d_scores + r * lds + j - first * NR;
              Ints bucket;
              const Floats s = row.score(load_two(weight), j, &bucket);
              Floats d_weight = load_two(d_score), factor, w, d_s;
              if (x.dropout > 0) factor = row.dropout(j), d_weight = d_weight * factor;
              if (x.softmax) {
                w = exponential(s - lse);
                d_s = w * (d_weight - delta);
              } else {
                const Floats gate = sigmoid(s);
                w = s * gate;
                d_s = d_weight * head.scale * gate * (s - w + 1.0f);
              }
              if (!row.sees_all(j)) {
                const Ints seen = row.visible(j);
                w = keep(w, seen), d_s = keep(d_s, seen);
              }
              if (!x.softmax) d_scale = d_scale + d_weight * w, w = w * head.scale;
              store(weight, x.dropout > 0 ? w * factor : w);
              store(d_score, d_s);
              if (d_position && !x.q_positions) {
                store(d_position + j - i, load_two(d_position + j - i) + d_s);
              } else if (d_position) {
                int32_t places[NR];
                store(places, row.positions(j));
                for (int column = 0; column < NR; ++column) d_position[places[column]] += d_score[column];
              }
              if (d_time) {
                // Neighbours often share a bucket: in turn to eight copies, so that no sum waits for the one before.
                int32_t places[NR];
                store(places, bucket);
                for (int column = 0; column < NR; ++column) {
                  d_time[(column & 7) * x.time_rows + places[column]] += d_score[column];
                }
              }
            }
          }
          const int64_t j0 = from * NR, count = std::min(to * NR, seen_end) - j0;
          for (int64_t panel = 0; panel < d_panels; ++panel) {
            TILES.of_rows[m](d_q + r0 * ldd + panel * NR, ldd, d_scores + r0 * lds + j0 - first * NR, lds, 1,
                             k_features + (panel * head.num_k + j0) * NR, count, true);
          }
        }
        for (int64_t panel = first; panel < last; ++panel) {
          const int64_t p = panel - first, r0 = seen_from[p] * MR, r1 = std::min(seen_to[p] * MR, num_rows);
          if (r0 >= r1) continue;
          for (int64_t j = 0; j < NR; j += MR) {
            const int64_t m = std::min<int64_t>(MR, NR - j), key = panel * NR + j, at = r0 * lds + p * NR + j;
            for (int64_t part = 0; part < v_panels; ++part) {
              TILES.of_rows[m](d_v + key * ldv + part * NR, ldv, weights + at, 1, lds,
                               d_out_features + (part * num_rows + r0) * NR, r1 - r0, true);
            }
            for (int64_t part = 0; part < d_panels; ++part) {
              TILES.of_rows[m](d_k + key * ldd + part * NR, ldd, d_scores + at, 1, lds,
                               q_features + (part * num_rows + r0) * NR, r1 - r0, true);
            }
          }
        }
      }
    }
    for (int64_t n = 0; d_time && n < 8 * x.time_rows; ++n) {
      d_time_total[n % x.time_rows] += d_time[n], d_time[n] = 0;
    }
    for (int64_t r = 0; r < num_rows; ++r) {
      write(x.d_q + ((head.q0 + i0 + r) * H + head.h) * D, d_q + r * ldd, (float)x.alpha, D, H * D);
    }
  }
  for (int64_t j = 0; j < head.num_k; ++j) {
    write(x.d_k + ((head.k0 + j) * H + head.h) * D, d_k + j * ldd, (float)x.alpha, D, H * D);
    write(x.d_v + ((head.k0 + j) * H + head.h) * V, d_v + j * ldv, 1.0f, V, H * V);
  }
  x.d_scale[head.b * H + head.h] = sum(d_scale);
}

// Tasks of each thread: the longest first, each to the thread that has least so far.
std::vector<std::vector<int64_t>> shares(const Arguments& x) {
  const int64_t num_tasks = x.num_sequences * x.num_heads;
  auto cost = [&x](int64_t task) {
    const int64_t b = task / x.num_heads;
    const int64_t num_q = x.q_offsets[b + 1] - x.q_offsets[b], num_k = x.k_offsets[b + 1] - x.k_offsets[b];
    return (num_q + 64) * (num_k + 64);
  };
  std::vector<int64_t> order(num_tasks);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t p, int64_t q) { return cost(p) > cost(q); });
  std::vector<std::vector<int64_t>> found(x.num_threads);
  std::vector<int64_t> load(x.num_threads, 0);
  for (int64_t task : order) {
    const int64_t thread = std::min_element(load.begin(), load.end()) - load.begin();
    found[thread].push_back(task);
    load[thread] += cost(task);
  }
  return found;
}

// (H, N), each row padded to whole blocks; see `look_up`.
std::vector<float> padded_times(const Arguments& x) {
  const int64_t size = ceil_div(x.time_rows, 2 * LANES) * 2 * LANES;
  std::vector<float> found(x.time_table ? x.num_heads * size : 0);
  for (int64_t h = 0; h < x.num_heads && x.time_table; ++h) {
    std::copy_n(x.time_table + h * x.time_rows, x.time_rows, found.data() + h * size);
  }
  return found;
}

}  // namespace

extern "C" {

void hstu_attention_forward(const Arguments* x) {
  const auto tasks = shares(*x);
  const Places places(*x);
  const std::vector<float> biases = places.biases(), times = padded_times(*x);
#pragma omp parallel for num_threads((int)x->num_threads) schedule(static, 1)
  for (int64_t thread = 0; thread < x->num_threads; ++thread) {
    Scratch scratch;
    for (int64_t task : tasks[thread]) {
      const int64_t h = task % x->num_heads;
      const float* bias = biases.empty() ? nullptr : biases.data() + h * places.size + places.origin();
      const float* time = times.empty() ? nullptr : times.data() + h * (times.size() / x->num_heads);
      forward(Head(*x, task / x->num_heads, h, bias, time), scratch);
    }
  }
}

void hstu_attention_backward(const Arguments* x) {
  const auto tasks = shares(*x);
  const Places places(*x);
  const std::vector<float> biases = places.biases(), times = padded_times(*x);
#pragma omp parallel for num_threads((int)x->num_threads) schedule(static, 1)
  for (int64_t thread = 0; thread < x->num_threads; ++thread) {
    Scratch scratch;
    std::vector<float> d_places(x->d_position_table ? x->num_heads * places.size : 0);
    std::vector<float> d_times(x->d_time_table ? 8 * x->time_rows : 0);
    std::vector<double> d_time_totals(x->d_time_table ? x->num_heads * x->time_rows : 0);
    for (int64_t task : tasks[thread]) {
      const int64_t h = task % x->num_heads;
      const float* bias = biases.empty() ? nullptr : biases.data() + h * places.size + places.origin();
      const float* time = times.empty() ? nullptr : times.data() + h * (times.size() / x->num_heads);
      backward(Head(*x, task / x->num_heads, h, bias, time), scratch,
               d_places.empty() ? nullptr : d_places.data() + h * places.size + places.origin(),
               d_times.empty() ? nullptr : d_times.data(),
               d_times.empty() ? nullptr : d_time_totals.data() + h * x->time_rows);
    }
    // Thousands of places share the rows at both ends of the table.
    std::vector<double> d_rows(x->position_rows);
    for (int64_t h = 0; h < x->num_heads; ++h) {
      std::fill(d_rows.begin(), d_rows.end(), 0.0);
      for (int64_t place = 0; !d_places.empty() && place < places.size; ++place) {
        d_rows[places.row(place)] += d_places[h * places.size + place];
      }
      if (x->d_position_table) {
        std::copy(d_rows.begin(), d_rows.end(), x->d_position_table + (thread * x->num_heads + h) * x->position_rows);
      }
    }
    if (x->d_time_table) {
      std::copy(d_time_totals.begin(), d_time_totals.end(), x->d_time_table + thread * d_time_totals.size());
    }
  }
}
}
