// The best four-bit numbers for groups of weights; kernels/four_bits.py says what is searched.
#pragma once

#include "../pool.h"
#include "numbers.h"

namespace {

constexpr float kClippedRanges[] = {1.0f, 0.9f, 0.8f, 0.7f};
constexpr int kRefinements = 2;

struct FourBits {
  float scale;
  float minimum;
};

// As float16 holds it.
template <class S>
float halved(float x) {
  uint16_t halves[kTile];
  float lanes[kTile];
  S::store_half(halves, S::set(x));
  S::store(lanes, S::load_half(halves));
  return lanes[0];
}

// The squared error of the group, and the sums that the next scale follows from.
struct Fit {
  float error, q, q_squares, q_weights;
};

// Weights are given less their mean; `minimum` is less the mean too.
template <class S>
Fit try_fit(const float* centred, int64_t size, float scale, float minimum) {
  using F = typename S::F;
  const F step = S::set(scale), low = S::set(minimum), top = S::set(15.0f);
  F error = S::zero(), q_sum = S::zero(), q_squares = S::zero(), q_weights = S::zero();
  for (int64_t i = 0; i < size; i += kTile) {
    const F w = S::load(centred + i);
    F q = S::zero();
    if (scale != 0.0f) {
      const F parts = S::div(S::sub(w, low), step);
      q = S::to_float(S::round(S::min(S::max(parts, S::zero()), top)));
    }
    const F left = S::sub(S::fma(q, step, low), w);
    error = S::fma(left, left, error);
    q_sum = S::add(q_sum, q);
    q_squares = S::fma(q, q, q_squares);
    q_weights = S::fma(q, w, q_weights);
  }
  return {S::sum(error), S::sum(q_sum), S::sum(q_squares), S::sum(q_weights)};
}

template <class S>
FourBits fit_group(const float* weights, int64_t size, float* centred) {
  using F = typename S::F;
  F lowest = S::load(weights), highest = lowest, total = S::zero();
  for (int64_t i = 0; i < size; i += kTile) {
    const F w = S::load(weights + i);
    lowest = S::min(lowest, w);
    highest = S::max(highest, w);
    total = S::add(total, w);
  }
  const float count = static_cast<float>(size), mean = S::sum(total) / count;
  const float high = S::largest(highest), low = -S::largest(S::sub(S::zero(), lowest));
  for (int64_t i = 0; i < size; i += kTile)
    S::store(centred + i, S::sub(S::load(weights + i), S::set(mean)));
  FourBits best = {0.0f, 0.0f};
  float best_error = __builtin_inff();
  for (const float part : kClippedRanges) {
    float scale = part * (high - low) / 15.0f;
    float minimum = (low + high - part * (high - low)) / 2.0f;
    for (int refinement = 0; refinement <= kRefinements; ++refinement) {
      scale = halved<S>(scale);
      minimum = halved<S>(minimum);
      const Fit fit = try_fit<S>(centred, size, scale, minimum - mean);
      if (fit.error < best_error) {
        best_error = fit.error;
        best = {scale, minimum};
      }
      // Least squares for these q; the centred weights add up to zero.
      const float q_mean = fit.q / count, spread = fit.q_squares - fit.q * q_mean;
      if (spread > 0.0f) scale = fit.q_weights / spread;
      minimum = mean - scale * q_mean;
    }
  }
  return best;
}

template <class S>
void fit_four_bits(int, int threads, const float* weights, int64_t groups, int32_t size, float* scales,
                   float* minima) {
  coreinfer::parallel(threads, 0, [&](const coreinfer::Worker& worker) {
    const coreinfer::Range mine = coreinfer::share(worker, groups);
    alignas(64) float centred[CI_MAX_GROUP];
    for (int64_t g = mine.begin; g < mine.end; ++g) {
      const FourBits found = fit_group<S>(weights + g * size, size, centred);
      scales[g] = found.scale;
      minima[g] = found.minimum;
    }
  });
}

}  // namespace
