// The products of a layer, each worker with its share of the outputs.
#pragma once

#include <cmath>
#include <cstring>

#include "../pool.h"
#include "memory.h"
#include "tiles.h"

namespace {

using coreinfer::Range;
using coreinfer::share;
using coreinfer::Worker;

// Calls emit(tile, y [rows][16]) for this worker's tiles of y = W x.
template <class S, class Emit>
void product(const Worker& worker, const CiMatrix& w, const Batch& batch, const Emit& emit) {
  const Range tiles = share(worker, pad(w.rows) / kTile);
  const int64_t bytes = tile_bytes(w);
  const TileFunction tile = row_tile<S>(w.dtype, batch.count);
  alignas(64) float y[CI_MAX_ROWS * kTile];
  for (int64_t t = tiles.begin; t < tiles.end; ++t) {
    tile(w.data + t * bytes, w.columns, w.group_size, batch, y);
    emit(t, y);
  }
}

// Sixteen of a record's `count` float16 numbers, from the i-th on, with zeros behind the last: the
// record may end right after it.
template <class S>
typename S::F some_halves(const uint8_t* from, int64_t i, int64_t count) {
  uint16_t halves[kTile] = {};
  const int64_t size = count - i < kTile ? count - i : kTile;
  std::memcpy(halves, from + 2 * i, static_cast<size_t>(2 * size));
  return S::load_half(halves);
}

// All of them as floats.
template <class S>
void read_halves(const uint8_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kTile) S::store(to + i, some_halves<S>(from, i, count));
}

// Of a matrix that is stored by neuron: a record has a number for each of its rows.
inline int64_t record_bytes(const CiMatrix& matrix) {
  const int64_t n = matrix.rows;
  if (matrix.dtype == CI_BFLOAT16) return 2 * n;
  const int64_t q = matrix.dtype == CI_INT8 ? n : n / 2;
  return q + n / matrix.group_size * scales_per_group(matrix.dtype) * 2;
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

// Calls visit(tile, its sixteen weights) for some tiles of a record. `numbers` is memory for scales
// and minima.
template <class S, class Visit>
void read_record(const CiMatrix& matrix, const uint8_t* record, Range tiles, float* numbers,
                 const Visit& visit) {
  if (matrix.dtype == CI_BFLOAT16) {
    for (int64_t t = tiles.begin; t < tiles.end; ++t)
      visit(t, some_bfloat16<S>(record, kTile * t, matrix.rows));
    return;
  }
  const int64_t groups = matrix.rows / matrix.group_size;
  const bool four = matrix.dtype == CI_INT4;
  const uint8_t* halves = record + (four ? matrix.rows / 2 : matrix.rows);
  float* scales = numbers;
  float* minima = numbers + pad(groups);
  read_halves<S>(halves, groups, scales);
  if (!four) {
    for (int64_t t = tiles.begin; t < tiles.end; ++t) {
      const auto* q = reinterpret_cast<const int8_t*>(record) + kTile * t;
      visit(t, S::mul(S::load_int8(q), S::set(scales[kTile * t / matrix.group_size])));
    }
    return;
  }
  read_halves<S>(halves + 2 * groups, groups, minima);
  for (int64_t t = tiles.begin; t < tiles.end; ++t) {
    const int64_t group = kTile * t / matrix.group_size;
    visit(t, S::fma(S::load_int4(record + 8 * t), S::set(scales[group]), S::set(minima[group])));
  }
}

// Sum over a record's weights times x, which is padded to 16 with zeros.
template <class S>
float dot_record(const CiMatrix& matrix, int64_t neuron, const float* x, float* numbers) {
  typename S::F total = S::zero();
  const uint8_t* record = matrix.data + neuron * record_bytes(matrix);
  read_record<S>(matrix, record, {0, pad(matrix.rows) / kTile}, numbers,
                 [&](int64_t t, typename S::F w) { total = S::fma(w, S::load(x + kTile * t), total); });
  return S::sum(total);
}

// Sets those that are smaller than their `least` to zero; how many of them are zero then.
inline int64_t skip_small(const float* least, int64_t count, float* h) {
  int64_t zeros = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (std::fabs(h[i]) < least[i]) h[i] = 0.0f;
    zeros += h[i] == 0.0f;
  }
  return zeros;
}

// h [rows][K16] of this worker's neurons: act(gate x) * up x, or act(fc1 x + bias). Where up is
// stored by neuron, that of a neuron whose gate is zero is not read. Where small ones count as zero
// (`least`), the number of zeros is added to skipped[row].
template <class S>
void neurons(const Worker& worker, const CiMlp& mlp, int32_t activation, const Batch& batch,
             float* numbers, float* const* h, int64_t* skipped) {
  const Range tiles = share(worker, pad(mlp.down.columns) / kTile);
  const int64_t bytes = tile_bytes(mlp.into);
  const bool up_by_neuron = mlp.up.data != nullptr, up_by_tile = mlp.gated && !up_by_neuron;
  const TileFunction tile = row_tile<S>(mlp.into.dtype, batch.count);
  alignas(64) float z[CI_MAX_ROWS * kTile], up[CI_MAX_ROWS * kTile];
  for (int64_t t = tiles.begin; t < tiles.end; ++t) {
    const uint8_t* data = mlp.into.data + (up_by_tile ? 2 : 1) * t * bytes;
    tile(data, mlp.into.columns, mlp.into.group_size, batch, z);
    if (up_by_tile) tile(data + bytes, mlp.into.columns, mlp.into.group_size, batch, up);
    for (int b = 0; b < batch.count; ++b) {
      typename S::F value = S::load(z + kTile * b);
      if (mlp.in_bias != nullptr) value = S::add(value, S::load(mlp.in_bias + kTile * t));
      value = activate<S>(activation, value);
      if (up_by_tile) value = S::mul(value, S::load(up + kTile * b));
      S::store(h[b] + kTile * t, value);
    }
    const int64_t end = kTile * (t + 1) < mlp.down.columns ? kTile * (t + 1) : mlp.down.columns;
    if (mlp.least != nullptr)
      for (int b = 0; b < batch.count; ++b)
        skipped[b] += skip_small(mlp.least + kTile * t, end - kTile * t, h[b] + kTile * t);
    if (!up_by_neuron) continue;
    for (int64_t n = kTile * t; n < end; ++n)
      for (int b = 0; b < batch.count; ++b)  // read once: for the next row it is in the cache
        if (h[b][n] != 0.0f) h[b][n] *= dot_record<S>(mlp.up, n, batch.rows[b].x, numbers);
  }
}

// Rounds h_n * scale[n, group] in blocks of neurons. Returns what is the same for all outputs of the
// group: for int4, the sum of h_n * (minimum[n, group] + 8 scale[n, group]).
template <class S>
float fold(const CiMatrix& down, int64_t group, const float* h, Inputs& inputs) {
  const int64_t neurons = pad(down.columns), groups = down.rows / down.group_size;
  const auto* scales = reinterpret_cast<const uint16_t*>(
      down.data + pad(down.rows) / kTile * word_bytes(down.dtype, neurons));
  const uint16_t* scale = scales + group * neurons;
  alignas(64) float folded[kNeuronBlock];
  for (int64_t start = 0, block = 0; start < neurons; start += kNeuronBlock, ++block) {
    const int64_t size = neurons - start < kNeuronBlock ? neurons - start : kNeuronBlock;
    for (int64_t i = 0; i < size; i += kTile)
      S::store(folded + i, S::mul(S::load(h + start + i), S::load_half(scale + start + i)));
    round_group<S>([&](int64_t i) { return S::load(folded + i); }, start, size, block,
                   has_rest(down.dtype), inputs);
  }
  if (down.dtype != CI_INT4) return 0.0f;
  const uint16_t* minimum = scale + groups * neurons;
  typename S::F total = S::zero();
  for (int64_t i = 0; i < neurons; i += kTile)
    total = S::fma(S::load(h + i),
                   S::fma(S::set(8.0f), S::load_half(scale + i), S::load_half(minimum + i)), total);
  return S::sum(total);
}

// Calls emit(tile, y [rows][16]) for this worker's tiles of y = W_down h.
template <class S, class Emit>
void down_by_tile(const Worker& worker, const CiMatrix& down, int rows, float* const* h,
                  const InputMemory& memory, const Emit& emit) {
  const Range tiles = share(worker, pad(down.rows) / kTile);
  const int64_t neurons = pad(down.columns);
  const int64_t bytes = word_bytes(down.dtype, neurons);
  const TileFunction tile = down_tile<S>(down.dtype, rows);
  const bool grouped = down.dtype != CI_BFLOAT16;
  Batch batch;
  batch.count = rows;
  for (int b = 0; b < rows; ++b) {
    batch.rows[b] = memory.inputs(b);
    batch.rows[b].x = h[b];
  }
  float constant[CI_MAX_ROWS] = {};
  alignas(64) float y[CI_MAX_ROWS * kTile];
  int64_t folded = -1;
  for (int64_t t = tiles.begin; t < tiles.end; ++t) {
    const int64_t group = grouped ? t * kTile / down.group_size : 0;
    if (grouped && group != folded) {
      for (int b = 0; b < rows; ++b) constant[b] = fold<S>(down, group, h[b], batch.rows[b]);
      folded = group;
    }
    tile(down.data + t * bytes, neurons, 0, batch, y);
    for (int b = 0; grouped && b < rows; ++b)
      S::store(y + kTile * b, S::add(S::load(y + kTile * b), S::set(constant[b])));
    emit(t, y);
  }
}

constexpr int kTogether = 4;  // records that are added at a time

// y += sum_k factors[k] * record k, for some tiles. `numbers` is memory for what they are scaled by.
template <class S, int kCount>
void add_records(const CiMatrix& matrix, const uint8_t* const* records, const float* factors,
                 Range tiles, float* numbers, float* y) {
  using F = typename S::F;
  if (matrix.dtype == CI_BFLOAT16) {
    for (int64_t t = tiles.begin; t < tiles.end; ++t) {
      F sum = S::load(y + kTile * t);
      for (int k = 0; k < kCount; ++k)
        sum = S::fma(some_bfloat16<S>(records[k], kTile * t, matrix.rows), S::set(factors[k]), sum);
      S::store(y + kTile * t, sum);
    }
    return;
  }
  // w * factor = q * (scale * factor) + minimum * factor, whose last term is the same for a group.
  const int64_t groups = matrix.rows / matrix.group_size, room = pad(groups);
  const bool four = matrix.dtype == CI_INT4;
  float* constant = numbers + kTogether * room;
  for (int64_t g = 0; g < groups; g += kTile) {
    F total = S::zero();
    for (int k = 0; k < kCount; ++k) {
      const uint8_t* halves = records[k] + (four ? matrix.rows / 2 : matrix.rows);
      const F factor = S::set(factors[k]);
      S::store(numbers + k * room + g, S::mul(some_halves<S>(halves, g, groups), factor));
      if (four) total = S::fma(some_halves<S>(halves + 2 * groups, g, groups), factor, total);
    }
    S::store(constant + g, total);
  }
  for (int64_t t = tiles.begin; t < tiles.end; ++t) {
    const int64_t group = kTile * t / matrix.group_size;
    F sum = S::load(y + kTile * t);
    if (four) sum = S::add(sum, S::set(constant[group]));
    for (int k = 0; k < kCount; ++k) {
      const F q = four ? S::load_int4(records[k] + 8 * t)
                       : S::load_int8(reinterpret_cast<const int8_t*>(records[k]) + kTile * t);
      sum = S::fma(q, S::set(numbers[k * room + group]), sum);
    }
    S::store(y + kTile * t, sum);
  }
}

template <class S>
void add_some_records(const CiMatrix& matrix, const uint8_t* const* records, const float* factors,
                      int count, Range tiles, float* numbers, float* y) {
  switch (count) {
    case 1: return add_records<S, 1>(matrix, records, factors, tiles, numbers, y);
    case 2: return add_records<S, 2>(matrix, records, factors, tiles, numbers, y);
    case 3: return add_records<S, 3>(matrix, records, factors, tiles, numbers, y);
    case 4: return add_records<S, 4>(matrix, records, factors, tiles, numbers, y);
    default: return;
  }
}

// y [rows][outputs of this worker] = W_down h, neuron by neuron: those that are zero are not read.
template <class S>
void down_by_neuron(const Worker& worker, const CiMatrix& down, int rows, float* const* h,
                    float* numbers, float* const* y) {
  constexpr int64_t kBlock = 256;  // neurons: for the next row, their records are in the cache
  const Range tiles = share(worker, pad(down.rows) / kTile);
  const int64_t bytes = record_bytes(down);
  for (int b = 0; b < rows; ++b)
    for (int64_t t = tiles.begin; t < tiles.end; ++t) S::store(y[b] + kTile * t, S::zero());
  for (int64_t start = 0; start < down.columns; start += kBlock) {
    const int64_t end = start + kBlock < down.columns ? start + kBlock : down.columns;
    for (int b = 0; b < rows; ++b) {
      const uint8_t* records[kTogether];
      float factors[kTogether];
      int count = 0;
      for (int64_t n = start; n < end; ++n) {
        if (h[b][n] == 0.0f) continue;
        records[count] = down.data + n * bytes;
        factors[count] = h[b][n];
        if (++count < kTogether) continue;
        add_some_records<S>(down, records, factors, count, tiles, numbers, y[b]);
        count = 0;
      }
      add_some_records<S>(down, records, factors, count, tiles, numbers, y[b]);
    }
  }
}

}  // namespace
