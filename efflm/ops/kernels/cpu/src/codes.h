// How the codes of quantized weights lie in memory, 2, 3, 4 or 8 bits each, and how they are read.
//
// A panel holds 32 outputs. Its inputs come in steps, and of a step there is a word of 4 bytes for every output. Byte i
// of a word holds code + 2^(bits - 1) of the inputs i, i + 4, ... of the step, the first in the lowest bits:
//   8 bits: 4 inputs in a step; 4 bits: 8; 2 bits: 16;
//   3 bits: 16. The words hold the lower two bits of each code, in the order of the inputs i, i + 8, i + 4, i + 12.
//   Behind them are 16 words with the upper bits, word n those of the outputs n (h = 0) and n + 16 (h = 1): the one of
//   input i + 8 v + 4 f is bit 2 h + v + 4 f of byte i. One shift and one selection of bits then make two codes, four
//   bits apart, of each byte of a word.
#pragma once

#include "simd.h"

namespace efflm {
namespace {

constexpr int kPanel = 32;                 // outputs that lie side by side in a quantized weight
constexpr int kVectors = kPanel / kWidth;  // of one panel

// One step of the codes of a vector of outputs.
template <int Bits>
struct Codes {
  static constexpr int kWords = Bits == 3 ? 2 : 1;         // as which a step is read
  static constexpr int kField = Bits == 3 ? 4 : Bits;      // from a code to the next of the same byte, in bits
  static constexpr int kFours = kWords * 8 / kField;       // groups of four inputs, of which each byte has one
  static constexpr int kInputs = 4 * kFours;               // of a step
  static constexpr int kBytes = kInputs * kPanel * Bits / 8;  // of a step of the whole panel
  static constexpr int kHalf = 1 << (Bits - 1);            // what is added to a code

  Words words[kWords];  // of 3 bits, what is between two codes is any

  // From a step of a panel, for its vector `c`.
  EFFLM_INLINE Codes(const uint8_t* step, int c) {
    const Words lower = load<Words>(step + c * 4 * kWidth);
    if constexpr (Bits == 3) {
      constexpr uint32_t kLower = 0x33333333;
      constexpr int kHalfOfPanel = kVectors / 2;
      const Words upper = load<Words>(step + (kVectors + c % kHalfOfPanel) * 4 * kWidth);
      for (int v = 0; v < 2; ++v) {
        const int bit = 2 * (c / kHalfOfPanel) + v;
        const Words moved = bit < 2 ? upper << (2 - bit) : upper >> (bit - 2);
        words[v] = (lower >> 2 * v & kLower) | (moved & ~kLower);
      }
    } else {
      words[0] = lower;
    }
  }

  // Code + kHalf of the inputs 4 i to 4 i + 3, in the bytes of a word.
  EFFLM_INLINE Ints four(int i) const {
    constexpr uint32_t kMask = 0x01010101u * ((1 << Bits) - 1);
    return (Ints)(words[i / (8 / kField)] >> i % (8 / kField) * kField & kMask);
  }

  // The codes of input j as floats.
  EFFLM_INLINE Floats one(int j) const {
    const Words word = words[j / 4 / (8 / kField)];
    const int bit = 8 * (j % 4) + j / 4 % (8 / kField) * kField;
#if defined(__AVX512F__) || defined(__AVX2__)
    if constexpr (1 << Bits <= kWidth) {  // an entry is chosen by as many of the lowest bits as number the table
      Floats table;
      for (int i = 0; i < kWidth; ++i) table[i] = i % (2 * kHalf) - kHalf;
#if defined(__AVX512F__)
      return (Floats)_mm512_permutexvar_ps((__m512i)(word >> bit), (__m512)table);
#else
      return (Floats)_mm256_permutevar8x32_ps((__m256)table, (__m256i)(word >> bit));
#endif
    }
#endif
    constexpr uint32_t kSigns = 0x01010101u * kHalf * (kField == 8 ? 1 : kField == 4 ? 0x11 : 0x55);
    return to_floats((Ints)((word ^ kSigns) << (32 - Bits - bit)) >> (32 - Bits));  // two's complement
  }
};

}  // namespace
}  // namespace efflm
