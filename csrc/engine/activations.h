// Inputs of a product: float32, or rounded to eight bits in groups.
#pragma once

#include "numbers.h"

namespace {

// A row's inputs, in one worker's memory.
struct Inputs {
  const float* x;    // for bfloat16 weights
  int8_t* q;         // for int8 and int4: x ~ q * step
  float* step;       // [groups]
  int32_t* sum;      // [groups]: of q
};

// The inputs of up to eight rows that share a weight matrix.
struct Batch {
  Inputs rows[CI_MAX_ROWS];
  int count;
};

constexpr float kSmallest = 1e-30f;  // below it a group counts as zero

// Rounds `count` numbers (a multiple of 16) that `read` gives 16 at a time, to 127ths of the largest.
template <class S, class Read>
void round_group(const Read& read, int64_t count, int8_t* q, float* step, int32_t* sum) {
  typename S::F largest = S::zero();
  for (int64_t i = 0; i < count; i += kTile) largest = S::max(largest, S::abs(read(i)));
  const float top = S::largest(largest);
  const bool is_zero = !(top >= kSmallest);
  const typename S::F inverse = S::set(is_zero ? 0.0f : 127.0f / top);
  typename S::I total = S::set_int(0);
  for (int64_t i = 0; i < count; i += kTile) {
    const typename S::I rounded = S::round(S::mul(read(i), inverse));
    total = S::add_int(total, rounded);
    S::store_int8(q + i, rounded);
  }
  *step = is_zero ? 0.0f : top / 127.0f;
  *sum = S::sum_int(total);
}

// Fills what a matrix of that format wants of x [columns], which is padded to 16 with zeros.
template <class S>
void prepare(const CiMatrix& matrix, const float* x, Inputs& inputs) {
  inputs.x = x;
  if (matrix.dtype == CI_BFLOAT16) return;
  const int64_t size = matrix.group_size;
  for (int64_t group = 0; group < matrix.columns / size; ++group) {
    const float* from = x + group * size;
    round_group<S>([=](int64_t i) { return S::load(from + i); }, size, inputs.q + group * size,
                   inputs.step + group, inputs.sum + group);
  }
}

}  // namespace
