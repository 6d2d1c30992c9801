/* The forward of Llama-shaped models in float32.

   Called by forward.py. Padding is dropped first: all work is done for the M slots that count, of all rows.
   The numbers of a slot are the same to the last bit in every batch, see vectors.h and tree_mask.h.  */

#include "attention.h"
#include "elementwise.h"
#include "gemm.h"
#include "tree_mask.h"

const long EXPORT sizeof_Linear = sizeof(Linear);
const long EXPORT sizeof_GatedLinear = sizeof(GatedLinear);
const long EXPORT sizeof_Layer = sizeof(Layer);
const long EXPORT sizeof_Model = sizeof(Model);
const long EXPORT sizeof_Batch = sizeof(Batch);

/* Intermediate results of one forward, one block of memory. */
typedef struct {
    float *residual;   /* (M, D) the residual stream */
    float *normalized; /* (M, D) */
    float *qkv;        /* (M, (H + 2 G) E) */
    float *heads;      /* (M, H E) what attention returns */
    float *gate_up;    /* (M, 2 F) */
    float *scores;     /* (QUERY_BLOCK, T + LANES) */
    int *slot;         /* (M,) where it stands in (B, S) */
    int *position;     /* (M,) position id */
    int *column_count; /* (M,) columns attended to */
    int *columns;      /* (M, T) these columns */
    int *mask_slots;   /* (mask_count,) slots of M where the adapter acts, rising */
    long mask_count;
    float *mask_in;    /* (mask_count, largest K) inputs of these slots */
    float *mask_low;   /* (mask_count, R) */
} Workspace;

static long larger(long a, long b) { return a > b ? a : b; }

static long heads_size(const Model *model) { return model->query_heads * model->head_size; }

static long qkv_size(const Model *model) { return (model->query_heads + 2 * model->key_heads) * model->head_size; }

/* Most inputs of a linear map. */
static long largest_input(const Model *model)
{
    return larger(larger(model->hidden, model->inner), heads_size(model));
}

/* Floats in the workspace of a forward of `count` slots over `total` columns. `divide` takes the same. */
EXPORT long workspace_size(const Model *model, long count, long total)
{
    long floats = 2 * model->hidden + qkv_size(model) + heads_size(model) + 2 * model->inner;
    long integers = 3 + total; /* an int is as long as a float */
    if (model->mask_id >= 0) {
        floats += largest_input(model) + model->rank;
        integers += 1;
    }
    return count * (floats + integers) + QUERY_BLOCK * (total + LANES);
}

static Workspace divide(float *memory, const Model *model, long count, long total)
{
    Workspace work;
    work.residual = memory;
    work.normalized = work.residual + count * model->hidden;
    work.qkv = work.normalized + count * model->hidden;
    work.heads = work.qkv + count * qkv_size(model);
    work.gate_up = work.heads + count * heads_size(model);
    work.scores = work.gate_up + count * 2 * model->inner;
    work.slot = (int *)(work.scores + QUERY_BLOCK * (total + LANES));
    work.position = work.slot + count;
    work.column_count = work.position + count;
    work.columns = work.column_count + count;
    work.mask_slots = work.columns + count * total;
    work.mask_count = 0;
    work.mask_in = (float *)(work.mask_slots + count);
    work.mask_low = work.mask_in + count * largest_input(model);
    return work;
}

/* Collects the slots that count: embeddings, positions, columns attended to, where the adapter acts.
   Returns 0 if an id, a position or a column is out of bounds. */
static int gather(const Model *model, const Batch *batch, Workspace *work)
{
    const long total = batch->total;
    if (batch->first_row < 0 || batch->first_row + batch->rows > batch->cache_rows || total > batch->cache_columns)
        return 0;
    long i = 0; /* of M */
    for (long row = 0; row < batch->rows; row++) {
        const long first = row * batch->slots, width = batch->widths[row], cached = batch->columns[first];
        if (width && (cached < 0 || cached + width > total)) return 0;
        for (long slot = first; slot < first + width; slot++, i++) {
            long id = batch->ids[slot], column = batch->columns[slot];
            long position = batch->enter ? cached + batch->offsets[slot] : column;
            if (id < 0 || id >= model->vocabulary || position < 0 || column < 0 || column >= total) return 0;
            memcpy(work->residual + i * model->hidden, model->embeddings + id * model->hidden,
                   model->hidden * sizeof(float));
            work->slot[i] = slot;
            work->position[i] = position < model->window ? position : model->window - 1;
            work->column_count[i] = attended_columns(batch, row, slot, work->columns + i * total);
            if (id == model->mask_id) work->mask_slots[work->mask_count++] = i;
        }
    }
    return 1;
}

/* A linear map of all slots; then, at mask slots alone, what the adapter adds: these slots are a block of their own, so
   the numbers of all others are those of a forward without adapter. Parameters are those of `gemm`. */
static void gated_gemm(const GatedLinear *linear, long count, const float *in, const float *residual, float *out,
                       const Workspace *work)
{
    const long inputs = linear->full.inputs;
    gemm(&linear->full, count, in, residual, out);
    if (!work->mask_count || !linear->down.outputs) return;
    for (long i = 0; i < work->mask_count; i++)
        memcpy(work->mask_in + i * inputs, in + work->mask_slots[i] * inputs, inputs * sizeof *in);
    gemm(&linear->down, work->mask_count, work->mask_in, NULL, work->mask_low);
    gemm_add(&linear->up, work->mask_count, work->mask_low, work->mask_slots, out);
}

/* Rotates queries and keys, and writes keys and values to the cache.
   keys, values: one layer's, (rows, G, cache columns, E). */
static void rotate_and_cache(const Model *model, const Batch *batch, long count, Workspace work, float *keys,
                             float *values)
{
    const long size = model->head_size, heads = model->query_heads, groups = model->key_heads;
    for (long i = 0; i < count; i++) {
        float *qkv = work.qkv + i * qkv_size(model);
        long row = work.slot[i] / batch->slots, column = batch->columns[work.slot[i]];
        const float *cos = model->cos + work.position[i] * size, *sin = model->sin + work.position[i] * size;
        for (long h = 0; h < heads + groups; h++) rope(qkv + h * size, cos, sin, size);
        for (long g = 0; g < groups; g++) {
            long cell = ((row * groups + g) * batch->cache_columns + column) * size;
            memcpy(keys + cell, qkv + (heads + g) * size, size * sizeof(float));
            memcpy(values + cell, qkv + (heads + groups + g) * size, size * sizeof(float));
        }
    }
}

/* Grouped-query attention of one row and one key head, in blocks of queries.  first, width: the row's slots in M.
   keys, values: (cache columns, E). */
static void attend_group(const Model *model, const Batch *batch, Workspace work, long group, long first, long width,
                         const float *keys, const float *values)
{
    const long size = model->head_size, heads = model->query_heads, per_group = heads / model->key_heads;
    const long total = batch->total;
    Query block[QUERY_BLOCK];
    long queries = 0, shared = total; /* columns that all queries of the block have: the shortest list */
    for (long i = first; i < first + width; i++)
        for (long h = group * per_group; h < (group + 1) * per_group; h++) {
            if (queries == QUERY_BLOCK) {
                attention(size, block, queries, shared, keys, values);
                queries = 0;
                shared = total;
            }
            if (work.column_count[i] < shared) shared = work.column_count[i];
            block[queries] = (Query){
                .query = work.qkv + i * qkv_size(model) + h * size,
                .columns = work.columns + i * total,
                .count = work.column_count[i],
                .scores = work.scores + queries * (total + LANES),
                .out = work.heads + (i * heads + h) * size,
            };
            queries++;
        }
    attention(size, block, queries, shared, keys, values);
}

/* One transformer layer: attention and MLP, each added to the residual stream. */
static void run_layer(const Model *model, const Layer *layer, const Batch *batch, long count, Workspace work,
                      float *keys, float *values)
{
    const long hidden = model->hidden, groups = model->key_heads;
    const long head_cells = batch->cache_columns * model->head_size; /* of one row and one key head */

    /* 1) attention */
    rms_norm(count, work.residual, layer->attention_norm, model->rms_norm_eps, hidden, work.normalized);
    gated_gemm(&layer->qkv, count, work.normalized, NULL, work.qkv, &work);
    rotate_and_cache(model, batch, count, work, keys, values);
    for (long row = 0, first = 0; row < batch->rows; first += batch->widths[row++])
        for (long group = 0; group < groups; group++) {
            long cells = (row * groups + group) * head_cells;
            attend_group(model, batch, work, group, first, batch->widths[row], keys + cells, values + cells);
        }
    gated_gemm(&layer->attention_out, count, work.heads, work.residual, work.residual, &work);

    /* 2) MLP */
    rms_norm(count, work.residual, layer->mlp_norm, model->rms_norm_eps, hidden, work.normalized);
    gated_gemm(&layer->gate_up, count, work.normalized, NULL, work.gate_up, &work);
    swiglu(count, model->inner, work.gate_up);
    gated_gemm(&layer->down, count, work.gate_up, work.residual, work.residual, &work);
}

/* Hidden states after the final norm, out (B, S, D); padding is left as it is. Positions behind the window are put at
   its end.  memory: `workspace_size` floats.
   Returns 0; or 1 if an id, a position or a column is out of bounds, before anything is written. */
EXPORT int forward(const Model *model, const Batch *batch, float *memory, float *out)
{
    const long row_cells = model->key_heads * batch->cache_columns * model->head_size;
    const long side = batch->cache_rows * row_cells; /* all keys of a layer, or all values */
    long count = 0;                                  /* M */
    for (long row = 0; row < batch->rows; row++) count += batch->widths[row];
    Workspace work = divide(memory, model, count, batch->total);

    if (!gather(model, batch, &work)) return 1;
    for (long number = 0; number < model->layers; number++) {
        float *keys = batch->cache + 2 * number * side + batch->first_row * row_cells;
        run_layer(model, &model->layer[number], batch, count, work, keys, keys + side);
    }
    for (long i = 0; i < count; i++)
        rms_norm(1, work.residual + i * model->hidden, model->final_norm, model->rms_norm_eps, model->hidden,
                 out + work.slot[i] * model->hidden);
    return 0;
}
