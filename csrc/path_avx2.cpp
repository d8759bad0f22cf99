#include "engine/kernels.h"
#include "simd/avx2.h"

namespace coreinfer {

extern const Kernels kAvx2Kernels = kernels_of<Avx2>();

}  // namespace coreinfer
