/* The forward of Llama-shaped models. Activations are float32, weights are stored in a Format each, see structs.h.

   Called by forward.py. Padding is dropped first: all work is done for the M slots that count, of all rows.
   Threads share every step: matrix products by output columns, attention by slots, heads and cache columns, the rest by
   slots.
   The numbers of a slot are the same to the last bit in every batch, on any number of threads, see vectors.h
   and tree_mask.h.  */

#include "attention.h"
#include "elementwise.h"
#include "gemm.h"
#include "pool.h"
#include "tree_mask.h"

const long EXPORT sizeof_Linear = sizeof(Linear);
const long EXPORT sizeof_GatedLinear = sizeof(GatedLinear);
const long EXPORT sizeof_Layer = sizeof(Layer);
const long EXPORT sizeof_Model = sizeof(Model);
const long EXPORT sizeof_Batch = sizeof(Batch);

#define SLOT_BLOCK 8 /* slots of a part of the work between matrix products */

/* Intermediate results of one forward, one block of memory. */
typedef struct {
    float *residual;   /* (M, D) the residual stream */
    float *normalized; /* (M, D) */
    float *qkv;        /* (M, (H + 2 G) E) */
    float *heads;      /* (M, H E) what attention returns */
    float *gate_up;    /* (M, 2 F) */
    float *activated;  /* (M, F) */
    float *scores;     /* (threads, QUERY_BLOCK, CHUNK) */
    float *sums;       /* (M, H, chunks, E) attention to each chunk; `heads` where there is one */
    float *softmax;    /* (M, H, chunks, 2) */
    int *slot;         /* (M,) where it stands in (B, S) */
    int *position;     /* (M,) position id */
    int *column_count; /* (M,) columns attended to */
    int *columns;      /* (M, T) these columns */
    int *mask_slots;   /* (mask_count,) slots of M where the adapter acts, rising */
    long mask_count;
    float *mask_in;    /* (mask_count, largest K) inputs of these slots */
    float *mask_low;   /* (mask_count, R) */
} Workspace;

/* A forward under way, as its parts see it. */
typedef struct {
    const Model *model;
    const Batch *batch;
    long count; /* M */
    long threads;
    Workspace work;
    const Layer *layer;   /* the layer at hand */
    const float *norm;    /* (D,) weight of the RMS norm to be taken */
    float *keys, *values; /* of the layer at hand: (rows, G, cache columns, E) */
    float *out;           /* (B, S, D) */
} Pass;

static long larger(long a, long b) { return a > b ? a : b; }

static long smaller(long a, long b) { return a < b ? a : b; }

static long heads_size(const Model *model) { return model->query_heads * model->head_size; }

static long qkv_size(const Model *model) { return (model->query_heads + 2 * model->key_heads) * model->head_size; }

/* Most inputs of a linear map. */
static long largest_input(const Model *model)
{
    return larger(larger(model->hidden, model->inner), heads_size(model));
}

/* Chunks of the longest list of columns. */
static long chunk_count(long total) { return (total + CHUNK - 1) / CHUNK; }

/* Floats in the workspace of a forward of `count` slots over `total` columns. `divide` takes the same. */
EXPORT long workspace_size(const Model *model, long count, long total, long threads)
{
    long floats = 2 * model->hidden + qkv_size(model) + heads_size(model) + 3 * model->inner;
    long integers = 3 + total; /* an int is as long as a float */
    const long parts = model->query_heads * chunk_count(total); /* of attention */
    floats += 2 * parts + (chunk_count(total) > 1 ? parts * model->head_size : 0);
    if (model->mask_id >= 0) {
        floats += largest_input(model) + model->rank;
        integers += 1;
    }
    return count * (floats + integers) + threads * QUERY_BLOCK * CHUNK;
}

static Workspace divide(float *memory, const Model *model, long count, long total, long threads)
{
    Workspace work;
    const long chunks = chunk_count(total), parts = count * model->query_heads * chunks; /* of attention */
    work.residual = memory;
    work.normalized = work.residual + count * model->hidden;
    work.qkv = work.normalized + count * model->hidden;
    work.heads = work.qkv + count * qkv_size(model);
    work.gate_up = work.heads + count * heads_size(model);
    work.activated = work.gate_up + count * 2 * model->inner;
    work.scores = work.activated + count * model->inner;
    work.softmax = work.scores + threads * QUERY_BLOCK * CHUNK;
    work.sums = chunks > 1 ? work.softmax + 2 * parts : work.heads;
    work.slot = (int *)(work.softmax + 2 * parts + (chunks > 1 ? parts * model->head_size : 0));
    work.position = work.slot + count;
    work.column_count = work.position + count;
    work.columns = work.column_count + count;
    work.mask_slots = work.columns + count * total;
    work.mask_count = 0;
    work.mask_in = (float *)(work.mask_slots + count);
    work.mask_low = work.mask_in + count * largest_input(model);
    return work;
}

/* Finds the slots that count, their positions, and where the adapter acts.
   Returns 0 if an id, a position or a column is out of bounds. */
static int locate(const Model *model, const Batch *batch, Workspace *work)
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
            work->slot[i] = slot;
            work->position[i] = position < model->window ? position : model->window - 1;
            if (id == model->mask_id) work->mask_slots[work->mask_count++] = i;
        }
    }
    return 1;
}

static long block_count(const Pass *pass) { return (pass->count + SLOT_BLOCK - 1) / SLOT_BLOCK; }

/* The slot behind the last of a block. */
static long block_end(const Pass *pass, long block)
{
    return (block + 1) * SLOT_BLOCK < pass->count ? (block + 1) * SLOT_BLOCK : pass->count;
}

/* Runs something for every block of slots, `times` parts each. */
static void for_blocks(Pass *pass, Part *run, long times)
{
    share(pass->threads, block_count(pass) * times, run, pass);
}

/* The embedding of a token, (D,). */
static void embed(const Model *model, long id, float *out)
{
    const long hidden = model->hidden;
    if (id == model->mask_id) {
        memcpy(out, model->mask_embedding, hidden * sizeof *out);
    } else if (model->embedding_format == FLOAT32) {
        memcpy(out, (const float *)model->embeddings + id * hidden, hidden * sizeof *out);
    } else {
        const unsigned short *halves = (const unsigned short *)model->embeddings + id * hidden;
        for (long d = 0; d < hidden; d++) {
            const unsigned bits = (unsigned)halves[d] << 16;
            memcpy(out + d, &bits, sizeof bits);
        }
    }
}

/* Embeddings of a block, and the columns its slots attend to. */
static void embed_block(void *context, long block, long thread)
{
    const Pass *pass = context;
    const Workspace *work = &pass->work;
    const long total = pass->batch->total;
    (void)thread;
    for (long i = block * SLOT_BLOCK; i < block_end(pass, block); i++) {
        const long slot = work->slot[i];
        embed(pass->model, pass->batch->ids[slot], work->residual + i * pass->model->hidden);
        work->column_count[i] =
            attended_columns(pass->batch, slot / pass->batch->slots, slot, work->columns + i * total);
    }
}

static void normalize_block(void *context, long block, long thread)
{
    const Pass *pass = context;
    const long hidden = pass->model->hidden, first = block * SLOT_BLOCK;
    (void)thread;
    rms_norm(block_end(pass, block) - first, pass->work.residual + first * hidden, pass->norm,
             pass->model->rms_norm_eps, hidden, pass->work.normalized + first * hidden);
}

/* The RMS norm of all slots. */
static const float *normalized(Pass *pass, const float *weight)
{
    pass->norm = weight;
    for_blocks(pass, normalize_block, 1);
    return pass->work.normalized;
}

/* A linear map of all slots; then, at mask slots alone, what the adapter adds: these slots are a block of their own, so
   the numbers of all others are those of a forward without adapter.  residual, out: as in `gemm`. */
static void gated_gemm(const Pass *pass, const GatedLinear *linear, const float *in, const float *residual, float *out)
{
    const Workspace *work = &pass->work;
    const long inputs = linear->full.inputs;
    gemm(&linear->full, pass->count, in, residual, out, pass->threads);
    if (!work->mask_count || !linear->down.outputs) return;
    for (long i = 0; i < work->mask_count; i++)
        memcpy(work->mask_in + i * inputs, in + work->mask_slots[i] * inputs, inputs * sizeof *in);
    gemm(&linear->down, work->mask_count, work->mask_in, NULL, work->mask_low, pass->threads);
    gemm_add(&linear->up, work->mask_count, work->mask_low, work->mask_slots, out, pass->threads);
}

/* RMS norm of every head, in place.  heads: (count, E) */
static void normalize_heads(const Model *model, long count, const float *weight, float *heads)
{
    if (weight) rms_norm(count, heads, weight, model->rms_norm_eps, model->head_size, heads);
}

/* Normalizes and rotates queries and keys of a block, and writes its keys and values to the cache. */
static void rotate_and_cache_block(void *context, long block, long thread)
{
    const Pass *pass = context;
    const Model *model = pass->model;
    const Workspace *work = &pass->work;
    const long size = model->head_size, heads = model->query_heads, groups = model->key_heads;
    (void)thread;
    for (long i = block * SLOT_BLOCK; i < block_end(pass, block); i++) {
        float *qkv = work->qkv + i * qkv_size(model);
        long row = work->slot[i] / pass->batch->slots, column = pass->batch->columns[work->slot[i]];
        const float *cos = model->cos + work->position[i] * size, *sin = model->sin + work->position[i] * size;
        normalize_heads(model, heads, pass->layer->query_norm, qkv);
        normalize_heads(model, groups, pass->layer->key_norm, qkv + heads * size);
        for (long h = 0; h < heads + groups; h++) rope(qkv + h * size, cos, sin, size);
        for (long g = 0; g < groups; g++) {
            long cell = ((row * groups + g) * pass->batch->cache_columns + column) * size;
            memcpy(pass->keys + cell, qkv + (heads + g) * size, size * sizeof(float));
            memcpy(pass->values + cell, qkv + (heads + groups + g) * size, size * sizeof(float));
        }
    }
}

/* Grouped-query attention of one block of slots to one chunk of columns, for one key head: queries of one row together,
   QUERY_BLOCK at most. */
static void attend_part(void *context, long part, long thread)
{
    const Pass *pass = context;
    const Model *model = pass->model;
    const Workspace *work = &pass->work;
    const long size = model->head_size, heads = model->query_heads, groups = model->key_heads;
    const long per_group = heads / groups, total = pass->batch->total, chunks = chunk_count(total);
    const long chunk = part % chunks, group = part / chunks % groups, block = part / chunks / groups;
    float *scores = work->scores + thread * QUERY_BLOCK * CHUNK;
    Query queries[QUERY_BLOCK];
    long held = 0, shared = CHUNK; /* columns that all of these have: the shortest list */
    for (long i = block * SLOT_BLOCK; i < block_end(pass, block); i++) {
        const long row = work->slot[i] / pass->batch->slots;
        const long cells = (row * groups + group) * pass->batch->cache_columns * size;
        const long count = smaller(work->column_count[i] - chunk * CHUNK, CHUNK);
        const int last = i + 1 == block_end(pass, block) || work->slot[i + 1] / pass->batch->slots != row;
        for (long h = group * per_group; h < (group + 1) * per_group; h++) {
            if (count > 0 || !chunk) {
                const long place = (i * heads + h) * chunks + chunk;
                shared = smaller(shared, count);
                queries[held] = (Query){
                    .query = work->qkv + i * qkv_size(model) + h * size,
                    .columns = work->columns + i * total + chunk * CHUNK,
                    .count = count,
                    .scores = scores + held * CHUNK,
                    .sums = work->sums + place * size,
                    .softmax = work->softmax + place * 2,
                };
                held++;
            }
            if (!held || (held < QUERY_BLOCK && !(last && h + 1 == (group + 1) * per_group))) continue;
            attention(size, queries, held, shared, pass->keys + cells, pass->values + cells);
            for (long q = 0; chunks == 1 && q < held; q++)
                merge_chunks(size, 1, queries[q].sums, queries[q].softmax, queries[q].sums);
            held = 0;
            shared = CHUNK;
        }
    }
}

/* What each head of a block attends to, from all chunks of its columns. */
static void merge_block(void *context, long block, long thread)
{
    const Pass *pass = context;
    const Workspace *work = &pass->work;
    const long size = pass->model->head_size, heads = pass->model->query_heads;
    const long chunks = chunk_count(pass->batch->total);
    (void)thread;
    for (long i = block * SLOT_BLOCK; i < block_end(pass, block); i++)
        for (long place = i * heads; place < (i + 1) * heads; place++)
            merge_chunks(size, larger(chunk_count(work->column_count[i]), 1), work->sums + place * chunks * size,
                         work->softmax + place * chunks * 2, work->heads + place * size);
}

static void activate_block(void *context, long block, long thread)
{
    const Pass *pass = context;
    const long inner = pass->model->inner, first = block * SLOT_BLOCK;
    (void)thread;
    swiglu(block_end(pass, block) - first, inner, pass->work.gate_up + 2 * first * inner,
           pass->work.activated + first * inner);
}

/* One transformer layer: attention and MLP, each added to the residual stream. */
static void run_layer(Pass *pass, const Layer *layer)
{
    const Workspace *work = &pass->work;
    const long chunks = chunk_count(pass->batch->total);
    pass->layer = layer;
    /* 1) attention */
    gated_gemm(pass, &layer->qkv, normalized(pass, layer->attention_norm), NULL, work->qkv);
    for_blocks(pass, rotate_and_cache_block, 1);
    for_blocks(pass, attend_part, pass->model->key_heads * chunks);
    if (chunks > 1) for_blocks(pass, merge_block, 1);
    gated_gemm(pass, &layer->attention_out, work->heads, work->residual, work->residual);
    /* 2) MLP */
    gated_gemm(pass, &layer->gate_up, normalized(pass, layer->mlp_norm), NULL, work->gate_up);
    for_blocks(pass, activate_block, 1);
    gated_gemm(pass, &layer->down, work->activated, work->residual, work->residual);
}

/* The final norm of a block, to where its slots stand in the batch. */
static void finish_block(void *context, long block, long thread)
{
    const Pass *pass = context;
    const long hidden = pass->model->hidden;
    (void)thread;
    for (long i = block * SLOT_BLOCK; i < block_end(pass, block); i++)
        rms_norm(1, pass->work.residual + i * hidden, pass->model->final_norm, pass->model->rms_norm_eps, hidden,
                 pass->out + pass->work.slot[i] * hidden);
}

/* Hidden states after the final norm, out (B, S, D); padding is left as it is. Positions behind the window are put at
   its end.  memory: `workspace_size` floats.
   Returns 0; or 1 if an id, a position or a column is out of bounds, before anything is written. */
EXPORT int forward(const Model *model, const Batch *batch, long threads, float *memory, float *out)
{
    const long row_cells = model->key_heads * batch->cache_columns * model->head_size;
    const long side = batch->cache_rows * row_cells; /* all keys of a layer, or all values */
    long count = 0;                                  /* M */
    for (long row = 0; row < batch->rows; row++) count += batch->widths[row];
    Pass pass = {.model = model, .batch = batch, .count = count, .threads = threads, .out = out};
    pass.work = divide(memory, model, count, batch->total, threads);

    if (!locate(model, batch, &pass.work)) return 1;
    for_blocks(&pass, embed_block, 1);
    for (long number = 0; number < model->layers; number++) {
        pass.keys = batch->cache + 2 * number * side + batch->first_row * row_cells;
        pass.values = pass.keys + side;
        run_layer(&pass, &model->layer[number]);
    }
    for_blocks(&pass, finish_block, 1);
    return 0;
}
