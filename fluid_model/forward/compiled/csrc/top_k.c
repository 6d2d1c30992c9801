/* The k most probable tokens of each row of logits. */

#include "pool.h"
#include "structs.h"
#include "vectors.h"

#define BLOCK (4 * LANES) /* logits that are looked at together: few blocks hold one of the largest */
#define PARTS_PER_THREAD 4
#define BEGINNING 1024    /* logits that are looked at one by one: the largest so far change often */

static vec larger(vec one, vec other) { return blend(one > other, one, other); }

/* The largest of BLOCK logits. */
static float peak(const float *logits)
{
    vec high = larger(larger(load(logits), load(logits + LANES)),
                      larger(load(logits + 2 * LANES), load(logits + 3 * LANES)));
    for (int half = LANES / 2; half; half /= 2) high = larger(high, swap_lanes(high, half));
    return high[0];
}

/* A short list of the largest so far, which few logits enter. tokens, best: (k,) each, falling. */
typedef struct {
    long k, held, *tokens;
    float *best;
} Ranking;

/* Enters logits `from` to `to` - 1. The first of equals ranks first. */
static inline void enter(Ranking *list, const float *logits, long from, long to)
{
    const long k = list->k;
    for (long token = from; token < to; token++) {
        if (list->held == k && !(logits[token] > list->best[k - 1])) continue;
        long rank = list->held < k ? list->held++ : k - 1;
        for (; rank && logits[token] > list->best[rank - 1]; rank--) {
            list->best[rank] = list->best[rank - 1];
            list->tokens[rank] = list->tokens[rank - 1];
        }
        list->best[rank] = logits[token];
        list->tokens[rank] = token;
    }
}

static void largest(long vocabulary, const float *logits, long k, long *tokens, float *best)
{
    Ranking list = {k, 0, tokens, best};
    long token = vocabulary < BEGINNING ? vocabulary : BEGINNING;
    enter(&list, logits, 0, token);
    for (; token + BLOCK <= vocabulary; token += BLOCK)
        if (list.held < k || peak(logits + token) > best[k - 1]) enter(&list, logits, token, token + BLOCK);
    enter(&list, logits, token, vocabulary);
}

/* The denominator of the softmax, sum(exp(logit - highest)). */
static float partition(long vocabulary, const float *logits, float highest)
{
    vec total = {0};
    float rest = 0;
    long v = 0;
    for (; v + LANES <= vocabulary; v += LANES) total += vec_exp(load(logits + v) - highest);
    for (; v < vocabulary; v++) rest += expf(logits[v] - highest);
    return rest + sum(total);
}

typedef struct {
    const float *logits;
    long count, vocabulary, k, parts, *tokens;
    float *probabilities;
} Rows;

static void rank_rows(void *context, long part, long thread)
{
    const Rows *rows = context;
    const long k = rows->k;
    for (long row = rows->count * part / rows->parts; row < rows->count * (part + 1) / rows->parts; row++) {
        const float *logits = rows->logits + row * rows->vocabulary;
        float *probabilities = rows->probabilities + row * k;
        largest(rows->vocabulary, logits, k, rows->tokens + row * k, probabilities); /* logits, for now */
        const float highest = probabilities[0], total = partition(rows->vocabulary, logits, highest);
        for (long rank = 0; rank < k; rank++) probabilities[rank] = expf(probabilities[rank] - highest) / total;
    }
    (void)thread;
}

/* logits (M, V) -> tokens and their softmax probabilities, (M, k) each, the most probable first. */
EXPORT void top_k(long count, long vocabulary, const float *logits, long k, long *tokens, float *probabilities,
                  long threads)
{
    const long most = threads * PARTS_PER_THREAD, parts = count < most ? count : most;
    Rows rows = {logits, count, vocabulary, k, parts, tokens, probabilities};
    share(threads, parts, rank_rows, &rows);
}
