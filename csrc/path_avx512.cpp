#include "engine/kernels.h"
#include "simd/avx512.h"

namespace coreinfer {

extern const Kernels kAvx512Kernels = kernels_of<Avx512>();

}  // namespace coreinfer
