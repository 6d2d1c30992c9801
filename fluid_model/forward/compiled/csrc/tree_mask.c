/* The mask as a tensor, for tests: attention itself uses lists of columns. */

#include "tree_mask.h"

/* mask (B, S, T) is set to 1 where a query attends to a column. It comes in as zeros, and stays 0 for padding.
   columns: room for T. */
EXPORT void fill_mask(const Batch *batch, int *columns, unsigned char *mask)
{
    for (long row = 0; row < batch->rows; row++)
        for (long slot = 0; slot < batch->widths[row]; slot++) {
            long query = row * batch->slots + slot;
            int count = attended_columns(batch, row, query, columns);
            for (int i = 0; i < count; i++) mask[query * batch->total + columns[i]] = 1;
        }
}
