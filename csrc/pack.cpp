// Records into the order that the kernels stream (kernels/layout.py).
//
// A line of sixteen records at a time is rearranged by zipping vectors of sixteen bytes. Any processor
// has those and is then faster than its memory, so there is one version for all instruction sets.
#include <cstring>
#include <utility>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "engine/numbers.h"
#include "pool.h"

namespace {

using coreinfer::parallel;
using coreinfer::Range;
using coreinfer::share;
using coreinfer::Worker;

constexpr int64_t kLine = 64;    // bytes
constexpr int64_t kAhead = 256;  // bytes of each record that are fetched before they are needed
constexpr uint8_t kSignBit = 0x80;  // q -> q + 128

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
using Vector [[gnu::vector_size(16)]] = T;
using Bytes = Vector<uint8_t>;

inline Bytes load(const uint8_t* p) {
  Bytes x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline void store(uint8_t* p, Bytes x) { std::memcpy(p, &x, sizeof x); }

// Half of the elements of two vectors in turn, from the first-th of both on.
template <class T, size_t first, size_t... I>
inline Bytes in_turn(Bytes x, Bytes y, std::index_sequence<I...>) {
  constexpr size_t n = sizeof...(I);
  const auto a = reinterpret_cast<Vector<T>>(x), b = reinterpret_cast<Vector<T>>(y);
#ifdef __clang__
  return reinterpret_cast<Bytes>(__builtin_shufflevector(a, b, (first + I / 2 + I % 2 * n)...));
#else
  constexpr Vector<T> order = {static_cast<T>(first + I / 2 + I % 2 * n)...};
  return reinterpret_cast<Bytes>(__builtin_shuffle(a, b, order));
#endif
}

struct Zipped {
  Bytes low, high;
};

// The elements of two vectors in turn.
template <class T>
inline Zipped zip(Bytes a, Bytes b) {
  constexpr size_t n = sizeof(Bytes) / sizeof(T);
  constexpr auto all = std::make_index_sequence<n>();
  return {in_turn<T, 0>(a, b, all), in_turn<T, n / 2>(a, b, all)};
}

// The elements of `count` vectors in turn, for a power of two, in place.
template <class T, int count>
inline void zip_all(Bytes (&x)[count]) {
  for (int round = 1; round < count; round *= 2) {
    Bytes y[count];
    for (int i = 0; i < count / 2; ++i) {
      const Zipped both = zip<T>(x[i], x[i + count / 2]);
      y[2 * i] = both.low;
      y[2 * i + 1] = both.high;
    }
    for (int i = 0; i < count; ++i) x[i] = y[i];
  }
}

// Copies whole vectors to aligned memory past the cache: the lines that are written need not be read
// first, which is a third of the traffic. Whoever does so ends with flush().
inline void stream(uint8_t* to, const uint8_t* from, int64_t bytes) {
#ifdef __SSE2__
#pragma GCC unroll 4  // a line
  for (int64_t i = 0; i < bytes; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), reinterpret_cast<__m128i>(load(from + i)));
#else
  std::memcpy(to, from, static_cast<size_t>(bytes));
#endif
}

inline void flush() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// The chosen ones of many records.
struct Records {
  const uint8_t* data;
  int64_t stride;
  const int32_t* index;  // null: all of them, in order
  int64_t count;

  const uint8_t* operator[](int64_t i) const {
    return data + stride * (index == nullptr ? i : index[i]);
  }
};

// Sixteen neighbours among them, or as many as there are.
struct Sixteen {
  const uint8_t* records[kTile];
  int count;

  Sixteen(const Records& all, int64_t first)
      : count(static_cast<int>(smaller(all.count - first, kTile))) {
    for (int r = 0; r < count; ++r) records[r] = all[first + r];
  }

  // body(at, lines) for each line of bytes begin..end-1, the first at 0; zeros are what is not there.
  template <class Body>
  void each_line(int64_t begin, int64_t end, const Body& body) const {
    const uint8_t* lines[kTile];
    int64_t at = begin;
    for (; count == kTile && at + kLine <= end; at += kLine) {
      for (int r = 0; r < kTile; ++r) lines[r] = records[r] + at;
      body(at - begin, lines);
      if (at + kAhead < end)
        for (int r = 0; r < kTile; ++r) __builtin_prefetch(lines[r] + kAhead);
    }
    for (; at < end; at += kLine) {
      uint8_t copies[kTile][kLine] = {};
      for (int r = 0; r < kTile; ++r) lines[r] = copies[r];
      for (int r = 0; r < count; ++r)
        std::memcpy(copies[r], records[r] + at, static_cast<size_t>(smaller(end - at, kLine)));
      body(at - begin, lines);
    }
  }
};

int64_t q_bytes(int32_t dtype, int64_t columns) {
  return dtype == CI_BFLOAT16 ? 2 * columns : dtype == CI_INT8 ? columns : columns / 2;
}

// out[w][r] = the w-th four bytes of line r.
void words_of(const uint8_t* const* lines, uint8_t flip, uint8_t* out) {
  for (int r = 0; r < kTile; r += 4)
    for (int w = 0; w < kTile; w += 4) {
      Bytes x[4];
      for (int i = 0; i < 4; ++i) x[i] = load(lines[r + i] + 4 * w) ^ flip;
      zip_all<uint32_t>(x);
      for (int i = 0; i < 4; ++i) store(out + kLine * (w + i) + 4 * r, x[i]);
    }
}

// out[i][r] = the i-th two bytes of line r.
void halves_of(const uint8_t* const* lines, uint8_t* out) {
  for (int r = 0; r < kTile; r += 8)
    for (int h = 0; h < kLine / 2; h += 8) {
      Bytes x[8];
      for (int i = 0; i < 8; ++i) x[i] = load(lines[r + i] + 2 * h);
      zip_all<uint16_t>(x);
      for (int i = 0; i < 8; ++i) store(out + 2 * kTile * (h + i) + 2 * r, x[i]);
    }
}

// A line of sixteen neurons -> what they are of each of its tiles of sixteen outputs.
void outputs_bfloat16(const uint8_t* const* lines, uint8_t* out) {
  for (int k = 0; k < kTile; k += 2)
    for (int i = 0; i < 4; ++i) {
      const Zipped pairs = zip<uint16_t>(load(lines[k] + 16 * i), load(lines[k + 1] + 16 * i));
      uint8_t* half = out + 512 * (i / 2) + 32 * k + 32 * (i % 2);
      store(half, pairs.low);
      store(half + 16, pairs.high);
    }
}

void outputs_int8(const uint8_t* const* lines, uint8_t* out) {
  for (int k = 0; k < kTile; k += 4)
    for (int t = 0; t < 4; ++t) {
      Bytes x[4];
      for (int i = 0; i < 4; ++i) x[i] = load(lines[k + i] + 16 * t) ^ kSignBit;
      zip_all<uint8_t>(x);
      for (int i = 0; i < 4; ++i) store(out + 256 * t + 16 * (k + i), x[i]);
    }
}

// Four bytes of a record are outputs o..o+3 in their low halves and o+4..o+7 in their high halves.
void outputs_int4(const uint8_t* const* lines, uint8_t* out) {
  for (int k = 0; k < kTile; k += 8)
    for (int t = 0; t < 8; t += 2) {
      Bytes low[4], high[4];
      for (int i = 0; i < 4; ++i) {
        const Bytes a = load(lines[k + i] + 8 * t), b = load(lines[k + i + 4] + 8 * t);
        low[i] = (a & 0x0f) | (b << 4);
        high[i] = (a >> 4) | (b & 0xf0);
      }
      zip_all<uint8_t>(low);
      zip_all<uint8_t>(high);
      for (int i = 0; i < 4; ++i) {
        uint8_t* half = out + 128 * (t + i / 2) + 8 * k + 32 * (i % 2);
        store(half, low[i]);
        store(half + 16, high[i]);
      }
    }
}

void outputs_of(int32_t dtype, const uint8_t* const* lines, uint8_t* out) {
  switch (dtype) {
    case CI_BFLOAT16: return outputs_bfloat16(lines, out);
    case CI_INT8: return outputs_int8(lines, out);
    default: return outputs_int4(lines, out);
  }
}

// `count` float16 of each record, from byte `begin` on, as rows of sixteen that lie `stride` apart.
void pack_halves(const Sixteen& from, int64_t begin, int64_t count, uint8_t* out, int64_t stride) {
  from.each_line(begin, begin + 2 * count, [&](int64_t at, const uint8_t* const* lines) {
    uint8_t rows[kLine / 2][2 * kTile];
    halves_of(lines, rows[0]);
    const int64_t first = at / 2, size = smaller(count - first, kLine / 2);
    for (int64_t i = 0; i < size; ++i)
      std::memcpy(out + stride * (first + i), rows[i], sizeof rows[i]);
  });
}

// Sixteen rows to one tile.
void pack_tile(const Sixteen& from, const CiMatrix& m, uint8_t* tile) {
  const int64_t bytes = q_bytes(m.dtype, m.columns), words = word_bytes(m.dtype, m.columns);
  const uint8_t flip = m.dtype == CI_INT8 ? kSignBit : 0;
  from.each_line(0, bytes, [&](int64_t at, const uint8_t* const* lines) {
    alignas(kLine) uint8_t out[kTile * kLine];
    words_of(lines, flip, out);
    stream(tile + kTile * at, out, smaller(sizeof out, words - kTile * at));
  });
  if (m.dtype == CI_BFLOAT16) return;
  const int64_t groups = m.columns / m.group_size, kinds = scales_per_group(m.dtype);
  const int64_t row = 2 * kTile;
  for (int64_t kind = 0; kind < kinds; ++kind)
    pack_halves(from, bytes + 2 * groups * kind, groups, tile + words + row * kind, row * kinds);
  const int64_t used = words + row * groups * kinds;
  std::memset(tile + used, 0, static_cast<size_t>(tile_bytes(m) - used));
}

// Sixteen neurons to their place in all tiles of outputs, the first of which is `tile`.
void pack_outputs(const Sixteen& from, const CiMatrix& m, uint8_t* tile) {
  const int64_t run = word_bytes(m.dtype, kTile), tiles = kTile * kLine / run;  // of a line
  const int64_t all = pad(m.rows) / kTile, stride = word_bytes(m.dtype, pad(m.columns));
  from.each_line(0, q_bytes(m.dtype, m.rows), [&](int64_t at, const uint8_t* const* lines) {
    alignas(kLine) uint8_t out[kTile * kLine];
    outputs_of(m.dtype, lines, out);
    const int64_t first = at / kLine * tiles, count = smaller(tiles, all - first);
    for (int64_t t = 0; t < count; ++t) stream(tile + stride * (first + t), out + run * t, run);
  });
}

}  // namespace

extern "C" void ci_pack_rows(int threads, const uint8_t* records, int64_t stride, int64_t part_stride,
                             int32_t parts, const int32_t* index, int64_t rows, int64_t columns,
                             int32_t dtype, int32_t group_size, uint8_t* out) {
  const CiMatrix m = {nullptr, rows, columns, dtype, group_size};
  parallel(threads, 0, [&](const Worker& worker) {
    const Range tiles = share(worker, parts * (pad(rows) / kTile));
    for (int64_t t = tiles.begin; t < tiles.end; ++t) {
      const Records source = {records + t % parts * part_stride, stride, index, rows};
      pack_tile(Sixteen(source, t / parts * kTile), m, out + t * tile_bytes(m));
    }
    flush();
  });
}

extern "C" void ci_pack_down(int threads, const uint8_t* records, int64_t stride, const int32_t* index,
                             int64_t neurons, int64_t outputs, int32_t dtype, int32_t group_size,
                             int32_t by_neuron, uint8_t* out) {
  const CiMatrix m = {nullptr, outputs, neurons, dtype, group_size};
  const int64_t numbers = dtype == CI_BFLOAT16 ? 0 : outputs / group_size * scales_per_group(dtype);
  const int64_t bytes = q_bytes(dtype, outputs), record_bytes = bytes + 2 * numbers;
  const Records source = {records, stride, index, neurons};
  if (by_neuron) {
    parallel(threads, 0, [&](const Worker& worker) {
      const Range mine = share(worker, neurons);
      for (int64_t k = mine.begin; k < mine.end; ++k) {
        uint8_t* to = out + k * record_bytes;
        if (record_bytes % kLine == 0) {
          stream(to, source[k], record_bytes);
        } else {
          std::memcpy(to, source[k], static_cast<size_t>(record_bytes));
        }
      }
      flush();
    });
    return;
  }
  const int64_t padded = pad(neurons);
  uint8_t* halves = out + pad(outputs) / kTile * word_bytes(dtype, padded);
  parallel(threads, 0, [&](const Worker& worker) {
    // By neurons: each record is read along its length, once.
    const Range blocks = share(worker, padded / kTile);
    for (int64_t first = kTile * blocks.begin; first < kTile * blocks.end; first += kTile) {
      const Sixteen from(source, first);
      pack_outputs(from, m, out + word_bytes(dtype, first));
      pack_halves(from, bytes, numbers, halves + 2 * first, 2 * padded);
    }
    flush();
  });
}
