/* Matrix products with packed weights.

   A tile is a few rows of the input times one panel of the weights. Its sums stay in registers while the panel is read
   once, in order. Rows of the input are independent: the tile's height changes no number.  */

#include "gemm.h"
#include "vectors.h"

#ifdef __AVX512F__
#define MAX_TILE 12 /* rows of a tile: two sums each fill the 32 registers */
#else
#define MAX_TILE 4
#endif
#define SUM_LENGTH 64 /* products summed in one go. Sums of short sums round less than one long sum. */

/* out (tile, PANEL) = in (tile, size) @ panel (size, PANEL). */
INLINE void multiply_tile(const int tile, long size, const float *in, const float *panel, float *out)
{
    memset(out, 0, tile * PANEL * sizeof *out);
    for (long start = 0; start < size; start += SUM_LENGTH) {
        long end = start + SUM_LENGTH < size ? start + SUM_LENGTH : size;
        vec left[MAX_TILE], right[MAX_TILE]; /* both vectors of the panel's columns */
        for (int m = 0; m < tile; m++) left[m] = right[m] = (vec){0};
        for (long k = start; k < end; k++, panel += PANEL) {
            vec first = load(panel), second = load(panel + LANES);
            for (int m = 0; m < tile; m++) {
                left[m] += in[m * size + k] * first;
                right[m] += in[m * size + k] * second;
            }
        }
        for (int m = 0; m < tile; m++) {
            store(out + m * PANEL, load(out + m * PANEL) + left[m]);
            store(out + m * PANEL + LANES, load(out + m * PANEL + LANES) + right[m]);
        }
    }
}

/* The same, compiled once for every height: sums stay in registers where the height is a constant. */
static void multiply(long tile, long size, const float *in, const float *panel, float *out)
{
#define TILE(height)                                    \
    case height:                                        \
        multiply_tile(height, size, in, panel, out);    \
        break;
    switch (tile) {
        TILE(1)
        TILE(2)
        TILE(3)
#if MAX_TILE == 12
        TILE(4)
        TILE(5)
        TILE(6)
        TILE(7)
        TILE(8)
        TILE(9)
        TILE(10)
        TILE(11)
#endif
    default:
        multiply_tile(MAX_TILE, size, in, panel, out);
    }
#undef TILE
}

/* rows: (count,) row of `out` and `residual` for each row of the input, or NULL: the same. */
static void gemm_rows(const Linear *linear, long count, const float *in, const int *rows, const float *residual,
                      float *out)
{
    const long inputs = linear->inputs, outputs = linear->outputs;
    float block[MAX_TILE * PANEL];
    for (long n = 0; n < outputs; n += PANEL) {
        long width = outputs - n < PANEL ? outputs - n : PANEL; /* the last panel is filled up with zeros */
        for (long m = 0, tile; m < count; m += tile) {
            /* Tiles of nearly equal height: 13 rows are 4 + 3 + 3 + 3, not 4 + 4 + 4 + 1. */
            long left = count - m, tiles = (left + MAX_TILE - 1) / MAX_TILE;
            tile = (left + tiles - 1) / tiles;
            multiply(tile, inputs, in + m * inputs, linear->panels + n * inputs, block);
            for (long i = 0; i < tile; i++) {
                long place = (rows ? rows[m + i] : m + i) * outputs + n;
                for (long j = 0; j < width; j++) {
                    float value = block[i * PANEL + j];
                    if (linear->bias) value += linear->bias[n + j];
                    out[place + j] = residual ? residual[place + j] + value : value;
                }
            }
        }
    }
}

void gemm(const Linear *linear, long count, const float *in, const float *residual, float *out)
{
    gemm_rows(linear, count, in, NULL, residual, out);
}

void gemm_add(const Linear *linear, long count, const float *in, const int *rows, float *out)
{
    gemm_rows(linear, count, in, rows, out, out);
}

/* The vocabulary projection: hidden (M, D) -> logits (M, V). */
EXPORT void project_vocabulary(const Linear *linear, long count, const float *hidden, float *logits)
{
    gemm(linear, count, hidden, NULL, logits);
}
