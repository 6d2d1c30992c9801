/* A pool of threads that lasts as long as the process.

   A forward has some hundred products of 10 to 500 us, so handing one out must take less than a microsecond. A thread
   without work looks for some a few thousand times, then sleeps: on a busy machine whoever spins takes the processor from
   those who have work. Parts are taken one by one, and a thread that does not run takes none, so nobody waits for a
   thread that has not begun.  */

#include "pool.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>

#define SPINS 2000 /* looks before a thread sleeps: some 20 to 80 us */

#if defined(__x86_64__) || defined(__i386__)
#define PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE() ((void)0)
#endif

static pthread_mutex_t caller = PTHREAD_MUTEX_INITIALIZER; /* held by whoever has work shared */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;   /* of those who sleep */
static pthread_cond_t work_comes = PTHREAD_COND_INITIALIZER, work_ends = PTHREAD_COND_INITIALIZER;
static long helpers; /* threads started, the caller's not counted */

/* The work at hand. It is written while no part is left to take, and stays until all parts are done. */
static Part *run_part;
static void *run_context;
static long run_parts;

static atomic_ulong offer;    /* threads that may take parts << 32 | parts not taken: one word, taken from at once */
static atomic_long done;      /* parts done */
static atomic_int sleepers;   /* helpers asleep */
static atomic_int caller_asleep;

static long parts_left(unsigned long offered, long thread)
{
    return thread < (long)(offered >> 32) ? (long)(offered & 0xffffffff) : 0;
}

/* Takes parts and runs them until none is left. */
static void run_some(long thread)
{
    unsigned long offered = atomic_load(&offer);
    while (parts_left(offered, thread)) {
        if (!atomic_compare_exchange_weak(&offer, &offered, offered - 1)) continue;
        /* From here to the increment of `done` the work at hand stays: this part of it is not done. */
        const long parts = run_parts;
        run_part(run_context, parts - parts_left(offered, thread), thread);
        if (atomic_fetch_add(&done, 1) + 1 == parts && atomic_load(&caller_asleep)) {
            pthread_mutex_lock(&lock);
            pthread_cond_signal(&work_ends);
            pthread_mutex_unlock(&lock);
        }
        offered = atomic_load(&offer);
    }
}

static void *help(void *number)
{
    const long thread = (long)number;
    for (;;) {
        run_some(thread);
        for (long spin = 0; spin < SPINS && !parts_left(atomic_load(&offer), thread); spin++) PAUSE();
        if (parts_left(atomic_load(&offer), thread)) continue;
        pthread_mutex_lock(&lock);
        atomic_fetch_add(&sleepers, 1); /* before the last look: whoever offers work looks here afterwards */
        while (!parts_left(atomic_load(&offer), thread)) pthread_cond_wait(&work_comes, &lock);
        atomic_fetch_sub(&sleepers, 1);
        pthread_mutex_unlock(&lock);
    }
    return NULL;
}

/* A fork has none of its parent's threads. */
static void forget_helpers(void)
{
    helpers = 0;
    atomic_store(&offer, 0);
    atomic_store(&sleepers, 0);
    pthread_mutex_init(&caller, NULL);
    pthread_mutex_init(&lock, NULL);
    pthread_cond_init(&work_comes, NULL);
    pthread_cond_init(&work_ends, NULL);
}

/* Starts helpers until there are `wanted`, or no more can be had. They take no signals: those are the caller's. */
static void start_helpers(long wanted)
{
    static int fork_safe;
    if (!fork_safe) fork_safe = pthread_atfork(NULL, NULL, forget_helpers) == 0;
    if (!fork_safe || helpers >= wanted) return;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (pthread_t thread; helpers < wanted && helpers < MAX_THREADS - 1; helpers++) {
        if (pthread_create(&thread, NULL, help, (void *)(helpers + 1))) break;
        pthread_detach(thread);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void wait_for_parts(long parts)
{
    for (long spin = 0; spin < SPINS && atomic_load(&done) < parts; spin++) PAUSE();
    if (atomic_load(&done) == parts) return;
    pthread_mutex_lock(&lock);
    atomic_store(&caller_asleep, 1);
    while (atomic_load(&done) < parts) pthread_cond_wait(&work_ends, &lock);
    atomic_store(&caller_asleep, 0);
    pthread_mutex_unlock(&lock);
}

void share(long threads, long parts, Part *run, void *context)
{
    /* 1) alone where that is asked for, or another caller has the helpers */
    if (threads < 2 || parts < 2 || pthread_mutex_trylock(&caller)) {
        for (long part = 0; part < parts; part++) run(context, part, 0);
        return;
    }
    /* 2) offer the parts */
    start_helpers(threads - 1);
    run_part = run;
    run_context = context;
    run_parts = parts;
    atomic_store(&done, 0);
    atomic_store(&offer, (unsigned long)threads << 32 | (unsigned long)parts);
    if (atomic_load(&sleepers)) {
        pthread_mutex_lock(&lock);
        pthread_cond_broadcast(&work_comes);
        pthread_mutex_unlock(&lock);
    }
    /* 3) take part */
    run_some(0);
    wait_for_parts(parts);
    pthread_mutex_unlock(&caller);
}
