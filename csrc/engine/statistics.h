// Sums over the tokens of a prefill: what the selection of core neurons needs of each neuron.
#pragma once

#include <algorithm>
#include <cstring>

#include "../pool.h"
#include "memory.h"

namespace {

using coreinfer::Range;
using coreinfer::share;
using coreinfer::Worker;

constexpr int kTopBits = 11;  // exponent and the first three bits of a positive float

// The positive numbers of a row that are among its tops[positive] largest: those above the threshold, and of
// those equal to it the ones up to `last`.
struct Top {
  float threshold;
  int64_t last;
};

inline uint32_t bits_of(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

// Positive floats are ordered as their bits are. A histogram of the first bits finds the few numbers
// that the threshold is among. `keys` has room for the row.
inline Top find_top(const float* row, int64_t size, const int64_t* tops, uint32_t* keys,
                    uint32_t* histogram) {
  constexpr int kShift = 31 - kTopBits;
  int64_t positive = 0;
  for (int64_t n = 0; n < size; ++n) {
    keys[positive] = bits_of(row[n]);
    positive += row[n] > 0.0f ? 1 : 0;
  }
  int64_t left = std::min(tops[positive], positive);  // to be found at or below the bin
  if (left <= 0) return {__builtin_inff(), -1};
  std::memset(histogram, 0, sizeof(uint32_t) << kTopBits);
  uint32_t bin = 0;
  for (int64_t i = 0; i < positive; ++i) {
    const uint32_t first = keys[i] >> kShift;
    ++histogram[first];
    bin = std::max(bin, first);
  }
  for (; histogram[bin] < left; --bin) left -= histogram[bin];
  int64_t candidates = 0;
  for (int64_t i = 0; i < positive; ++i) {
    const uint32_t key = keys[i];
    keys[candidates] = key;
    candidates += key >> kShift == bin ? 1 : 0;
  }
  std::nth_element(keys, keys + left - 1, keys + candidates, [](uint32_t a, uint32_t b) { return a > b; });
  const uint32_t key = keys[left - 1];
  Top found = {float_of(key), -1};
  // Of the equal ones, as many as are left once the larger ones are in.
  int64_t larger = 0;
  for (int64_t i = 0; i < left; ++i) larger += keys[i] > key ? 1 : 0;
  left -= larger;
  for (int64_t n = 0; left > 0; ++n)
    if (row[n] == found.threshold) found.last = n, --left;
  return found;
}

// The sum of squares of a row; sixteen sums side by side, so that it can be vectorised.
inline double square_norm(const float* row, int64_t size) {
  double lanes[kTile] = {};
  const int64_t whole = size / kTile * kTile;
  for (int64_t n = 0; n < whole; n += kTile)
    for (int64_t i = 0; i < kTile; ++i)
      lanes[i] += static_cast<double>(row[n + i]) * static_cast<double>(row[n + i]);
  double sum = 0.0;
  for (int64_t n = whole; n < size; ++n) sum += static_cast<double>(row[n]) * static_cast<double>(row[n]);
  for (double lane : lanes) sum += lane;
  return sum;
}

inline void add_squares(const float* __restrict row, Range range, double scale,
                        double* __restrict square_sum, double* __restrict unit_square_sum) {
  for (int64_t n = range.begin; n < range.end; ++n) {
    const double square = static_cast<double>(row[n]) * static_cast<double>(row[n]);
    square_sum[n] += square;
    unit_square_sum[n] += square * scale;
  }
}

inline void add_counts(const float* __restrict row, Range range, Top top,
                       double* __restrict positive_sum, int64_t* __restrict counts) {
  // Compared as the integers that positive floats are ordered as, which compilers vectorise.
  const auto above = static_cast<int32_t>(bits_of(top.threshold));
  for (int64_t n = range.begin; n < range.end; ++n) {
    const auto bits = static_cast<int32_t>(bits_of(row[n]));
    positive_sum[n] += static_cast<double>(float_of(static_cast<uint32_t>(bits & ~(bits >> 31))));
  }
  for (int64_t n = range.begin; n < range.end; ++n)
    counts[n] += static_cast<int64_t>(static_cast<int32_t>(bits_of(row[n])) > above);
  for (int64_t n = range.begin; n < std::min(range.end, top.last + 1); ++n)
    counts[n] += row[n] == top.threshold ? 1 : 0;
}

// A template only so that each instruction set has its own.
template <class S>
void statistics(int, int threads, const float* h, int64_t stride, int64_t tokens, int64_t neurons,
                const int64_t* tops, double* square_sum, double* unit_square_sum, double* positive_sum,
                int64_t* counts) {
  Carver own(nullptr);
  own.take<uint32_t>(neurons + 1);
  own.take<uint32_t>(int64_t{1} << kTopBits);
  Carver shared(nullptr);
  shared.take<double>(tokens);
  shared.take<Top>(tokens);
  const int64_t bytes = shared.used() + own.used() * threads;
  parallel(threads, static_cast<size_t>(bytes), [&](const Worker& worker) {
    Carver common(worker.scratch);
    double* unit = common.take<double>(tokens);
    Top* top = common.take<Top>(tokens);
    Carver carver(worker.scratch + common.used() + own.used() * worker.index);
    uint32_t* keys = carver.take<uint32_t>(neurons + 1);
    uint32_t* histogram = carver.take<uint32_t>(int64_t{1} << kTopBits);
    const Range rows = share(worker, tokens);
    for (int64_t t = rows.begin; t < rows.end; ++t) {
      const double norm = square_norm(h + t * stride, neurons);
      unit[t] = norm > 0.0 ? 1.0 / norm : 0.0;
      if (tops != nullptr) top[t] = find_top(h + t * stride, neurons, tops, keys, histogram);
    }
    worker.wait();
    const Range mine = share(worker, neurons);
    for (int64_t t = 0; t < tokens; ++t) {
      const float* row = h + t * stride;
      add_squares(row, mine, unit[t], square_sum, unit_square_sum);
      if (tops != nullptr) add_counts(row, mine, top[t], positive_sum, counts);
    }
  });
}

}  // namespace
