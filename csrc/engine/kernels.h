// The entry points of one instruction set.
#pragma once

#include "../paths.h"
#include "fit.h"
#include "statistics.h"
#include "step.h"

namespace {

using coreinfer::parallel;

// Sixteen weights of a record to wherever they go.
template <class S>
void write_tile(typename S::F value, int32_t dtype, void* out, int64_t at) {
  if (dtype == CI_FLOAT32) {
    S::store(static_cast<float*>(out) + at, value);
  } else if (dtype == CI_FLOAT16) {
    S::store_half(static_cast<uint16_t*>(out) + at, value);
  } else {
    S::store_bfloat16(static_cast<uint16_t*>(out) + at, value);
  }
}

// A record of bfloat16, whose last tile may be shorter.
template <class S>
void convert_record(const uint8_t* record, int64_t columns, int32_t out_dtype, void* out, int64_t at) {
  const auto* weights = reinterpret_cast<const uint16_t*>(record);
  const int64_t whole = columns / kTile * kTile;
  for (int64_t i = 0; i < whole; i += kTile)
    write_tile<S>(S::load_bfloat16(weights + i), out_dtype, out, at + i);
  if (whole == columns) return;
  const size_t left = static_cast<size_t>(columns - whole);
  const size_t bytes = out_dtype == CI_FLOAT32 ? 4 : 2;
  uint16_t last[kTile] = {};
  alignas(64) uint8_t tile[4 * kTile];
  std::memcpy(last, weights + whole, 2 * left);
  write_tile<S>(S::load_bfloat16(last), out_dtype, tile, 0);
  std::memcpy(static_cast<uint8_t*>(out) + bytes * static_cast<size_t>(at + whole), tile, bytes * left);
}

template <class S>
void dequantize_record(const uint8_t* record, int64_t columns, int32_t dtype, int64_t size,
                       int32_t out_dtype, void* out, int64_t at) {
  if (dtype == CI_BFLOAT16) return convert_record<S>(record, columns, out_dtype, out, at);
  const bool four = dtype == CI_INT4;
  const int64_t groups = columns / size;
  const uint8_t* halves = record + (four ? columns / 2 : columns);
  constexpr int64_t kChunk = 256;  // groups whose numbers are read at a time
  float scales[kChunk], minima[kChunk];
  for (int64_t first = 0; first < groups; first += kChunk) {
    const int64_t count = groups - first < kChunk ? groups - first : kChunk;
    read_halves<S>(halves + 2 * first, count, scales);
    if (four) read_halves<S>(halves + 2 * (groups + first), count, minima);
    for (int64_t i = first * size; i < (first + count) * size; i += kTile) {
      const int64_t group = i / size - first;
      // As the twin: a product, then a sum, each rounded.
      typename S::F value = four ? S::load_int4(record + i / 2)
                                 : S::load_int8(reinterpret_cast<const int8_t*>(record) + i);
      value = S::mul(value, S::set(scales[group]));
      if (four) value = S::add(value, S::set(minima[group]));
      write_tile<S>(value, out_dtype, out, at + i);
    }
  }
}

template <class S>
void dequantize(int, int threads, const uint8_t* records, int64_t stride, const int32_t* index,
                int64_t rows, int64_t columns, int32_t dtype, int32_t group_size, int32_t out_dtype,
                void* out) {
  parallel(threads, 0, [&](const Worker& worker) {
    const Range mine = share(worker, rows);
    for (int64_t r = mine.begin; r < mine.end; ++r)
      dequantize_record<S>(records + stride * (index == nullptr ? r : index[r]), columns, dtype,
                           group_size, out_dtype, out, r * columns);
  });
}

// Copies rows to where they are padded with zeros to 16.
inline void pad_rows(const float* x, int64_t columns, int rows, float* const* to) {
  for (int b = 0; b < rows; ++b) {
    std::memcpy(to[b], x + b * columns, static_cast<size_t>(columns) * sizeof(float));
    for (int64_t i = columns; i < pad(columns); ++i) to[b][i] = 0.0f;
  }
}

// Writes sixteen outputs of each row where they belong, fewer at the end of a row.
inline void put(const float* tile, int64_t t, int64_t columns, int rows, float* y) {
  const int64_t left = columns - kTile * t, size = left < kTile ? left : kTile;
  for (int b = 0; b < rows; ++b)
    std::memcpy(y + b * columns + kTile * t, tile + kTile * b, static_cast<size_t>(size) * sizeof(float));
}

template <class S>
Batch padded_inputs(const CiMatrix& matrix, const float* x, int rows, const InputMemory& memory) {
  pad_rows(x, matrix.columns, rows, memory.x);
  Batch batch;
  batch.count = rows;
  for (int b = 0; b < rows; ++b) {
    batch.rows[b] = memory.inputs(b);
    prepare<S>(matrix, memory.x[b], batch.rows[b]);
  }
  return batch;
}

template <class S>
void linear(int, int threads, const CiMatrix* matrix, const float* x, int32_t batch, float* y) {
  Carver size(nullptr);
  InputMemory(size, batch, matrix->columns);
  parallel(threads, static_cast<size_t>(size.used() * threads), [&](const Worker& worker) {
    Carver carver(worker.scratch + size.used() * worker.index);
    const InputMemory memory(carver, batch, matrix->columns);
    const Batch inputs = padded_inputs<S>(*matrix, x, batch, memory);
    product<S>(worker, *matrix, inputs,
               [&](int64_t t, const float* tile) { put(tile, t, matrix->rows, batch, y); });
  });
}

// Memory of a worker for an MLP alone.
struct MlpMemory {
  InputMemory inputs;
  float* y[CI_MAX_ROWS];
  float* numbers;

  MlpMemory(Carver& carver, const CiMlp& mlp, int rows)
      : inputs(carver, rows, larger(mlp.into.columns, mlp.down.columns)) {
    for (int b = 0; b < rows; ++b) y[b] = carver.take<float>(pad(mlp.down.rows));
    numbers = carver.take<float>((kTogether + 1) * pad(pad(mlp.down.rows) / kTile));
  }
};

template <class S>
void mlp(int, int threads, const CiMlp* mlp, int32_t activation, const float* x, int32_t batch,
         float* y) {
  const CiMatrix& down = mlp->down;
  const int64_t h_bytes = batch * pad(pad(down.columns) * static_cast<int64_t>(sizeof(float)), 64);
  Carver size(nullptr);
  MlpMemory(size, *mlp, batch);
  parallel(threads, static_cast<size_t>(h_bytes + size.used() * threads), [&](const Worker& worker) {
    Carver shared(worker.scratch);
    float* h[CI_MAX_ROWS];
    for (int b = 0; b < batch; ++b) h[b] = shared.take<float>(pad(down.columns));
    Carver carver(worker.scratch + h_bytes + size.used() * worker.index);
    const MlpMemory memory(carver, *mlp, batch);
    const Batch inputs = padded_inputs<S>(mlp->into, x, batch, memory.inputs);
    int64_t skipped[CI_MAX_ROWS] = {};
    neurons<S>(worker, *mlp, activation, inputs, memory.numbers, h, skipped);
    worker.wait();
    if (!mlp->by_neuron) {
      down_by_tile<S>(worker, down, batch, h, memory.inputs,
                      [&](int64_t t, const float* tile) { put(tile, t, down.rows, batch, y); });
      return;
    }
    down_by_neuron<S>(worker, down, batch, h, memory.numbers, memory.y);
    const Range tiles = share(worker, pad(down.rows) / kTile);
    for (int b = 0; b < batch; ++b)
      for (int64_t t = tiles.begin; t < tiles.end; ++t)
        put(memory.y[b] + kTile * t, t, down.rows, 1, y + b * down.rows);
  });
}

template <class S>
void decode(int, int threads, const CiModel* model, const CiRow* rows, int32_t batch, float* logits) {
  const Step<S> step(*model, rows, batch, logits);
  parallel(threads, static_cast<size_t>(step.scratch_bytes(threads)),
           [&](const Worker& worker) { step.run(worker); });
}

template <class S>
constexpr coreinfer::Kernels kernels_of() {
  return {dequantize<S>, fit_four_bits<S>, statistics<S>, linear<S>, mlp<S>, decode<S>};
}

}  // namespace
