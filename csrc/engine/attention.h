// Norms, rotary positions and attention of one token.
#pragma once

#include <cmath>
#include <cstring>

#include "numbers.h"

namespace {

// RMSNorm or LayerNorm of x [size], padded to 16 with zeros; so is what it writes.
template <class S>
void normalize(const float* x, int64_t size, const float* weight, const float* bias,
               bool subtract_mean, float eps, float* y) {
  using F = typename S::F;
  const float count = static_cast<float>(size);
  float mean = 0.0f;
  if (subtract_mean) {
    F sum = S::zero();
    for (int64_t i = 0; i < size; i += kTile) sum = S::add(sum, S::load(x + i));
    mean = S::sum(sum) / count;
  }
  F squares = S::zero();
  const F center = S::set(mean);
  for (int64_t i = 0; i < size; i += kTile) {
    const F value = S::sub(S::load(x + i), center);
    squares = S::fma(value, value, squares);
  }
  // The padding counted as mean^2 each.
  const float padding = static_cast<float>(pad(size) - size) * mean * mean;
  const float variance = (S::sum(squares) - padding) / count;
  const F factor = S::set(1.0f / std::sqrt(variance + eps));
  for (int64_t i = 0; i < size; i += kTile) {
    const F value = S::mul(S::sub(S::load(x + i), center), factor);
    const F scaled = S::mul(value, S::load(weight + i));
    S::store(y + i, bias == nullptr ? scaled : S::add(scaled, S::load(bias + i)));
  }
}

// RMSNorm of one head in place.
inline void normalize_head(float* head, int64_t size, const float* weight, float eps) {
  float squares = 0.0f;
  for (int64_t i = 0; i < size; ++i) squares += head[i] * head[i];
  const float factor = 1.0f / std::sqrt(squares / static_cast<float>(size) + eps);
  for (int64_t i = 0; i < size; ++i) head[i] *= factor * weight[i];
}

// Rotates the first half of a head against the second, in place.
inline void rotate(float* head, int64_t size, const float* cosine, const float* sine) {
  const int64_t half = size / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float first = head[i], second = head[half + i];
    head[i] = first * cosine[i] - second * sine[i];
    head[half + i] = second * cosine[i] + first * sine[i];
  }
}

inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);  // half to even
}

inline float from_bfloat16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

// Elements of a cache, sixteen or one at a time.
template <class S>
struct Float32Cache {
  using T = float;
  static typename S::F load(const T* p) { return S::load(p); }
  static float get(const T* p) { return *p; }
  static void put(T* p, float x) { *p = x; }
};

template <class S>
struct Bfloat16Cache {
  using T = uint16_t;
  static typename S::F load(const T* p) { return S::load_bfloat16(p); }
  static float get(const T* p) { return from_bfloat16(*p); }
  static void put(T* p, float x) { *p = to_bfloat16(x); }
};

// Where one head's keys and values of `count` tokens lie, `stride` elements apart.
template <class T>
struct Tokens {
  const T* keys;
  const T* values;
  int64_t stride;
  int64_t count;
};

// out [size] = softmax(scale * query . keys) values; scores has room for count, padded to 16.
template <class S, class Cache>
void attend(const float* query, const Tokens<typename Cache::T>& seen, int64_t size, float scale,
            float* scores, float* out) {
  using F = typename S::F;
  const int64_t whole = size / kTile * kTile;
  const int64_t last = seen.count - 1;
  for (int64_t t = 0; t < pad(seen.count); t += 4) {
    // Four keys at a time share the sums over lanes; beyond the end the last one stands in.
    const typename Cache::T* keys[4];
    F sums[4];
    for (int j = 0; j < 4; ++j) {
      keys[j] = seen.keys + (t + j < last ? t + j : last) * seen.stride;
      sums[j] = S::zero();
    }
    for (int64_t i = 0; i < whole; i += kTile) {
      const F part = S::load(query + i);
      for (int j = 0; j < 4; ++j) sums[j] = S::fma(part, Cache::load(keys[j] + i), sums[j]);
    }
    S::sum_four(sums[0], sums[1], sums[2], sums[3], scores + t);
    for (int64_t i = whole; i < size; ++i)
      for (int j = 0; j < 4; ++j) scores[t + j] += query[i] * Cache::get(keys[j] + i);
  }
  F highest = S::set(-INFINITY);
  for (int64_t t = 0; t < pad(seen.count); t += kTile) {
    const F scaled = S::mul(S::load(scores + t), S::set(scale));
    S::store(scores + t, scaled);
    highest = S::max(highest, scaled);
  }
  const float top = S::largest(highest);
  for (int64_t t = seen.count; t < pad(seen.count); ++t) scores[t] = -INFINITY;
  F total = S::zero();
  for (int64_t t = 0; t < seen.count; t += kTile) {
    const F weight = exponential<S>(S::sub(S::load(scores + t), S::set(top)));
    S::store(scores + t, weight);
    total = S::add(total, weight);
  }
  // The padding added some e^-87 at most: below the rounding of a sum that is at least 1.
  const float inverse = 1.0f / S::sum(total);
  constexpr int kParts = 4;
  int64_t i = 0;
  for (; i + kParts * kTile <= size; i += kParts * kTile) {
    F sums[kParts] = {S::zero(), S::zero(), S::zero(), S::zero()};
    for (int64_t t = 0; t < seen.count; ++t) {
      const F weight = S::set(scores[t]);
      const typename Cache::T* value = seen.values + t * seen.stride + i;
      for (int p = 0; p < kParts; ++p) sums[p] = S::fma(weight, Cache::load(value + kTile * p), sums[p]);
    }
    for (int p = 0; p < kParts; ++p) S::store(out + i + kTile * p, S::mul(sums[p], S::set(inverse)));
  }
  for (; i < size; ++i) {
    float sum = 0.0f;
    for (int64_t t = 0; t < seen.count; ++t)
      sum += scores[t] * Cache::get(seen.values + t * seen.stride + i);
    out[i] = sum * inverse;
  }
}

}  // namespace
