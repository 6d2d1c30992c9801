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
#define MAX_WIDTH (4 * LANES)    /* columns of a panel */
#define SUM_LENGTH 64 /* products summed in one go. Sums of short sums round less than one long sum. */
#define PREFETCH_FROM 3 /* height of a tile of float32 that computes for so long that memory would idle */
#define CACHE_LINE 64
#define PARTS_PER_THREAD 16 /* so that threads end at the same time */

/* Vector `number` of a panel's row, as floats. */
INLINE vec widen(const Format format, const char *row, const int number)
{
    if (format == FLOAT32) return load((const float *)row + number * LANES);
    if (format == INT8) return __builtin_convertvector(load_bytes(row + number * LANES), vec);
    const ivec pairs = load_words(row + number / 2 * LANES * 4);
    return (vec)(number % 2 ? pairs & (int)0xffff0000 : pairs << 16);
}

/* Memory to ask for while a tile is computed: `step` bytes from `next` on with every row of the panel. */
typedef struct {
    const char *next;
    long step;
} Ahead;

/* sums (tile, panel width) += in (tile, length) @ panel (length, panel width), in vectors `first` to `first + vectors` of
   the panel's columns.  stride: floats from one row of `in` to the next. */
INLINE void multiply_tile(const Format format, const int tile, const int first, const int vectors, long length,
                          long stride, const float *in, const char *panel, Ahead ahead, float *sums)
{
    const long row_bytes = panel_width(format) * weight_bytes(format), width = panel_width(format);
    vec held[MAX_TILE][4];
    for (int m = 0; m < tile; m++)
        for (int v = 0; v < vectors; v++) held[m][v] = (vec){0};
    for (long k = 0; k < length; k++, panel += row_bytes) {
        vec weights[4];
        for (int v = 0; v < vectors; v++) weights[v] = widen(format, panel, first + v);
        /* Widening is computing, too: narrow formats ask ahead at every height. */
        if (!first && (format != FLOAT32 || tile >= PREFETCH_FROM)) {
            for (long at = 0; at < row_bytes; at += CACHE_LINE)
                __builtin_prefetch(ahead.next + at * ahead.step / row_bytes);
            ahead.next += ahead.step;
        }
        for (int m = 0; m < tile; m++)
            for (int v = 0; v < vectors; v++) held[m][v] += in[m * stride + k] * weights[v];
    }
    for (int m = 0; m < tile; m++)
        for (int v = 0; v < vectors; v++) {
            float *sum = sums + m * width + (first + v) * LANES;
            store(sum, load(sum) + held[m][v]);
        }
}

/* All columns of a panel. A high tile takes them two vectors at a time: its sums fill the registers. */
INLINE void multiply_all_columns(const Format format, const int tile, long length, long stride, const float *in,
                                 const char *panel, Ahead ahead, float *sums)
{
    const int vectors = panel_vectors(format) == 4 && tile <= MAX_TILE / 2 ? 4 : 2;
    for (int first = 0; first < panel_vectors(format); first += vectors)
        multiply_tile(format, tile, first, vectors, length, stride, in, panel, ahead, sums);
}

/* The same, compiled once for every height: sums stay in registers where the height is a constant. */
INLINE void multiply(const Format format, long tile, long length, long stride, const float *in, const char *panel,
                     Ahead ahead, float *sums)
{
#define TILE(height)                                                                  \
    case height:                                                                      \
        multiply_all_columns(format, height, length, stride, in, panel, ahead, sums); \
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
        multiply_all_columns(format, MAX_TILE, length, stride, in, panel, ahead, sums);
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
    const Linear *linear = product->linear;
    const long outputs = linear->outputs, panel = panel_width(linear->format);
    const long width = outputs - n < panel ? outputs - n : panel; /* the last panel is filled up with zeros */
    const float *bias = linear->bias, *scales = linear->scales, *residual = product->residual;
    for (long m = 0; m < rows; m++, sums += panel) {
        const long place = (product->rows ? product->rows[first + m] : first + m) * outputs + n;
        for (long j = 0; j < width; j++) {
            float value = sums[j];
            if (scales) value *= scales[n + j];
            if (bias) value += bias[n + j];
            product->out[place + j] = residual ? residual[place + j] + value : value;
        }
    }
}

/* All rows of the input times one panel. */
INLINE void multiply_panel(const Format format, const Product *product, long n)
{
    const long inputs = product->linear->inputs, width = panel_width(format), bytes = weight_bytes(format);
    const char *panel = (const char *)product->linear->panels + n * inputs * bytes;
    float sums[MAX_BLOCK * MAX_WIDTH];
    for (long first = 0; first < product->count; first += MAX_BLOCK) {
        const long rows = product->count - first < MAX_BLOCK ? product->count - first : MAX_BLOCK;
        const long tiles = (rows + MAX_TILE - 1) / MAX_TILE;
        memset(sums, 0, rows * width * sizeof *sums);
        for (long k = 0; k < inputs; k += SUM_LENGTH) {
            const long length = inputs - k < SUM_LENGTH ? inputs - k : SUM_LENGTH;
            const char *piece = panel + k * width * bytes, *next_piece = piece + length * width * bytes;
            /* Tiles of nearly equal height: 13 rows are 5 + 4 + 4, not 6 + 6 + 1. */
            for (long t = 0, m = 0, next; t < tiles; t++, m = next) {
                next = rows * (t + 1) / tiles;
                /* Each asks for its part of the next piece: memory is read while all of them compute. */
                const Ahead ahead = {next_piece + length * width * bytes * t / tiles, width * bytes / tiles};
                multiply(format, next - m, length, inputs, product->in + (first + m) * inputs + k, piece, ahead,
                         sums + m * width);
            }
        }
        put_block(product, first, rows, n, sums);
    }
}

static void multiply_float32(const Product *product, long n) { multiply_panel(FLOAT32, product, n); }
static void multiply_bfloat16(const Product *product, long n) { multiply_panel(BFLOAT16, product, n); }
static void multiply_int8(const Product *product, long n) { multiply_panel(INT8, product, n); }

/* Panels of a linear map. */
static long panel_count(const Linear *linear)
{
    return (linear->outputs + panel_width(linear->format) - 1) / panel_width(linear->format);
}

static void multiply_part(void *context, long part, long thread)
{
    static void (*const multiply_one[])(const Product *, long) = {multiply_float32, multiply_bfloat16, multiply_int8};
    const Product *product = context;
    const Linear *linear = product->linear;
    const long panels = panel_count(linear);
    (void)thread;
    for (long p = panels * part / product->parts; p < panels * (part + 1) / product->parts; p++)
        multiply_one[linear->format](product, p * panel_width(linear->format));
}

static void multiply_all(Product product, long threads)
{
    const long panels = panel_count(product.linear), most = threads * PARTS_PER_THREAD;
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
