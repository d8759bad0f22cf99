// What a decode step keeps while it runs: shared by the workers, and each worker's own.
#pragma once

#include "memory.h"
#include "records.h"

namespace {

// Memory that all workers share.
struct StepMemory {
  float* x[CI_MAX_ROWS];     // the residual stream
  float* qkv[CI_MAX_ROWS];
  float* seen[CI_MAX_ROWS];  // what attention gives
  float* h[CI_MAX_ROWS];
  float* z[CI_MAX_ROWS];     // the stand-in's inner vector

  StepMemory(Carver& carver, const CiModel& model, const CiRow* rows, int count);
};

// Memory of one worker.
struct WorkerMemory {
  InputMemory inputs;
  float* y[CI_MAX_ROWS];
  float* cosine[CI_MAX_ROWS];
  float* sine[CI_MAX_ROWS];
  float* scores;
  float* numbers;  // scales and minima of records

  WorkerMemory(Carver& carver, const CiModel& model, const CiRow* rows, int count);
};

inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

inline int64_t most_neurons(const CiModel& model, const CiRow* rows, int count) {
  int64_t most = 0;
  for (int b = 0; b < count; ++b)
    for (int i = 0; i < model.num_layers; ++i) most = larger(most, rows[b].mlps[i].down.columns);
  return most;
}

inline int64_t highest_rank(const CiModel& model, const CiRow* rows, int count) {
  int64_t rank = 0;
  for (int b = 0; b < count; ++b)
    for (int i = 0; i < model.num_layers; ++i) rank = larger(rank, rows[b].stand_ins[i].right.rows);
  return rank;
}

inline StepMemory::StepMemory(Carver& carver, const CiModel& model, const CiRow* rows, int count) {
  const int64_t heads = model.num_heads + 2 * model.num_kv_heads;
  const int64_t neurons = most_neurons(model, rows, count);
  const int64_t rank = highest_rank(model, rows, count);
  for (int b = 0; b < count; ++b) {
    x[b] = carver.take<float>(pad(model.hidden_size));
    qkv[b] = carver.take<float>(pad(heads * model.head_dim));
    seen[b] = carver.take<float>(pad(static_cast<int64_t>(model.num_heads) * model.head_dim));
    h[b] = carver.take<float>(pad(neurons));
    z[b] = carver.take<float>(pad(rank));
  }
}

inline WorkerMemory::WorkerMemory(Carver& carver, const CiModel& model, const CiRow* rows, int count)
    : inputs(carver, count,
             larger(larger(model.hidden_size, static_cast<int64_t>(model.num_heads) * model.head_dim),
                    larger(most_neurons(model, rows, count), highest_rank(model, rows, count)))) {
  int64_t longest = 0;
  for (int b = 0; b < count; ++b) {
    longest = larger(longest, rows[b].length + 1);
    y[b] = carver.take<float>(pad(model.hidden_size));
    cosine[b] = carver.take<float>(model.head_dim);
    sine[b] = carver.take<float>(model.head_dim);
  }
  scores = carver.take<float>(pad(longest));
  numbers = carver.take<float>((kTogether + 1) * pad(pad(model.hidden_size) / kTile));
}

}  // namespace
