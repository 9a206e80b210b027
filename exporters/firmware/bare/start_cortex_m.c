/* From reset to main on a Cortex-M. */
#include <stdint.h>

#include "semihosting.h"

#define CONFIGURATION (*(volatile uint32_t *)0xe000ed14u)
#define COPROCESSORS (*(volatile uint32_t *)0xe000ed88u)

/* Addresses that the linker script sets. */
extern uint32_t stack_top, data_load, data_start, data_end, bss_start, bss_end;

int main(void);
void reset(void);
void systick(void);

static void fault(void)
{
    semihosting_print("FAULT\n");
    semihosting_exit(99);
}

/* A program that counts time defines its own. */
void __attribute__((weak)) systick(void)
{
}

typedef void (*vector)(void);

/* The top of the stack, and the sixteen handlers that every Cortex-M has. */
static const struct {
    uint32_t *stack;
    vector handlers[15];
} vectors __attribute__((section(".vectors"), used)) = {
    &stack_top,
    {reset, fault, fault, fault, fault, fault, fault, 0, 0, 0, fault, fault, 0, fault, systick}};

void reset(void)
{
    const uint32_t *source = &data_load;
    uintptr_t target;
    for (target = (uintptr_t)&data_start; target < (uintptr_t)&data_end; target += sizeof *source)
        *(volatile uint32_t *)target = *source++;
    for (target = (uintptr_t)&bss_start; target < (uintptr_t)&bss_end; target += sizeof *source)
        *(volatile uint32_t *)target = 0u;
#if __ARM_ARCH == 6
    /* Like a processor of this architecture, trap what is not aligned, on one that would allow it. */
    CONFIGURATION |= 1u << 3;
#endif
#if defined(__ARM_FP) || defined(__ARM_FEATURE_MVE)
    COPROCESSORS |= 0xfu << 20;
    __asm__ volatile("dsb\n\tisb" ::: "memory");
#endif
    semihosting_exit(main());
}
