/* The drafts of all rows in one call: laid out for a forward, verified by its predictions, and grown anew.
   draft_rows.py does the same row by row; draft_tree.py, verification.py and draft_policy.py explain it.

   Legend: B rows of the batch, n of them, W most slots of a row, S slots of the widest row, N nodes and M mask-block
   slots of all n rows, C candidates, K widest stride.  */

#include "structs.h"
#include <math.h>
#include <stdlib.h>

#define MAX_STEPS (1L << 16) /* as in attention_masks.py */
#define NEVER 0

const long EXPORT sizeof_DraftTable = sizeof(DraftTable);

/* A draft tree: nodes in preorder, the likelier child first. */
typedef struct {
    long *tokens, *parents, *depths;
    double *reached; /* of each node, that the path from the root to it is accepted */
    long nodes;
} Tree;

static Tree tree_of(const DraftTable *d, long row)
{
    const long first = row * d->max_slots;
    return (Tree){d->tokens + first, d->parents + first, d->depths + first, d->reached + first, d->nodes[row]};
}

static long add(Tree *tree, long token, long parent, double reached, long depth)
{
    const long node = tree->nodes++;
    tree->tokens[node] = token, tree->parents[node] = parent;
    tree->reached[node] = reached, tree->depths[node] = depth;
    return node;
}

static long min(long one, long other) { return one < other ? one : other; }
static long max(long one, long other) { return one > other ? one : other; }

/* --- layout --- */

/* Ids, enter, exit and offsets of one row's slots, each padded to `width`. */
static void lay_out_row(const DraftTable *d, long row, long width, long mask_id, long *ids, long *enter, long *exit,
                        long *offsets)
{
    const Tree tree = tree_of(d, row);
    const long *masks = d->masks + row * d->max_slots;
    long slot = tree.nodes;
    /* 1) nodes; a subtree ends where its last child's does, and children stand behind their parents */
    for (long node = 0; node < tree.nodes; node++) {
        ids[node] = tree.tokens[node], offsets[node] = tree.depths[node];
        enter[node] = node * MAX_STEPS, exit[node] = (node + 1) * MAX_STEPS;
    }
    for (long node = tree.nodes - 1; node > 0; node--)
        exit[tree.parents[node]] = max(exit[tree.parents[node]], exit[node]);
    /* 2) mask blocks: each a chain behind its anchor that no other slot attends to */
    for (long node = 0; node < tree.nodes; node++)
        for (long step = 1; step <= masks[node]; step++, slot++) {
            ids[slot] = mask_id, offsets[slot] = tree.depths[node] + step;
            enter[slot] = node * MAX_STEPS + step, exit[slot] = (node + 1) * MAX_STEPS;
        }
    /* 3) padding, which nothing attends to */
    for (; slot < width; slot++) ids[slot] = mask_id, enter[slot] = 0, exit[slot] = NEVER, offsets[slot] = 0;
}

/* sizes: slots of the widest of some rows, nodes of all of them, slots of all of them. */
EXPORT void measure_drafts(const DraftTable *d, long start, long rows, long *sizes)
{
    sizes[0] = sizes[1] = sizes[2] = 0;
    for (long row = start; row < start + rows; row++) {
        sizes[0] = max(sizes[0], d->slots[row]);
        sizes[1] += d->nodes[row], sizes[2] += d->slots[row];
    }
}

/* numbers: see DraftLayout in draft_rows.py. */
EXPORT void lay_out_drafts(const DraftTable *d, long start, long rows, long width, long mask_id, long *numbers)
{
    const long all = rows * width;
    long *at_nodes = numbers + 4 * all, *at_masks = at_nodes;
    for (long row = 0; row < rows; row++) at_masks += d->nodes[start + row];
    for (long row = 0; row < rows; row++, numbers += width) {
        lay_out_row(d, start + row, width, mask_id, numbers, numbers + all, numbers + 2 * all, numbers + 3 * all);
        const long first = row * width, nodes = d->nodes[start + row];
        for (long slot = 0; slot < nodes; slot++) *at_nodes++ = first + slot;
        for (long slot = nodes; slot < d->slots[start + row]; slot++) *at_masks++ = first + slot;
    }
}

/* --- verification --- */

/* The accepted path: nodes from the root down that the model chooses itself. path: (K,). Returns its length. */
static long accepted_path(const Tree *tree, const long *predictions, long most, long *path)
{
    long length = 1, last = path[0] = 0;
    for (long node = 1; node < tree->nodes && length < most; node++)
        if (tree->parents[node] == last && tree->tokens[node] == predictions[last]) path[length++] = last = node;
    return length;
}

/* Nodes of the greedy path: the first ones, up to the first leaf. */
static long greedy_length(const Tree *tree)
{
    long node = 1;
    while (node < tree->nodes && tree->parents[node] == node - 1) node++;
    return node;
}

/* --- growth --- */

/* What a mask block proposes behind the bonus token, (depths, C) each, the likeliest first. */
typedef struct {
    const long *tokens;
    const float *probabilities;
    long depths, count;
} Candidates;

/* All paths that are accepted with a probability of `least` at least, in preorder; `room` nodes. */
static void grow(Tree *tree, const Candidates *all, double least, long room, long token, long parent, double reached,
                 long depth)
{
    if (tree->nodes == room) return;
    const long node = add(tree, token, parent, reached, depth), first = depth * all->count;
    if (depth == all->depths) return;
    for (long rank = first; rank < first + all->count; rank++) {
        const double further = reached * all->probabilities[rank];
        if (further < least) return; /* so are all candidates that follow */
        grow(tree, all, least, room, all->tokens[rank], node, further, depth + 1);
    }
}

static int falling(const void *one, const void *other)
{
    const double a = *(const double *)one, b = *(const double *)other;
    return (a < b) - (a > b);
}

/* The likeliest `most` nodes of a tree, the first of equals, in preorder. No node is likelier than its parent, so they
   are a tree. index: where each node of `full` stands, filled here.  sorted: as many numbers. */
static void prune(const Tree *full, long most, Tree *tree, long *index, double *sorted)
{
    double least = -1;
    long equals = 0; /* nodes of exactly that probability that still fit */
    if (full->nodes > most) {
        for (long node = 0; node < full->nodes; node++) sorted[node] = full->reached[node];
        qsort(sorted, full->nodes, sizeof(double), falling);
        least = sorted[most - 1];
        for (long place = most; place-- && sorted[place] == least;) equals++;
    }
    tree->nodes = 0;
    for (long node = 0; node < full->nodes; node++) {
        if (full->reached[node] < least || (full->reached[node] == least && equals-- <= 0)) continue;
        const long parent = node ? index[full->parents[node]] : -1;
        index[node] = add(tree, full->tokens[node], parent, full->reached[node], full->depths[node]);
    }
}

/* The size of each node's mask block: as many slots as gain `cost` at least. stops: as many numbers as nodes, for what
   is left of a node's probability without its children's. Returns the slots of all. */
static long size_mask_blocks(const Tree *tree, double rate, double cost, long widest, long most, double *stops,
                             long *masks)
{
    const double shrink = rate > 0 ? log(rate) : -INFINITY;
    long left = most;
    for (long node = 0; node < tree->nodes; node++) stops[node] = tree->reached[node];
    for (long node = 1; node < tree->nodes; node++) stops[tree->parents[node]] -= tree->reached[node];
    for (long node = 0; node < tree->nodes; node++) {
        masks[node] = 0;
        if (stops[node] > cost) masks[node] = (long)fmin(log(cost / stops[node]) / shrink, (double)min(left, widest));
        left -= masks[node];
    }
    return most - left;
}

/* --- a step --- */

/* Verify the drafts of rows start.. and draft the next ones.

   tokens, strides: (N,) each; candidates, probabilities: (M, C) each: see Predictions in draft_rows.py.
   committed, rejected: (n, K) each, of each row the tokens committed and rejected.  counts: (4, n), of each row tokens
   committed, nodes of the greedy path, the place of the first of its tokens that was rejected, and how many were.
   expected: (n,) tokens.  moves: room for (n K, 3): row, node and place of accepted nodes that are not in their place on
   the path. Returns their number. */
EXPORT long advance_drafts(const DraftTable *d, long start, long rows, const long *tokens, const long *strides,
                           const long *candidates, const float *probabilities, long *committed, long *rejected,
                           long *counts, double *expected, long *moves)
{
    const long longest = d->max_stride;
    long moved = 0;
    Tree full = {d->scratch, d->scratch + d->room, d->scratch + 2 * d->room, d->scratch_reached, 0};
    long *index = d->scratch + 3 * d->room;
    double *numbers = d->scratch_reached + d->room;
    for (long row = 0; row < rows; row++, committed += longest, rejected += longest) {
        Tree tree = tree_of(d, start + row);
        long *masks = d->masks + (start + row) * d->max_slots, masks_before = 0, all_masks = 0;
        long path[longest];

        /* 1) verify */
        const long nodes = tree.nodes, length = accepted_path(&tree, tokens, longest, path), last = path[length - 1];
        const long bonus = tokens[last], greedy = greedy_length(&tree);
        long agreed = 0;
        while (agreed < length && agreed < greedy && path[agreed] == agreed) agreed++;

        /* 2) commit */
        for (long place = 1; place < length; place++) committed[place - 1] = tree.tokens[path[place]];
        committed[length - 1] = bonus;
        for (long node = agreed; node < greedy; node++) rejected[node - agreed] = tree.tokens[node];
        counts[row] = length, counts[rows + row] = greedy;
        counts[2 * rows + row] = agreed - 1, counts[3 * rows + row] = greedy - agreed;
        for (long place = agreed; place < length; place++, moved++)
            moves[3 * moved] = row, moves[3 * moved + 1] = path[place], moves[3 * moved + 2] = place;
        expected[row] = 0;
        for (long node = 0; node < nodes; node++) expected[row] += tree.reached[node];

        /* 3) draft from the mask block anchored at the last accepted node, as far as stride and window reach */
        for (long node = 0; node < nodes; node++) {
            all_masks += masks[node];
            if (node < last) masks_before += masks[node];
        }
        const long left = max(d->window_left[row] - length, 1);
        const long stride = min(min(max(strides[last], d->min_stride), longest), min(left, masks[last] + 1));
        const long first = masks_before * d->candidates;
        const Candidates behind = {candidates + first, probabilities + first, stride - 1, d->candidates};
        full.nodes = 0;
        grow(&full, &behind, d->costs[row], d->room, bonus, -1, 1, 0);
        prune(&full, d->max_slots / 2, &tree, index, numbers);
        const long fed = size_mask_blocks(&tree, d->rates[row], d->costs[row], longest - 1, d->max_slots - tree.nodes,
                                          numbers, masks);
        d->nodes[start + row] = tree.nodes, d->slots[start + row] = tree.nodes + fed;

        tokens += nodes, strides += nodes;
        candidates += all_masks * d->candidates, probabilities += all_masks * d->candidates;
    }
    return moved;
}
