// Distinct ids of each table with counts, by a hash table that grows with them; keys sorted by owner by counting.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <new>
#include <utility>
#include <vector>

namespace {

constexpr int AHEAD = 16, RING = 32;  // ids whose memory is on its way; a power of two above
constexpr int64_t LARGEST = 8192;     // slots to begin with
constexpr int64_t PART = 16384, PARALLEL = 8192;  // ids of a part; below, threads take longer to start than to work
constexpr int MOST_PARTS = 10;        // as a power of two

// MurmurHash3's finaliser, as counter_random.mix64.
inline uint64_t mix64(uint64_t x) {
  x ^= x >> 33;
  x *= 0xFF51AFD7ED558CCDull;
  x ^= x >> 33;
  x *= 0xC4CEB9FE1A85EC53ull;
  return x ^ (x >> 33);
}

struct Slot {
  int64_t id, number;  // -1: empty
};

// Numbers of ids by linear probing, half full at most.
class Numbers {
 public:
  void start(int64_t ids) {
    int64_t size = 16;
    while (size < std::min(2 * ids, LARGEST)) size *= 2;
    slots_.assign(size, Slot{0, -1}), used_ = 0;
  }

  void fetch(uint64_t hash) const { __builtin_prefetch(&slots_[hash & (slots_.size() - 1)], 1); }

  // The id's number; `next` where it is new.
  int64_t find_or_insert(uint64_t hash, int64_t id, int64_t next) {
    Slot* slot = place(hash, id);
    if (slot->number >= 0) return slot->number;
    *slot = {id, next};
    if (2 * ++used_ > slots_.size()) grow();
    return next;
  }

 private:
  Slot* place(uint64_t hash, int64_t id) {
    const uint64_t mask = slots_.size() - 1;
    uint64_t i = hash & mask;
    while (slots_[i].number >= 0 && slots_[i].id != id) i = (i + 1) & mask;
    return &slots_[i];
  }

  void grow() {
    slots_.swap(old_);
    slots_.assign(4 * old_.size(), Slot{0, -1});
    for (const Slot& slot : old_)
      if (slot.number >= 0) *place(mix64(slot.id), slot.id) = slot;
  }

  std::vector<Slot> slots_, old_;  // both keep their memory: fresh pages would cost more than the work
  uint64_t used_ = 0;
};

}  // namespace

extern "C" {

// Distinct ids of each table in the order of their first occurrence, which is also the order of tables.
//
// Ids of a large table are first split by hash into parts whose distinct ones fit into a core's cache, each in the order
// of positions. A part is one thread's work: it says for each position where its id occurs first. First positions,
// counted, are the numbers of the keys. `ids_out` and `counts` have room for all ids; `part_ids`, `part_positions` and
// `count_at` are scratch of that size, `bits` and `before` of a 64th. Returns the number of keys, -1 for want of memory.
int64_t unique_keys(const int64_t* ids, const int64_t* offsets, int64_t num_tables, const int64_t* weights,
                    int64_t* ids_out, int64_t* offsets_out, int64_t* inverse, int64_t* counts, int64_t* part_ids,
                    uint32_t* part_positions, int64_t* count_at, uint64_t* bits, int64_t* before) try {
  struct Part {
    int64_t first, last;
    bool split;
  };
  std::vector<Part> parts;
  for (int64_t table = 0; table < num_tables; ++table) {
    const int64_t first = offsets[table], last = offsets[table + 1];
    int log = 0;
    while ((last - first) >> log > PART && log < MOST_PARTS) ++log;
    if (log == 0) {
      parts.push_back({first, last, false});
      continue;
    }
    const int64_t chunks = omp_get_max_threads(), num = int64_t(1) << log;
    std::vector<std::vector<int64_t>> places(chunks, std::vector<int64_t>(num));
    const auto each = [&](int64_t chunk, auto work) {
      int64_t* const place = places[chunk].data();
      for (int64_t i = first + (last - first) * chunk / chunks; i < first + (last - first) * (chunk + 1) / chunks; ++i)
        work(i, place[mix64(ids[i]) >> (64 - log)]);
    };
#pragma omp parallel for schedule(static, 1)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) each(chunk, [](int64_t, int64_t& place) { ++place; });
    int64_t sum = first;
    for (int64_t part = 0; part < num; ++part) {
      const int64_t begin = sum;
      for (auto& of_chunk : places) sum += std::exchange(of_chunk[part], sum);  // so a part keeps the order of positions
      parts.push_back({begin, sum, true});
    }
#pragma omp parallel for schedule(static, 1)
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      each(chunk, [&](int64_t i, int64_t& place) {
        part_ids[place] = ids[i];
        part_positions[place++] = uint32_t(i);
      });
  }

  const int64_t size = offsets[num_tables], words = (size + 63) / 64;
  bool failed = false;
#pragma omp parallel if (size > PARALLEL)
  {
    Numbers numbers;
    std::vector<int64_t> first_positions, local_counts;
#pragma omp for schedule(dynamic)
    for (size_t p = 0; p < parts.size(); ++p) {
      const Part part = parts[p];
      const int64_t* const own = part.split ? part_ids : ids;
      uint64_t ring[RING];
      try {
        numbers.start(part.last - part.first), first_positions.clear(), local_counts.clear();
        for (int64_t i = part.first; i < part.last + AHEAD; ++i) {
          if (i < part.last) numbers.fetch(ring[i % RING] = mix64(own[i]));
          const int64_t k = i - AHEAD;
          if (k < part.first) continue;
          const int64_t position = part.split ? part_positions[k] : k;
          const int64_t number = numbers.find_or_insert(ring[k % RING], own[k], first_positions.size());
          if (size_t(number) == first_positions.size()) first_positions.push_back(position), local_counts.push_back(0);
          local_counts[number] += weights ? weights[position] : 1;
          inverse[position] = first_positions[number];
        }
        for (size_t u = 0; u < first_positions.size(); ++u) count_at[first_positions[u]] = local_counts[u];
      } catch (const std::bad_alloc&) {
#pragma omp atomic write
        failed = true;
      }
    }
  }
  if (failed) return -1;

#pragma omp parallel for if (size > PARALLEL)
  for (int64_t w = 0; w < words; ++w) {
    uint64_t word = 0;
    for (int64_t i = w * 64; i < std::min(size, w * 64 + 64); ++i) word |= uint64_t(inverse[i] == i) << (i % 64);
    bits[w] = word;
    before[w] = __builtin_popcountll(word);
  }
  int64_t keys = 0;
  for (int64_t w = 0; w < words; ++w) keys += std::exchange(before[w], keys);
  const auto rank = [&](int64_t i) {
    return i == size ? keys : before[i / 64] + __builtin_popcountll(bits[i / 64] & ((uint64_t(1) << (i % 64)) - 1));
  };
  for (int64_t table = 0; table <= num_tables; ++table) offsets_out[table] = rank(offsets[table]);
#pragma omp parallel for if (size > PARALLEL)
  for (int64_t i = 0; i < size; ++i) {
    const int64_t first = inverse[i], number = rank(first);
    if (first == i) ids_out[number] = ids[i], counts[number] = count_at[i];
    inverse[i] = number;
  }
  return keys;
} catch (const std::bad_alloc&) {
  return -1;
}

// Keys, which lie by table, sorted by owner; `counts` (owners, tables) is zero before. Returns -1 for want of memory.
int64_t route(const int64_t* ids, const int64_t* offsets, const int64_t* salts, const int64_t* group_bits,
              const int64_t* rotations, int64_t num_tables, int64_t owners, int64_t* order, int64_t* counts) try {
  const int64_t keys = offsets[num_tables];
  std::vector<int32_t> owner(keys);
  for (int64_t table = 0; table < num_tables; ++table) {
    const int64_t bits = group_bits[table], rotation = rotations[table];
    for (int64_t i = offsets[table]; i < offsets[table + 1]; ++i) {
      const uint64_t group = bits ? mix64(ids[i] ^ salts[table]) >> (64 - bits) : 0;
      uint64_t rank = (group * owners >> bits) + rotation;
      if (rank >= uint64_t(owners)) rank -= owners;
      owner[i] = int32_t(rank);
      ++counts[rank * num_tables + table];
    }
  }
  std::vector<int64_t> place(owners);
  for (int64_t rank = 0, sum = 0; rank < owners; ++rank) {
    place[rank] = sum;
    for (int64_t table = 0; table < num_tables; ++table) sum += counts[rank * num_tables + table];
  }
  for (int64_t i = 0; i < keys; ++i) order[place[owner[i]]++] = i;
  return 0;
} catch (const std::bad_alloc&) {
  return -1;
}

}  // extern "C"
