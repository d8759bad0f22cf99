// Sizes of the layouts (kernels/layout.py), and functions of 16 floats.
#pragma once

#include <cmath>
#include <cstdint>

#include "../coreinfer_kernels.h"

namespace {

constexpr int64_t kTile = 16;
constexpr int64_t kNeuronBlock = 32;  // neurons whose activations are rounded together

constexpr int64_t pad(int64_t count, int64_t multiple = kTile) {
  return (count + multiple - 1) / multiple * multiple;
}

// Bytes of the 16-lane words of a tile with that many inputs, without the scales.
inline int64_t word_bytes(int32_t dtype, int64_t inputs) {
  switch (dtype) {
    case CI_BFLOAT16: return 32 * pad(inputs, 2);
    case CI_INT8: return 16 * inputs;
    default: return 8 * inputs;
  }
}

inline int64_t scales_per_group(int32_t dtype) { return dtype == CI_INT4 ? 2 : 1; }

inline int64_t tile_bytes(const CiMatrix& m) {
  const int64_t words = word_bytes(m.dtype, m.columns);
  if (m.dtype == CI_BFLOAT16) return words;
  return pad(words + m.columns / m.group_size * scales_per_group(m.dtype) * 2 * kTile, 64);
}

// e^x to about one unit in the last place, zero below -87, finite at most e^88.
template <class S>
typename S::F exponential(typename S::F x) {
  using F = typename S::F;
  x = S::min(S::max(x, S::set(-87.33f)), S::set(88.0f));
  const typename S::I n = S::round(S::mul(x, S::set(1.44269504f)));
  const F whole = S::to_float(n);
  // ln 2 in two parts, so that what is left is exact; then the series of e^r, |r| < 0.35.
  F r = S::fma(whole, S::set(-0.693359375f), x);
  r = S::fma(whole, S::set(2.12194440e-4f), r);
  F y = S::set(1.9875691500e-4f);
  y = S::fma(y, r, S::set(1.3981999507e-3f));
  y = S::fma(y, r, S::set(8.3334519073e-3f));
  y = S::fma(y, r, S::set(4.1665795894e-2f));
  y = S::fma(y, r, S::set(1.6666665459e-1f));
  y = S::fma(y, r, S::set(5.0000001201e-1f));
  y = S::fma(y, S::mul(r, r), S::add(r, S::set(1.0f)));
  return S::mul(y, S::power_of_two(n));
}

// 1 / (1 + e^-x)
template <class S>
typename S::F sigmoid(typename S::F x) {
  const typename S::F one = S::set(1.0f);
  return S::div(one, S::add(one, exponential<S>(S::sub(S::zero(), x))));
}

template <class S>
typename S::F activate(int32_t activation, typename S::F x) {
  using F = typename S::F;
  switch (activation) {
    case CI_SILU: return S::mul(x, sigmoid<S>(x));
    case CI_RELU: return S::max(x, S::zero());
    case CI_GELU: {
      float lanes[kTile];
      S::store(lanes, x);
      for (float& lane : lanes) lane *= 0.5f * (1.0f + std::erf(lane * 0.70710678f));
      return S::load(lanes);
    }
    default: {  // 0.5 x (1 + tanh u) = x sigmoid(2 u)
      const F cube = S::mul(S::mul(x, x), x);
      const F u = S::mul(S::set(0.79788456f), S::fma(S::set(0.044715f), cube, x));
      return S::mul(x, sigmoid<S>(S::add(u, u)));
    }
  }
}

}  // namespace
