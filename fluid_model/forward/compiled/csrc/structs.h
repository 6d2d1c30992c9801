/* What Python hands over. structs.py holds the other halves: it compares the sizes when the library is loaded.

   Legend: B rows, S slots fed, M slots of all rows that count (no padding), T key columns, V vocabulary, D hidden,
   H query heads, G key heads, E head size, F inner size of the MLP, W window, R rank of an adapter's map. D, E and F
   are multiples of LANES.  */

#ifndef STRUCTS_H
#define STRUCTS_H

#define EXPORT __attribute__((visibility("default"))) /* called by Python; all else is hidden by -fvisibility */
#define MAX_HEAD_SIZE 256

_Static_assert(sizeof(long) == 8, "torch's int64 is read as long");

/* How weights are stored. Products and sums are float32 throughout. */
typedef enum { FLOAT32, BFLOAT16, INT8 } Format;

/* A linear map. Its weights are packed in panels of output columns, see gemm.h. */
typedef struct {
    const void *panels;  /* (outputs / width rounded up, inputs, width), width being `panel_width` */
    const float *scales; /* (outputs,) of int8 weights: a weight is its integer times its row's scale; else NULL */
    const float *bias;   /* (outputs,), or NULL */
    long inputs, outputs;
    long format; /* a Format */
} Linear;

/* A linear map, and the low-rank map of a gated adapter that is added to it at mask slots. */
typedef struct {
    Linear full;     /* K -> N */
    Linear down, up; /* K -> R, R -> N; no outputs where the map is not adapted */
} GatedLinear;

typedef struct {
    const float *attention_norm, *mlp_norm; /* (D,) each: weights of the RMS norms */
    const float *query_norm, *key_norm;     /* (E,) each: of the RMS norms of every head; NULL: none (but Qwen3) */
    GatedLinear qkv;                        /* D -> (H + 2 G) E: queries, keys, values */
    GatedLinear attention_out;              /* H E -> D */
    GatedLinear gate_up;                    /* D -> 2 F: gate, up */
    GatedLinear down;                       /* F -> D */
} Layer;

typedef struct {
    const void *embeddings;  /* (V, D) */
    const float *final_norm; /* (D,) */
    const float *cos, *sin;  /* (W, E) each; the sine of the left half is negative */
    float rms_norm_eps;
    long vocabulary, layers, hidden, inner, query_heads, key_heads, head_size, window;
    long mask_id; /* the token at whose slots the adapter acts; negative without an adapter */
    long rank;    /* largest R of an adapted map */
    const float *mask_embedding; /* (D,) in place of that token's row; NULL without an adapter */
    long embedding_format;       /* FLOAT32 or BFLOAT16 */
    const Layer *layer;
} Model;

/* One forward over the key/value cache. */
typedef struct {
    const long *ids;     /* (B, S) */
    const long *columns; /* (B, S) cache column of each fed slot */
    const long *widths;  /* (B,) slots of each row that count; the rest is padding */
    const long *enter, *exit, *offsets; /* (B, S) each, see AttentionIntervals in attention_masks.py; NULL: causal */
    long rows, slots, total;            /* B, S, T */
    long first_row, cache_rows, cache_columns; /* the batch is fed to the cache's rows from first_row on */
    float *cache;                              /* (layers, 2, cache_rows, G, cache_columns, E): keys, then values */
} Batch;

/* The drafts of the rows of a batch, see drafts.c. B rows, W slots of a row at most, n rows of a step. */
typedef struct {
    long *tokens, *parents, *depths, *masks; /* (B, W) each, of every node; masks: slots of the block anchored there */
    double *reached;                         /* (B, W): that the path from the root to a node is accepted */
    long *nodes, *slots;                     /* (B,) each */
    long min_stride, max_stride, max_slots, candidates;
    const long *window_left;     /* (n,) positions behind the row's cached tokens */
    const double *costs, *rates; /* (n,) each: marginal cost of a slot, in tokens; acceptance rate */
    long room;                   /* nodes of a tree before it is pruned */
    long *scratch;               /* (4, room) */
    double *scratch_reached;     /* (2, room) */
} DraftTable;

/* A token of an answer, and the forward that wrote it. */
typedef struct {
    long id, forward;
} Token;

/* A step that is complete: its stride, the answer's length before and behind it, tokens expected. */
typedef struct {
    long predicted, begun, ended;
    double expected;
} Step;

/* A rejected draft: the forward, the place of its first token in the answer, its tokens. */
typedef struct {
    long forward, place, length;
} Rejected;

/* The rows of a batch and their answers, see rows.c and engine/rows.py. Lists are (B, room) each, of which the numbers
   before them count. */
typedef struct {
    long *cached, *forwards, *slots; /* (B,) each */
    const long *limits;              /* (B,) tokens of an answer at most */
    double *seconds;                 /* (B,) */
    long *lengths;
    Token *answers;
    long *steps_made;
    Step *steps;
    long *drafts_rejected;
    Rejected *drafts;
    long *tokens_rejected, *rejected; /* those of the rejected drafts, end to end */
    long answer_room, step_room, draft_room, rejected_room;
    const unsigned char *harmless; /* (known,) whether a token ends no answer */
    long known;
} RowTable;

/* What a forward brought n rows, see Updates in engine/strategy.py; T is `width`, W `rejected_width`. Arrays may be NULL:
   then the number beside them holds for all rows, or 0. */
typedef struct {
    const long *widths; /* (n,) slots fed */
    long slots, forwards;
    double seconds;
    const long *tokens, *ages; /* (n, T) each */
    long width;
    const long *lengths, *kept, *dropped, *strides; /* (n,) each */
    long length, kept_of_all, stride;
    const double *expected; /* (n,); NULL: 1 */
    const long *rejected_places, *rejected_counts, *rejected; /* (n,), (n,), (n, W) */
    long rejected_width;
} StepUpdates;

#endif
