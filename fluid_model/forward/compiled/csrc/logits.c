/* The likeliest token of some rows of logits, the k likeliest and their probabilities of others. */

#include "pool.h"
#include "structs.h"
#include "vectors.h"

#include <math.h>
#include <string.h>

#define BLOCK (4 * LANES) /* logits that are looked at together: few blocks hold one of the largest */
#define PARTS_PER_THREAD 4

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

/* Enters a number into the k largest so far, falling. */
static void keep(float number, long k, float *numbers)
{
    long rank = k;
    for (; rank && number > numbers[rank - 1]; rank--)
        if (rank < k) numbers[rank] = numbers[rank - 1];
    if (rank < k) numbers[rank] = number;
}

/* k blocks have a peak that is no less than the k-th largest peak, so the k largest logits are no less either. */
static void largest(long vocabulary, const float *logits, long k, long *tokens, float *best)
{
    const long blocks = vocabulary / BLOCK;
    float peaks[blocks + 1], high[k];
    for (long rank = 0; rank < k; rank++) high[rank] = -INFINITY;
    for (long block = 0; block < blocks; block++) keep(peaks[block] = peak(logits + block * BLOCK), k, high);
    Ranking list = {k, 0, tokens, best};
    for (long block = 0; block < blocks; block++)
        if (peaks[block] >= high[k - 1]) enter(&list, logits, block * BLOCK, (block + 1) * BLOCK);
    enter(&list, logits, blocks * BLOCK, vocabulary);
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

/* The first of the largest. */
static long likeliest(long vocabulary, const float *logits)
{
    float highest = -INFINITY;
    long block = 0, token = 0;
    for (; token + BLOCK <= vocabulary; token += BLOCK) {
        const float high = peak(logits + token);
        if (high > highest) highest = high, block = token;
    }
    for (; token < vocabulary; token++)
        if (logits[token] > highest) highest = logits[token], block = token;
    while (logits[block] < highest) block++;
    return block;
}

/* The states at some places, one behind the other: hidden (any, D), places (M,) -> selected (M, D). */
EXPORT void select_states(const float *hidden, long size, const long *places, long count, float *selected)
{
    for (long at = 0; at < count; at++) memcpy(selected + at * size, hidden + places[at] * size, size * sizeof(float));
}

typedef struct {
    const float *logits;
    long single, count, vocabulary, k, parts, *first, *tokens;
    float *probabilities;
} Rows;

static void rank_rows(void *context, long part, long thread)
{
    const Rows *rows = context;
    const long k = rows->k;
    for (long row = rows->count * part / rows->parts; row < rows->count * (part + 1) / rows->parts; row++) {
        const float *logits = rows->logits + row * rows->vocabulary;
        if (row < rows->single) {
            rows->first[row] = likeliest(rows->vocabulary, logits);
            continue;
        }
        const long at = (row - rows->single) * k;
        float *probabilities = rows->probabilities + at;
        largest(rows->vocabulary, logits, k, rows->tokens + at, probabilities); /* logits, for now */
        const float highest = probabilities[0], total = partition(rows->vocabulary, logits, highest);
        for (long rank = 0; rank < k; rank++) probabilities[rank] = expf(probabilities[rank] - highest) / total;
    }
    (void)thread;
}

/* logits (M, V) -> of the first `single` rows the likeliest token, (single,); of the others the k likeliest and their
   softmax probabilities, (M - single, k) each, the most probable first. The first of equals ranks first. */
EXPORT void rank_logits(long single, long count, long vocabulary, const float *logits, long *first, long k,
                        long *tokens, float *probabilities, long threads)
{
    const long most = threads * PARTS_PER_THREAD, parts = count < most ? count : most;
    Rows rows = {logits, single, count, vocabulary, k, parts, first, tokens, probabilities};
    share(threads, parts, rank_rows, &rows);
}
