/* Matrix products with packed weights.

   A panel is a few output columns of a linear map. Its row holds the weights of one input, LANES words or twice as many:

       float32    column i                                  | LANES + i
       bfloat16   column i in the low half, LANES + i above | 2 LANES + i, 3 LANES + i
       int8       columns 4 i to 4 i + 3: bytes in the order of columns

   A bfloat16 is the upper half of a float: a shift widens the low half of a word, a mask the high half.  */

#ifndef GEMM_H
#define GEMM_H

#include "structs.h"

/* Vectors of output columns in a panel. */
static inline int panel_vectors(Format format) { return format == FLOAT32 ? 2 : 4; }

static inline long panel_width(Format format) { return panel_vectors(format) * LANES; }

static inline long weight_bytes(Format format) { return format == FLOAT32 ? 4 : format == BFLOAT16 ? 2 : 1; }

/* Place of a column in a panel's row, counted in weights. The low half of a word comes first in memory. */
static inline long place_in_row(Format format, long column)
{
    if (format != BFLOAT16) return column;
    const long vector = column / LANES;
    return (vector / 2 * LANES + column % LANES) * 2 + vector % 2;
}

/* out (M, outputs) = in (M, inputs) @ weights + bias + residual, on up to `threads` threads.
   residual: (M, outputs), or NULL; it may be `out` itself. */
void gemm(const Linear *linear, long count, const float *in, const float *residual, float *out, long threads);

/* out[rows[m]] += in[m] @ weights + bias, for m < count. */
void gemm_add(const Linear *linear, long count, const float *in, const int *rows, float *out, long threads);

#endif
