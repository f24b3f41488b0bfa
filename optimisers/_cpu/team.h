/* A team of threads that share out the pieces of a job.

   Who hands over the job works too, and waits at the end for no more than the pieces that others
   are at just then. What a member does not come to, because it sleeps or the system has something
   better for its core to do, the others do. So a team costs little where it is of no use: on a busy
   machine a loop that waits for each of its threads, as OpenMP's, can take milliseconds over what
   one thread does in microseconds.

   a) Each member begins with a stretch of the pieces that is its own, the same for jobs alike, so
      that data stays in that core's cache; then it helps with the others' stretches.
   b) A piece is claimed by moving a stretch's cursor: the number of the job, and the next piece.
      A latecomer who still has the last job in mind finds another number there. All cursors are
      closed before the particulars of a new job are written, and opened thereafter, so that a
      claim that succeeds is one on the job whose particulars were read before.
   c) A member without work looks out for the next job for some 50 µs, then sleeps. To wake it takes
      the caller 5 to 50 µs. So it is woken only for a job that is worth that, or if jobs follow
      each other so closely that it will be awake for the next ones.
   d) A member is kept off the caller's core, where it can only be in the way: it leaves, and is
      woken on another. Linux puts it there if the other cores look busy, be it with threads that
      wait, and in a virtual machine also if they are asleep.
   e) There is one team in a process, and one job at a time. A thread that comes meanwhile works
      alone. A child that was forked has a new team.
   f) Members compute in the usual floating-point environment (see environment.h), whatever that of
      the thread was that happened to make them.

   Needs nothing but Python's threads and locks, and atomic operations on 64 bits. */

#ifndef OPTIMISERS_TEAM_H
#define OPTIMISERS_TEAM_H

#include <Python.h>
#include <pythread.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#include "environment.h"

#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
static int64_t team_load(volatile int64_t *at) { return _InterlockedOr64(at, 0); }
static int64_t team_swap(volatile int64_t *at, int64_t to) { return _InterlockedExchange64(at, to); }
static int64_t team_add(volatile int64_t *at, int64_t n) { return _InterlockedExchangeAdd64(at, n); }
static int team_move(volatile int64_t *at, int64_t *from, int64_t to) {
    int64_t found = _InterlockedCompareExchange64(at, to, *from), wanted = *from;
    *from = found;
    return found == wanted;
}
#else
static inline int64_t team_load(volatile int64_t *at) {
    return __atomic_load_n(at, __ATOMIC_SEQ_CST);
}
static inline int64_t team_swap(volatile int64_t *at, int64_t to) {
    return __atomic_exchange_n(at, to, __ATOMIC_SEQ_CST);
}
static inline int64_t team_add(volatile int64_t *at, int64_t n) {
    return __atomic_fetch_add(at, n, __ATOMIC_SEQ_CST);
}
static inline int team_move(volatile int64_t *at, int64_t *from, int64_t to) {
    return __atomic_compare_exchange_n(at, from, to, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}
#endif

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN /* the rest has macros such as `small` */
#define NOMINMAX
#include <windows.h>
#undef far /* empty macros, from the days of 16 bits */
#undef near
#define team_yield() SwitchToThread()
#else
#include <sched.h>
#define team_yield() sched_yield()
#endif

#if defined(__x86_64__) || defined(__i386__)
#define team_pause() __builtin_ia32_pause()
#elif defined(_MSC_VER) && defined(_M_X64)
#define team_pause() _mm_pause()
#elif defined(__aarch64__) && defined(__GNUC__)
#define team_pause() __asm__ __volatile__("isb")
#else
#define team_pause() ((void) 0)
#endif

typedef void (*team_piece)(void *job, int64_t k, int member);

enum {
    TEAM_MOST = 256,        /* members */
    TEAM_LOOKOUT = 2000,    /* pauses, of 20 to 50 ns each, before a member sleeps */
    TEAM_CLOSELY = 30000    /* ns from the end of a job to the next */
};

#define TEAM_CLOSED 0xffffffff      /* in place of a piece: none to be had */

typedef struct {
    volatile int64_t cursor;        /* of this member's stretch: job << 32 | piece */
    volatile int64_t asleep;
    volatile int64_t thread;        /* its number, where the system has such */
    int64_t off;                    /* the core that it is kept off, plus one */
    PyThread_type_lock bed;         /* held, so that who wants it sleeps until it is released */
    char apart[88];                 /* no two members in one cache line, nor in two side by side */
} team_member;

static struct {
    volatile int64_t taken;         /* by a thread that has, or may have, a job for it */
    volatile int64_t number;        /* of the last job */
    volatile int64_t run, job, pieces, members;     /* its particulars */
    volatile int64_t done;          /* pieces */
    volatile int64_t core;          /* the caller's */
    int64_t ended;                  /* when the last job did; of use to who has taken the team */
    int hired;                      /* members with a thread of their own; the first has none */
    team_member member[TEAM_MOST];
} team;

static void team_close(int64_t number, int hired) {
    for (int m = 0; m <= hired; m++)
        team_swap(&team.member[m].cursor, number << 32 | TEAM_CLOSED);
}

#if defined(__linux__)
static int64_t team_core(void) { return sched_getcpu(); }
static int64_t team_thread(void) { return syscall(SYS_gettid); }

/* Keep a sleeping member off this core. Tell whether it can run elsewhere, as far as is known. */
static int team_keep_off(team_member *member, int64_t core) {
    cpu_set_t others;
    if (core < 0 || core >= CPU_SETSIZE || member->off == core + 1)
        return 1;
    if (sched_getaffinity(0, sizeof others, &others))
        return 1;
    CPU_CLR(core, &others);
    if (CPU_COUNT(&others) == 0)
        return 0;
    if (!sched_setaffinity((pid_t) team_load(&member->thread), sizeof others, &others))
        member->off = core + 1;
    return 1;
}
#else
static int64_t team_core(void) { return -1; }
static int64_t team_thread(void) { return 0; }
static int team_keep_off(team_member *member, int64_t core) { return member != NULL || core; }
#endif

/* Tell whether this thread is on the caller's core. */
static int team_in_the_way(void) {
    int64_t core = team_core();
    return core >= 0 && core == team_load(&team.core);
}

/* Do pieces of job `number`, or none if it is over. */
static void team_work(int64_t number, int me) {
    team_piece run = (team_piece) (intptr_t) team_load(&team.run);
    void *job = (void *) (intptr_t) team_load(&team.job);
    int64_t pieces = team_load(&team.pieces), members = team_load(&team.members);
    if (me >= members)
        return;
    for (int64_t k = 0; k < members; k++) {
        int64_t whose = (me + k) % members, end = (whose + 1) * pieces / members;
        volatile int64_t *cursor = &team.member[whose].cursor;
        int64_t seen = team_load(cursor);
        while (seen >> 32 == number && (seen & TEAM_CLOSED) < end) {
            if (me && team_in_the_way())
                return;
            if (team_move(cursor, &seen, seen + 1)) {
                run(job, seen & TEAM_CLOSED, me);
                team_add(&team.done, 1);
                seen = team_load(cursor);
            }
        }
    }
}

static void team_life(void *whose) {
    int me = (int) (intptr_t) whose;
    team_member *self = &team.member[me];
    int64_t last = 0;
    int looked = 0;
    environment_enter();
    team_swap(&self->thread, team_thread());
    for (;;) {
        int64_t number;
        while ((number = team_load(&team.number)) == last) {
            if (looked++ < TEAM_LOOKOUT) {
                team_pause();
                continue;
            }
            team_swap(&self->asleep, 1);
            /* A job that came just now may have found this member awake. */
            if (team_load(&team.number) == last || !team_swap(&self->asleep, 0))
                PyThread_acquire_lock(self->bed, WAIT_LOCK);
            looked = 0;
        }
        last = number;
        looked = 0;
        team_work(number, me);
        if (team_in_the_way())
            looked = TEAM_LOOKOUT;
    }
}

/* Take the team, for up to so many members, the caller among them. Return how many there are: 1,
   and nothing is taken, if another thread has it. The caller holds the GIL, if there is one. */
static int team_take(int members) {
    int64_t nobody = 0;
    if (members < 2 || !team_move(&team.taken, &nobody, 1))
        return 1;
    if (members > TEAM_MOST)
        members = TEAM_MOST;
    while (team.hired + 1 < members) {
        team_member *next = &team.member[team.hired + 1];
        if (next->bed == NULL && (next->bed = PyThread_allocate_lock()) != NULL)
            PyThread_acquire_lock(next->bed, WAIT_LOCK);
        team_swap(&next->cursor, TEAM_CLOSED);
        if (next->bed == NULL || PyThread_start_new_thread(
                team_life, (void *) (intptr_t) (team.hired + 1)) == PYTHREAD_INVALID_THREAD_ID)
            break;
        team.hired++;
    }
    if (team.hired == 0) {
        team_swap(&team.taken, 0);
        return 1;
    }
    return team.hired + 1 < members ? team.hired + 1 : members;
}

static void team_leave(void) {
    team_swap(&team.taken, 0);
}

static int64_t team_now(void) {
    struct timespec now;
    timespec_get(&now, TIME_UTC);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

/* Run a job to its end, by members of the team that the caller has taken; by those that are awake,
   unless it is worth waking the others. */
static void team_run(team_piece run, void *job, int64_t pieces, int members, int worth_waking) {
    int64_t number = (team_load(&team.number) + 1) & 0x7fffffff, core = team_core();
    team_close(number, team.hired);
    team_swap(&team.run, (int64_t) (intptr_t) run);
    team_swap(&team.job, (int64_t) (intptr_t) job);
    team_swap(&team.pieces, pieces);
    team_swap(&team.members, members);
    team_swap(&team.core, core);
    team_swap(&team.done, 0);
    for (int m = 0; m < members; m++)
        team_swap(&team.member[m].cursor, number << 32 | m * pieces / members);
    team_swap(&team.number, number);
    if (worth_waking || team_now() - team.ended < TEAM_CLOSELY)
        for (int m = 1; m < members; m++)
            if (team_load(&team.member[m].asleep) && team_keep_off(&team.member[m], core)
                    && team_swap(&team.member[m].asleep, 0))
                PyThread_release_lock(team.member[m].bed);
    team_work(number, 0);
    for (int looked = 0; team_load(&team.done) < pieces; looked++)
        if (looked < TEAM_LOOKOUT)
            team_pause();
        else
            team_yield();   /* perhaps to the member that is still at work */
    team.ended = team_now();
}

/* Begin anew in a forked child, where the other members' threads do not exist. */
static void team_forked(void) {
    memset((void *) &team, 0, sizeof team);
}

#endif
