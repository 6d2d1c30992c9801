/* Weights from torch's layout to panels. */

#define _GNU_SOURCE /* madvise */
#include "gemm.h"
#include "pool.h"
#include <stdint.h>
#include <sys/mman.h>

#define HUGE_PAGE (2L << 20)
#define LARGE (32L << 20) /* bytes from which on huge pages save more than what the last of them may waste */

/* Memory for panels, before it is first written. A large model is read at every forward from end to end: with pages of
   4 KB the processor waits for their addresses. */
EXPORT void prepare_panels(float *memory, long bytes)
{
#ifdef MADV_HUGEPAGE
    const uintptr_t from = ((uintptr_t)memory + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    const uintptr_t end = ((uintptr_t)memory + bytes) / HUGE_PAGE * HUGE_PAGE;
    if (bytes >= LARGE) madvise((void *)from, end - from, MADV_HUGEPAGE); /* a wish: nothing follows if it is not met */
#else
    (void)memory, (void)bytes;
#endif
}

typedef struct {
    const float *weights; /* (rows, inputs) */
    long first, rows, inputs;
    float *panels;
} Packing;

/* The rows of one panel that these weights have. */
static void pack_panel(void *context, long part, long thread)
{
    const Packing *packing = context;
    const long inputs = packing->inputs, from = packing->first / PANEL * PANEL + part * PANEL;
    (void)thread;
    for (long output = from; output < from + PANEL; output++) {
        const long row = output - packing->first;
        if (row < 0 || row >= packing->rows) continue;
        float *to = packing->panels + output / PANEL * PANEL * inputs + output % PANEL;
        for (long k = 0; k < inputs; k++) to[k * PANEL] = packing->weights[row * inputs + k];
    }
}

/* Packs weights (rows, inputs) of a linear map, its outputs `first` to `first + rows`.  panels: as in `Linear`. */
EXPORT void pack(const float *weights, long first, long rows, long inputs, float *panels, long threads)
{
    Packing packing = {weights, first, rows, inputs, panels};
    const long last = first + rows - 1;
    share(threads, rows ? last / PANEL - first / PANEL + 1 : 0, pack_panel, &packing);
}
