// Weights stored by neuron, as the records of formats.py: only those of some neurons are read.
#pragma once

#include <cstring>

#include "memory.h"
#include "tiles.h"

namespace {

using coreinfer::Range;

constexpr int kTogether = 4;            // records that are read at a time
constexpr int64_t kRecordBlock = 256;   // neurons: for the next row, their records are in the cache

// Sixteen of a record's `count` float16 numbers, from the i-th on, with zeros behind the last: the
// record may end right after it.
template <class S>
typename S::F some_halves(const uint8_t* from, int64_t i, int64_t count) {
  if (i + kTile <= count) return S::load_half(reinterpret_cast<const uint16_t*>(from) + i);
  uint16_t halves[kTile] = {};
  std::memcpy(halves, from + 2 * i, static_cast<size_t>(2 * (count - i)));
  return S::load_half(halves);
}

// All of them as floats.
template <class S>
void read_halves(const uint8_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kTile) S::store(to + i, some_halves<S>(from, i, count));
}

// Of a matrix that is stored by neuron, whose records have a number for each of its rows: the bytes of
// these numbers.
inline int64_t weight_bytes(const CiMatrix& matrix) {
  const int64_t n = matrix.rows;
  return matrix.dtype == CI_BFLOAT16 ? 2 * n : matrix.dtype == CI_INT8 ? n : n / 2;
}

// With the scales behind them.
inline int64_t record_bytes(const CiMatrix& matrix) {
  if (matrix.dtype == CI_BFLOAT16) return weight_bytes(matrix);
  const int64_t groups = matrix.rows / matrix.group_size;
  return weight_bytes(matrix) + groups * scales_per_group(matrix.dtype) * 2;
}

// Sixteen bfloat16 of a record, with zeros behind the last of `count`.
template <class S>
typename S::F some_bfloat16(const uint8_t* record, int64_t i, int64_t count) {
  const auto* from = reinterpret_cast<const uint16_t*>(record) + i;
  if (i + kTile <= count) return S::load_bfloat16(from);
  uint16_t last[kTile] = {};
  std::memcpy(last, from, static_cast<size_t>(2 * (count - i)));
  return S::load_bfloat16(last);
}

// Which of the neurons from `start` on are not zero; how many.
inline int not_zero(const float* h, int64_t start, int64_t size, int32_t* found) {
  int count = 0;
  for (int64_t i = start; i < start + size; ++i) {
    found[count] = static_cast<int32_t>(i);
    count += h[i] != 0.0f;
  }
  return count;
}

// Four of a list of records, the last one again where there are fewer. They are not asked for before:
// within a record a processor fetches ahead by itself, and whole records are too much for its cache.
struct Records {
  const uint8_t* each[kTogether];

  Records(const CiMatrix& matrix, const int32_t* some, int i, int count) {
    const int64_t size = record_bytes(matrix);
    for (int k = 0; k < kTogether; ++k)
      each[k] = matrix.data + some[i + k < count ? i + k : count - 1] * size;
  }
};

// Sums over the weights of four records times x, which is padded to 16 with zeros. x_sums are those of
// the groups of x. Each record's sum is the same whatever the others are.
template <class S>
void dot_records(const CiMatrix& matrix, const Records& records, const float* x, const float* x_sums,
                 float* numbers, float* sums) {
  using F = typename S::F;
  F total[kTogether] = {S::zero(), S::zero(), S::zero(), S::zero()};
  if (matrix.dtype == CI_BFLOAT16) {
    for (int64_t i = 0; i < matrix.rows; i += kTile) {
      const F value = S::load(x + i);
      for (int k = 0; k < kTogether; ++k)
        total[k] = S::fma(some_bfloat16<S>(records.each[k], i, matrix.rows), value, total[k]);
    }
    return S::sum_four(total[0], total[1], total[2], total[3], sums);
  }
  const int64_t groups = matrix.rows / matrix.group_size, room = pad(groups);
  const bool four = matrix.dtype == CI_INT4;
  for (int k = 0; k < kTogether; ++k) {
    const uint8_t* halves = records.each[k] + weight_bytes(matrix);
    read_halves<S>(halves, groups, numbers + k * room);
    for (int64_t g = 0; four && g < groups; g += kTile)
      total[k] = S::fma(some_halves<S>(halves + 2 * groups, g, groups), S::load(x_sums + g), total[k]);
  }
  for (int64_t g = 0; g < groups; ++g) {
    F part[kTogether] = {S::zero(), S::zero(), S::zero(), S::zero()};
    for (int64_t i = g * matrix.group_size; i < (g + 1) * matrix.group_size; i += kTile) {
      const F value = S::load(x + i);
      for (int k = 0; k < kTogether; ++k) {
        const F q = four ? S::load_int4(records.each[k] + i / 2)
                         : S::load_int8(reinterpret_cast<const int8_t*>(records.each[k]) + i);
        part[k] = S::fma(q, value, part[k]);
      }
    }
    for (int k = 0; k < kTogether; ++k)
      total[k] = S::fma(part[k], S::set(numbers[k * room + g]), total[k]);
  }
  S::sum_four(total[0], total[1], total[2], total[3], sums);
}

// Of each group of x; zeros up to a multiple of 16.
template <class S>
void group_sums(const CiMatrix& matrix, const float* x, float* sums) {
  if (matrix.dtype != CI_INT4) return;
  const int64_t groups = matrix.rows / matrix.group_size;
  for (int64_t g = 0; g < pad(groups); ++g) {
    typename S::F total = S::zero();
    for (int64_t i = g * matrix.group_size; g < groups && i < (g + 1) * matrix.group_size; i += kTile)
      total = S::add(total, S::load(x + i));
    sums[g] = S::sum(total);
  }
}

// h_n *= record n times x, for those of some neurons that are not zero. `numbers` is memory for scales
// and sums.
template <class S>
void multiply_by_records(const CiMatrix& matrix, Range neurons, const Batch& batch, float* numbers,
                         float* const* h) {
  float* x_sums = numbers + kTogether * pad(pad(matrix.rows) / kTile);
  int32_t some[kRecordBlock];
  for (int64_t start = neurons.begin; start < neurons.end; start += kRecordBlock) {
    const int64_t left = neurons.end - start, size = left < kRecordBlock ? left : kRecordBlock;
    for (int b = 0; b < batch.count; ++b) {
      const float* x = batch.rows[b].x;
      group_sums<S>(matrix, x, x_sums);
      const int count = not_zero(h[b], start, size, some);
      for (int i = 0; i < count; i += kTogether) {
        alignas(64) float sums[kTogether];
        const Records records(matrix, some, i, count);
        dot_records<S>(matrix, records, x, x_sums, numbers, sums);
        for (int k = 0; k < kTogether && i + k < count; ++k) h[b][some[i + k]] *= sums[k];
      }
    }
  }
}

// y += sum_k factors[k] * record k, for some tiles. `numbers` is memory for what they are scaled by.
template <class S>
void add_together(const CiMatrix& matrix, const Records& records, const float* factors, Range tiles,
                  float* numbers, float* y) {
  using F = typename S::F;
  if (matrix.dtype == CI_BFLOAT16) {
    for (int64_t t = tiles.begin; t < tiles.end; ++t) {
      F sum = S::load(y + kTile * t);
      for (int k = 0; k < kTogether; ++k)
        sum = S::fma(some_bfloat16<S>(records.each[k], kTile * t, matrix.rows), S::set(factors[k]), sum);
      S::store(y + kTile * t, sum);
    }
    return;
  }
  // w * factor = q * (scale * factor) + minimum * factor, whose last term is the same for a group.
  const int64_t groups = matrix.rows / matrix.group_size, room = pad(groups);
  const int64_t tiles_a_group = matrix.group_size / kTile;
  const bool four = matrix.dtype == CI_INT4;
  float* constant = numbers + kTogether * room;
  for (int64_t g = tiles.begin / tiles_a_group / kTile * kTile; g * tiles_a_group < tiles.end; g += kTile) {
    F total = S::zero();
    for (int k = 0; k < kTogether; ++k) {
      const uint8_t* halves = records.each[k] + weight_bytes(matrix);
      const F factor = S::set(factors[k]);
      S::store(numbers + k * room + g, S::mul(some_halves<S>(halves, g, groups), factor));
      if (four) total = S::fma(some_halves<S>(halves + 2 * groups, g, groups), factor, total);
    }
    S::store(constant + g, total);
  }
  for (int64_t t = tiles.begin; t < tiles.end;) {
    const int64_t group = t / tiles_a_group, after = (group + 1) * tiles_a_group;
    const int64_t end = after < tiles.end ? after : tiles.end;
    F scale[kTogether];
    for (int k = 0; k < kTogether; ++k) scale[k] = S::set(numbers[k * room + group]);
    const F same = four ? S::set(constant[group]) : S::zero();
    for (; t < end; ++t) {
      F sum = S::add(S::load(y + kTile * t), same);
      for (int k = 0; k < kTogether; ++k) {
        const F q = four ? S::load_int4(records.each[k] + 8 * t)
                         : S::load_int8(reinterpret_cast<const int8_t*>(records.each[k]) + kTile * t);
        sum = S::fma(q, scale[k], sum);
      }
      S::store(y + kTile * t, sum);
    }
  }
}

// y += sum of h_n * record n over some neurons, for some tiles.
template <class S>
void add_records(const CiMatrix& matrix, const int32_t* some, int count, const float* h, Range tiles,
                 float* numbers, float* y) {
  for (int i = 0; i < count; i += kTogether) {
    const Records records(matrix, some, i, count);
    float factors[kTogether];
    for (int k = 0; k < kTogether; ++k) factors[k] = i + k < count ? h[some[i + k]] : 0.0f;
    add_together<S>(matrix, records, factors, tiles, numbers, y);
  }
}

}  // namespace
