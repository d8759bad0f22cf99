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

// Whole words of sixteen rows: all sizes are constant, which makes it fast.
void copy_words(const uint8_t* const* rows, int64_t words, uint32_t flip, uint8_t* tile) {
  for (int64_t word = 0; word < words; ++word) {
    uint32_t line[kTile];
    for (int r = 0; r < kTile; ++r) std::memcpy(line + r, rows[r] + 4 * word, 4);
    for (int r = 0; r < kTile; ++r) line[r] ^= flip;
    std::memcpy(tile + 64 * word, line, sizeof line);
  }
}

// Sixteen rows, or as many as there are, to one tile.
void pack_tile(const uint8_t* const* rows, int count, const CiMatrix& m, uint8_t* tile) {
  const int64_t bytes = q_bytes(m.dtype, m.columns), words = word_bytes(m.dtype, m.columns) / 64;
  const uint32_t flip = m.dtype == CI_INT8 ? kSignBits : 0u;
  std::memset(tile + 64 * words, 0, static_cast<size_t>(tile_bytes(m) - 64 * words));
  const int64_t whole = count == kTile ? bytes / 4 : 0;
  copy_words(rows, whole, flip, tile);
  for (int64_t word = whole; word < words; ++word) {
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

// Sixteen int4 of a record as bytes: the low and the high halves of two runs of four (formats.py).
void unpack_halves(const uint8_t* from, uint8_t* to) {
  constexpr uint64_t kLow = 0x0f0f0f0f0f0f0f0full;
  uint64_t bytes;
  std::memcpy(&bytes, from, 8);
  const uint64_t low = bytes & kLow, high = bytes >> 4 & kLow;
  std::memcpy(to, &low, 4);
  std::memcpy(to + 4, &high, 4);
  std::memcpy(to + 8, reinterpret_cast<const uint8_t*>(&low) + 4, 4);
  std::memcpy(to + 12, reinterpret_cast<const uint8_t*>(&high) + 4, 4);
}

// words[o] = the o-th bytes of four rows, one above the other.
void interleave(const uint8_t (*rows)[kTile], uint32_t flip, uint8_t* words) {
  uint32_t out[kTile];
  for (int o = 0; o < kTile; ++o)
    out[o] = (rows[0][o] | static_cast<uint32_t>(rows[1][o]) << 8 |
              static_cast<uint32_t>(rows[2][o]) << 16 | static_cast<uint32_t>(rows[3][o]) << 24) ^
             flip;
  std::memcpy(words, out, sizeof out);
}

// Sixteen neurons, or as many as there are, of sixteen outputs from `output` on.
void pack_block(const uint8_t* const* records, int count, int64_t output, const CiMatrix& m,
                uint8_t* words) {
  if (m.dtype == CI_BFLOAT16) {
    uint16_t block[kTile][kTile] = {};
    const int64_t left = m.rows - output, size = left < kTile ? left : kTile;
    for (int k = 0; k < count; ++k)
      std::memcpy(block[k], records[k] + 2 * output, static_cast<size_t>(2 * size));
    for (int k = 0; k < kTile; k += 2) {
      uint32_t out[kTile];
      for (int o = 0; o < kTile; ++o)
        out[o] = block[k][o] | static_cast<uint32_t>(block[k + 1][o]) << 16;
      std::memcpy(words + 32 * k, out, sizeof out);
    }
    return;
  }
  uint8_t block[kTile][kTile] = {};
  if (m.dtype == CI_INT8) {
    for (int k = 0; k < count; ++k) std::memcpy(block[k], records[k] + output, kTile);
    for (int k = 0; k < kTile; k += 4) interleave(block + k, kSignBits, words + 16 * k);
    return;
  }
  for (int k = 0; k < count; ++k) unpack_halves(records[k] + output / 2, block[k]);
  for (int k = 0; k < kTile; k += 8) {
    uint8_t pairs[4][kTile];
    for (int j = 0; j < 4; ++j)
      for (int o = 0; o < kTile; ++o)
        pairs[j][o] = static_cast<uint8_t>(block[k + j][o] | block[k + j + 4][o] << 4);
    interleave(pairs, 0, words + 8 * k);
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
    const Range rows = share(worker, groups * kinds);
    // Neurons in blocks outside, outputs inside: records are read along their length.
    for (int64_t first = 0; first < padded; first += kTile) {
      const int count = static_cast<int>(neurons - first < kTile ? neurons - first : kTile);
      const uint8_t* from[kTile];
      for (int k = 0; k < count; ++k) from[k] = source[first + k];
      for (int64_t t = tiles.begin; t < tiles.end; ++t)
        pack_block(from, count, kTile * t, m, out + t * words + word_bytes(dtype, first));
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        uint16_t halves[kTile] = {};
        for (int k = 0; k < count; ++k) std::memcpy(halves + k, from[k] + bytes + 2 * row, 2);
        std::memcpy(numbers + 2 * (padded * row + first), halves, sizeof halves);
      }
    }
  });
}
