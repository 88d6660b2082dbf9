// First values of rows: draws by counter (counter_random.counter_uniform of seed, name, id, column), vectorised.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr uint64_t GAMMA = 0x9E3779B97F4A7C15ull;
constexpr int64_t PARALLEL = 1 << 12;  // draws; below, threads take longer to start than to work
constexpr double PI = 3.14159265358979323846;
// Half of pi in two numbers, the first so short that a product with a small integer is exact.
constexpr double HALF_PI_HIGH = 0x1.921fb544p+0, HALF_PI_LOW = 0x1.0b4611a626331p-34;
constexpr double DOUBT = 0x1p-50;  // above what `log_of` and `cos_of` may be off

// MurmurHash3's finaliser, as counter_random.mix64.
inline uint64_t mix64(uint64_t x) {
  x ^= x >> 33;
  x *= 0xFF51AFD7ED558CCDull;
  x ^= x >> 33;
  x *= 0xC4CEB9FE1A85EC53ull;
  return x ^ (x >> 33);
}

inline uint64_t with_part(uint64_t state, uint64_t mixed_part) { return mix64(state * 31 + GAMMA + mixed_part); }

inline uint64_t mixed(uint64_t part) { return mix64(part + GAMMA); }

inline double uniform_of(uint64_t bits) { return (double(int64_t(bits >> 11)) + 0.5) * 0x1p-53; }

// Of x in (0, 1): x = m 2^e with m within [sqrt(1/2), sqrt(2)), log m = 2 artanh((m - 1) / (m + 1)) by its series.
inline double log_of(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  const uint64_t shifted = bits - 0x3FE6A09E667F3BCDull;  // the bits of sqrt(1/2)
  const int64_t e = int64_t(shifted) >> 52;
  bits -= uint64_t(e) << 52;
  double m;
  std::memcpy(&m, &bits, 8);
  const double s = (m - 1) / (m + 1), z = s * s;
  double rest = 1.0 / 25;
  for (int n = 23; n >= 3; n -= 2) rest = rest * z + 1.0 / n;
  return double(e) * 6.93147180559945309417e-1 + 2 * (s + s * z * rest);
}

// Of x in [0, 2 pi]: by the nearest multiple of pi / 2 and the series around it.
inline double cos_of(double x) {
  const int32_t k = int32_t(x * (2 / PI) + 0.5);
  const double r = (x - k * HALF_PI_HIGH) - k * HALF_PI_LOW, z = r * r;
  double c = 1, s = 1;
  for (int n = 18; n >= 2; n -= 2) c = 1 - c * z * (1.0 / (n * (n - 1)));
  for (int n = 19; n >= 3; n -= 2) s = 1 - s * z * (1.0 / (n * (n - 1)));
  const double value = k & 1 ? r * s : c;
  return (k + 1) & 2 ? -value : value;
}

// Calls row(i, bits) with the bits of all D columns of each row.
template <class Row>
void each_row(const int64_t* ids, int64_t N, int64_t D, uint64_t seed, uint64_t name, Row row) {
  const uint64_t start = with_part(with_part(0, mixed(seed)), mixed(name));
  std::vector<uint64_t> columns(D);
  for (int64_t d = 0; d < D; ++d) columns[d] = mixed(d);
#pragma omp parallel if (N * D > PARALLEL)
  {
    std::vector<uint64_t> bits(D);
    std::vector<double> scratch(D);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < N; ++i) {
      const uint64_t state = with_part(start, mixed(ids[i]));
      for (int64_t d = 0; d < D; ++d) bits[d] = with_part(state, columns[d]);
      row(i, bits.data(), scratch.data());
    }
  }
}

}  // namespace

extern "C" {

// out (N, D): uniform between low and low + width.
void uniform(const int64_t* ids, int64_t N, int64_t D, uint64_t seed, uint64_t name, double low, double width,
             float* out) {
  each_row(ids, N, D, seed, name, [=](int64_t i, const uint64_t* bits, double* scratch) {
    // Two loops, so that product and sum are rounded one by one as in PyTorch.
    for (int64_t d = 0; d < D; ++d) scratch[d] = width * uniform_of(bits[d]);
    for (int64_t d = 0; d < D; ++d) out[i * D + d] = float(low + scratch[d]);
  });
}

// out (N, D): normal, by Box and Muller. Where a value is so near the middle of two floats that a last bit of the
// logarithm or cosine may decide which it becomes, `doubtful` (N) says so of its row.
void normal(const int64_t* ids, int64_t N, int64_t D, uint64_t seed, uint64_t name, double mean, double deviation,
            float* out, uint8_t* doubtful) {
  const uint64_t first = mixed(0), second = mixed(1);
  each_row(ids, N, D, seed, name, [=](int64_t i, const uint64_t* bits, double* scratch) {
    for (int64_t d = 0; d < D; ++d) scratch[d] = deviation * std::sqrt(-2 * log_of(uniform_of(with_part(bits[d], first))));
    int doubts = 0;
    for (int64_t d = 0; d < D; ++d) {
      const double angle = 2 * PI * uniform_of(with_part(bits[d], second));
      const double value = mean + scratch[d] * cos_of(angle);
      const double error = DOUBT * (std::fabs(mean) + std::fabs(scratch[d]));
      out[i * D + d] = float(value);
      doubts |= float(value - error) != float(value + error);
    }
    doubtful[i] = doubts != 0;
  });
}
}
