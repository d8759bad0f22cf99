#include "engine/kernels.h"
#include "simd/portable.h"

namespace coreinfer {

extern const Kernels kPortableKernels = kernels_of<Portable>();

}  // namespace coreinfer
