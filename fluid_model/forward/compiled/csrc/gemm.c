/* Matrix products with packed weights.

   A tile is a few rows of the input times SUM_LENGTH rows of a panel of the weights. Its sums stay in registers. All tiles
   of a block of rows read that piece of the panel after one another, so memory is read once, in order. A number is
   computed by one thread, in an order that depends neither on tiles and blocks nor on threads.  */

#include "gemm.h"
#include "pool.h"
#include "vectors.h"

#ifdef __AVX512F__
#define MAX_TILE 12 /* rows of a tile: two sums each, in 32 registers */
#else
#define MAX_TILE 6 /* in 16 registers */
#endif
#define MAX_BLOCK (8 * MAX_TILE) /* rows of the input of one block, whose pieces stay in the second-level cache */
#define SUM_LENGTH 64 /* products summed in one go. Sums of short sums round less than one long sum. */
#define PREFETCH_FROM 3 /* height of a tile that computes for so long that memory would idle */
#define PARTS_PER_THREAD 16 /* so that threads end at the same time */

/* sums (tile, PANEL) += in (tile, length) @ panel (length, PANEL).  stride: floats from one row of `in` to the next. */
INLINE void multiply_tile(const int tile, long length, long stride, const float *in, const float *panel, float *sums)
{
    vec left[MAX_TILE], right[MAX_TILE]; /* both vectors of the panel's columns */
    for (int m = 0; m < tile; m++) left[m] = right[m] = (vec){0};
    for (long k = 0; k < length; k++, panel += PANEL) {
        vec first = load(panel), second = load(panel + LANES);
        if (tile >= PREFETCH_FROM) __builtin_prefetch(panel + SUM_LENGTH * PANEL);
        for (int m = 0; m < tile; m++) {
            left[m] += in[m * stride + k] * first;
            right[m] += in[m * stride + k] * second;
        }
    }
    for (int m = 0; m < tile; m++) {
        store(sums + m * PANEL, load(sums + m * PANEL) + left[m]);
        store(sums + m * PANEL + LANES, load(sums + m * PANEL + LANES) + right[m]);
    }
}

/* The same, compiled once for every height: sums stay in registers where the height is a constant. */
static void multiply(long tile, long length, long stride, const float *in, const float *panel, float *sums)
{
#define TILE(height)                                                \
    case height:                                                    \
        multiply_tile(height, length, stride, in, panel, sums);     \
        break;
    switch (tile) {
        TILE(1)
        TILE(2)
        TILE(3)
        TILE(4)
        TILE(5)
#if MAX_TILE == 12
        TILE(6)
        TILE(7)
        TILE(8)
        TILE(9)
        TILE(10)
        TILE(11)
#endif
    default:
        multiply_tile(MAX_TILE, length, stride, in, panel, sums);
    }
#undef TILE
}

/* A product and where it goes. */
typedef struct {
    const Linear *linear;
    long count;
    const float *in, *residual;
    const int *rows; /* (count,) row of `out` and `residual` for each row of the input, or NULL: the same */
    float *out;
    long parts;
} Product;

/* Sums of one block of rows and one panel to `out`.  first: row of the input.  n: output column. */
static void put_block(const Product *product, long first, long rows, long n, const float *sums)
{
    const long outputs = product->linear->outputs;
    const long width = outputs - n < PANEL ? outputs - n : PANEL; /* the last panel is filled up with zeros */
    const float *bias = product->linear->bias, *residual = product->residual;
    for (long m = 0; m < rows; m++, sums += PANEL) {
        const long place = (product->rows ? product->rows[first + m] : first + m) * outputs + n;
        for (long j = 0; j < width; j++) {
            float value = sums[j];
            if (bias) value += bias[n + j];
            product->out[place + j] = residual ? residual[place + j] + value : value;
        }
    }
}

/* All rows of the input times one panel. */
static void multiply_panel(const Product *product, long n)
{
    const long inputs = product->linear->inputs;
    const float *panel = product->linear->panels + n * inputs;
    float sums[MAX_BLOCK * PANEL];
    for (long first = 0; first < product->count; first += MAX_BLOCK) {
        const long rows = product->count - first < MAX_BLOCK ? product->count - first : MAX_BLOCK;
        const long tiles = (rows + MAX_TILE - 1) / MAX_TILE;
        memset(sums, 0, rows * PANEL * sizeof *sums);
        for (long k = 0; k < inputs; k += SUM_LENGTH) {
            const long length = inputs - k < SUM_LENGTH ? inputs - k : SUM_LENGTH;
            /* Tiles of nearly equal height: 13 rows are 5 + 4 + 4, not 6 + 6 + 1. */
            for (long t = 0, m = 0, next; t < tiles; t++, m = next) {
                next = rows * (t + 1) / tiles;
                multiply(next - m, length, inputs, product->in + (first + m) * inputs + k, panel + k * PANEL,
                         sums + m * PANEL);
            }
        }
        put_block(product, first, rows, n, sums);
    }
}

static void multiply_part(void *context, long part, long thread)
{
    const Product *product = context;
    const long panels = (product->linear->outputs + PANEL - 1) / PANEL;
    (void)thread;
    for (long p = panels * part / product->parts; p < panels * (part + 1) / product->parts; p++)
        multiply_panel(product, p * PANEL);
}

static void multiply_all(Product product, long threads)
{
    const long panels = (product.linear->outputs + PANEL - 1) / PANEL, most = threads * PARTS_PER_THREAD;
    product.parts = threads == 1 ? 1 : panels < most ? panels : most;
    share(threads, product.parts, multiply_part, &product);
}

void gemm(const Linear *linear, long count, const float *in, const float *residual, float *out, long threads)
{
    multiply_all((Product){.linear = linear, .count = count, .in = in, .residual = residual, .out = out}, threads);
}

void gemm_add(const Linear *linear, long count, const float *in, const int *rows, float *out, long threads)
{
    multiply_all((Product){.linear = linear, .count = count, .in = in, .residual = out, .rows = rows, .out = out},
                 threads);
}

/* The vocabulary projection: hidden (M, D) -> logits (M, V). */
EXPORT void project_vocabulary(const Linear *linear, long count, const float *hidden, float *logits, long threads)
{
    gemm(linear, count, hidden, NULL, logits, threads);
}
