/* Half-width floats, as bits: float16 and bfloat16, made float and back.

   Rounding is to nearest, ties to even, as in NumPy. The functions for one number have no branches,
   so that compilers turn loops over them into vector instructions. For float16 many processors have
   instructions of their own, with the same bits: the functions for many numbers use these where the
   compiler may, and return how many numbers they did. */

#ifndef OPTIMISERS_HALVES_H
#define OPTIMISERS_HALVES_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__F16C__)
#include <immintrin.h>
#endif

static inline uint32_t bits_of(float x) { uint32_t b; memcpy(&b, &x, 4); return b; }
static inline float float_of(uint32_t b) { float x; memcpy(&x, &b, 4); return x; }

static inline float widen_bfloat16(uint16_t h) { return float_of((uint32_t) h << 16); }

static inline uint16_t narrow_bfloat16(float x) {
    uint32_t b = bits_of(x), sign = b & 0x80000000u, rest = b ^ sign;
    uint32_t near = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    return (uint16_t) (rest > 0x7f800000u ? (sign >> 16) | 0x7fc0u : near);
}

static inline float widen_float16(uint16_t h) {
    uint32_t sign = (uint32_t) (h & 0x8000u) << 16, rest = (uint32_t) (h & 0x7fffu) << 13;
    uint32_t scaled = bits_of(float_of(rest) * 0x1p112f);       /* subnormals come out right */
    uint32_t quiet = rest > 0x0f800000u ? 0x7fc00000u : 0x7f800000u;
    return float_of(sign | (rest >= 0x0f800000u ? rest | quiet : scaled));
}

static inline uint16_t narrow_float16(float x) {
    uint32_t b = bits_of(x), sign = b & 0x80000000u, rest = b ^ sign;
    uint32_t normal = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
    uint32_t tiny = bits_of(float_of(rest) + 0.5f) - 0x3f000000u;       /* the sum rounds */
    uint32_t near = rest < 0x38800000u ? tiny : normal;
    near = rest >= 0x477ff000u ? 0x7c00u : near;
    near = rest > 0x7f800000u ? 0x7e00u | ((rest >> 13) & 0x1ffu) : near;
    return (uint16_t) ((sign >> 16) | near);
}

static inline ptrdiff_t widen_float16s(const uint16_t *from, float *to, ptrdiff_t n) {
    ptrdiff_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (from + i))));
#endif
    return i;
}

static inline ptrdiff_t narrow_float16s(const float *from, uint16_t *to, ptrdiff_t n) {
    ptrdiff_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *) (to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#endif
    return i;
}

#endif
