// Sixteen outputs at a time: the loops that weights stream through.
#pragma once

#include "activations.h"

namespace {

constexpr int64_t kAhead = 2048;  // bytes that are fetched before they are needed

// `count` words of 64 bytes times the group's inputs, which begin at `start`: for B rows, in steps.
template <class S, int B>
inline void dot_group_int8(const uint8_t* words, int64_t count, const Batch& batch, int64_t start,
                           int64_t group, typename S::F (&y)[B]) {
  typename S::I sum[B], rest[B];
  const int8_t *q[B], *r[B];
  for (int b = 0; b < B; ++b) {
    const Inputs& row = batch.rows[b];
    q[b] = row.q + start;
    r[b] = row.rest + start;
    sum[b] = S::set_int(-S::kByteOffset * row.sum[group]);
    rest[b] = S::set_int(-S::kByteOffset * row.rest_sum[group]);
  }
#pragma GCC unroll 4
  for (int64_t k = 0; k < count; ++k) {
    const typename S::W w = S::load_bytes(words + 64 * k);
    S::prefetch(words + 64 * k + kAhead);
    for (int b = 0; b < B; ++b) {
      sum[b] = S::dot_int8(sum[b], w, q[b] + 4 * k);
      rest[b] = S::dot_int8(rest[b], w, r[b] + 4 * k);
    }
  }
  const typename S::F part = S::set(1.0f / kRestParts);
  for (int b = 0; b < B; ++b) y[b] = S::fma(S::to_float(rest[b]), part, S::to_float(sum[b]));
}

// The same for four bits, whose q count from `offset` on; B sums of the group.
template <class S, int B>
inline void dot_group_int4(const uint8_t* words, int64_t count, const Batch& batch, int64_t start,
                           int64_t group, int offset, typename S::F (&y)[B]) {
  typename S::I sum[B];
  const int8_t* q[B];
  for (int b = 0; b < B; ++b) {
    q[b] = batch.rows[b].q + start;
    sum[b] = S::set_int(-offset * batch.rows[b].sum[group]);
  }
#pragma GCC unroll 2
  for (int64_t k = 0; k < count; ++k) {
    const typename S::W w = S::load_bytes(words + 64 * k);
    S::prefetch(words + 64 * k + kAhead);
    const typename S::W low = S::low_halves(w), high = S::high_halves(w);
    for (int b = 0; b < B; ++b) {
      sum[b] = S::dot_int4(sum[b], low, q[b] + 8 * k);
      sum[b] = S::dot_int4(sum[b], high, q[b] + 8 * k + 4);
    }
  }
  for (int b = 0; b < B; ++b) y[b] = S::to_float(sum[b]);
}

// y [B][16] of one tile; the order of the sums does not depend on B.
template <class S, int B>
void tile_bfloat16(const uint8_t* tile, int64_t columns, int64_t, const Batch& batch, float* y) {
  typename S::F even[B], odd[B];
  for (int b = 0; b < B; ++b) even[b] = odd[b] = S::zero();
#pragma GCC unroll 4
  for (int64_t k = 0; k < (columns + 1) / 2; ++k) {
    const typename S::W w = S::load_bytes(tile + 64 * k);
    S::prefetch(tile + 64 * k + kAhead);
    const typename S::F first = S::even_bfloat16(w), second = S::odd_bfloat16(w);
    for (int b = 0; b < B; ++b) {
      const float* x = batch.rows[b].x + 2 * k;
      even[b] = S::fma(first, S::set(x[0]), even[b]);
      odd[b] = S::fma(second, S::set(x[1]), odd[b]);
    }
  }
  for (int b = 0; b < B; ++b) S::store(y + kTile * b, S::add(even[b], odd[b]));
}

template <class S, int B>
void tile_int8(const uint8_t* tile, int64_t columns, int64_t size, const Batch& batch, float* y) {
  const auto* scales = reinterpret_cast<const uint16_t*>(tile + 16 * columns);
  typename S::F total[B];
  for (int b = 0; b < B; ++b) total[b] = S::zero();
  for (int64_t group = 0; group < columns / size; ++group) {
    typename S::F dots[B];
    dot_group_int8<S, B>(tile + 16 * size * group, size / 4, batch, group * size, group, dots);
    const typename S::F scale = S::load_half(scales + kTile * group);
    for (int b = 0; b < B; ++b) {
      const typename S::F step = S::mul(scale, S::set(batch.rows[b].step[group]));
      total[b] = S::fma(dots[b], step, total[b]);
    }
  }
  for (int b = 0; b < B; ++b) S::store(y + kTile * b, total[b]);
}

template <class S, int B>
void tile_int4(const uint8_t* tile, int64_t columns, int64_t size, const Batch& batch, float* y) {
  const auto* scales = reinterpret_cast<const uint16_t*>(tile + 8 * columns);
  typename S::F total[B];
  for (int b = 0; b < B; ++b) total[b] = S::zero();
  for (int64_t group = 0; group < columns / size; ++group) {
    typename S::F dots[B];
    dot_group_int4<S, B>(tile + 8 * size * group, size / 8, batch, group * size, group, 0, dots);
    const typename S::F scale = S::load_half(scales + 2 * kTile * group);
    const typename S::F minimum = S::load_half(scales + 2 * kTile * group + kTile);
    for (int b = 0; b < B; ++b) {
      const float step = batch.rows[b].step[group];
      const float x_sum = step * static_cast<float>(batch.rows[b].sum[group]);
      total[b] = S::fma(dots[b], S::mul(scale, S::set(step)), total[b]);
      total[b] = S::fma(minimum, S::set(x_sum), total[b]);
    }
  }
  for (int b = 0; b < B; ++b) S::store(y + kTile * b, total[b]);
}

// A tile of a down projection: blocks of neurons take the place of groups, a step serves all lanes.
// The q of int4 count from -8 on: fold() adds what that leaves out.
template <class S, int B, int32_t kDtype>
void tile_down(const uint8_t* tile, int64_t neurons, int64_t, const Batch& batch, float* y) {
  constexpr int64_t kInputs = kDtype == CI_INT8 ? 4 : 8;  // of each lane, in a word
  typename S::F total[B];
  for (int b = 0; b < B; ++b) total[b] = S::zero();
  for (int64_t start = 0, block = 0; start < neurons; start += kNeuronBlock, ++block) {
    const int64_t size = neurons - start < kNeuronBlock ? neurons - start : kNeuronBlock;
    const uint8_t* words = tile + 64 / kInputs * start;
    typename S::F dots[B];
    if constexpr (kDtype == CI_INT8) {
      dot_group_int8<S, B>(words, size / kInputs, batch, start, block, dots);
    } else {
      dot_group_int4<S, B>(words, size / kInputs, batch, start, block, 8, dots);
    }
    for (int b = 0; b < B; ++b)
      total[b] = S::fma(dots[b], S::set(batch.rows[b].step[block]), total[b]);
  }
  for (int b = 0; b < B; ++b) S::store(y + kTile * b, total[b]);
}

// (tile, inputs, group size, batch, y [B][16])
using TileFunction = void (*)(const uint8_t*, int64_t, int64_t, const Batch&, float*);

template <class S, int B>
struct TilesOf {
  static constexpr TileFunction rows[] = {tile_bfloat16<S, B>, tile_int8<S, B>, tile_int4<S, B>};
  static constexpr TileFunction down[] = {tile_bfloat16<S, B>, tile_down<S, B, CI_INT8>,
                                          tile_down<S, B, CI_INT4>};
};

template <class S>
TileFunction row_tile(int32_t dtype, int batch) {
  static constexpr const TileFunction* all[] = {
      TilesOf<S, 1>::rows, TilesOf<S, 2>::rows, TilesOf<S, 3>::rows, TilesOf<S, 4>::rows,
      TilesOf<S, 5>::rows, TilesOf<S, 6>::rows, TilesOf<S, 7>::rows, TilesOf<S, 8>::rows};
  return all[batch - 1][dtype];
}

template <class S>
TileFunction down_tile(int32_t dtype, int batch) {
  static constexpr const TileFunction* all[] = {
      TilesOf<S, 1>::down, TilesOf<S, 2>::down, TilesOf<S, 3>::down, TilesOf<S, 4>::down,
      TilesOf<S, 5>::down, TilesOf<S, 6>::down, TilesOf<S, 7>::down, TilesOf<S, 8>::down};
  return all[batch - 1][dtype];
}

}  // namespace
