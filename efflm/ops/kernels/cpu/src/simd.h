// Vectors of the width of the form that is being compiled (see build.py), by the vector extension of GCC and Clang.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace efflm {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));

#define EFFLM_INLINE inline __attribute__((always_inline))

template <typename V, typename T>
EFFLM_INLINE V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <typename V, typename T>
EFFLM_INLINE void store(T* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

// Asks for the memory that a loop reads somewhat later: two cores with no more than what a processor asks for by itself
// read at four fifths of what they can.
constexpr int64_t kReadAhead = 4096;  // bytes
EFFLM_INLINE void ask_for(const void* p) { __builtin_prefetch(p); }

EFFLM_INLINE Floats splat(float x) { return x - Floats{}; }
EFFLM_INLINE Ints splat(int32_t x) { return x - Ints{}; }

EFFLM_INLINE Ints load_ints(const int8_t* p) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepi8_epi32(load<__m128i>(p));
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepi8_epi32(_mm_set1_epi64x(load<int64_t>(p)));
#else
  return Ints{p[0], p[1], p[2], p[3]};
#endif
}
EFFLM_INLINE Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }

EFFLM_INLINE float sum(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX2__)
  __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
  return (v[0] + v[1]) + (v[2] + v[3]);
#endif
}

// e^x to 2 units in the last place, 0 below -87.3; NaN for NaN.
EFFLM_INLINE Floats exponential(Floats x) {
  const Floats bounded = x > 88.3762626f ? splat(88.3762626f) : x;
  // 2^n e^r with n whole and |r| <= log(2) / 2: adding and taking away 1.5 * 2^23 rounds.
  const Floats n = (bounded * 1.44269504f + 12582912.0f) - 12582912.0f;
  const Floats r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Floats e = p * r * r + r + 1.0f;
  const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  const Floats value = e * (Floats)power;
  return x < -87.3365448f ? Floats{} : value;
}

// bfloat16 is the upper half of a float32.
EFFLM_INLINE float from_bfloat16(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

EFFLM_INLINE uint16_t to_bfloat16(float x) {  // to the nearest, ties to even; a NaN stays one
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

EFFLM_INLINE Floats load_floats(const float* p) { return load<Floats>(p); }
EFFLM_INLINE Floats load_floats(const uint16_t* p) {
  const Words wide = __builtin_convertvector(load<Halves>(p), Words) << 16;
  return (Floats)wide;
}

EFFLM_INLINE Floats load_float16(const uint16_t* p) {
  const Halves halves = load<Halves>(p);
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps((__m256i)halves);
#elif defined(__AVX2__)
  return (Floats)_mm256_cvtph_ps((__m128i)halves);
#else
  const Words bits = __builtin_convertvector(halves, Words), size = bits & 0x7fff;
  const Words normal = (size << 13) + (112 << 23), broken = size << 13 | 0x7f800000;  // broken: infinite or NaN
  const Words tiny = (Words)(to_floats((Ints)size) * 0x1p-24f);
  const Words found = size < 0x400 ? tiny : size < 0x7c00 ? normal : broken;
  return (Floats)(found | (bits & 0x8000) << 16);
#endif
}

EFFLM_INLINE float load_float(const float* p) { return *p; }
EFFLM_INLINE float load_float(const uint16_t* p) { return from_bfloat16(*p); }

// What a thread keeps memory for. Each is used by one function, which may call those of the others.
enum class For {
  kRow, kRounded, kPanel,                          // one row of x, and its codes; one panel of a weight
  kX, kScales, kSums,                              // all rows of x as a product reads them
  kParts,                                          // sums of parts of the inputs
  kHidden, kUp,                                    // of a feed-forward part
  kQueries, kTurned, kDecoded,                     // of decode
  kForward, kBackward,                             // of attention
};

// Memory that a thread keeps from call to call, from the start of a cache line on; what it held is lost when it grows.
// Throws std::bad_alloc.
template <typename T, For Use>
T* scratch(int64_t size) {
  struct Block {
    T* data = nullptr;
    int64_t size = 0;
    ~Block() { std::free(data); }
  };
  thread_local Block kept;
  if (!kept.data || kept.size < size) {
    std::free(kept.data);
    kept.data = nullptr;
    void* memory = nullptr;
    const size_t most = SIZE_MAX / sizeof(T);
    if (size < 0 || size_t(size) > most || posix_memalign(&memory, 64, size ? size * sizeof(T) : 1) != 0)
      throw std::bad_alloc();
    kept.data = static_cast<T*>(memory);
    kept.size = size;
  }
  return kept.data;
}

EFFLM_INLINE int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }
EFFLM_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace
}  // namespace efflm
