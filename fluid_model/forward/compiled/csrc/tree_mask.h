/* The mask rule of attention_masks.py: which slot attends to which.

   Masked keys are left out of attention rather than added as minus infinity. A slot's sums then have the same terms in
   the same order in every batch, and among draft tokens and mask blocks as in autoregressive decoding.  */

#ifndef TREE_MASK_H
#define TREE_MASK_H

#include "structs.h"

#define ALWAYS (1L << 62) /* an exit behind every slot, as in attention_masks.py */

/* The ancestor test of tree attention: the query entered inside the key's interval. */
static inline int attends(long query_enter, long key_enter, long key_exit)
{
    return key_enter <= query_enter && query_enter < key_exit;
}

/* The rule for two slots of one row, numbered over (B, S). Without intervals the slots are a chain: causal. */
static inline int slot_attends(const Batch *batch, long query, long key)
{
    if (!batch->enter) return attends(query, key, ALWAYS);
    return attends(batch->enter[query], batch->enter[key], batch->exit[key]);
}

/* Cache columns that slot `query` of a row attends to: all cached ones, then those of fed slots. Returns how many. */
static inline int attended_columns(const Batch *batch, long row, long query, int *columns)
{
    const long first = row * batch->slots, cached = batch->columns[first];
    int count = 0;
    for (; count < cached; count++) columns[count] = count;
    for (long key = first; key < first + batch->widths[row]; key++) /* padding is never a key */
        if (slot_attends(batch, query, key)) columns[count++] = batch->columns[key];
    return count;
}

#endif
