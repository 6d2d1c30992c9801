/* Attention over lists of cache columns.

   Queries of one row attend to mostly the same columns: the cached prefix comes first in every list. Those columns are
   read for all queries of a block while they are in the cache of the processor; the rest, each query's own. Every
   query's sums are taken in the order of its own list, so they do not depend on the queries beside it.

   Head sizes are counted in vectors: `parts` of LANES numbers.  */

#include "attention.h"
#include "structs.h"
#include "vectors.h"

/* Scaled dot products with LANES columns from t on, stored as scores. Past the end the last column is taken again. */
INLINE vec score_columns(const int parts, const Query *query, long t, const float *keys)
{
    const long size = parts * LANES, last = query->count - 1;
    vec products[LANES]; /* of each column, not yet summed over the lanes */
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        const float *key = keys + query->columns[t + i < last ? t + i : last] * size;
        products[i] = load(query->query) * load(key);
        for (int e = 1; e < parts; e++) products[i] += load(query->query + e * LANES) * load(key + e * LANES);
    }
    vec scores = sum_each(products) * (1.0f / sqrtf(size));
    store(query->scores + t, scores);
    return scores;
}

/* Softmax without its division: scores become exp(score - largest). Returns their sum.
   maxima: largest score of each lane. */
static float exponentiate(const Query *query, vec maxima)
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
    return sum(total);
}

/* Adds the weighted values of columns start to end. Even and odd columns have sums of their own, so that two additions
   are under way at a time.  sums: (2, E), even and odd. */
INLINE void add_values(const int parts, const Query *query, long start, long end, const float *values, float *sums)
{
    const long size = parts * LANES;
    const float *weights = query->scores;
    vec even[MAX_HEAD_SIZE / LANES], odd[MAX_HEAD_SIZE / LANES];
    for (int e = 0; e < parts; e++) {
        even[e] = load(sums + e * LANES);
        odd[e] = load(sums + size + e * LANES);
    }
    long t = start;
    for (; t + 1 < end; t += 2)
        for (int e = 0; e < parts; e++) {
            even[e] += weights[t] * load(values + query->columns[t] * size + e * LANES);
            odd[e] += weights[t + 1] * load(values + query->columns[t + 1] * size + e * LANES);
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
    float totals[QUERY_BLOCK], sums[QUERY_BLOCK * 2 * MAX_HEAD_SIZE];

    /* 1) scores: shared columns, then each query's own */
    for (long q = 0; q < queries; q++) maxima[q] = (vec){0} - INFINITY;
    for (long t = 0; t < together; t += LANES)
        for (long q = 0; q < queries; q++) {
            vec scores = score_columns(parts, query + q, t, keys);
            maxima[q] = blend(scores > maxima[q], scores, maxima[q]);
        }
    for (long q = 0; q < queries; q++) {
        for (long t = together; t < query[q].count; t += LANES) {
            vec scores = score_columns(parts, query + q, t, keys);
            maxima[q] = blend(scores > maxima[q], scores, maxima[q]);
        }
        /* 2) softmax; a query that attends to nothing gets zeros */
        totals[q] = query[q].count ? exponentiate(query + q, maxima[q]) : 1.0f;
        memset(sums + q * 2 * size, 0, 2 * size * sizeof *sums);
    }
    /* 3) values: shared columns, then each query's own; divided by the sum of weights */
    for (long t = 0; t < together; t += LANES)
        for (long q = 0; q < queries; q++) add_values(parts, query + q, t, t + LANES, values, sums + q * 2 * size);
    for (long q = 0; q < queries; q++) {
        const float *even = sums + q * 2 * size, *odd = even + size;
        add_values(parts, query + q, together, query[q].count, values, sums + q * 2 * size);
        for (int e = 0; e < size; e += LANES)
            store(query[q].out + e, (load(even + e) + load(odd + e)) / totals[q]);
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
