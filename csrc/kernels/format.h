// The format of an array whose type is known at run time only.
#pragma once

namespace gpu {

enum class Format : int { kFloat32, kFloat64, kBfloat16, kFloat16 };

}  // namespace gpu
