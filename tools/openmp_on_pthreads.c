/* What the kernels ask of OpenMP, done by threads that start and end with each parallel region.

   For `make sanitize-threads`: ThreadSanitizer sees how POSIX threads wait for each other, but not
   how libgomp's do, which is by system calls of its own, and so takes any two of its regions for a
   race. Preloaded, this takes the place of libgomp: what is then reported is between blocks. */

#include <pthread.h>
#include <stdlib.h>

enum { MOST = 64 };

struct member {
    void (*work)(void *);
    void *data;
    int number, of;
    pthread_barrier_t *barrier;
};

static __thread struct member self = {NULL, NULL, 0, 1, NULL};

static void *run(void *at) {
    struct member before = self;
    self = *(struct member *) at;
    self.work(self.data);
    self = before;
    return NULL;
}

void GOMP_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags) {
    pthread_t ids[MOST];
    struct member team[MOST];
    pthread_barrier_t barrier;
    int k, n = threads ? (int) threads : 1;
    (void) flags;
    if (n > MOST || pthread_barrier_init(&barrier, NULL, n))
        abort();
    for (k = 0; k < n; k++)
        team[k] = (struct member){work, data, k, n, &barrier};
    for (k = 1; k < n; k++)
        if (pthread_create(&ids[k], NULL, run, &team[k]))
            abort();
    run(&team[0]);
    for (k = 1; k < n; k++)
        pthread_join(ids[k], NULL);
    pthread_barrier_destroy(&barrier);
}

void GOMP_barrier(void) { pthread_barrier_wait(self.barrier); }
int omp_get_thread_num(void) { return self.number; }
int omp_get_num_threads(void) { return self.of; }
int omp_get_max_threads(void) {
    const char *wanted = getenv("OMP_NUM_THREADS");
    return wanted && atoi(wanted) > 0 ? atoi(wanted) : 4;
}
