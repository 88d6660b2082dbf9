// Log-sum-exp of products of queries and items, and its gradients, in tiles that are used while they lie in the cache.
//
// A thread owns some of the items and passes over all tokens, a block at a time. Logits have items as rows: items are
// read where they lie, and a token is a lane, in which its maximum and sum arise. Where forward takes the gradients,
// dx needs the sum over all items, so the exponentials of one block are kept until it is known. Threads meet once a
// block and add up each other's sums in a fixed order: results repeat bit for bit on one number of threads.
//
// Sizes: T tokens, C items, D width, P the same in whole panels.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>

#include "../register_tile.h"

namespace {

constexpr int TOKENS = 96;  // of a block: whole panels
constexpr int ROW = 112;    // floats from a row of logits to the next: 7 lines of the cache, which no power of 2 divides
constexpr int ITEMS = 192;  // of a chunk, half of it where they are wide
constexpr float LOWEST = std::numeric_limits<float>::lowest();  // not -inf: where nothing counts, -inf - -inf is NaN

typedef int64_t lvec __attribute__((vector_size(8 * LANES), aligned(8), may_alias));

inline vec higher(vec x, vec y) { return x > y ? x : y; }

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

// C (+)= A B by tiles; B in panels of `num_k` rows.
void product(float* c, int64_t ldc, const float* a, int64_t rs, int64_t cs, const float* panels, int64_t rows,
             int64_t columns, int64_t num_k, bool add, bool rows_first) {
  const int64_t num_panels = columns / NR, groups = (rows + MR - 1) / MR;
  const int64_t outer = rows_first ? groups : num_panels, inner = rows_first ? num_panels : groups;
  for (int64_t i = 0; i < outer; ++i) {
    // Rows are far away: in the cache that processors share, or in memory.
    for (int64_t row = (i + 1) * MR; rows_first && row < std::min((i + 2) * MR, rows); ++row) {
      for (int64_t k = 0; k < num_k; k += 16) __builtin_prefetch(a + row * rs + k, 0, 3);
      for (int64_t k = 0; k < columns; k += 16) __builtin_prefetch(c + row * ldc + k, 1, 3);
    }
    for (int64_t j = 0; j < inner; ++j) {
      const int64_t row = (rows_first ? i : j) * MR, panel = rows_first ? j : i;
      const int64_t count = std::min<int64_t>(MR, rows - row);
      const Tile of_rows = count == MR ? tile<MR> : TILES.of_rows[count];
      of_rows(c + row * ldc + panel * NR, ldc, a + row * rs, rs, cs, panels + panel * num_k * NR, num_k, add);
    }
  }
}

inline int64_t up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// Floats aligned to cache lines: a vector that lies across two costs twice.
struct Buffer {
  std::unique_ptr<float[]> memory;
  float* data = nullptr;
  void reserve(int64_t floats) {
    memory.reset(new float[floats + 16]);
    data = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) / 4 % 16;
  }
};

struct Problem {
  const float *queries, *items, *log_weights;  // weights: null where there are none
  const int64_t *ids, *excluded;               // null where nothing is excluded
  int64_t T, C, D;
  float scale;

  int64_t width() const { return up(D, NR); }
};

// The items of a thread, a chunk at a time.
struct Share {
  const Problem& x;
  int64_t first, last, chunk;

  Share(const Problem& problem, int64_t thread, int64_t threads) : x(problem) {
    const int64_t groups = (x.C + MR - 1) / MR;
    first = std::min(x.C, groups * thread / threads * MR);
    last = std::min(x.C, groups * (thread + 1) / threads * MR);
    chunk = x.width() > 128 ? ITEMS / 2 : ITEMS;
  }
  int64_t chunks() const { return (last - first + chunk - 1) / chunk; }
  int64_t begin(int64_t k) const { return first + k * chunk; }
  int64_t size(int64_t k) const { return std::min(chunk, last - begin(k)); }
};

// Queries of a block as panels of tokens, which are the columns of logits; rows beyond the last token are 0.
void pack_transposed(const Problem& x, int64_t t0, int64_t n, float* to) {
  for (int64_t t = 0; t < up(n, NR); ++t) {
    float* column = to + t / NR * x.D * NR + t % NR;
    const float* from = x.queries + (t0 + t) * x.D;
    for (int64_t d = 0; d < x.D; ++d) column[d * NR] = t < n ? from[d] * x.scale : 0.0f;
  }
}

// Rows as panels of columns, filled up with zeros; `factors` of the rows, or null.
void pack(const float* rows, int64_t num_rows, int64_t D, const float* factors, float* to) {
  for (int64_t j = 0; j < D; j += NR, to += num_rows * NR) {
    const int64_t here = std::min<int64_t>(NR, D - j);
    for (int64_t r = 0; r < num_rows; ++r) {
      const float* from = rows + r * D + j;
      float* row = to + r * NR;
      vec low = {}, high = {};
      if (here == NR) {
        low = load(from), high = load(from + LANES);
      } else {
        float whole[NR] = {};
        std::memcpy(whole, from, 4 * here);
        low = load(whole), high = load(whole + LANES);
      }
      const vec factor = all(factors ? factors[r] : 1.0f);
      store(row, low * factor), store(row + LANES, high * factor);
    }
  }
}

// Logits of a chunk with weights, and -inf where an item has the excluded id.
void complete(const Problem& x, int64_t c0, int64_t num_c, int64_t t0, int64_t n, float* logits) {
  const vec nothing = all(-std::numeric_limits<float>::infinity());
  for (int64_t t = 0; t < n; t += LANES) {
    lvec excluded = {};
    if (x.ids) std::memcpy(&excluded, x.excluded + t0 + t, 8 * std::min<int64_t>(LANES, n - t));
    for (int64_t c = 0; c < num_c; ++c) {
      vec s = load(logits + c * ROW + t);
      if (x.log_weights) s += x.log_weights[c0 + c];
      if (x.ids) s = __builtin_convertvector(excluded == x.ids[c0 + c], ivec) ? nothing : s;
      store(logits + c * ROW + t, s);
    }
  }
}

// logits := exp(logits - maximum), maximum and sum of each token now covering this chunk too, and what that multiplies
// earlier sums by. Returns whether that is not 1 for a token.
bool add_exponentials(float* logits, int64_t num_c, int64_t n, float* maximum, float* sum, float* shrink) {
  bool changed = false;
  for (int64_t t = 0; t < n; t += NR) {
    vec high[2][2];
    for (int i = 0; i < 2; ++i) high[0][i] = high[1][i] = load(maximum + t + i * LANES);
    int64_t c = 0;
    for (; c + 2 <= num_c; c += 2) {
      for (int i = 0; i < 2; ++i) {
        high[0][i] = higher(load(logits + c * ROW + t + i * LANES), high[0][i]);
        high[1][i] = higher(load(logits + (c + 1) * ROW + t + i * LANES), high[1][i]);
      }
    }
    for (int i = 0; i < 2; ++i) {
      if (c < num_c) high[0][i] = higher(load(logits + c * ROW + t + i * LANES), high[0][i]);
      high[0][i] = higher(high[1][i], high[0][i]);
      const vec before = load(maximum + t + i * LANES);
      const ivec rose = high[0][i] > before;
      for (int lane = 0; lane < LANES; ++lane) changed |= rose[lane] != 0;
      store(shrink + t + i * LANES, exponential(before - high[0][i]));
      store(maximum + t + i * LANES, high[0][i]);
    }
    vec total0 = {}, total1 = {};
    for (c = 0; c < num_c; ++c) {
      float* row = logits + c * ROW + t;
      const vec e0 = exponential(load(row) - high[0][0]), e1 = exponential(load(row + LANES) - high[0][1]);
      total0 += e0, total1 += e1;
      store(row, e0), store(row + LANES, e1);
    }
    store(sum + t, load(sum + t) * load(shrink + t) + total0);
    store(sum + t + LANES, load(sum + t + LANES) * load(shrink + t + LANES) + total1);
  }
  return changed;
}

// logits := exp(logits - total).
void exponentials(float* logits, int64_t num_c, int64_t n, const float* total) {
  for (int64_t t = 0; t < n; t += NR) {
    const vec t0 = load(total + t), t1 = load(total + t + LANES);
    for (int64_t c = 0; c < num_c; ++c) {
      float* row = logits + c * ROW + t;
      const vec e0 = exponential(load(row) - t0), e1 = exponential(load(row + LANES) - t1);
      store(row, e0), store(row + LANES, e1);
    }
  }
}

// What a thread says of a block of tokens to the others; two of them, so that one is read while the next is written.
struct Part {
  Buffer memory;
  float *maximum, *sum, *d_queries;
  void reserve(int64_t width) {
    memory.reserve(TOKENS * (2 + width));
    maximum = memory.data, sum = maximum + TOKENS, d_queries = sum + TOKENS;
  }
};

// How many threads gain more than they wait for each other.
int gainful(int64_t threads, const Problem& x) {
  return (int)std::max<int64_t>(1, std::min({threads, x.C / 64, x.T * x.C * x.D / 200000}));
}

// What a block of tokens adds to rows of the gradient of items; the first block sets them.
void add_to_items(const Problem& x, float* d_items, int64_t c0, int64_t num_c, const float* slopes,
                  const float* packed_queries, int64_t n, bool add, float* spare) {
  if (x.width() == x.D) {
    product(d_items + c0 * x.D, x.D, slopes, ROW, 1, packed_queries, num_c, x.D, n, add, true);
    return;
  }
  product(spare, x.width(), slopes, ROW, 1, packed_queries, num_c, x.width(), n, false, true);
  for (int64_t c = 0; c < num_c; ++c) {
    float* to = d_items + (c0 + c) * x.D;
    const float* from = spare + c * x.width();
    for (int64_t d = 0; d < x.D; ++d) to[d] = add ? to[d] + from[d] : from[d];
  }
}

}  // namespace

extern "C" {

// The log-sum-exp (T) and, unless null, the gradients of its sum: d_queries (T, D), d_items (C, D).
void log_sum_exp(const float* queries, const float* items, const float* log_weights, const int64_t* ids,
                 const int64_t* excluded, float* lse, float* d_queries, float* d_items, double scale, int64_t T,
                 int64_t C, int64_t D, int64_t most_threads) {
  const Problem x{queries, items, log_weights, ids, excluded, T, C, D, (float)scale};
  const int64_t width = x.width();
  std::unique_ptr<Part[]> parts(new Part[2 * gainful(most_threads, x)]);
#pragma omp parallel num_threads(gainful(most_threads, x))
  {
    const int64_t me = omp_get_thread_num(), threads = omp_get_num_threads();
    const Share share(x, me, threads);
    for (int i = 0; i < 2; ++i) parts[2 * me + i].reserve(width);
    Buffer tokens, columns, logits, packed, history, spare;
    tokens.reserve(6 * TOKENS);
    float *whole = tokens.data, *inverse = whole + TOKENS, *factor = inverse + TOKENS, *shrink = factor + TOKENS;
    columns.reserve(TOKENS * std::max(D, width));
    packed.reserve(std::max<int64_t>(share.chunk, TOKENS) * width);
    logits.reserve((d_items ? share.chunks() : 1) * share.chunk * ROW);
    history.reserve(share.chunks() * TOKENS);
    spare.reserve(width == D ? 0 : share.chunk * width);
    for (int64_t t0 = 0, block = 0; t0 < T; t0 += TOKENS, ++block) {
      const int64_t n = std::min<int64_t>(TOKENS, T - t0), whole_n = up(n, NR);
      Part& mine = parts[2 * me + block % 2];
      pack_transposed(x, t0, n, columns.data);
      std::fill(mine.maximum, mine.maximum + whole_n, LOWEST);
      std::fill(mine.sum, mine.sum + whole_n, 0.0f);
      if (d_queries) std::fill(mine.d_queries, mine.d_queries + TOKENS * width, 0.0f);
      for (int64_t k = 0; k < share.chunks(); ++k) {
        const int64_t c0 = share.begin(k), num_c = share.size(k);
        float* s = logits.data + (d_items ? k * share.chunk * ROW : 0);
        product(s, ROW, items + c0 * D, D, 1, columns.data, num_c, whole_n, D, false, true);
        if (log_weights || ids) complete(x, c0, num_c, t0, n, s);
        const bool changed = add_exponentials(s, num_c, whole_n, mine.maximum, mine.sum, shrink);
        std::copy(mine.maximum, mine.maximum + whole_n, history.data + k * TOKENS);
        if (!d_queries) continue;
        if (changed && k) {
          for (int64_t t = 0; t < n; ++t) {
            for (int64_t d = 0; d < width; ++d) mine.d_queries[t * width + d] *= shrink[t];
          }
        }
        pack(items + c0 * D, num_c, D, nullptr, packed.data);
        product(mine.d_queries, width, s, 1, ROW, packed.data, n, width, num_c, true, false);
      }
#pragma omp barrier
      for (int64_t t = 0; t < whole_n; t += LANES) {
        vec high = all(LOWEST), sum = {};
        for (int64_t i = 0; i < threads; ++i) high = higher(load(parts[2 * i + block % 2].maximum + t), high);
        for (int64_t i = 0; i < threads; ++i) {
          const Part& part = parts[2 * i + block % 2];
          sum += load(part.sum + t) * exponential(load(part.maximum + t) - high);
        }
        store(whole + t, high);
        store(inverse + t, sum == 0.0f ? vec{} : x.scale / sum);
        store(factor + t, sum);
      }
      for (int64_t t = n * me / threads; t < n * (me + 1) / threads; ++t) {
        lse[t0 + t] = whole[t] + std::log(factor[t]);
        if (!d_queries) continue;
        for (int64_t i = 0; i < threads; ++i) {
          const Part& part = parts[2 * i + block % 2];
          const float f = exponential(all(part.maximum[t] - whole[t]))[0] * inverse[t];
          float* to = d_queries + (t0 + t) * D;
          const float* from = part.d_queries + t * width;
          for (int64_t d = 0; d < D; ++d) to[d] = i ? to[d] + f * from[d] : f * from[d];
        }
      }
      if (!d_items) continue;
      for (int64_t k = 0; k < share.chunks(); ++k) {
        for (int64_t t = 0; t < whole_n; t += LANES) {
          store(factor + t, exponential(load(history.data + k * TOKENS + t) - load(whole + t)) * load(inverse + t));
        }
        pack(queries + t0 * D, n, D, factor, packed.data);
        add_to_items(x, d_items, share.begin(k), share.size(k), logits.data + k * share.chunk * ROW, packed.data, n,
                     block, spare.data);
      }
    }
  }
}

// Gradients, unless null, for that of the log-sum-exp `lse`, from logits that are computed again.
void log_sum_exp_backward(const float* queries, const float* items, const float* log_weights, const int64_t* ids,
                          const int64_t* excluded, const float* lse, const float* gradient, float* d_queries,
                          float* d_items, double scale, int64_t T, int64_t C, int64_t D, int64_t most_threads) {
  const Problem x{queries, items, log_weights, ids, excluded, T, C, D, (float)scale};
  const int64_t width = x.width();
  std::unique_ptr<Part[]> parts(new Part[2 * gainful(most_threads, x)]);
#pragma omp parallel num_threads(gainful(most_threads, x))
  {
    const int64_t me = omp_get_thread_num(), threads = omp_get_num_threads();
    const Share share(x, me, threads);
    for (int i = 0; i < 2; ++i) parts[2 * me + i].reserve(width);
    Buffer tokens, columns, logits, packed, packed_queries, spare;
    tokens.reserve(2 * TOKENS);
    float *total = tokens.data, *factor = total + TOKENS;
    columns.reserve(TOKENS * D);
    packed.reserve(share.chunk * width);
    packed_queries.reserve(TOKENS * width);
    logits.reserve(share.chunk * ROW);
    spare.reserve(width == D ? 0 : share.chunk * width);
    for (int64_t t0 = 0, block = 0; t0 < T; t0 += TOKENS, ++block) {
      const int64_t n = std::min<int64_t>(TOKENS, T - t0), whole_n = up(n, NR);
      Part& mine = parts[2 * me + block % 2];
      pack_transposed(x, t0, n, columns.data);
      for (int64_t t = 0; t < whole_n; ++t) {
        total[t] = t < n ? lse[t0 + t] : 0.0f;
        factor[t] = t < n ? gradient[t0 + t] * x.scale : 0.0f;
      }
      if (d_items) pack(queries + t0 * D, n, D, factor, packed_queries.data);
      for (int64_t k = 0; k < share.chunks(); ++k) {
        const int64_t c0 = share.begin(k), num_c = share.size(k);
        product(logits.data, ROW, items + c0 * D, D, 1, columns.data, num_c, whole_n, D, false, true);
        if (log_weights || ids) complete(x, c0, num_c, t0, n, logits.data);
        exponentials(logits.data, num_c, whole_n, total);
        if (d_queries) {
          pack(items + c0 * D, num_c, D, nullptr, packed.data);
          product(mine.d_queries, width, logits.data, 1, ROW, packed.data, n, width, num_c, k, false);
        }
        if (d_items) add_to_items(x, d_items, c0, num_c, logits.data, packed_queries.data, n, block, spare.data);
      }
      if (!d_queries) continue;
#pragma omp barrier
      for (int64_t t = n * me / threads; t < n * (me + 1) / threads; ++t) {
        float* to = d_queries + (t0 + t) * D;
        for (int64_t i = 0; i < threads; ++i) {
          const float* from = parts[2 * i + block % 2].d_queries + t * width;
          for (int64_t d = 0; d < D; ++d) to[d] = i ? to[d] + factor[t] * from[d] : factor[t] * from[d];
        }
      }
    }
  }
}
}
