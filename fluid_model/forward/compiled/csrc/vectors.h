/* Vectors of LANES floats, by the vector extensions of gcc and clang.

   LANES (16, 8 or 4) is given to the compiler: as many as a register of this processor holds. All sizes of a model are
   multiples of it, so no loop over them has a remainder.

   Sums are taken in one fixed order. Together with `-ffp-contract=fast` in every function alike, this makes the numbers
   of a slot the same to the last bit whatever else is in the batch.  */

#ifndef VECTORS_H
#define VECTORS_H

#ifdef __AVX2__
#include <immintrin.h> /* gcc widens bytes lane by lane otherwise */
#endif
#include <math.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias)); /* loads need no alignment */
typedef int ivec __attribute__((vector_size(4 * LANES)));

#if LANES == 16
static const ivec LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif LANES == 8
static const ivec LANE = {0, 1, 2, 3, 4, 5, 6, 7};
#else
static const ivec LANE = {0, 1, 2, 3};
#endif

static inline vec load(const float *from) { return *(const vec *)from; }

typedef int loose_ivec __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
/* LANES words as they are: pairs of bfloat16. */
static inline ivec load_words(const void *from) { return *(const loose_ivec *)from; }

/* LANES bytes, each widened to a word with its sign. */
static inline ivec load_bytes(const char *from)
{
#if LANES == 16 && defined(__AVX512F__)
    return (ivec)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from));
#elif LANES == 8 && defined(__AVX2__)
    return (ivec)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from));
#elif LANES == 4
    int word;
    memcpy(&word, from, sizeof word);
    return ((ivec){0} + word) << (ivec){24, 16, 8, 0} >> 24;
#else
#error "LANES is more than a register of this processor holds"
#endif
}

static inline void store(float *to, vec value) { *(vec *)to = value; }

/* Lane by lane: `yes` where the condition is all ones, else `no`. */
static inline vec blend(ivec condition, vec yes, vec no)
{
    return (vec)((condition & (ivec)yes) | (~condition & (ivec)no));
}

/* Lane i gets lane i ^ distance. */
static inline vec swap_lanes(vec value, int distance)
{
#if __has_builtin(__builtin_shuffle) /* gcc; clang makes a shuffle of the loop */
    return __builtin_shuffle(value, LANE ^ distance);
#else
    vec swapped;
    for (int i = 0; i < LANES; i++) swapped[i] = value[i ^ distance];
    return swapped;
#endif
}

/* The sum of a vector's lanes, by halves. */
static inline float sum(vec value)
{
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) value[i] += value[i + half];
    return value[0];
}

/* Lane i of the result is the sum of vector i: a transpose and LANES sums in one. Overwrites the vectors. */
static inline vec sum_each(vec *vectors)
{
#pragma GCC unroll 4
    for (int half = LANES / 2; half; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; i++) {
            ivec upper = (LANE & half) != 0;
            vec own = blend(upper, vectors[i + half], vectors[i]);
            vec moved = blend(upper, vectors[i], vectors[i + half]);
            vectors[i] = own + swap_lanes(moved, half);
        }
    return vectors[0];
}

/* e^x: a power of two times a Taylor polynomial of degree 7. Inputs are clamped to [-87, 88], where results are normal
   floats. NaN stays NaN. */
static inline vec vec_exp(vec x)
{
    vec clamped = blend(x > 88.0f, (vec){0} + 88.0f, blend(x < -87.0f, (vec){0} - 87.0f, x));
    /* x = power * ln 2 + rest. Adding 1.5 * 2^23 rounds to an integer; ln 2 is split in two parts. */
    vec power = clamped * 1.44269504f + 12582912.0f - 12582912.0f;
    vec rest = clamped - power * 0.693359375f + power * 2.12194440e-4f;
    vec y = ((rest * (1.0f / 5040) + 1.0f / 720) * rest + 1.0f / 120) * rest + 1.0f / 24;
    y = ((y * rest + 1.0f / 6) * rest + 0.5f) * rest * rest + rest + 1.0f;
    y = (vec)((ivec)y + (__builtin_convertvector(power, ivec) << 23)); /* adds to the exponent's bits */
    return blend(x == x, y, x);
}

#endif
