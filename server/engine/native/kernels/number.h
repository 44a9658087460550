// Number is the type of a kernel's tensors: float, or bfloat16 with -DBFLOAT16. Sums are always
// float.

#pragma once

#include <cstdint>

namespace {

#if defined(BFLOAT16)
struct Number {
  uint16_t bits;  // The upper half of a float's.

  Number() = default;
  // Rounds to nearest, ties to even.
  Number(float value) {
    const uint32_t whole = __builtin_bit_cast(uint32_t, value);
    bits = uint16_t((whole + 0x7fff + (whole >> 16 & 1)) >> 16);
  }
  operator float() const { return __builtin_bit_cast(float, uint32_t(bits) << 16); }
};
#else
typedef float Number;
#endif

// The nearest value that a Number can hold.
inline float rounded(float value) { return Number(value); }

}  // namespace
