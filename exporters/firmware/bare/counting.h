/* What the comparison program needs of the processor: a clock that counts instructions, and a stack of one's own. */
#ifndef COUNTING_H
#define COUNTING_H

#include <stdint.h>

void counting_start(void);
void counting_stop(void);

/* Ticks since the start. */
uint64_t counting_read(void);

/* Call `function` with a stack that ends at `top`, aligned to 16 bytes. */
int counting_on_stack(int (*function)(void), void *top);

#endif
