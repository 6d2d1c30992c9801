/* RMS norm, rotary embedding and SwiGLU: what stands between the matrix products of a layer. */

#ifndef ELEMENTWISE_H
#define ELEMENTWISE_H

#include "structs.h"
#include "vectors.h"

/* Root mean square norm of each row: in, out (count, size); weight (size,). */
static inline void rms_norm(long count, const float *in, const float *weight, float eps, long size, float *out)
{
    for (; count--; in += size, out += size) {
        vec squares = {0};
        for (long d = 0; d < size; d += LANES) squares += load(in + d) * load(in + d);
        float scale = 1.0f / sqrtf(sum(squares) / size + eps);
        for (long d = 0; d < size; d += LANES) store(out + d, load(in + d) * scale * load(weight + d));
    }
}

/* Rotary embedding of one head (size,), in place. The left half of `sin` is negative. */
static inline void rope(float *head, const float *cos, const float *sin, long size)
{
    float swapped[MAX_HEAD_SIZE]; /* right half, left half */
    memcpy(swapped, head + size / 2, size / 2 * sizeof *head);
    memcpy(swapped + size / 2, head, size / 2 * sizeof *head);
    for (long e = 0; e < size; e += LANES)
        store(head + e, load(head + e) * load(cos + e) + load(swapped + e) * load(sin + e));
}

/* silu(gate) * up: gate_up (count, 2, inner) -> out (count, inner). */
static inline void swiglu(long count, long inner, const float *gate_up, float *out)
{
    for (; count--; gate_up += 2 * inner, out += inner)
        for (long f = 0; f < inner; f += LANES) {
            vec gate = load(gate_up + f), up = load(gate_up + inner + f);
            store(out + f, gate / (1.0f + vec_exp(-gate)) * up);
        }
}

#endif
