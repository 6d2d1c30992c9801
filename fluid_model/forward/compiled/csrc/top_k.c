/* The k most probable tokens of each row of logits. */

#include "structs.h"
#include "vectors.h"

/* Insertion into a short sorted list: k is small, and few logits pass its last. The first of equals ranks first.
   tokens, best: (k,) each, falling. */
static void largest(long vocabulary, const float *logits, long k, long *tokens, float *best)
{
    long held = 0;
    for (long token = 0; token < vocabulary; token++) {
        if (held == k && !(logits[token] > best[k - 1])) continue;
        long rank = held < k ? held++ : k - 1;
        for (; rank && logits[token] > best[rank - 1]; rank--) {
            best[rank] = best[rank - 1];
            tokens[rank] = tokens[rank - 1];
        }
        best[rank] = logits[token];
        tokens[rank] = token;
    }
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

/* logits (M, V) -> tokens and their softmax probabilities, (M, k) each, the most probable first. */
EXPORT void top_k(long count, long vocabulary, const float *logits, long k, long *tokens, float *probabilities)
{
    for (; count--; logits += vocabulary, tokens += k, probabilities += k) {
        largest(vocabulary, logits, k, tokens, probabilities); /* logits, for now */
        const float highest = probabilities[0];
        const float total = partition(vocabulary, logits, highest);
        for (long rank = 0; rank < k; rank++) probabilities[rank] = expf(probabilities[rank] - highest) / total;
    }
}
