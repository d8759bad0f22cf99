// Sixteen lanes in an array: plain C++ that any compiler turns into what its target has.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct Portable {
  struct F {
    float v[16];
  };
  struct I {
    int32_t v[16];
  };
  struct W {
    uint8_t v[64];
  };

  // dot_int8 takes q + 128 back to q.
  static constexpr int kByteOffset = 0;

  template <class Function>
  static F lanes(Function f) {
    F y;
    for (int i = 0; i < 16; ++i) y.v[i] = f(i);
    return y;
  }
  template <class Function>
  static I int_lanes(Function f) {
    I y;
    for (int i = 0; i < 16; ++i) y.v[i] = f(i);
    return y;
  }

  static F zero() { return set(0); }
  static F set(float x) {
    return lanes([=](int) { return x; });
  }
  static F load(const float* p) {
    F y;
    std::memcpy(y.v, p, sizeof y.v);
    return y;
  }
  static void store(float* p, F x) { std::memcpy(p, x.v, sizeof x.v); }
  static F add(const F& a, const F& b) {
    return lanes([&](int i) { return a.v[i] + b.v[i]; });
  }
  static F sub(const F& a, const F& b) {
    return lanes([&](int i) { return a.v[i] - b.v[i]; });
  }
  static F mul(const F& a, const F& b) {
    return lanes([&](int i) { return a.v[i] * b.v[i]; });
  }
  static F div(const F& a, const F& b) {
    return lanes([&](int i) { return a.v[i] / b.v[i]; });
  }
  static F fma(const F& a, const F& b, const F& c) {
    return lanes([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
  }
  static F max(const F& a, const F& b) {
    return lanes([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static F min(const F& a, const F& b) {
    return lanes([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  static F abs(const F& a) {
    return lanes([&](int i) { return std::fabs(a.v[i]); });
  }
  static float sum(const F& a) {
    float total = 0;
    for (float lane : a.v) total += lane;
    return total;
  }
  // The sums of four vectors, side by side.
  static void sum_four(const F& a, const F& b, const F& c, const F& d, float* p) {
    p[0] = sum(a);
    p[1] = sum(b);
    p[2] = sum(c);
    p[3] = sum(d);
  }
  static float largest(const F& a) {
    float found = a.v[0];
    for (float lane : a.v) found = lane > found ? lane : found;
    return found;
  }

  static F load_half(const uint16_t* p) {
    // Shift exponent and fraction into place; the exponents' biases differ by 112.
    const float bias = bits(0x77800000u);  // 2^112
    return lanes([=](int i) {
      const uint32_t half = p[i];
      const float magnitude = bits((half & 0x7fffu) << 13) * bias;
      return half & 0x8000u ? -magnitude : magnitude;
    });
  }
  static void store_half(uint16_t* p, const F& x) {
    for (int i = 0; i < 16; ++i) p[i] = to_half(x.v[i]);
  }
  static F load_bfloat16(const uint16_t* p) {
    return lanes([=](int i) { return bits(static_cast<uint32_t>(p[i]) << 16); });
  }
  // Half to even; for finite numbers.
  static void store_bfloat16(uint16_t* p, const F& x) {
    for (int i = 0; i < 16; ++i) {
      uint32_t all;
      std::memcpy(&all, x.v + i, 4);
      p[i] = static_cast<uint16_t>((all + 0x7fffu + (all >> 16 & 1u)) >> 16);
    }
  }
  static F load_int8(const int8_t* p) {
    return lanes([=](int i) { return static_cast<float>(p[i]); });
  }
  // Sixteen int4 of two runs of four bytes (formats.py).
  static F load_int4(const uint8_t* p) {
    return lanes([=](int i) { return static_cast<float>(p[i / 8 * 4 + i % 4] >> (i % 8 / 4 * 4) & 15); });
  }

  static I set_int(int x) {
    return int_lanes([=](int) { return x; });
  }
  static I add_int(const I& a, const I& b) {
    return int_lanes([&](int i) { return a.v[i] + b.v[i]; });
  }
  static int sum_int(const I& a) {
    int total = 0;
    for (int lane : a.v) total += lane;
    return total;
  }
  static F to_float(const I& a) {
    return lanes([&](int i) { return static_cast<float>(a.v[i]); });
  }
  // Half to even, by the rounding of an addition; for magnitudes below 2^22.
  static I round(const F& a) {
    return int_lanes([&](int i) { return static_cast<int32_t>((a.v[i] + 12582912.0f) - 12582912.0f); });
  }
  static void store_int8(int8_t* p, const I& a) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a.v[i]);
  }
  // 2^n for whole n in -126..127.
  static F power_of_two(const I& n) {
    return lanes([&](int i) { return bits(static_cast<uint32_t>(n.v[i] + 127) << 23); });
  }

  static W load_bytes(const uint8_t* p) {
    W w;
    std::memcpy(w.v, p, sizeof w.v);
    return w;
  }
  static W low_halves(const W& w) {
    W y;
    for (int i = 0; i < 64; ++i) y.v[i] = w.v[i] & 15;
    return y;
  }
  static W high_halves(const W& w) {
    W y;
    for (int i = 0; i < 64; ++i) y.v[i] = w.v[i] >> 4;
    return y;
  }
  // Lane r += sum over j < 4 of weights[4 r + j] * x[j].
  static I dot_int8(const I& sum, const W& w, const int8_t* x) { return dot<128>(sum, w, x); }
  static I dot_int4(const I& sum, const W& w, const int8_t* x) { return dot<0>(sum, w, x); }
  // The first and the second of each pair of bfloat16.
  static F even_bfloat16(const W& w) {
    return lanes([&](int i) { return bits(word(w, i) << 16); });
  }
  static F odd_bfloat16(const W& w) {
    return lanes([&](int i) { return bits(word(w, i) & 0xffff0000u); });
  }
  static void prefetch(const uint8_t*) {}

 private:
  template <int offset>
  static I dot(const I& sum, const W& w, const int8_t* x) {
    return int_lanes([&](int i) {
      const uint8_t* four = w.v + 4 * i;
      return sum.v[i] + (four[0] - offset) * x[0] + (four[1] - offset) * x[1] +
             (four[2] - offset) * x[2] + (four[3] - offset) * x[3];
    });
  }
  // Of a little-endian pair of bfloat16; written out so that byte order does not matter.
  static uint32_t word(const W& w, int i) {
    const uint8_t* p = w.v + 4 * i;
    return p[0] | static_cast<uint32_t>(p[1]) << 8 | static_cast<uint32_t>(p[2]) << 16 |
           static_cast<uint32_t>(p[3]) << 24;
  }
  static float bits(uint32_t x) {
    float y;
    std::memcpy(&y, &x, 4);
    return y;
  }
  static uint16_t to_half(float x) {
    uint32_t all;
    std::memcpy(&all, &x, 4);
    const uint32_t sign = all >> 16 & 0x8000u;
    float magnitude = std::fabs(x);
    if (!(magnitude < 65520.0f)) return static_cast<uint16_t>(sign | (x != x ? 0x7e00u : 0x7c00u));
    if (magnitude < bits(0x38800000u)) {  // below 2^-14: whole steps of 2^-24
      const float steps = magnitude * 16777216.0f + 8388608.0f;
      uint32_t low;
      std::memcpy(&low, &steps, 4);
      return static_cast<uint16_t>(sign | (low & 0x7ffu));
    }
    std::memcpy(&all, &magnitude, 4);
    all += 0xfffu + (all >> 13 & 1u);  // half to even
    return static_cast<uint16_t>(sign | ((all - 0x38000000u) >> 13));
  }
};

}  // namespace
