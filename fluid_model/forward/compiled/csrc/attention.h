/* Attention of several queries over the cached keys and values of one row and one key head. */

#ifndef ATTENTION_H
#define ATTENTION_H

#define QUERY_BLOCK 8 /* queries that read keys and values together, at most */

/* One head of one slot. */
typedef struct {
    const float *query; /* (E,) */
    const int *columns; /* (count,) cache columns attended to, rising */
    long count;
    float *scores; /* workspace of count + LANES floats */
    float *out;    /* (E,) */
} Query;

/* Scaled dot product attention of `queries` queries.
   keys, values: (cache columns, E).  shared: columns that every query has at least. */
void attention(long head_size, const Query *query, long queries, long shared, const float *keys, const float *values);

#endif
