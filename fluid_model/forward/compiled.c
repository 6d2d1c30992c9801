/* The forward of Llama-shaped models in float32 on a CPU, the K-head, and the choice of drafts. Compiled and called by
   native.py, which holds the other halves of these structures.

   Every number is summed in one order, whatever is computed beside it, and what a slot may not read is left out, not
   masked: a token's numbers are the same to the last bit in every batch, and among drafts and fans as alone.

   Legend: B rows, S slots fed, M slots of all rows that count, T columns, D hidden, H query heads, G key heads,
   E head size, F inner size. D, F and E are multiples of LANES, which the compiler is told.  */

#include <math.h>
#include <string.h>

#define WIDE (2 * LANES) /* columns of a panel */
#ifdef __AVX512F__
#define TALL 12 /* slots that go through a panel together, at most: their sums fill the registers */
#else
#define TALL 4
#endif
#define MOST_HEAD 256
#define SHORT 64 /* products summed in one go */
#define MANY 8   /* queries that read keys and values together, at most */

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int whole __attribute__((vector_size(4 * LANES)));

typedef struct { const float *panels, *bias; long from, to; } Map; /* (N / WIDE, from, WIDE), (N,) or none */
typedef struct { const float *before, *after; Map read, out, opened, down; } Layer;
typedef struct {
    const float *embed, *norm, *cos, *sin; /* (V, D), (D,), (W, E) and (W, E), the left half's sine negative */
    float eps;
    long vocabulary, layers, hidden, inner, heads, key_heads, head;
    const Layer *layer;
} Model;
typedef struct {
    const long *ids, *columns, *widths;        /* (B, S) each, slots of a row that count (B,) */
    const long *order, *until, *places;        /* (B, S) each, see masks.AttentionIntervals; or none: all is read as it stands */
    long rows, slots, total, first, held, room; /* the rows are those of the cache from `first` on */
    float *cache;                              /* (layers, 2, held, G, room, E) */
} Fed;

static inline lanes at(const float *from) { return *(const lanes *)from; }
static inline void put(float *to, lanes what) { *(lanes *)to = what; }
static inline lanes pick(whole which, lanes yes, lanes no) {
    return (lanes)((which & (whole)yes) | (~which & (whole)no));
}

/* Where each number stands. */
#if LANES == 16
static const whole LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif LANES == 8
static const whole LANE = {0, 1, 2, 3, 4, 5, 6, 7};
#else
static const whole LANE = {0, 1, 2, 3};
#endif

/* Each lane has that of the lane `half` away. */
static inline lanes crossed(lanes of, int half) {
#if __has_builtin(__builtin_shuffle)
    return __builtin_shuffle(of, LANE ^ half);
#else
    lanes to;
    for (int i = 0; i < LANES; i++) to[i] = of[i ^ half];
    return to;
#endif
}

/* LANES sums of LANES vectors, all in one order. */
static inline lanes sums(lanes *of) {
#pragma GCC unroll 4
    for (int half = LANES / 2; half; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; i++) {
            whole upper = (LANE & half) != 0;
            of[i] = pick(upper, of[i + half], of[i]) + crossed(pick(upper, of[i], of[i + half]), half);
        }
    return of[0];
}

static inline float sum(lanes of) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) of[i] += of[i + half];
    return of[0];
}

/* e to the x, from 1e-38 on: a power of two times a polynomial. What is no number stays none. */
static inline lanes exponential(lanes x) {
    lanes near = pick(x > 88.0f, (lanes){0} + 88.0f, pick(x < -87.0f, (lanes){0} - 87.0f, x));
    lanes power = near * 1.44269504f + 12582912.0f - 12582912.0f; /* rounded to a whole number */
    lanes rest = near - power * 0.693359375f + power * 2.12194440e-4f;
    lanes y = ((rest * (1.0f / 5040) + 1.0f / 720) * rest + 1.0f / 120) * rest + 1.0f / 24;
    y = ((y * rest + 1.0f / 6) * rest + 0.5f) * rest * rest + rest + 1.0f;
    y = (lanes)((whole)y + (__builtin_convertvector(power, whole) << 23));
    return pick(x == x, y, x);
}

/* (tall, WIDE) = (tall, size) times a panel (size, WIDE). */
static inline __attribute__((always_inline)) void tile(const int tall, long size, const float *in, const float *panel,
                                                       float *to)
{
    memset(to, 0, tall * WIDE * sizeof *to);
    for (long part = 0; part < size; part += SHORT) { /* sums of sums, which round less than one long sum */
        long end = part + SHORT < size ? part + SHORT : size;
        lanes left[TALL], right[TALL];
        for (int m = 0; m < tall; m++) left[m] = right[m] = (lanes){0};
        for (long k = part; k < end; k++, panel += WIDE) {
            lanes first = at(panel), second = at(panel + LANES);
            for (int m = 0; m < tall; m++) {
                left[m] += in[m * size + k] * first;
                right[m] += in[m * size + k] * second;
            }
        }
        for (int m = 0; m < tall; m++) {
            put(to + m * WIDE, at(to + m * WIDE) + left[m]);
            put(to + m * WIDE + LANES, at(to + m * WIDE + LANES) + right[m]);
        }
    }
}

static void tiles(long tall, long size, const float *in, const float *panel, float *to) {
#define TALL_IS(n) case n: tile(n, size, in, panel, to); break;
    switch (tall) { /* each with its sums in registers */
        TALL_IS(1) TALL_IS(2) TALL_IS(3)
#if TALL == 12
        TALL_IS(4) TALL_IS(5) TALL_IS(6) TALL_IS(7) TALL_IS(8) TALL_IS(9) TALL_IS(10) TALL_IS(11)
#endif
    default: tile(TALL, size, in, panel, to);
    }
}

/* to (M, map->to) = in (M, map->from) through a map, added to `more` (M, map->to) where there is one. */
void through(const Map *map, long count, const float *in, const float *more, float *to) {
    float block[TALL * WIDE];
    for (long n = 0; n < map->to; n += WIDE) {
        long wide = map->to - n < WIDE ? map->to - n : WIDE;
        for (long m = 0, tall; m < count; m += tall) {
            long left = count - m, blocks = (left + TALL - 1) / TALL;
            tall = (left + blocks - 1) / blocks;
            tiles(tall, map->from, in + m * map->from, map->panels + n * map->from, block);
            for (long i = 0; i < tall; i++) {
                long place = (m + i) * map->to + n;
                for (long j = 0; j < wide; j++) {
                    float value = block[i * WIDE + j];
                    if (map->bias) value += map->bias[n + j];
                    to[place + j] = more ? more[place + j] + value : value;
                }
            }
        }
    }
}

/* The K-head's strides of in (M, D), see khead.py: to (M,).  space: M inner + K numbers. */
void strides(const Map *first, const Map *second, long count, const float *in, float *space, long *to) {
    float *scores = space + count * first->to;
    through(first, count, in, NULL, space);
    for (long i = 0; i < count * first->to; i++) space[i] *= 0.5f + 0.5f * erff(space[i] * 0.70710678f);
    for (long m = 0; m < count; m++) {
        through(second, 1, space + m * first->to, NULL, scores);
        to[m] = 0;
        for (long k = 1; k < second->to; k++)
            if (scores[k] > scores[to[m]]) to[m] = k;
        to[m]++;
    }
}

/* The `most` largest of each of M rows of scores (M, size), the largest first, the first of equals: where they stand,
   and their probabilities, (M, most) each. */
void surest(long count, long size, const float *scores, long most, long *places, float *sure) {
    for (; count--; scores += size, places += most, sure += most) {
        for (long v = 0, found = 0; v < size; v++) {
            if (found == most && !(scores[v] > sure[most - 1])) continue;
            long rank = found < most ? found++ : most - 1;
            for (; rank && scores[v] > sure[rank - 1]; rank--) {
                sure[rank] = sure[rank - 1];
                places[rank] = places[rank - 1];
            }
            sure[rank] = scores[v];
            places[rank] = v;
        }
        const float highest = sure[0];
        lanes all = {0};
        float rest = 0;
        long v = 0;
        for (; v + LANES <= size; v += LANES) all += exponential(at(scores + v) - highest);
        for (; v < size; v++) rest += expf(scores[v] - highest);
        rest += sum(all);
        for (long rank = 0; rank < most; rank++) sure[rank] = expf(sure[rank] - highest) / rest;
    }
}

/* Root mean square norm of (M, size). */
static void normed(long count, const float *in, const float *weight, float eps, long size, float *to) {
    for (; count--; in += size, to += size) {
        lanes squares = {0};
        for (long d = 0; d < size; d += LANES) squares += at(in + d) * at(in + d);
        float scale = 1.0f / sqrtf(sum(squares) / size + eps);
        for (long d = 0; d < size; d += LANES) put(to + d, at(in + d) * scale * at(weight + d));
    }
}

/* Rotary embedding of one head, in place. */
static void turn(float *head, const float *cos, const float *sin, long size) {
    float other[MOST_HEAD];
    memcpy(other, head + size / 2, size / 2 * sizeof *head);
    memcpy(other + size / 2, head, size / 2 * sizeof *head);
    for (long e = 0; e < size; e += LANES) put(head + e, at(head + e) * at(cos + e) + at(other + e) * at(sin + e));
}

/* One head's query of a slot: over the columns `seen`, `count` of them.  shares: room for them, LANES more at most. */
typedef struct { const float *query; const int *seen; long count; float *shares, *to; } Asked;

/* Scores of LANES columns from t on, the last one's again where there are no more. */
static inline __attribute__((always_inline)) lanes score(const int parts, const Asked *asked, long t,
                                                         const float *keys)
{
    const long size = parts * LANES, last = asked->count - 1;
    const int *seen = asked->seen;
    lanes dots[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        const float *key = keys + seen[t + i < last ? t + i : last] * size;
        dots[i] = at(asked->query) * at(key);
        for (int e = 1; e < parts; e++) dots[i] += at(asked->query + e * LANES) * at(key + e * LANES);
    }
    lanes found = sums(dots) * (1.0f / sqrtf(size));
    put(asked->shares + t, found);
    return found;
}

/* Scores to shares that are not divided by their sum yet, which is returned. */
static float share(const Asked *asked, lanes most) {
    lanes all = {0};
    float highest = most[0];
    for (int i = 1; i < LANES; i++) highest = most[i] > highest ? most[i] : highest;
    for (long t = 0; t < asked->count; t += LANES) {
        lanes found = exponential(at(asked->shares + t) - highest);
        found = pick(LANE < (int)(asked->count - t), found, (lanes){0});
        put(asked->shares + t, found);
        all += found;
    }
    return sum(all);
}

/* Add the values of columns t to end, shared out, to the sums of every other one: both (2, parts) of LANES. */
static inline __attribute__((always_inline)) void add(const int parts, const Asked *asked, long t, long end,
                                                      const float *values, float *both)
{
    const long size = parts * LANES;
    lanes even[MOST_HEAD / LANES], odd[MOST_HEAD / LANES];
    for (int e = 0; e < parts; e++) even[e] = at(both + e * LANES), odd[e] = at(both + size + e * LANES);
    for (; t + 1 < end; t += 2)
        for (int e = 0; e < parts; e++) {
            even[e] += asked->shares[t] * at(values + asked->seen[t] * size + e * LANES);
            odd[e] += asked->shares[t + 1] * at(values + asked->seen[t + 1] * size + e * LANES);
        }
    if (t < end)
        for (int e = 0; e < parts; e++) even[e] += asked->shares[t] * at(values + asked->seen[t] * size + e * LANES);
    for (int e = 0; e < parts; e++) put(both + e * LANES, even[e]), put(both + size + e * LANES, odd[e]);
}

/* Queries of one row and of one head's keys, MANY at most. What they read is mostly the same, so the first of their
   columns, of which each has `least`, are read for all of them while they are near. */
static inline __attribute__((always_inline)) void attend(const int parts, const Asked *asked, long many, long least,
                                                         const float *keys, const float *values)
{
    const long size = parts * LANES, together = least - least % LANES;
    lanes most[MANY];
    float all[MANY], both[MANY * 2 * MOST_HEAD];
    for (long q = 0; q < many; q++) most[q] = (lanes){0} - INFINITY;
    for (long t = 0; t < together; t += LANES)
        for (long q = 0; q < many; q++) {
            lanes found = score(parts, asked + q, t, keys);
            most[q] = pick(found > most[q], found, most[q]);
        }
    for (long q = 0; q < many; q++) {
        for (long t = together; t < asked[q].count; t += LANES) {
            lanes found = score(parts, asked + q, t, keys);
            most[q] = pick(found > most[q], found, most[q]);
        }
        all[q] = asked[q].count ? share(asked + q, most[q]) : 1.0f;
        memset(both + q * 2 * size, 0, 2 * size * sizeof *both);
    }
    for (long t = 0; t < together; t += LANES)
        for (long q = 0; q < many; q++) add(parts, asked + q, t, t + LANES, values, both + q * 2 * size);
    for (long q = 0; q < many; q++) {
        const float *even = both + q * 2 * size, *odd = even + size;
        add(parts, asked + q, together, asked[q].count, values, both + q * 2 * size);
        for (int e = 0; e < size; e += LANES) put(asked[q].to + e, (at(even + e) + at(odd + e)) / all[q]);
    }
}

static void attention(long size, const Asked *asked, long many, long least, const float *keys, const float *values) {
#define PARTS_ARE(n) case n: attend(n, asked, many, least, keys, values); break;
    switch (size / LANES) {
        PARTS_ARE(1) PARTS_ARE(2) PARTS_ARE(3) PARTS_ARE(4) PARTS_ARE(8)
    default: attend(size / LANES, asked, many, least, keys, values);
    }
}

/* Floats that a forward of M slots takes beside its results. */
long workspace(const Model *model, long count, long total) {
    long read = (model->heads + 2 * model->key_heads) * model->head;
    long each = 2 * model->hidden + read + model->heads * model->head + 2 * model->inner + total + 3;
    return count * each + MANY * (total + LANES);
}

/* Whether a slot reads another of its row, see masks.AttentionIntervals. */
static int may_read(const Fed *fed, long slot, long key) {
    if (!fed->order) return key <= slot;
    return fed->order[key] <= fed->order[slot] && fed->order[slot] < fed->until[key];
}

/* What slots bring, M of them: their embeddings x (M, D), where in (B, S) they stand, their places, and the columns
   they read, `reads` of `seen` (M, T). Returns 0 if an id, a place or a column is out of bounds. */
static int take(const Model *model, const Fed *fed, long window, float *x, int *where, int *place, int *reads,
                int *seen)
{
    const long total = fed->total;
    if (fed->first < 0 || fed->first + fed->rows > fed->held || total > fed->room) return 0;
    for (long b = 0; b < fed->rows; b++) {
        const long row = b * fed->slots, width = fed->widths[b], cached = fed->columns[row];
        if (width && (cached < 0 || cached + width > total)) return 0;
        for (long slot = row; slot < row + width; slot++, x += model->hidden, seen += total) {
            long id = fed->ids[slot], column = fed->columns[slot], stands = column;
            if (fed->order) stands = cached + fed->places[slot];
            if (id < 0 || id >= model->vocabulary || stands < 0 || column < 0 || column >= total) return 0;
            memcpy(x, model->embed + id * model->hidden, model->hidden * sizeof *x);
            *where++ = slot;
            *place++ = stands < window ? stands : window - 1;
            int count = 0;
            for (; count < cached; count++) seen[count] = count;
            for (long key = row; key < row + width; key++)
                if (may_read(fed, slot, key)) seen[count++] = fed->columns[key];
            *reads++ = count;
        }
    }
    return 1;
}

/* Hidden states after the final norm, of slots that count: to (B, S, D).  space: see `workspace`.
   What stands behind the window stands at its end.  Returns 0; or 1 if an id, a place or a column is out of bounds,
   before anything is written. */
int forward(const Model *model, const Fed *fed, long window, float *space, float *to) {
    const long hidden = model->hidden, size = model->head, heads = model->heads, groups = model->key_heads;
    const long read = (heads + 2 * groups) * size, inner = model->inner, total = fed->total;
    const long values = fed->held * groups * fed->room * size; /* behind keys */
    long count = 0, i = 0;
    for (long b = 0; b < fed->rows; b++) count += fed->widths[b];
    float *x = space, *normal = x + count * hidden, *fresh = normal + count * hidden, *got = fresh + count * read;
    float *open = got + count * heads * size, *shares = open + count * 2 * inner;
    int *where = (int *)(shares + MANY * (total + LANES)), *place = where + count, *reads = place + count;
    int *seen = reads + count;

    if (!take(model, fed, window, x, where, place, reads, seen)) return 1;
    for (const Layer *layer = model->layer; layer < model->layer + model->layers; layer++) {
        float *keys = fed->cache + (2 * (layer - model->layer) * fed->held + fed->first) * groups * fed->room * size;
        normed(count, x, layer->before, model->eps, hidden, normal);
        through(&layer->read, count, normal, NULL, fresh);
        for (i = 0; i < count; i++) {
            float *mine = fresh + i * read;
            long row = where[i] / fed->slots, turned = place[i] * size;
            for (long h = 0; h < heads + groups; h++)
                turn(mine + h * size, model->cos + turned, model->sin + turned, size);
            for (long g = 0; g < groups; g++) {
                float *cell = keys + ((row * groups + g) * fed->room + fed->columns[where[i]]) * size;
                memcpy(cell, mine + (heads + g) * size, size * sizeof *cell);
                memcpy(cell + values, mine + (heads + groups + g) * size, size * sizeof *cell);
            }
        }
        for (long b = 0, first = 0; b < fed->rows; first += fed->widths[b++])
            for (long g = 0; g < groups; g++) {
                const float *these = keys + (b * groups + g) * fed->room * size;
                Asked asked[MANY];
                long many = 0, least = total;
                for (i = first; i < first + fed->widths[b]; i++)
                    for (long h = g * (heads / groups); h < (g + 1) * (heads / groups); h++) {
                        if (many == MANY) {
                            attention(size, asked, many, least, these, these + values);
                            many = 0, least = total;
                        }
                        if (reads[i] < least) least = reads[i];
                        asked[many] = (Asked){fresh + i * read + h * size, seen + i * total, reads[i],
                                              shares + many * (total + LANES), got + (i * heads + h) * size};
                        many++;
                    }
                attention(size, asked, many, least, these, these + values);
            }
        through(&layer->out, count, got, x, x);
        normed(count, x, layer->after, model->eps, hidden, normal);
        through(&layer->opened, count, normal, NULL, open);
        for (i = 0; i < count; i++) /* in place: row i is written to what rows up to i / 2 were read from */
            for (long f = 0; f < inner; f += LANES) {
                lanes gate = at(open + 2 * i * inner + f), let = at(open + (2 * i + 1) * inner + f);
                put(open + i * inner + f, gate / (1.0f + exponential(-gate)) * let);
            }
        through(&layer->down, count, open, x, x);
    }
    for (i = 0; i < count; i++)
        normed(1, x + i * hidden, model->norm, model->eps, hidden, to + where[i] * hidden);
    return 0;
}
