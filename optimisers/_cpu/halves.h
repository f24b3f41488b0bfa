/* Half-width floats, as bits: float16 and bfloat16, made float and back.

   Rounding is to nearest, ties to even, as in NumPy; slots are rounded as `_rule.kept_as` does it.
   The functions for one number have no branches, so that compilers turn loops over them into vector
   instructions. For float16 many processors have instructions of their own, with the same bits: the
   functions for many numbers use these where the compiler may. No two blocks that they are given
   overlap. */

#ifndef OPTIMISERS_HALVES_H
#define OPTIMISERS_HALVES_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__F16C__)
#include <immintrin.h>
#endif
#if defined(_MSC_VER)
#define HALVES_APART __restrict
#define HALVES_BLOCK static __declspec(noinline) void
#else
#define HALVES_APART __restrict__
#define HALVES_BLOCK static __attribute__((noinline)) void
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

/* --- slots: `kept_as` ------------------------------------------------------------------------- */

#define MOST_FLOAT16 0x477fe000     /* the largest finite numbers, as bits of a float */
#define MOST_BFLOAT16 0x7f7f0000

static inline uint32_t size_of(float x) { return bits_of(x) & 0x7fffffffu; }

/* The number of this size at most that is nearest to x. */
static inline float bounded(float x, uint32_t most) {
    uint32_t size = size_of(x), least = size < most ? size : most;
    return float_of((bits_of(x) ^ size) | least);
}

/* The same for finite numbers; others as they are. */
static inline float finite_bounded(float x, uint32_t most) {
    return float_of(size_of(x) < 0x7f800000u ? bits_of(bounded(x, most)) : bits_of(x));
}

/* Eight times a change: if rounding still loses it, it was no more than a sixteenth of a unit. */
static inline float eightfold(float before, float x) { return before + 8.0f * (x - before); }

/* What is added to the nearest number, `before`, where it loses a change: a unit, as x goes. */
static inline uint32_t unit_on(float before, float x, float near, float far) {
    uint32_t step = size_of(x) > size_of(before) ? 1u : 0xffffffffu;
    step = near == before ? step : 0u;
    step = x != before ? step : 0u;
    return far != before ? step : 0u;
}

/* The narrow number that is nearest to a finite one, as bits of a float. */
static inline uint32_t nearest_float16(float x) {
    uint32_t size = size_of(x), normal = (size + 0xfffu + ((size >> 13) & 1u)) & 0xffffe000u;
    uint32_t tiny = bits_of((float_of(size) + 0.5f) - 0.5f);       /* the sum rounds */
    return (bits_of(x) ^ size) | (size < 0x38800000u ? tiny : normal);
}

static inline uint32_t nearest_bfloat16(float x) {
    uint32_t b = bits_of(x);
    return (b + 0x7fffu + ((b >> 16) & 1u)) & 0xffff0000u;
}

static inline uint16_t keep_float16(uint16_t old, float x) {
    float before = widen_float16(old);
    float near = float_of(nearest_float16(bounded(x, MOST_FLOAT16)));
    float far = float_of(nearest_float16(bounded(eightfold(before, x), MOST_FLOAT16)));
    uint16_t kept = narrow_float16(finite_bounded(x, MOST_FLOAT16));
    return (uint16_t) (kept + unit_on(before, x, near, far));
}

static inline uint16_t keep_bfloat16(uint16_t old, float x) {
    float before = widen_bfloat16(old);
    float near = float_of(nearest_bfloat16(bounded(x, MOST_BFLOAT16)));
    float far = float_of(nearest_bfloat16(bounded(eightfold(before, x), MOST_BFLOAT16)));
    uint16_t kept = narrow_bfloat16(finite_bounded(x, MOST_BFLOAT16));
    return (uint16_t) (kept + unit_on(before, x, near, far));
}

#if defined(__F16C__) && defined(__AVX2__)
static inline __m256 size_of8(__m256 x) {
    return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
}

static inline __m256 bounded8(__m256 x) {
    const __m256 most = _mm256_set1_ps(65504.0f), least = _mm256_set1_ps(-65504.0f);
    return _mm256_min_ps(_mm256_max_ps(x, least), most);
}

static inline __m128i keep_float16_8(__m128i old, __m256 x) {
    const __m256 before = _mm256_cvtph_ps(old), inf = _mm256_set1_ps(INFINITY);
    __m256 finite = _mm256_cmp_ps(size_of8(x), inf, _CMP_LT_OQ);
    __m128i near = _mm256_cvtps_ph(_mm256_blendv_ps(x, bounded8(x), finite), 0), far, both;
    __m256 stays = _mm256_cmp_ps(_mm256_cvtph_ps(near), before, _CMP_EQ_OQ), change, grows;
    __m256i step;
    __m256 lost = _mm256_and_ps(stays, _mm256_cmp_ps(x, before, _CMP_NEQ_UQ));
    if (!_mm256_movemask_ps(lost))
        return near;
    change = _mm256_mul_ps(_mm256_set1_ps(8.0f), _mm256_sub_ps(x, before));
    far = _mm256_cvtps_ph(bounded8(_mm256_add_ps(before, change)), 0);
    lost = _mm256_and_ps(lost, _mm256_cmp_ps(_mm256_cvtph_ps(far), before, _CMP_NEQ_UQ));
    grows = _mm256_cmp_ps(size_of8(x), size_of8(before), _CMP_GT_OQ);
    step = _mm256_or_si256(_mm256_set1_epi32(1), _mm256_xor_si256(
        _mm256_castps_si256(grows), _mm256_set1_epi32(-1)));
    step = _mm256_and_si256(step, _mm256_castps_si256(lost));
    both = _mm_packs_epi32(_mm256_castsi256_si128(step), _mm256_extracti128_si256(step, 1));
    return _mm_add_epi16(near, both);
}
#endif

/* --- blocks ----------------------------------------------------------------------------------- */

/* Not inline: the driver, which calls them for few leaves, would be slower for all others. */

HALVES_BLOCK widen_float16s(const uint16_t *from, float *HALVES_APART to, ptrdiff_t n) {
    ptrdiff_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (from + i))));
#endif
    for (; i < n; i++)
        to[i] = widen_float16(from[i]);
}

HALVES_BLOCK widen_bfloat16s(const uint16_t *from, float *HALVES_APART to, ptrdiff_t n) {
    ptrdiff_t i;
    for (i = 0; i < n; i++)
        to[i] = widen_bfloat16(from[i]);
}

HALVES_BLOCK narrow_float16s(const float *HALVES_APART from, uint16_t *to, ptrdiff_t n) {
    ptrdiff_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *) (to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#endif
    for (; i < n; i++)
        to[i] = narrow_float16(from[i]);
}

HALVES_BLOCK narrow_bfloat16s(const float *HALVES_APART from, uint16_t *to, ptrdiff_t n) {
    ptrdiff_t i;
    for (i = 0; i < n; i++)
        to[i] = narrow_bfloat16(from[i]);
}

/* The old numbers lie where the new ones go. */
HALVES_BLOCK keep_float16s(const float *HALVES_APART from, uint16_t *to, ptrdiff_t n) {
    ptrdiff_t i = 0;
#if defined(__F16C__) && defined(__AVX2__)
    for (; i + 8 <= n; i += 8) {
        __m128i *at = (__m128i *) (to + i);
        _mm_storeu_si128(at, keep_float16_8(_mm_loadu_si128(at), _mm256_loadu_ps(from + i)));
    }
#endif
    for (; i < n; i++)
        to[i] = keep_float16(to[i], from[i]);
}

HALVES_BLOCK keep_bfloat16s(const float *HALVES_APART from, uint16_t *to, ptrdiff_t n) {
    ptrdiff_t i;
    for (i = 0; i < n; i++)
        to[i] = keep_bfloat16(to[i], from[i]);
}

#endif
