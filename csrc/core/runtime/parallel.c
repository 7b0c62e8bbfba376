/* parallel.c: the one loop runner. Threads live for one call (no pool survives a fork); a host that has a
 * pool of its own installs it with aqlm_set_parallel. Results never depend on how a range is cut. */
#define _GNU_SOURCE
#include "core/runtime/memory.h"
#include "core/runtime/parallel.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <unistd.h>

static aqlm_parallel_fn runner; /* NULL: run_threads */
static int (*poll_fn)(void);
static _Atomic int thread_count; /* 0: not set */

/* Each thread that calls into the core has a flag of its own; its workers share it. */
static _Thread_local _Atomic bool own_flag;
static _Thread_local _Atomic bool *flag_of_caller; /* NULL on a calling thread */

static _Atomic bool *cancel_flag(void) { return flag_of_caller ? flag_of_caller : &own_flag; }

static int usable_cpus(void) {
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 ? (int)n : 1;
}

void aqlm_set_parallel(aqlm_parallel_fn fn) { runner = fn; }
void aqlm_set_num_threads(int n) { thread_count = n < 1 ? 0 : n; }
int aqlm_get_num_threads(void) {
    const int n = thread_count;
    return n ? n : usable_cpus();
}
void aqlm_set_poll(int (*poll)(void)) { poll_fn = poll; }

bool aqlm_cancelled(void) {
    if (atomic_load_explicit(cancel_flag(), memory_order_relaxed)) return true;
    if (flag_of_caller || !poll_fn || !poll_fn()) return false;
    atomic_store(&own_flag, true);
    return true;
}

void aqlm_set_status(aqlm_shared_status *s, aqlm_status status) {
    int ok = AQLM_OK;
    atomic_compare_exchange_strong(&s->value, &ok, (int)status);
}

aqlm_status aqlm_get_status(aqlm_shared_status *s) {
    if (atomic_exchange(cancel_flag(), false)) return AQLM_CANCELLED;
    return (aqlm_status)atomic_load(&s->value);
}

int64_t aqlm_even_grain(int64_t n, int64_t least) {
    int64_t threads = aqlm_get_num_threads();
    return aqlm_max(least, (n + threads - 1) / threads);
}

typedef struct job {
    _Atomic int64_t next;
    int64_t end, piece;
    aqlm_range_fn fn;
    void *ctx;
    _Atomic bool *cancel;
} job;

static void work(job *j) {
    for (;;) {
        int64_t begin = atomic_fetch_add(&j->next, j->piece);
        if (begin >= j->end || aqlm_cancelled()) return;
        j->fn(begin, aqlm_min(begin + j->piece, j->end), j->ctx);
    }
}

static void *worker(void *arg) {
    flag_of_caller = ((job *)arg)->cancel;
    work(arg);
    return NULL;
}

static void run_threads(int64_t begin, int64_t end, int64_t grain, aqlm_range_fn fn, void *ctx) {
    enum { MOST = 256 };
    const int64_t n = end - begin, threads = aqlm_get_num_threads();
    const int64_t piece = aqlm_max(grain, (n + 4 * threads - 1) / (4 * threads)); /* 4 pieces a thread even out */
    const int64_t pieces = (n + piece - 1) / piece;
    job j = {.end = end, .piece = piece, .fn = fn, .ctx = ctx, .cancel = cancel_flag()};
    atomic_init(&j.next, begin);
    pthread_t thread[MOST];
    int started = 0;
    const int64_t wanted = aqlm_min(aqlm_min(threads, pieces) - 1, MOST);
    while (!flag_of_caller && started < wanted && pthread_create(&thread[started], NULL, worker, &j) == 0) started++;
    work(&j); /* a thread that could not be had only costs time */
    for (int i = 0; i < started; i++) pthread_join(thread[i], NULL);
}

/* What the host's runner is given: on its threads the calling thread's flag counts, and that one alone polls. */
typedef struct hosted {
    aqlm_range_fn fn;
    void *ctx;
    _Atomic bool *cancel;
} hosted;

static void run_hosted(int64_t begin, int64_t end, void *ctx) {
    const hosted *h = ctx;
    _Atomic bool *before = flag_of_caller;
    flag_of_caller = h->cancel == &own_flag ? NULL : h->cancel;
    h->fn(begin, end, h->ctx);
    flag_of_caller = before;
}

void aqlm_parallel(int64_t begin, int64_t end, int64_t grain, aqlm_range_fn fn, void *ctx) {
    if (begin >= end) return;
    grain = aqlm_max(grain, 1);
    if (runner) {
        hosted h = {fn, ctx, cancel_flag()};
        runner(begin, end, grain, run_hosted, &h);
    } else run_threads(begin, end, grain, fn, ctx);
}
