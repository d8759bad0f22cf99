// Pieces of the scratch memory of a region.
#pragma once

#include <cstdint>

#include "activations.h"

namespace {

// Takes aligned pieces off a block. From a null block it takes nothing and counts bytes, so that the
// same code first measures and then divides.
class Carver {
 public:
  explicit Carver(uint8_t* block) : block_(block) {}

  template <class T>
  T* take(int64_t count) {
    uint8_t* piece = block_ == nullptr ? nullptr : block_ + used_;
    used_ += pad(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(piece);
  }
  int64_t used() const { return used_; }

 private:
  uint8_t* block_;
  int64_t used_ = 0;
};

// What one worker needs to hold the inputs of up to eight rows.
struct InputMemory {
  float* x[CI_MAX_ROWS];
  int8_t* q[CI_MAX_ROWS];
  int8_t* rest[CI_MAX_ROWS];
  float* step[CI_MAX_ROWS];
  int32_t* sum[CI_MAX_ROWS];
  int32_t* rest_sum[CI_MAX_ROWS];

  InputMemory(Carver& carver, int rows, int64_t columns) {
    for (int b = 0; b < rows; ++b) {
      x[b] = carver.take<float>(pad(columns));
      q[b] = carver.take<int8_t>(pad(columns));
      rest[b] = carver.take<int8_t>(pad(columns));
      step[b] = carver.take<float>(pad(columns) / kTile);  // groups are 16 or longer
      sum[b] = carver.take<int32_t>(pad(columns) / kTile);
      rest_sum[b] = carver.take<int32_t>(pad(columns) / kTile);
    }
  }
  Inputs inputs(int b) const { return {x[b], q[b], rest[b], step[b], sum[b], rest_sum[b]}; }
};

}  // namespace
