// The exported functions that depend on the instruction set, handed on to its table.
#include "paths.h"

namespace {

const coreinfer::Kernels& kernels(int path) {
#ifdef COREINFER_X86
  if (path == CI_AVX512) return coreinfer::kAvx512Kernels;
  if (path == CI_AVX2) return coreinfer::kAvx2Kernels;
#endif
  static_cast<void>(path);
  return coreinfer::kPortableKernels;
}

}  // namespace

int ci_abi_version(void) { return CI_ABI_VERSION; }

int ci_supports(int path) {
#ifdef COREINFER_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (path == CI_AVX2) return avx2;
  if (path == CI_AVX512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
#endif
  return path == CI_PORTABLE;
}

void ci_dequantize(int path, int threads, const uint8_t* records, int64_t stride,
                   const int32_t* index, int64_t rows, int64_t columns, int32_t dtype,
                   int32_t group_size, int32_t out_dtype, void* out) {
  kernels(path).dequantize(path, threads, records, stride, index, rows, columns, dtype, group_size,
                           out_dtype, out);
}

void ci_fit_four_bits(int path, int threads, const float* weights, int64_t groups, int32_t size,
                      float* scales, float* minima) {
  kernels(path).fit_four_bits(path, threads, weights, groups, size, scales, minima);
}

void ci_statistics(int path, int threads, const float* h, int64_t stride, int64_t tokens,
                   int64_t neurons, const int64_t* tops, double* square_sum, double* unit_square_sum,
                   double* positive_sum, int64_t* counts) {
  kernels(path).statistics(path, threads, h, stride, tokens, neurons, tops, square_sum,
                           unit_square_sum, positive_sum, counts);
}

void ci_linear(int path, int threads, const CiMatrix* matrix, const float* x, int32_t batch,
               float* y) {
  kernels(path).linear(path, threads, matrix, x, batch, y);
}

void ci_mlp(int path, int threads, const CiMlp* mlp, int32_t activation, const float* x,
            int32_t batch, float* y) {
  kernels(path).mlp(path, threads, mlp, activation, x, batch, y);
}

void ci_decode(int path, int threads, const CiModel* model, const CiRow* rows, int32_t batch,
               float* logits) {
  kernels(path).decode(path, threads, model, rows, batch, logits);
}
