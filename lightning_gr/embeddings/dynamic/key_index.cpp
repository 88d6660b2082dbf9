// The slots of a KeyIndex: search by all threads, insertion in the order of the keys, rehash, scan by virtual shard.
//
// A group is 8 slots, whose ids are a cache line. Memory is asked for well before it is read, since almost every access
// to a large index misses the caches. No result depends on the number of threads.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#if defined(__AVX512F__) && defined(__AVX512VL__)
#include <immintrin.h>
#endif

namespace {

constexpr int GROUP = 8, AHEAD = 16, RING = 32;  // keys whose memory is on its way; a power of two above
constexpr int32_t EMPTY = -1;
constexpr int64_t PARALLEL = 4096;  // below, threads take longer to start than to work

// MurmurHash3's finaliser, as counter_random.mix64.
inline uint64_t mix64(uint64_t x) {
  x ^= x >> 33;
  x *= 0xFF51AFD7ED558CCDull;
  x ^= x >> 33;
  x *= 0xC4CEB9FE1A85EC53ull;
  return x ^ (x >> 33);
}

// Bit j of each mask is slot j of a group.
#if defined(__AVX512F__) && defined(__AVX512VL__)
inline unsigned equal(const int64_t* ids, int64_t id) {
  return _mm512_cmpeq_epi64_mask(_mm512_loadu_si512(ids), _mm512_set1_epi64(id));
}
inline unsigned empty(const int32_t* rows) {
  return _mm256_cmpeq_epi32_mask(_mm256_loadu_si256((const __m256i*)rows), _mm256_set1_epi32(EMPTY));
}
inline unsigned free_slots(const int32_t* rows) {
  return _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_loadu_si256((const __m256i*)rows)));
}
#else
inline unsigned equal(const int64_t* ids, int64_t id) {
  unsigned mask = 0;
  for (int j = 0; j < GROUP; ++j) mask |= unsigned(ids[j] == id) << j;
  return mask;
}
inline unsigned empty(const int32_t* rows) {
  unsigned mask = 0;
  for (int j = 0; j < GROUP; ++j) mask |= unsigned(rows[j] == EMPTY) << j;
  return mask;
}
inline unsigned free_slots(const int32_t* rows) {
  unsigned mask = 0;
  for (int j = 0; j < GROUP; ++j) mask |= unsigned(rows[j] < 0) << j;
  return mask;
}
#endif

// Groups in the order in which a key looks for its place; an odd stride visits every one of a power of two.
struct Path {
  uint64_t group, stride, mask;
  Path(uint64_t hash, int64_t groups) : group(hash & (groups - 1)), stride(hash >> 32 | 1), mask(groups - 1) {}
  int64_t slot() const { return group * GROUP; }
  void next() { group = (group + stride) & mask; }
};

}  // namespace

extern "C" {

struct Keys {
  const int64_t* ids;
  const int16_t* tables;  // null where all are of one table
  int64_t table, size;
  int16_t table_of(int64_t i) const { return tables ? tables[i] : int16_t(table); }
};

struct Slots {
  int64_t* ids;
  int32_t* rows;
  int16_t* tables;  // null where there is one table
  const int64_t* salts;
  int64_t groups;

  uint64_t hash(int64_t id, int16_t table) const { return mix64(uint64_t(id) ^ uint64_t(salts[table])); }
  uint64_t hash_at(int64_t slot) const { return hash(ids[slot], tables ? tables[slot] : int16_t(0)); }

  void fetch(uint64_t hash) const {
    const int64_t slot = Path(hash, groups).slot();
    __builtin_prefetch(ids + slot);
    __builtin_prefetch(rows + slot);
    if (tables) __builtin_prefetch(tables + slot);
  }

  // The slot of a key within a group, or -1.
  int64_t match(int64_t slot, int64_t id, int16_t table) const {
    for (unsigned same = equal(ids + slot, id); same; same &= same - 1) {
      const int64_t j = slot + __builtin_ctz(same);
      if (rows[j] >= 0 && (!tables || tables[j] == table)) return j;
    }
    return -1;
  }

  // There is always an empty slot somewhere, so every search ends.
  int64_t find(uint64_t hash, int64_t id, int16_t table) const {
    for (Path path(hash, groups);; path.next()) {
      const int64_t found = match(path.slot(), id, table);
      if (found >= 0 || empty(rows + path.slot())) return found;
    }
  }

  int64_t first_free(uint64_t hash) const {
    for (Path path(hash, groups);; path.next())
      if (const unsigned open = free_slots(rows + path.slot())) return path.slot() + __builtin_ctz(open);
  }

  // Returns 1 where a tombstone was there, else 0.
  int put(int64_t slot, int64_t id, int16_t table, int32_t row) {
    const int reused = rows[slot] != EMPTY;
    ids[slot] = id;
    if (tables) tables[slot] = table;
    rows[slot] = row;
    return reused;
  }
};

}  // extern "C"

namespace {

// work(i, hash of i) for i in [first, last), each AHEAD turns after its memory was asked for.
template <class Hash, class Work>
inline void pipelined(const Slots& slots, int64_t first, int64_t last, Hash hash_of, Work work) {
  uint64_t ring[RING];
  for (int64_t i = first; i < last + AHEAD; ++i) {
    if (i < last) slots.fetch(ring[i % RING] = hash_of(i));
    if (i - AHEAD >= first) work(i - AHEAD, ring[(i - AHEAD) % RING]);
  }
}

}  // namespace

extern "C" {

// Slots of keys and their rows (either output may be null), -1 where absent.
void find(const Slots* slots, const Keys* keys, int64_t* slots_out, int64_t* rows_out) {
  const int64_t n = keys->size;
#pragma omp parallel if (n > PARALLEL)
  {
    const int64_t t = omp_get_thread_num(), threads = omp_get_num_threads();
    pipelined(
        *slots, n * t / threads, n * (t + 1) / threads,
        [&](int64_t i) { return slots->hash(keys->ids[i], keys->table_of(i)); },
        [&](int64_t i, uint64_t hash) {
          const int64_t slot = slots->find(hash, keys->ids[i], keys->table_of(i));
          if (slots_out) slots_out[i] = slot;
          if (rows_out) rows_out[i] = slot < 0 ? -1 : slots->rows[slot];
        });
  }
}

// Inserts the keys at `positions` that are absent, in their order, with rows from `first_row` on; sets `rows_out` at
// all of these positions. At the end the first `*num_new` positions are those of the new keys. Returns the number of
// tombstones that were reused.
int64_t find_or_insert(Slots* slots, const Keys* keys, int64_t* positions, int64_t num_positions, int64_t first_row,
                       int64_t* rows_out, int64_t* num_new) {
  int64_t fresh = 0, reused = 0;
  pipelined(
      *slots, 0, num_positions,
      [&](int64_t k) { return slots->hash(keys->ids[positions[k]], keys->table_of(positions[k])); },
      [&](int64_t k, uint64_t hash) {
        const int64_t i = positions[k], id = keys->ids[i];
        const int16_t table = keys->table_of(i);
        const int64_t found = slots->find(hash, id, table);
        if (found >= 0) {
          rows_out[i] = slots->rows[found];
        } else {
          rows_out[i] = first_row + fresh;
          reused += slots->put(slots->first_free(hash), id, table, int32_t(first_row + fresh));
          positions[fresh++] = i;
        }
      });
  *num_new = fresh;
  return reused;
}

// Inserts distinct keys that are absent. Returns the number of tombstones that were reused.
int64_t insert(Slots* slots, const Keys* keys, const int64_t* rows) {
  int64_t reused = 0;
  pipelined(
      *slots, 0, keys->size, [&](int64_t i) { return slots->hash(keys->ids[i], keys->table_of(i)); },
      [&](int64_t i, uint64_t hash) {
        reused += slots->put(slots->first_free(hash), keys->ids[i], keys->table_of(i), int32_t(rows[i]));
      });
  return reused;
}

// Puts all keys into larger or equally many slots, which are empty. A key's new home is its old one plus a multiple of
// the old number of groups, so a range of old groups is one thread's work as far as homes have room and lie in the
// same range. What is left over (a bit a slot in `left_over`, one byte an old group) follows in order.
void rehash(const Slots* from, Slots* to, uint8_t* left_over) {
  const int64_t groups = from->groups, parts = std::min<int64_t>(groups, 256);
#pragma omp parallel for schedule(dynamic) if (groups * GROUP > PARALLEL)
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = groups * part / parts, last = groups * (part + 1) / parts;
    for (int64_t g = first; g < last; ++g) {
      unsigned left = 0;
      for (unsigned taken = ~free_slots(from->rows + g * GROUP) & 0xFF; taken; taken &= taken - 1) {
        const int64_t slot = g * GROUP + __builtin_ctz(taken);
        const uint64_t hash = from->hash_at(slot);
        const int64_t home = hash & (to->groups - 1), old_home = home & (groups - 1);
        const unsigned open = free_slots(to->rows + home * GROUP);
        if (open && first <= old_home && old_home < last) {
          const int64_t place = home * GROUP + __builtin_ctz(open);
          to->put(place, from->ids[slot], from->tables ? from->tables[slot] : int16_t(0), from->rows[slot]);
        } else {
          left |= taken & -taken;
        }
      }
      left_over[g] = uint8_t(left);
    }
  }
  int64_t waiting[RING], head = 0, tail = 0;
  uint64_t hashes[RING];
  const auto put_oldest = [&] {
    const int64_t slot = waiting[head % RING], place = to->first_free(hashes[head % RING]);
    to->put(place, from->ids[slot], from->tables ? from->tables[slot] : int16_t(0), from->rows[slot]);
    ++head;
  };
  for (int64_t g = 0; g < groups; ++g) {
    for (unsigned left = left_over[g]; left; left &= left - 1) {
      waiting[tail % RING] = g * GROUP + __builtin_ctz(left);
      to->fetch(hashes[tail % RING] = from->hash_at(waiting[tail % RING]));
      if (++tail - head > AHEAD) put_oldest();
    }
  }
  while (head < tail) put_oldest();
}

// Keys whose flag, at [table][top `bits` of the hash], is set, in the order of slots: counted by part of the slots
// where `ids_out` is null, else written from `places[part]` on.
void entries_of(const Slots* slots, const uint8_t* flags, int64_t bits, int64_t parts, int64_t* places,
                int64_t* ids_out, int64_t* tables_out, int64_t* rows_out) {
  const int64_t groups = slots->groups;
#pragma omp parallel for schedule(dynamic) if (groups * GROUP > PARALLEL)
  for (int64_t part = 0; part < parts; ++part) {
    int64_t count = 0, place = places[part];
    for (int64_t g = groups * part / parts; g < groups * (part + 1) / parts; ++g) {
      for (unsigned taken = ~free_slots(slots->rows + g * GROUP) & 0xFF; taken; taken &= taken - 1) {
        const int64_t slot = g * GROUP + __builtin_ctz(taken);
        const int64_t table = slots->tables ? slots->tables[slot] : 0;
        const uint64_t shard = bits ? slots->hash_at(slot) >> (64 - bits) : 0;
        if (!flags[(table << bits) + shard]) continue;
        if (ids_out) {
          ids_out[place] = slots->ids[slot];
          tables_out[place] = table;
          rows_out[place++] = slots->rows[slot];
        }
        ++count;
      }
    }
    if (!ids_out) places[part] = count;
  }
}

}  // extern "C"
