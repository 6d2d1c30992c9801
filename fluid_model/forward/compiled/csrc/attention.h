/* Attention of several queries over the cached keys and values of one row and one key head, chunk by chunk of their
   columns, so that threads can share a long context (FlashDecoding, Dao et al. 2023).  */

#ifndef ATTENTION_H
#define ATTENTION_H

#define QUERY_BLOCK 8 /* queries that read keys and values together, at most */
#define CHUNK 512     /* columns of a list that are attended to at a time; the last chunk of a list may be shorter */

/* One head of one slot, and one chunk of its columns. */
typedef struct {
    const float *query; /* (E,) */
    const int *columns; /* (count,) cache columns attended to, rising */
    long count;         /* CHUNK at most */
    float *scores;      /* workspace of CHUNK floats */
    float *sums;        /* (E,) values, each times exp(score - largest) */
    float *softmax;     /* (2,) the largest score, and the sum of the weights */
} Query;

/* Scaled dot product attention of `queries` queries, not yet divided by the sum of weights: fills `sums` and `softmax`.
   keys, values: (cache columns, E).  shared: columns that every query has at least. */
void attention(long head_size, const Query *query, long queries, long shared, const float *keys, const float *values);

/* What a query attends to, from all its chunks.
   sums: (chunks, E).  softmax: (chunks, 2).  out: (E,), may be `sums`. */
void merge_chunks(long head_size, long chunks, const float *sums, const float *softmax, float *out);

#endif
