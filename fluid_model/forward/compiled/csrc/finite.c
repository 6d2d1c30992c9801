/* Whether numbers are finite. */

#include "structs.h"
#include <string.h>

#define INFINITE 0x7f800000u /* the bits of infinity; NaN has larger ones, but for the sign */

EXPORT int all_finite(const float *numbers, long count)
{
    unsigned largest = 0;
    for (long i = 0; i < count; i++) {
        unsigned bits;
        memcpy(&bits, numbers + i, sizeof bits);
        bits &= ~(1u << 31);
        largest = bits > largest ? bits : largest;
    }
    return largest < INFINITE;
}
