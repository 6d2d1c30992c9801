/* Threads that share the work of a forward. */

#ifndef POOL_H
#define POOL_H

#define MAX_THREADS 64

/* One part of some work.  thread: 0 for the caller, below `threads` for all; no two parts run on one at a time. */
typedef void Part(void *context, long part, long thread);

/* Runs parts 0 to `parts` - 1, each once, on up to `threads` threads, the caller's among them. Returns when all are done.
   Parts must not depend on one another. */
void share(long threads, long parts, Part *run, void *context);

#endif
