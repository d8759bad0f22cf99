// A whole decode step in one parallel region; kernels/decode_twin.py says what it computes.
#pragma once

#include "attention.h"
#include "mlp.h"
#include "step_memory.h"

namespace {

// Rows that read the same neurons, and so read them once.
struct Sharers {
  int rows[CI_MAX_ROWS];
  int count;
};

template <class S>
class Step {
 public:
  Step(const CiModel& model, const CiRow* rows, int count, float* logits)
      : model_(model), rows_(rows), count_(count), logits_(logits) {
    Carver shared(nullptr), own(nullptr);
    StepMemory(shared, model, rows, count);
    WorkerMemory(own, model, rows, count);
    shared_bytes_ = shared.used();
    worker_bytes_ = own.used();
  }

  int64_t scratch_bytes(int threads) const { return shared_bytes_ + threads * worker_bytes_; }

  void run(const Worker& worker) const {
    Carver shared(worker.scratch), own(worker.scratch + shared_bytes_ + worker.index * worker_bytes_);
    const StepMemory memory(shared, model_, rows_, count_);
    const WorkerMemory mine(own, model_, rows_, count_);
    embed(worker, memory);
    angles(mine);
    worker.wait();
    for (int i = 0; i < model_.num_layers; ++i) {
      const CiLayer& layer = model_.layers[i];
      const Batch attention_in = normed(memory, mine, layer.norm1_weight, layer.norm1_bias, layer.qkv);
      store(worker, layer.qkv, attention_in, layer.qkv_bias, memory.qkv);
      worker.wait();
      keep(worker, layer, i, memory, mine);
      worker.wait();
      look(worker, layer, i, memory, mine);
      worker.wait();
      product<S>(worker, layer.o, from(memory.seen, mine, layer.o),
                 [&](int64_t t, const float* y) { add(t, y, layer.o_bias, memory); });
      worker.wait();
      think(worker, layer, i, memory, mine);
      worker.wait();
      answer(worker, layer, i, memory, mine);
      worker.wait();
    }
    const Batch last = normed(memory, mine, model_.final_weight, model_.final_bias, model_.head);
    product<S>(worker, model_.head, last, [&](int64_t t, const float* y) {
      const int64_t left = model_.head.rows - kTile * t, size = left < kTile ? left : kTile;
      for (int b = 0; b < count_; ++b)
        std::memcpy(logits_ + b * model_.head.rows + kTile * t, y + kTile * b,
                    static_cast<size_t>(size) * sizeof(float));
    });
  }

 private:
  // Each worker fills its columns of x.
  void embed(const Worker& worker, const StepMemory& memory) const {
    const Range tiles = share(worker, pad(model_.hidden_size) / kTile);
    for (int b = 0; b < count_; ++b) {
      float* x = memory.x[b];
      for (int64_t i = tiles.begin * kTile; i < tiles.end * kTile; ++i) {
        if (i >= model_.hidden_size) {
          x[i] = 0.0f;
          continue;
        }
        const int64_t at = rows_[b].token * model_.hidden_size + i;
        x[i] = model_.embed == nullptr ? head_weight(rows_[b].token, i) : from_bfloat16(model_.embed[at]);
        if (model_.position != nullptr)
          x[i] += model_.position[rows_[b].position * model_.hidden_size + i];
      }
    }
  }

  // One weight of the packed head.
  float head_weight(int64_t row, int64_t column) const {
    const CiMatrix& head = model_.head;
    const uint8_t* tile = head.data + row / kTile * tile_bytes(head);
    const int64_t lane = row % kTile;
    if (head.dtype == CI_BFLOAT16) {
      uint16_t weight;
      std::memcpy(&weight, tile + 64 * (column / 2) + 4 * lane + 2 * (column % 2), 2);
      return from_bfloat16(weight);
    }
    const int64_t group = column / head.group_size;
    const auto* halves = reinterpret_cast<const uint16_t*>(tile + word_bytes(head.dtype, head.columns));
    const uint16_t* scales = halves + group * kTile * scales_per_group(head.dtype);
    float scale[kTile], minimum[kTile] = {};
    S::store(scale, S::load_half(scales));
    if (head.dtype == CI_INT8) {
      const int q = tile[64 * (column / 4) + 4 * lane + column % 4] - 128;
      return static_cast<float>(q) * scale[lane];
    }
    S::store(minimum, S::load_half(scales + kTile));
    const int two = tile[64 * (column / 8) + 4 * lane + column % 4];
    return static_cast<float>(two >> (column % 8 / 4 * 4) & 15) * scale[lane] + minimum[lane];
  }

  void angles(const WorkerMemory& mine) const {
    if (model_.inverse_frequencies == nullptr) return;
    for (int b = 0; b < count_; ++b)
      for (int i = 0; i < model_.head_dim / 2; ++i) {
        const float angle = model_.inverse_frequencies[i] * static_cast<float>(rows_[b].position);
        mine.cosine[b][i] = std::cos(angle) * model_.rope_factor;
        mine.sine[b][i] = std::sin(angle) * model_.rope_factor;
      }
  }

  // The rows' vectors as inputs of a matrix. Every worker makes its own: cheaper than to wait.
  Batch from(float* const* x, const WorkerMemory& mine, const CiMatrix& matrix) const {
    Batch batch;
    batch.count = count_;
    for (int b = 0; b < count_; ++b) {
      batch.rows[b] = mine.inputs.inputs(b);
      prepare<S>(matrix, x[b], batch.rows[b]);
    }
    return batch;
  }

  // One row's input of a stand-in, in memory that no other product of this worker needs any more.
  Batch single(const CiMatrix& matrix, const float* x, const WorkerMemory& mine) const {
    Batch batch;
    batch.count = 1;
    batch.rows[0] = mine.inputs.inputs(0);
    prepare<S>(matrix, x, batch.rows[0]);
    return batch;
  }

  Batch normed(const StepMemory& memory, const WorkerMemory& mine, const float* weight,
               const float* bias, const CiMatrix& matrix) const {
    for (int b = 0; b < count_; ++b)
      normalize<S>(memory.x[b], model_.hidden_size, weight, bias, model_.layer_norm != 0,
                   model_.norm_eps, mine.inputs.x[b]);
    return from(mine.inputs.x, mine, matrix);
  }

  void store(const Worker& worker, const CiMatrix& matrix, const Batch& batch, const float* bias,
             float* const* out) const {
    product<S>(worker, matrix, batch, [&](int64_t t, const float* y) {
      for (int b = 0; b < count_; ++b) {
        typename S::F value = S::load(y + kTile * b);
        if (bias != nullptr) value = S::add(value, S::load(bias + kTile * t));
        S::store(out[b] + kTile * t, value);
      }
    });
  }

  // x += y + bias, for one tile.
  void add(int64_t t, const float* y, const float* bias, const StepMemory& memory) const {
    for (int b = 0; b < count_; ++b) {
      typename S::F value = S::load(y + kTile * b);
      if (bias != nullptr) value = S::add(value, S::load(bias + kTile * t));
      float* x = memory.x[b] + kTile * t;
      S::store(x, S::add(S::load(x), value));
    }
  }

  template <class Cache>
  typename Cache::T* at(void* part, const CiRow& row, int layer, int64_t head, int64_t token) const {
    return static_cast<typename Cache::T*>(part) + layer * row.layer_stride + head * row.head_stride +
           token * row.token_stride;
  }

  // Norm and rotation of queries and keys; keys and values go to the caches.
  void keep(const Worker& worker, const CiLayer& layer, int index, const StepMemory& memory,
            const WorkerMemory& mine) const {
    const int64_t size = model_.head_dim, queries = model_.num_heads, keys = model_.num_kv_heads;
    const int64_t heads = queries + 2 * keys;
    const Range tasks = share(worker, count_ * heads);
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const int64_t b = task / heads, head = task % heads;
      const CiRow& row = rows_[b];
      float* vector = memory.qkv[b] + head * size;
      if (head < queries + keys) {
        const float* weight = head < queries ? layer.q_norm : layer.k_norm;
        if (weight != nullptr) normalize_head(vector, size, weight, model_.norm_eps);
        if (layer.rope && model_.inverse_frequencies != nullptr)
          rotate(vector, size, mine.cosine[b], mine.sine[b]);
      }
      if (head < queries) continue;
      const bool is_key = head < queries + keys;
      const int64_t place = head - queries - (is_key ? 0 : keys);
      void* part = is_key ? row.keys : row.values;
      if (row.cache_bfloat16)
        write<Bfloat16Cache<S>>(vector, at<Bfloat16Cache<S>>(part, row, index, place, row.length));
      else
        write<Float32Cache<S>>(vector, at<Float32Cache<S>>(part, row, index, place, row.length));
    }
  }

  template <class Cache>
  void write(const float* vector, typename Cache::T* to) const {
    for (int i = 0; i < model_.head_dim; ++i) Cache::put(to + i, vector[i]);
  }

  void look(const Worker& worker, const CiLayer& layer, int index, const StepMemory& memory,
            const WorkerMemory& mine) const {
    const Range tasks = share(worker, static_cast<int64_t>(count_) * model_.num_heads);
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const int64_t b = task / model_.num_heads, head = task % model_.num_heads;
      if (rows_[b].cache_bfloat16)
        look_at<Bfloat16Cache<S>>(layer, index, b, head, memory, mine);
      else
        look_at<Float32Cache<S>>(layer, index, b, head, memory, mine);
    }
  }

  template <class Cache>
  void look_at(const CiLayer& layer, int index, int64_t b, int64_t head, const StepMemory& memory,
               const WorkerMemory& mine) const {
    const CiRow& row = rows_[b];
    const int64_t end = row.length + 1;
    const int64_t start = layer.window > 0 && end > layer.window ? end - layer.window : 0;
    const int64_t place = head / (model_.num_heads / model_.num_kv_heads);
    const Tokens<typename Cache::T> seen = {at<Cache>(row.keys, row, index, place, start),
                                            at<Cache>(row.values, row, index, place, start),
                                            row.token_stride, end - start};
    const float scale = 1.0f / std::sqrt(static_cast<float>(model_.head_dim));
    attend<S, Cache>(memory.qkv[b] + head * model_.head_dim, seen, model_.head_dim, scale, mine.scores,
                     memory.seen[b] + head * model_.head_dim);
  }

  // Rows b.. that read the same neurons as row b; none if an earlier row does too.
  Sharers sharers(int layer, int b) const {
    Sharers found;
    found.count = 0;
    const CiMlp& mlp = rows_[b].mlps[layer];
    for (int other = 0; other < count_; ++other) {
      const CiMlp& its = rows_[other].mlps[layer];
      if (its.into.data != mlp.into.data || its.least != mlp.least) continue;
      if (other < b) return {{}, 0};
      found.rows[found.count++] = other;
    }
    return found;
  }

  // The MLP's first half, and the stand-ins'.
  void think(const Worker& worker, const CiLayer& layer, int index, const StepMemory& memory,
             const WorkerMemory& mine) const {
    const Batch all = normed(memory, mine, layer.norm2_weight, layer.norm2_bias,
                             rows_[0].mlps[index].into);
    for (int b = 0; b < count_; ++b) {
      const Sharers same = sharers(index, b);
      if (same.count == 0) continue;
      Batch batch;
      batch.count = same.count;
      float* h[CI_MAX_ROWS];
      for (int i = 0; i < same.count; ++i) {
        batch.rows[i] = all.rows[same.rows[i]];
        h[i] = memory.h[same.rows[i]];
      }
      int64_t skipped[CI_MAX_ROWS] = {};
      neurons<S>(worker, rows_[b].mlps[index], model_.activation, batch, mine.numbers, h, skipped);
      for (int i = 0; i < same.count; ++i) count(rows_[same.rows[i]].skipped, skipped[i]);
    }
    for (int b = 0; b < count_; ++b) {
      const CiMatrix& right = rows_[b].stand_ins[index].right;
      if (right.data == nullptr) continue;
      product<S>(worker, right, single(right, mine.inputs.x[b], mine), [&](int64_t t, const float* y) {
        std::memcpy(memory.z[b] + kTile * t, y, kTile * sizeof(float));
      });
    }
  }

  // Workers add to the same number.
  static void count(int64_t* total, int64_t more) {
    if (total != nullptr && more != 0) __atomic_fetch_add(total, more, __ATOMIC_RELAXED);
  }

  // The second half; every worker adds its columns to x.
  void answer(const Worker& worker, const CiLayer& layer, int index, const StepMemory& memory,
              const WorkerMemory& mine) const {
    for (int b = 0; b < count_; ++b) {
      const Sharers same = sharers(index, b);
      if (same.count == 0) continue;
      const CiMlp& mlp = rows_[b].mlps[index];
      float* h[CI_MAX_ROWS];
      float* x[CI_MAX_ROWS];
      for (int i = 0; i < same.count; ++i) {
        h[i] = memory.h[same.rows[i]];
        x[i] = memory.x[same.rows[i]];
      }
      const auto emit = [&](int64_t t, const float* y) {
        for (int i = 0; i < same.count; ++i) {
          typename S::F value = S::load(y + kTile * i);
          if (layer.mlp_out_bias != nullptr)
            value = S::add(value, S::load(layer.mlp_out_bias + kTile * t));
          S::store(x[i] + kTile * t, S::add(S::load(x[i] + kTile * t), value));
        }
      };
      if (!mlp.by_neuron) {
        down_by_tile<S>(worker, mlp.down, same.count, h, mine.inputs, emit);
        continue;
      }
      down_by_neuron<S>(worker, mlp.down, same.count, h, mine.numbers, mine.y);
      const Range tiles = share(worker, pad(model_.hidden_size) / kTile);
      alignas(64) float y[CI_MAX_ROWS * kTile];
      for (int64_t t = tiles.begin; t < tiles.end; ++t) {
        for (int i = 0; i < same.count; ++i)
          std::memcpy(y + kTile * i, mine.y[i] + kTile * t, kTile * sizeof(float));
        emit(t, y);
      }
    }
    for (int b = 0; b < count_; ++b)
      stand_in(worker, rows_[b].stand_ins[index], memory.z[b], mine, memory.x[b]);
  }

  void stand_in(const Worker& worker, const CiStandIn& part, const float* z, const WorkerMemory& mine,
                float* x) const {
    const Range tiles = share(worker, pad(model_.hidden_size) / kTile);
    if (part.offset != nullptr)
      for (int64_t t = tiles.begin; t < tiles.end; ++t)
        S::store(x + kTile * t, S::add(S::load(x + kTile * t), S::load(part.offset + kTile * t)));
    if (part.left.data == nullptr) return;
    product<S>(worker, part.left, single(part.left, z, mine), [&](int64_t t, const float* y) {
      S::store(x + kTile * t, S::add(S::load(x + kTile * t), S::load(y)));
    });
  }

  const CiModel& model_;
  const CiRow* rows_;
  int count_;
  float* logits_;
  int64_t shared_bytes_;
  int64_t worker_bytes_;
};

}  // namespace
