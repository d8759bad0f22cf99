// Inputs of a product: float32, or rounded in groups to one or two digits of eight bits.
#pragma once

#include "numbers.h"

namespace {

// A row's inputs, in one worker's memory.
struct Inputs {
  const float* x = nullptr;    // for bfloat16 weights
  int8_t* q = nullptr;         // for int8 and int4: x ~ q * step
  int8_t* rest = nullptr;      // for int8, whose weights deserve it: x ~ (q + rest / 254) * step
  float* step = nullptr;       // [groups]
  int32_t* sum = nullptr;      // [groups]: of q
  int32_t* rest_sum = nullptr;
};

// The inputs of up to eight rows that share a weight matrix.
struct Batch {
  Inputs rows[CI_MAX_ROWS];
  int count;
};

constexpr float kSmallest = 1e-30f;  // below it a group counts as zero
constexpr float kRestParts = 254.0f;  // of a step: what is left is half of one at most, +-127

inline bool has_rest(int32_t dtype) { return dtype == CI_INT8; }

// Rounds group `group` at `start`, `count` numbers (a multiple of 16) that `read` gives 16 at a time,
// to 127ths of the largest, and with_rest what is left of each to 254ths of those.
template <class S, class Read>
void round_group(const Read& read, int64_t start, int64_t count, int64_t group, bool with_rest,
                 Inputs& inputs) {
  typename S::F largest = S::zero();
  for (int64_t i = 0; i < count; i += kTile) largest = S::max(largest, S::abs(read(i)));
  const float top = S::largest(largest);
  const bool is_zero = !(top >= kSmallest);
  const typename S::F inverse = S::set(is_zero ? 0.0f : 127.0f / top);
  typename S::I total = S::set_int(0), rest_total = S::set_int(0);
  for (int64_t i = 0; i < count; i += kTile) {
    const typename S::F steps = S::mul(read(i), inverse);
    const typename S::I rounded = S::round(steps);
    total = S::add_int(total, rounded);
    S::store_int8(inputs.q + start + i, rounded);
    if (!with_rest) continue;
    const typename S::F left = S::sub(steps, S::to_float(rounded));
    const typename S::I rest = S::round(S::mul(left, S::set(kRestParts)));
    rest_total = S::add_int(rest_total, rest);
    S::store_int8(inputs.rest + start + i, rest);
  }
  inputs.step[group] = is_zero ? 0.0f : top / 127.0f;
  inputs.sum[group] = S::sum_int(total);
  if (with_rest) inputs.rest_sum[group] = S::sum_int(rest_total);
}

// Fills what a matrix of that format wants of x [columns], which is padded to 16 with zeros.
template <class S>
void prepare(const CiMatrix& matrix, const float* x, Inputs& inputs) {
  inputs.x = x;
  if (matrix.dtype == CI_BFLOAT16) return;
  const int64_t size = matrix.group_size;
  for (int64_t group = 0; group < matrix.columns / size; ++group) {
    const float* from = x + group * size;
    round_group<S>([=](int64_t i) { return S::load(from + i); }, group * size, size, group,
                   has_rest(matrix.dtype), inputs);
  }
}

}  // namespace
