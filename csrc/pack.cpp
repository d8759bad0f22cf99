// Records into the order that the kernels stream (kernels/layout.py).
#include <cstring>

#include "engine/numbers.h"
#include "pool.h"

namespace {

using coreinfer::parallel;
using coreinfer::Range;
using coreinfer::share;
using coreinfer::Worker;

constexpr uint32_t kSignBits = 0x80808080u;  // q -> q + 128, four bytes at a time

struct Records {
  const uint8_t* data;
  int64_t stride;
  const int32_t* index;  // null: all of them, in order
  int64_t count;

  const uint8_t* operator[](int64_t i) const {
    return data + stride * (index == nullptr ? i : index[i]);
  }
};

int64_t q_bytes(int32_t dtype, int64_t columns) {
  return dtype == CI_BFLOAT16 ? 2 * columns : dtype == CI_INT8 ? columns : columns / 2;
}

// Sixteen rows, or as many as there are, to one tile.
void pack_tile(const uint8_t* const* rows, int count, const CiMatrix& m, uint8_t* tile) {
  const int64_t bytes = q_bytes(m.dtype, m.columns);
  const uint32_t flip = m.dtype == CI_INT8 ? kSignBits : 0u;
  std::memset(tile, 0, static_cast<size_t>(tile_bytes(m)));
  for (int64_t word = 0; word < (bytes + 3) / 4; ++word) {
    const size_t size = bytes - 4 * word < 4 ? static_cast<size_t>(bytes - 4 * word) : 4;
    for (int r = 0; r < kTile; ++r) {
      uint32_t four = 0;
      if (r < count) std::memcpy(&four, rows[r] + 4 * word, size);
      four ^= flip;
      std::memcpy(tile + 64 * word + 4 * r, &four, 4);
    }
  }
  if (m.dtype == CI_BFLOAT16) return;
  const int64_t groups = m.columns / m.group_size, kinds = scales_per_group(m.dtype);
  uint8_t* numbers = tile + word_bytes(m.dtype, m.columns);
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t kind = 0; kind < kinds; ++kind)
      for (int r = 0; r < count; ++r)
        std::memcpy(numbers + 2 * (kTile * (group * kinds + kind) + r),
                    rows[r] + bytes + 2 * (groups * kind + group), 2);
}

// The q of one output of a record.
uint8_t byte_of(const uint8_t* record, int64_t output) { return record[output] ^ 128u; }
uint8_t half_of(const uint8_t* record, int64_t output) {
  return record[output / 8 * 4 + output % 4] >> (output % 8 / 4 * 4) & 15;
}

// Words of a tile of a down projection: neurons k.. of outputs t.. .
void pack_down_words(const Records& records, const CiMatrix& m, int64_t t, uint8_t* tile) {
  const int64_t step = m.dtype == CI_BFLOAT16 ? 2 : m.dtype == CI_INT8 ? 4 : 8;
  const int64_t outputs = m.rows - kTile * t < kTile ? m.rows - kTile * t : kTile;
  std::memset(tile, m.dtype == CI_INT8 ? 128 : 0,
              static_cast<size_t>(word_bytes(m.dtype, pad(m.columns))));
  for (int64_t k = 0; k < records.count; ++k) {
    const uint8_t* record = records[k];
    uint8_t* word = tile + 64 * (k / step);
    const int64_t place = k % step;
    for (int64_t o = 0; o < outputs; ++o) {
      const int64_t output = kTile * t + o;
      if (m.dtype == CI_BFLOAT16)
        std::memcpy(word + 4 * o + 2 * place, record + 2 * output, 2);
      else if (m.dtype == CI_INT8)
        word[4 * o + place] = byte_of(record, output);
      else
        word[4 * o + place % 4] |= static_cast<uint8_t>(half_of(record, output) << (place / 4 * 4));
    }
  }
}

}  // namespace

extern "C" void ci_pack_rows(int threads, const uint8_t* records, int64_t stride, int64_t part_stride,
                             int32_t parts, const int32_t* index, int64_t rows, int64_t columns,
                             int32_t dtype, int32_t group_size, uint8_t* out) {
  const CiMatrix m = {nullptr, rows, columns, dtype, group_size};
  const Records source = {records, stride, index, rows};
  parallel(threads, 0, [&](const Worker& worker) {
    const Range tiles = share(worker, parts * (pad(rows) / kTile));
    for (int64_t t = tiles.begin; t < tiles.end; ++t) {
      const uint8_t* from[kTile];
      const int64_t first = t / parts * kTile;
      const int count = static_cast<int>(rows - first < kTile ? rows - first : kTile);
      for (int r = 0; r < count; ++r) from[r] = source[first + r] + t % parts * part_stride;
      pack_tile(from, count, m, out + t * tile_bytes(m));
    }
  });
}

extern "C" void ci_pack_down(int threads, const uint8_t* records, int64_t stride, const int32_t* index,
                             int64_t neurons, int64_t outputs, int32_t dtype, int32_t group_size,
                             int32_t by_neuron, uint8_t* out) {
  const CiMatrix m = {nullptr, outputs, neurons, dtype, group_size};
  const Records source = {records, stride, index, neurons};
  const bool grouped = dtype != CI_BFLOAT16;
  const int64_t groups = grouped ? outputs / group_size : 0;
  const int64_t kinds = grouped ? scales_per_group(dtype) : 0;
  const int64_t bytes = q_bytes(dtype, outputs);
  const int64_t record_bytes = bytes + 2 * groups * kinds;
  if (by_neuron) {
    parallel(threads, 0, [&](const Worker& worker) {
      const Range mine = share(worker, neurons);
      for (int64_t k = mine.begin; k < mine.end; ++k)
        std::memcpy(out + k * record_bytes, source[k], static_cast<size_t>(record_bytes));
    });
    return;
  }
  const int64_t padded = pad(neurons), words = word_bytes(dtype, padded);
  uint8_t* numbers = out + pad(outputs) / kTile * words;
  parallel(threads, 0, [&](const Worker& worker) {
    const Range tiles = share(worker, pad(outputs) / kTile);
    for (int64_t t = tiles.begin; t < tiles.end; ++t) pack_down_words(source, m, t, out + t * words);
    const Range rows = share(worker, groups * kinds);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      uint8_t* to = numbers + 2 * padded * row;
      std::memset(to, 0, static_cast<size_t>(2 * padded));
      for (int64_t k = 0; k < neurons; ++k) std::memcpy(to + 2 * k, source[k] + bytes + 2 * row, 2);
    }
  });
}
