/* The floating-point environment of a thread: how it rounds, and whether it takes numbers near zero
   (subnormal ones) for zero, as code built with -ffast-math and `torch.set_flush_denormal` have it.

   Each thread has its own, so that one job by several threads would follow several. Whoever computes
   enters the usual one, to nearest and with subnormal numbers, and puts the other back. */

#ifndef OPTIMISERS_ENVIRONMENT_H
#define OPTIMISERS_ENVIRONMENT_H

#if defined(__x86_64__) || defined(_M_X64)

#include <xmmintrin.h>

typedef unsigned float_environment;

enum {
    ENVIRONMENT_FLAGS = 0x3f,       /* what happened so far, such as an overflow */
    ENVIRONMENT_USUAL = 0x1f80      /* nothing traps, flushes, or rounds elsewhere */
};

static inline float_environment environment_enter(void) {
    unsigned before = _mm_getcsr();
    if ((before & ~(unsigned) ENVIRONMENT_FLAGS) != ENVIRONMENT_USUAL)
        _mm_setcsr(ENVIRONMENT_USUAL);
    return before;
}

static inline void environment_leave(float_environment before) {
    if ((_mm_getcsr() ^ before) & ~(unsigned) ENVIRONMENT_FLAGS)
        _mm_setcsr(before);
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
