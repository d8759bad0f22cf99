// The C interface of the kernels: plain structures and pointers, mirrored in kernels/abi.py.
//
// Nothing here allocates for the caller, throws or keeps a pointer after the call. Layouts are those
// of kernels/formats.py and kernels/layout.py; results are those of the torch twins.
#pragma once

#include <stdint.h>

#if defined(__GNUC__)
#define CI_EXPORT __attribute__((visibility("default")))
#else
#define CI_EXPORT
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Changes whenever a structure or a function does: the loader compares it.
#define CI_ABI_VERSION 5

enum CiPath { CI_PORTABLE = 0, CI_AVX2 = 1, CI_AVX512 = 2 };
enum CiDtype { CI_BFLOAT16 = 0, CI_INT8 = 1, CI_INT4 = 2, CI_FLOAT32 = 3, CI_FLOAT16 = 4 };
enum CiActivation { CI_SILU = 0, CI_RELU = 1, CI_GELU = 2, CI_GELU_TANH = 3 };

// A weight matrix [rows, columns] as packed by ci_pack_rows or ci_pack_down (rows = outputs).
typedef struct {
  const uint8_t* data;
  int64_t rows;
  int64_t columns;
  int32_t dtype;
  int32_t group_size;
} CiMatrix;

typedef struct {
  CiMatrix into;  // [2 * K16, d], tiles of gate and up alternating, or [K16, d]
  CiMatrix up;    // gated and by neuron: [d, K], a record a neuron; else null, up is in `into`
  CiMatrix down;  // [d, K]
  const float* in_bias;  // [K16] or null
  const float* least;    // [K16] or null; by neuron: activations (gates') below it count as zero
  int32_t gated;
  int32_t by_neuron;  // the down projection is a record a neuron; zeros are skipped
} CiMlp;

// y += offset + left (right x); left.data is null where it is constant, offset where there is none.
typedef struct {
  const float* offset;
  CiMatrix left;
  CiMatrix right;
} CiStandIn;

// Vectors of floats are padded with zeros to a multiple of 16; any of the optional ones is null.
typedef struct {
  CiMatrix qkv;
  CiMatrix o;
  const float* norm1_weight;
  const float* norm1_bias;
  const float* norm2_weight;
  const float* norm2_bias;
  const float* qkv_bias;
  const float* o_bias;
  const float* mlp_out_bias;
  const float* q_norm;
  const float* k_norm;
  int32_t rope;
  int32_t window;  // 0: all keys
} CiLayer;

typedef struct {
  const CiLayer* layers;
  CiMatrix head;
  const uint16_t* embed;  // bfloat16 [vocab, d]; null: rows of the head
  const float* position;  // [positions, d] or null
  const float* inverse_frequencies;  // [head_dim / 2] or null
  const float* final_weight;
  const float* final_bias;
  int64_t hidden_size;
  int32_t num_layers;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t activation;
  int32_t layer_norm;
  float norm_eps;
  float rope_factor;
} CiModel;

// One token of one sequence. Strides are in elements.
typedef struct {
  int64_t token;
  int64_t position;
  int64_t length;  // tokens in the cache before this one
  const CiMlp* mlps;  // [layers]
  const CiStandIn* stand_ins;  // [layers]
  void* keys;
  void* values;
  int64_t layer_stride;
  int64_t head_stride;
  int64_t token_stride;
  int64_t* skipped;  // or null; the zeros among the neurons of MLPs with `least` are added to it
  int32_t cache_bfloat16;  // else float32
} CiRow;

enum { CI_MAX_ROWS = 8, CI_MAX_GROUP = 256 };

CI_EXPORT int ci_abi_version(void);

// Whether this build and this processor can run a CiPath.
CI_EXPORT int ci_supports(int path);

// Regions run on the threads of an OpenMP runtime from now on: its GOMP_parallel, omp_get_thread_num
// and omp_get_num_threads. Without this call, on threads of this library.
CI_EXPORT void ci_use_openmp(void* parallel, void* thread_num, void* num_threads);

// Tiles of records: `parts` records of `columns` weights lie part_stride apart in a source row.
CI_EXPORT void ci_pack_rows(int threads, const uint8_t* records, int64_t stride, int64_t part_stride,
                  int32_t parts, const int32_t* index, int64_t rows, int64_t columns, int32_t dtype,
                  int32_t group_size, uint8_t* out);

// A down projection [outputs, neurons] of records that are a column of it each.
CI_EXPORT void ci_pack_down(int threads, const uint8_t* records, int64_t stride, const int32_t* index,
                  int64_t neurons, int64_t outputs, int32_t dtype, int32_t group_size,
                  int32_t by_neuron, uint8_t* out);

// Records -> [rows, columns] of out_dtype (CI_FLOAT32, CI_FLOAT16 or CI_BFLOAT16).
CI_EXPORT void ci_dequantize(int path, int threads, const uint8_t* records, int64_t stride,
                   const int32_t* index, int64_t rows, int64_t columns, int32_t dtype,
                   int32_t group_size, int32_t out_dtype, void* out);

// Float16 scales and minima, as floats, that fit groups of `size` weights in four bits.
CI_EXPORT void ci_fit_four_bits(int path, int threads, const float* weights, int64_t groups,
                      int32_t size, float* scales, float* minima);

// Adds, for each neuron and over the rows h [tokens, neurons] that lie `stride` floats apart: h^2,
// h^2 / |h|^2 and, unless tops [neurons + 1] is null, the positive h and how often it is among the
// tops[p] largest of the p positive ones of its row (equal ones go to the smaller index).
CI_EXPORT void ci_statistics(int path, int threads, const float* h, int64_t stride, int64_t tokens,
                   int64_t neurons, const int64_t* tops, double* square_sum, double* unit_square_sum,
                   double* positive_sum, int64_t* counts);

// y [batch, rows] = x [batch, columns] W^T, batch at most CI_MAX_ROWS.
CI_EXPORT void ci_linear(int path, int threads, const CiMatrix* matrix, const float* x, int32_t batch,
               float* y);

// y [batch, d] of x [batch, d].
CI_EXPORT void ci_mlp(int path, int threads, const CiMlp* mlp, int32_t activation, const float* x,
            int32_t batch, float* y);

// logits [batch, vocab]; writes the rows' keys and values into their caches.
CI_EXPORT void ci_decode(int path, int threads, const CiModel* model, const CiRow* rows, int32_t batch,
               float* logits);

#ifdef __cplusplus
}
#endif
