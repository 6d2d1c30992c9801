/* The K-head: Linear -> GELU -> Linear -> argmax, see khead.py. */

#include "gemm.h"
#include "vectors.h"

/* The predicted stride of each hidden state, class i being stride i + 1: hidden (M, D) -> strides (M,).
   workspace: M inner + K floats. */
EXPORT void k_head_strides(const Linear *first, const Linear *second, long count, const float *hidden,
                           float *workspace, long *strides)
{
    float *inner = workspace, *scores = workspace + count * first->outputs;
    gemm(first, count, hidden, NULL, inner, 1);
    for (long i = 0; i < count * first->outputs; i++) inner[i] *= 0.5f + 0.5f * erff(inner[i] * 0.70710678f); /* GELU */
    for (long m = 0; m < count; m++) {
        gemm(second, 1, inner + m * first->outputs, NULL, scores, 1);
        long best = 0; /* the first of equals */
        for (long k = 1; k < second->outputs; k++)
            if (scores[k] > scores[best]) best = k;
        strides[m] = best + 1;
    }
}
