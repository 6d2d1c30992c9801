/* Matrix products with packed weights. */

#ifndef GEMM_H
#define GEMM_H

#include "structs.h"

#define PANEL (2 * LANES) /* output columns of a panel: two vectors */

/* out (M, outputs) = in (M, inputs) @ weights + bias + residual, on up to `threads` threads.
   residual: (M, outputs), or NULL; it may be `out` itself. */
void gemm(const Linear *linear, long count, const float *in, const float *residual, float *out, long threads);

/* out[rows[m]] += in[m] @ weights + bias, for m < count. */
void gemm_add(const Linear *linear, long count, const float *in, const int *rows, float *out, long threads);

#endif
