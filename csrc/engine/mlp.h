// The products of a layer, each worker with its share of the outputs.
#pragma once

#include <cmath>
#include <cstring>

#include "../pool.h"
#include "memory.h"
#include "records.h"
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
  }
  if (!up_by_neuron) return;
  const int64_t end = kTile * tiles.end < mlp.up.columns ? kTile * tiles.end : mlp.up.columns;
  multiply_by_records<S>(mlp.up, {kTile * tiles.begin, end}, batch, numbers, h);
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

// y [rows][outputs of this worker] = W_down h, neuron by neuron: those that are zero are not read.
template <class S>
void down_by_neuron(const Worker& worker, const CiMatrix& down, int rows, float* const* h,
                    float* numbers, float* const* y) {
  const Range tiles = share(worker, pad(down.rows) / kTile);
  for (int b = 0; b < rows; ++b)
    for (int64_t t = tiles.begin; t < tiles.end; ++t) S::store(y[b] + kTile * t, S::zero());
  int32_t some[kRecordBlock];
  for (int64_t start = 0; start < down.columns; start += kRecordBlock) {
    const int64_t left = down.columns - start, size = left < kRecordBlock ? left : kRecordBlock;
    for (int b = 0; b < rows; ++b) {
      const int count = not_zero(h[b], start, size, some);
      add_records<S>(down, some, count, h[b], tiles, numbers, y[b]);
    }
  }
}

}  // namespace
