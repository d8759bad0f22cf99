// One table of functions for each instruction set, all compiled from the same templates.
#pragma once

#include "coreinfer_kernels.h"

namespace coreinfer {

struct Kernels {
  decltype(&ci_dequantize) dequantize;
  decltype(&ci_fit_four_bits) fit_four_bits;
  decltype(&ci_statistics) statistics;
  decltype(&ci_linear) linear;
  decltype(&ci_mlp) mlp;
  decltype(&ci_decode) decode;
};

extern const Kernels kPortableKernels;
#ifdef COREINFER_X86
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace coreinfer
