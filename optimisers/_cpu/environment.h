/* The floating-point environment of a thread: how it rounds, and whether it takes numbers near zero
   (subnormal ones) for zero, as code built with -ffast-math and `torch.set_flush_denormal` have it.

   Each thread has its own, so that one job by several threads would follow several. Whoever computes
   enters the usual one, to nearest and with subnormal numbers, and puts the other back. */

#ifndef OPTIMISERS_ENVIRONMENT_H
#define OPTIMISERS_ENVIRONMENT_H

#if defined(__x86_64__) || defined(_M_X64)

#include <xmmintrin.h>

/* The register of SSE; above it, that of the older unit, in which `long double` is computed. */
typedef unsigned float_environment;

enum {
    ENVIRONMENT_FLAGS = 0x3f,       /* what happened so far, such as an overflow */
    ENVIRONMENT_USUAL = 0x1f80,     /* nothing traps, flushes, or rounds elsewhere */
    ENVIRONMENT_OLD_USUAL = 0x37f   /* nor here, where all digits are kept */
};

#if defined(__GNUC__)

static inline unsigned environment_old(void) {
    unsigned short now;
    __asm__ __volatile__("fnstcw %0" : "=m"(now));
    return now;
}

static inline void environment_set_old(unsigned to) {
    unsigned short word = (unsigned short) to;
    __asm__ __volatile__("fldcw %0" : : "m"(word) : "memory");
}

#else                               /* where `long double` is double */

static inline unsigned environment_old(void) { return ENVIRONMENT_OLD_USUAL; }
static inline void environment_set_old(unsigned to) { (void) to; }

#endif

static inline float_environment environment_enter(void) {
    unsigned before = _mm_getcsr(), old = environment_old();
    if ((before & ~(unsigned) ENVIRONMENT_FLAGS) != ENVIRONMENT_USUAL)
        _mm_setcsr(ENVIRONMENT_USUAL);
    if (old != ENVIRONMENT_OLD_USUAL)
        environment_set_old(ENVIRONMENT_OLD_USUAL);
    return (before & 0xffff) | old << 16;
}

static inline void environment_leave(float_environment before) {
    if ((_mm_getcsr() ^ before) & 0xffff & ~(unsigned) ENVIRONMENT_FLAGS)
        _mm_setcsr(before & 0xffff);
    if (environment_old() != before >> 16)
        environment_set_old(before >> 16);
}

#elif defined(__aarch64__) && defined(__GNUC__)

#include <stdint.h>

typedef uint64_t float_environment;

static inline uint64_t environment_now(void) {
    uint64_t now;
    __asm__ __volatile__("mrs %0, fpcr" : "=r"(now));
    return now;
}

static inline void environment_set(uint64_t to) {
    __asm__ __volatile__("msr fpcr, %0" : : "r"(to) : "memory");
}

static inline float_environment environment_enter(void) {
    uint64_t before = environment_now();
    if (before)
        environment_set(0);
    return before;
}

static inline void environment_leave(float_environment before) {
    if (environment_now() != before)
        environment_set(before);
}

#else

#include <fenv.h>

typedef fenv_t float_environment;

static inline float_environment environment_enter(void) {
    fenv_t before;
    fegetenv(&before);
    fesetenv(FE_DFL_ENV);
    return before;
}

static inline void environment_leave(float_environment before) {
    fesetenv(&before);
}

#endif

#endif
