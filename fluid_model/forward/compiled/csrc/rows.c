/* What a step brings all rows of a batch, entered into their table in one call. engine/rows.py does the same by NumPy.

   Legend: B rows of the batch, n of them in a step, T tokens of an update at most, W tokens of a rejected draft at
   most.  */

#include "structs.h"

const long EXPORT sizeof_RowTable = sizeof(RowTable);
const long EXPORT sizeof_StepUpdates = sizeof(StepUpdates);

static long of_row(const long *numbers, long same, long row) { return numbers ? numbers[row] : same; }

/* Rows start.., n of them. ends: room for (n (T + 1), 3), filled with the places where an answer may end: row, counted
   from `start`, the token before, -1 if there is none, and the token; -1 for both at the limit. Returns their number. */
EXPORT long extend_rows(const RowTable *table, const StepUpdates *u, long start, long n, long *ends)
{
    long ending = 0;
    for (long at = 0, row = start; at < n; at++, row++) {
        const long *tokens = u->tokens + at * u->width, *ages = u->ages ? u->ages + at * u->width : 0;
        const long count = of_row(u->lengths, u->length, at), before = table->lengths[row];

        /* 1) the forward */
        const long forward = table->forwards[row] += u->forwards;
        table->slots[row] += of_row(u->widths, u->slots, at);
        table->cached[row] += of_row(u->kept, u->kept_of_all, at) - of_row(u->dropped, 0, at);
        table->seconds[row] += u->seconds;

        /* 2) tokens */
        Token *answer = table->answers + row * table->answer_room + before;
        for (long place = 0; place < count; place++) {
            answer[place] = (Token){tokens[place], forward - (ages ? ages[place] : 0)};
            if ((unsigned long)tokens[place] < (unsigned long)table->known && table->harmless[tokens[place]]) continue;
            long *end = ends + 3 * ending++;
            end[0] = at, end[1] = before + place ? answer[place - 1].id : -1, end[2] = tokens[place];
        }
        table->lengths[row] = before + count;
        if (before + count >= table->limits[row]) {
            long *end = ends + 3 * ending++;
            end[0] = at, end[1] = end[2] = -1;
        }

        /* 3) a step that is complete */
        const long stride = of_row(u->strides, u->stride, at);
        if (stride)
            table->steps[row * table->step_room + table->steps_made[row]++] =
                (Step){stride, before, before + count, u->expected ? u->expected[at] : 1};

        /* 4) a rejected draft, in place of one of these tokens */
        const long missed = of_row(u->rejected_counts, 0, at);
        if (missed) {
            const long place = u->rejected_places[at], age = ages && place < count ? ages[place] : 0;
            table->drafts[row * table->draft_room + table->drafts_rejected[row]++] =
                (Rejected){forward - age, before + place, missed};
            long *rejected = table->rejected + row * table->rejected_room + table->tokens_rejected[row];
            for (long token = 0; token < missed; token++) rejected[token] = u->rejected[at * u->rejected_width + token];
            table->tokens_rejected[row] += missed;
        }
    }
    return ending;
}

/* The same where every row was fed `slots` slots and committed one token; the numbers hold for all rows. */
EXPORT long extend_rows_alike(const RowTable *table, long start, long n, const long *tokens, long slots, long kept,
                              long stride, double seconds, long *ends)
{
    const StepUpdates updates = {.slots = slots, .forwards = slots > 0, .seconds = seconds, .tokens = tokens, .width = 1,
                                 .length = 1, .kept_of_all = kept, .stride = stride};
    return extend_rows(table, &updates, start, n, ends);
}
