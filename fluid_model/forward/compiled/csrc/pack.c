/* Weights from torch's layout to panels. */

#define _GNU_SOURCE /* madvise */
#include "gemm.h"
#include "pool.h"
#include "vectors.h"
#include <stdint.h>
#include <sys/mman.h>

#define HUGE_PAGE (2L << 20)
#define LARGE (32L << 20) /* bytes from which on huge pages save more than what the last of them may waste */

/* Memory for panels, before it is first written. A large model is read at every forward from end to end: with pages of
   4 KB the processor waits for their addresses. */
EXPORT void prepare_panels(void *memory, long bytes)
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
    const char *weights; /* (rows, inputs) */
    long first, rows, inputs;
    Format format;
    char *panels;
} Packing;

/* One row of weights to its column of a panel. */
INLINE void scatter(const long bytes, const char *row, long inputs, char *column, long stride)
{
    for (long k = 0; k < inputs; k++) memcpy(column + k * stride, row + k * bytes, bytes);
}

/* The rows of one panel that these weights have. */
static void pack_panel(void *context, long part, long thread)
{
    const Packing *packing = context;
    const Format format = packing->format;
    const long width = panel_width(format), bytes = weight_bytes(format), inputs = packing->inputs;
    const long from = (packing->first / width + part) * width;
    (void)thread;
    for (long output = from; output < from + width; output++) {
        const long row = output - packing->first;
        if (row < 0 || row >= packing->rows) continue;
        const char *weights = packing->weights + row * inputs * bytes;
        char *to = packing->panels + (from * inputs + place_in_row(format, output - from)) * bytes;
        if (format == FLOAT32)
            scatter(4, weights, inputs, to, width * 4);
        else if (format == BFLOAT16)
            scatter(2, weights, inputs, to, width * 2);
        else
            scatter(1, weights, inputs, to, width);
    }
}

/* Packs weights (rows, inputs) of a linear map, its outputs `first` to `first + rows`.  panels: as in `Linear`, of the
   format that the weights have. */
EXPORT void pack(const void *weights, long format, long first, long rows, long inputs, void *panels, long threads)
{
    const long width = panel_width(format), last = first + rows - 1;
    Packing packing = {weights, first, rows, inputs, format, panels};
    share(threads, rows ? last / width - first / width + 1 : 0, pack_panel, &packing);
}
