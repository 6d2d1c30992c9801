/* Attention over lists of cache columns.

   Queries of one row attend to mostly the same columns: the cached prefix comes first in every list. Those columns are
   read for all queries of a block while they are in the cache of the processor; the rest, each query's own. Every
   query's sums are taken in the order of its own list, so they do not depend on the queries beside it.

   Head sizes are counted in vectors: `parts` of LANES numbers.  */

#include "attention.h"
#include "structs.h"
#include "vectors.h"

#define VALUE_BLOCK (4 * LANES) /* columns whose values stay in the first cache of the processor */

/* Whether `count` entries of a list from t on are columns side by side, as in a cached prefix. Then no entry is read. */
static inline int adjacent(const int *columns, long t, long count)
{
    return columns[t + count - 1] - columns[t] == count - 1; /* they rise */
}

/* Scaled dot products with LANES columns from t on, stored as scores. Past the end the last column is taken again.
   side_by_side: whether these columns are. */
INLINE vec score_columns(const int parts, const int side_by_side, const Query *query, long t, const float *keys)
{
    const long size = parts * LANES, last = query->count - 1;
    const float *first = keys + query->columns[t] * size;
    vec products[LANES]; /* of each column, not yet summed over the lanes */
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        const float *key = side_by_side ? first + i * size : keys + query->columns[t + i < last ? t + i : last] * size;
        products[i] = load(query->query) * load(key);
        for (int e = 1; e < parts; e++) products[i] += load(query->query + e * LANES) * load(key + e * LANES);
    }
    vec scores = sum_each(products) * (1.0f / sqrtf(size));
    store(query->scores + t, scores);
    return scores;
}

/* Softmax without its division: scores become exp(score - largest). Fills query->softmax.
   maxima: largest score of each lane. */
static void exponentiate(const Query *query, vec maxima)
{
    vec total = {0};
    float largest = maxima[0];
    for (int i = 1; i < LANES; i++) largest = maxima[i] > largest ? maxima[i] : largest;
    for (long t = 0; t < query->count; t += LANES) {
        vec weights = vec_exp(load(query->scores + t) - largest);
        weights = blend(LANE < (int)(query->count - t), weights, (vec){0}); /* the end was filled up */
        store(query->scores + t, weights);
        total += weights;
    }
    query->softmax[0] = query->count ? largest : 0.0f;
    query->softmax[1] = query->count ? sum(total) : 1.0f; /* a query that attends to nothing gets zeros */
}

/* Adds the weighted values of columns start to end. Even and odd columns have sums of their own, so that two additions
   are under way at a time.  sums: (2, E), even and odd.  side_by_side: whether these columns are. */
INLINE void add_values(const int parts, const int side_by_side, const Query *query, long start, long end,
                       const float *values, float *sums)
{
    const long size = parts * LANES;
    const float *weights = query->scores, *first = values + query->columns[start] * size;
    vec even[MAX_HEAD_SIZE / LANES], odd[MAX_HEAD_SIZE / LANES];
    for (int e = 0; e < parts; e++) {
        even[e] = load(sums + e * LANES);
        odd[e] = load(sums + size + e * LANES);
    }
    long t = start;
    for (; t + 1 < end; t += 2) {
        const float *value = side_by_side ? first + (t - start) * size : values + query->columns[t] * size;
        const float *next = side_by_side ? value + size : values + query->columns[t + 1] * size;
        for (int e = 0; e < parts; e++) {
            even[e] += weights[t] * load(value + e * LANES);
            odd[e] += weights[t + 1] * load(next + e * LANES);
        }
    }
    if (t < end)
        for (int e = 0; e < parts; e++) even[e] += weights[t] * load(values + query->columns[t] * size + e * LANES);
    for (int e = 0; e < parts; e++) {
        store(sums + e * LANES, even[e]);
        store(sums + size + e * LANES, odd[e]);
    }
}

INLINE void attend(const int parts, const Query *query, long queries, long shared, const float *keys,
                   const float *values)
{
    const long size = parts * LANES;
    const long together = shared - shared % LANES; /* columns read for all queries, in whole vectors */
    vec maxima[QUERY_BLOCK];
    float sums[QUERY_BLOCK * 2 * MAX_HEAD_SIZE];

    /* 1) scores: shared columns, then each query's own */
    for (long q = 0; q < queries; q++) maxima[q] = (vec){0} - INFINITY;
    for (long t = 0; t < together; t += LANES)
        for (long q = 0; q < queries; q++) {
            vec scores = adjacent(query[q].columns, t, LANES) ? score_columns(parts, 1, query + q, t, keys)
                                                              : score_columns(parts, 0, query + q, t, keys);
            maxima[q] = blend(scores > maxima[q], scores, maxima[q]);
        }
    for (long q = 0; q < queries; q++) {
        for (long t = together; t < query[q].count; t += LANES) {
            vec scores = score_columns(parts, 0, query + q, t, keys);
            maxima[q] = blend(scores > maxima[q], scores, maxima[q]);
        }
        /* 2) softmax, not divided */
        exponentiate(query + q, maxima[q]);
        memset(sums + q * 2 * size, 0, 2 * size * sizeof *sums);
    }
    /* 3) values: shared columns, then each query's own */
    for (long t = 0; t < together; t += VALUE_BLOCK) {
        const long end = t + VALUE_BLOCK < together ? t + VALUE_BLOCK : together;
        for (long q = 0; q < queries; q++)
            if (adjacent(query[q].columns, t, end - t))
                add_values(parts, 1, query + q, t, end, values, sums + q * 2 * size);
            else
                add_values(parts, 0, query + q, t, end, values, sums + q * 2 * size);
    }
    for (long q = 0; q < queries; q++) {
        const float *even = sums + q * 2 * size, *odd = even + size;
        if (together < query[q].count)
            add_values(parts, 0, query + q, together, query[q].count, values, sums + q * 2 * size);
        for (int e = 0; e < size; e += LANES) store(query[q].sums + e, load(even + e) + load(odd + e));
    }
}

/* Compiled once for every common head size: sums stay in registers where the size is a constant. */
void attention(long head_size, const Query *query, long queries, long shared, const float *keys, const float *values)
{
#define PARTS(parts)                                            \
    case parts:                                                 \
        attend(parts, query, queries, shared, keys, values);    \
        break;
    switch (head_size / LANES) {
        PARTS(1)
        PARTS(2)
        PARTS(3)
        PARTS(4)
        PARTS(8)
    default:
        attend(head_size / LANES, query, queries, shared, keys, values);
    }
#undef PARTS
}

void merge_chunks(long head_size, long chunks, const float *sums, const float *softmax, float *out)
{
    float largest = softmax[0], total = 0;
    for (long c = 1; c < chunks; c++) largest = softmax[2 * c] > largest ? softmax[2 * c] : largest;
    float share[chunks]; /* of each chunk: what its weights are multiplied by; exactly 1 where there is one chunk */
    for (long c = 0; c < chunks; c++) {
        share[c] = vec_exp((vec){0} + (softmax[2 * c] - largest))[0];
        total += share[c] * softmax[2 * c + 1];
    }
    for (long e = 0; e < head_size; e += LANES) {
        vec merged = {0};
        for (long c = 0; c < chunks; c++) merged += share[c] * load(sums + c * head_size + e);
        store(out + e, merged / total);
    }
}
