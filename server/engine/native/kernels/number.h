// What a kernel's tensors hold: float, or bfloat16 where the command line says -DBFLOAT16. Sums are
// float in either case.

#pragma once

#include <cstdint>

namespace {

#if defined(BFLOAT16)
struct Number {
  uint16_t bits;  // The upper half of a float's.

  Number() = default;
  // To the nearest; of two, to the even one.
  Number(float value) {
    const uint32_t whole = __builtin_bit_cast(uint32_t, value);
    bits = uint16_t((whole + 0x7fff + (whole >> 16 & 1)) >> 16);
  }
  operator float() const { return __builtin_bit_cast(float, uint32_t(bits) << 16); }
};
#else
typedef float Number;
#endif

// To what a Number can hold.
inline float rounded(float value) { return Number(value); }

}  // namespace
