// Dealing samples out over parts; partition_reference.py is the specification and gives the same parts.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <queue>
#include <set>
#include <utility>
#include <vector>

namespace {

using Int = std::int64_t;
using Ranked = std::set<std::pair<Int, Int>>;  // (cost, part), the cheapest first

constexpr int kCostBits = 40;
constexpr Int kCheapest = 8;
constexpr Int kEnough = 1024;
constexpr Int kNone = -1;

struct Parts {
  std::vector<Int> costs;
  const Int* sizes;  // or null
  Int num_samples, capacity;
  std::vector<std::vector<Int>> samples;
  std::vector<Int> loads, filled;

  Int size(Int sample) const { return sizes ? sizes[sample] : 0; }
  Int count() const { return static_cast<Int>(samples.size()); }

  void add(Int part, Int sample) {
    samples[part].push_back(sample);
    loads[part] += costs[sample];
    filled[part] += size(sample);
  }

  Int take(Int part, Int place) {
    const Int sample = samples[part][place];
    samples[part].erase(samples[part].begin() + place);
    loads[part] -= costs[sample];
    filled[part] -= size(sample);
    return sample;
  }

  Ranked ranked() const {
    Ranked all;
    for (Int part = 0; part < count(); ++part) all.emplace(loads[part], part);
    return all;
  }
};

void lpt(Parts& parts, const std::vector<Int>& order) {
  Int smallest = parts.sizes ? std::numeric_limits<Int>::max() : 0;
  if (parts.sizes)
    for (Int i = 0; i < parts.num_samples; ++i) smallest = std::min(smallest, parts.sizes[i]);
  Ranked open = parts.ranked();
  for (const Int sample : order) {
    const Int size = parts.size(sample);
    auto found = open.begin();
    while (found != open.end() && parts.filled[found->second] > parts.capacity - size) ++found;
    Int part;
    if (found != open.end()) {
      part = found->second;
      open.erase(found);
    } else {
      part = std::min_element(parts.filled.begin(), parts.filled.end()) - parts.filled.begin();
      open.erase({parts.loads[part], part});
    }
    parts.add(part, sample);
    // A part without room for the smallest sample is not asked again.
    if (parts.filled[part] <= parts.capacity - smallest) open.emplace(parts.loads[part], part);
  }
}

void zigzag(Parts& parts, const std::vector<Int>& order) {
  std::vector<Int> cheapest(parts.count());
  for (Int first = 0; first < parts.num_samples; first += parts.count()) {
    std::iota(cheapest.begin(), cheapest.end(), Int{0});
    std::stable_sort(cheapest.begin(), cheapest.end(), [&](Int a, Int b) { return parts.loads[a] < parts.loads[b]; });
    const Int last = std::min(first + parts.count(), parts.num_samples);
    for (Int i = first; i < last; ++i) parts.add(cheapest[i - first], order[i]);
  }
}

// Samples that will share a part, as a list through `next`; `first` is the lowest position among them.
struct Bundle {
  Int cost, first, head, tail;
  bool operator<(const Bundle& other) const {
    return cost != other.cost ? cost > other.cost : first < other.first;
  }
};

void karmarkar_karp(Parts& parts, const std::vector<Int>& order) {
  const Int num_parts = parts.count(), num_samples = parts.num_samples;
  std::vector<Int> next(num_samples, kNone);
  std::vector<std::vector<Bundle>> partials(num_samples);
  std::priority_queue<std::pair<Int, Int>> widest;  // (difference within, - number), so that ties go to the lower
  for (Int i = 0; i < num_samples; ++i) {
    partials[i] = {{parts.costs[order[i]], order[i], order[i], order[i]}};
    widest.emplace(parts.costs[order[i]], -i);
  }
  const auto pop = [&] {
    const Int number = -widest.top().second;
    widest.pop();
    return number;
  };
  while (widest.size() > 1) {
    const Int one = pop(), other = pop();
    auto& bundles = partials[one];
    auto& cheap = partials[other];
    const Int before = bundles.size(), added = cheap.size();
    // Bundles before `touched` stay in order; those from there on have met one of the other's, or are the other's.
    const Int touched = std::min(before, num_parts - added);
    for (Int i = 0; i < added; ++i) {
      const Bundle& bundle = cheap[added - 1 - i];
      const Int place = num_parts - added + i;
      if (place >= before) {
        bundles.push_back(bundle);
        continue;
      }
      Bundle& mine = bundles[place];
      next[mine.tail] = bundle.head;
      mine = {mine.cost + bundle.cost, std::min(mine.first, bundle.first), mine.head, bundle.tail};
    }
    std::sort(bundles.begin() + touched, bundles.end());
    std::inplace_merge(bundles.begin(), bundles.begin() + touched, bundles.end());
    std::vector<Bundle>().swap(cheap);
    if (static_cast<Int>(bundles.size()) == num_parts) {
      const Int lowest = bundles.back().cost;
      if (lowest)
        for (Bundle& bundle : bundles) bundle.cost -= lowest;
    }
    widest.emplace(bundles.front().cost, -one);
  }
  if (widest.empty()) return;
  const auto& bundles = partials[pop()];
  for (Int part = 0; part < static_cast<Int>(bundles.size()); ++part) {
    std::vector<Int> samples;
    for (Int sample = bundles[part].head; sample != kNone; sample = next[sample]) samples.push_back(sample);
    std::sort(samples.begin(), samples.end());
    for (const Int sample : samples) parts.add(part, sample);
  }
}

struct Swap {
  Int given, taker, returned;  // places, the last kNone for a move
};

// The first swap after which both parts cost little enough, else the closest; false where none lowers the costliest.
bool best_swap(const Parts& parts, const Ranked& ranked, bool moves, Int enough, Swap& best) {
  const Int costliest = ranked.rbegin()->second;
  const Int load = parts.loads[costliest];
  Int lowest = load;
  auto cheapest = ranked.begin();
  for (Int tried = 0; tried < std::min(kCheapest, parts.count() - 1); ++tried, ++cheapest) {
    const Int taker = cheapest->second;
    const auto& theirs = parts.samples[taker];
    for (Int given = 0; given < static_cast<Int>(parts.samples[costliest].size()); ++given) {
      const Int sample = parts.samples[costliest][given];
      for (Int returned = moves ? kNone : 0; returned < static_cast<Int>(theirs.size()); ++returned) {
        const bool alone = returned == kNone;
        const Int cost = parts.costs[sample] - (alone ? 0 : parts.costs[theirs[returned]]);
        const Int peak = std::max(load - cost, parts.loads[taker] + cost);
        if (peak >= lowest) continue;
        const Int size = parts.size(sample) - (alone ? 0 : parts.size(theirs[returned]));
        if (std::max(parts.filled[costliest] - size, parts.filled[taker] + size) > parts.capacity) continue;
        lowest = peak;
        best = {given, taker, returned};
        if (lowest <= enough) return true;
      }
    }
  }
  return lowest < load;
}

void swap(Parts& parts, bool moves) {
  const Int mean = std::accumulate(parts.loads.begin(), parts.loads.end(), Int{0}) / parts.count();
  const Int enough = mean + mean / kEnough;
  Ranked ranked = parts.ranked();
  for (Int round = 0; round < 2 * parts.count(); ++round) {
    const Int costliest = ranked.rbegin()->second;
    if (parts.loads[costliest] <= enough) return;
    Swap found;
    if (!best_swap(parts, ranked, moves, enough, found)) return;
    ranked.erase({parts.loads[costliest], costliest});
    ranked.erase({parts.loads[found.taker], found.taker});
    const Int sample = parts.take(costliest, found.given);
    if (found.returned != kNone) parts.add(costliest, parts.take(found.taker, found.returned));
    parts.add(found.taker, sample);
    ranked.emplace(parts.loads[costliest], costliest);
    ranked.emplace(parts.loads[found.taker], found.taker);
  }
}

// Integers up to 2^40, and one more for each; false where a cost is negative or not finite.
bool whole(const double* costs, Int num_samples, std::vector<Int>& out) {
  double largest = 0;
  for (Int i = 0; i < num_samples; ++i) {
    if (!(costs[i] >= 0 && costs[i] <= std::numeric_limits<double>::max())) return false;
    largest = std::max(largest, costs[i]);
  }
  int exponent;
  std::frexp(largest, &exponent);
  out.resize(num_samples);
  for (Int i = 0; i < num_samples; ++i) out[i] = std::llrint(std::ldexp(costs[i], kCostBits - exponent)) + 1;
  return true;
}

}  // namespace

// Writes the samples, part by part and ascending within each, then where each part begins (num_parts + 1 places).
// Methods: 0 longest processing time, 1 Karmarkar-Karp, 2 zig-zag. False where a cost is negative or not finite.
extern "C" bool lightning_gr_deal(
    Int method, Int num_samples, Int num_parts, const double* costs, const Int* sizes, Int capacity, Int* out) {
  Parts parts{{}, sizes, num_samples, capacity, {}, {}, {}};
  if (!whole(costs, num_samples, parts.costs)) return false;
  parts.samples.resize(num_parts);
  parts.loads.resize(num_parts);
  parts.filled.resize(num_parts);
  std::vector<Int> order(num_samples);
  std::iota(order.begin(), order.end(), Int{0});
  std::sort(order.begin(), order.end(), [&](Int a, Int b) {
    return parts.costs[a] != parts.costs[b] ? parts.costs[a] > parts.costs[b] : a < b;
  });
  (method == 0 ? lpt : method == 1 ? karmarkar_karp : zigzag)(parts, order);
  swap(parts, method != 2);
  Int* const bounds = out + num_samples;
  bounds[0] = 0;
  for (Int part = 0; part < num_parts; ++part) {
    Int* const begin = out + bounds[part];
    Int* const end = std::copy(parts.samples[part].begin(), parts.samples[part].end(), begin);
    std::sort(begin, end);
    bounds[part + 1] = end - out;
  }
  return true;
}
