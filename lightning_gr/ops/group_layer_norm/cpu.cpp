// Group layer norm of rows, times a gate, with dropout: forward and backward, one pass over memory each.
//
// Rows are given to threads in blocks of a fixed number, and sums over rows are kept by block: the caller adds the
// blocks up, so that results do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

// Mirrors `_Arguments` in cpu.py. Null: `groups` of one group, `gate` of none, `gate_grad` where nobody wants it.
struct Arguments {
  const float* x;
  int64_t x_stride;
  const float* weight;
  const float* bias;
  const int64_t* groups;
  const float* gate;
  int64_t gate_stride;
  float eps;
  uint32_t seed;
  uint32_t drop_below;  // of 2^32; 0 means no dropout
  float kept_scale;
  int64_t rows, dim, num_groups;
};

inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// What dropout multiplies the elements of a row with.
struct Dropout {
  uint32_t key, drop_below;
  float kept_scale;
  Dropout(const Arguments& a, int64_t t)
      : key(mix(a.seed + uint32_t(t) * 0x9e3779b9u)), drop_below(a.drop_below), kept_scale(a.kept_scale) {}
  float operator()(int64_t d) const { return mix(key ^ uint32_t(d)) >= drop_below ? kept_scale : 0.0f; }
};

struct Statistics {
  float mean, rstd;
};

inline Statistics statistics(const float* x, int64_t dim, float eps) {
  float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < dim; ++d) sum += x[d];
  const float mean = sum / dim;
#pragma omp simd reduction(+ : squares)
  for (int64_t d = 0; d < dim; ++d) squares += (x[d] - mean) * (x[d] - mean);
  return {mean, 1.0f / std::sqrt(squares / dim + eps)};
}

template <bool GATE, bool DROPOUT>
void forward_row(const Arguments& a, int64_t t, float* __restrict out) {
  const float* __restrict x = a.x + t * a.x_stride;
  const float* __restrict gate = a.gate + t * a.gate_stride;
  const int64_t group = a.groups ? a.groups[t] : 0;
  const float* __restrict weight = a.weight + group * a.dim;
  const float* __restrict bias = a.bias + group * a.dim;
  const auto [mean, rstd] = statistics(x, a.dim, a.eps);
  const Dropout dropout(a, t);
#pragma omp simd
  for (int64_t d = 0; d < a.dim; ++d) {
    float y = (x[d] - mean) * rstd * weight[d] + bias[d];
    if (GATE) y *= gate[d];
    if (DROPOUT) y *= dropout(d);
    out[d] = y;
  }
}

template <bool GATE, bool DROPOUT>
void backward_row(const Arguments& a, int64_t t, const float* __restrict out_grad, float* __restrict x_grad,
                  float* __restrict gate_grad, float* __restrict weight_grad, float* __restrict bias_grad,
                  float* __restrict normed_grad) {
  const float* __restrict x = a.x + t * a.x_stride;
  const float* __restrict gate = a.gate + t * a.gate_stride;
  const int64_t group = a.groups ? a.groups[t] : 0;
  const float* __restrict weight = a.weight + group * a.dim;
  const float* __restrict bias = a.bias + group * a.dim;
  weight_grad += group * a.dim;
  bias_grad += group * a.dim;
  const auto [mean, rstd] = statistics(x, a.dim, a.eps);
  const Dropout dropout(a, t);
  float sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
  for (int64_t d = 0; d < a.dim; ++d) {
    const float normed = (x[d] - mean) * rstd;
    float grad = out_grad[d];
    if (DROPOUT) grad *= dropout(d);
    if (GATE) {
      gate_grad[d] = grad * (normed * weight[d] + bias[d]);
      grad *= gate[d];
    }
    weight_grad[d] += grad * normed;
    bias_grad[d] += grad;
    grad *= weight[d];
    normed_grad[d] = grad;
    sum += grad;
    product += grad * normed;
  }
  const float mean_grad = sum / a.dim, slope = product / a.dim;
#pragma omp simd
  for (int64_t d = 0; d < a.dim; ++d) {
    x_grad[d] = rstd * (normed_grad[d] - mean_grad - (x[d] - mean) * rstd * slope);
  }
}

template <bool GATE, bool DROPOUT>
void forward(const Arguments& a, float* out) {
#pragma omp parallel for schedule(static) if (a.rows * a.dim > 1 << 15)
  for (int64_t t = 0; t < a.rows; ++t) forward_row<GATE, DROPOUT>(a, t, out + t * a.dim);
}

template <bool GATE, bool DROPOUT>
void backward(const Arguments& a, const float* out_grad, float* x_grad, float* gate_grad, float* weight_grad,
              float* bias_grad, int64_t rows_per_block) {
  const int64_t blocks = (a.rows + rows_per_block - 1) / rows_per_block, affine = a.num_groups * a.dim;
#pragma omp parallel if (a.rows * a.dim > 1 << 15)
  {
    std::vector<float> normed_grad(a.dim);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      float* block_weight = weight_grad + block * affine;
      float* block_bias = bias_grad + block * affine;
      std::fill_n(block_weight, affine, 0.0f);
      std::fill_n(block_bias, affine, 0.0f);
      const int64_t end = std::min(a.rows, (block + 1) * rows_per_block);
      for (int64_t t = block * rows_per_block; t < end; ++t) {
        const int64_t at = t * a.dim;
        backward_row<GATE, DROPOUT>(a, t, out_grad + at, x_grad + at, GATE ? gate_grad + at : nullptr, block_weight,
                                    block_bias, normed_grad.data());
      }
    }
  }
}

}  // namespace

extern "C" {

// out: (rows, dim).
void norm_forward(const Arguments* a, float* out) {
  if (a->gate) {
    a->drop_below ? forward<true, true>(*a, out) : forward<true, false>(*a, out);
  } else {
    a->drop_below ? forward<false, true>(*a, out) : forward<false, false>(*a, out);
  }
}

// x_grad and, with a gate, gate_grad: (rows, dim). weight_grad and bias_grad: (blocks, num_groups, dim).
void norm_backward(const Arguments* a, const float* out_grad, float* x_grad, float* gate_grad, float* weight_grad,
                   float* bias_grad, int64_t rows_per_block) {
  const auto run = a->gate ? (a->drop_below ? backward<true, true> : backward<true, false>)
                           : (a->drop_below ? backward<false, true> : backward<false, false>);
  run(*a, out_grad, x_grad, gate_grad, weight_grad, bias_grad, rows_per_block);
}
}
