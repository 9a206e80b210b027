/* From reset to main on a RISC-V. */
#include <stdint.h>

#include "semihosting.h"

/* Addresses that the linker script sets. */
extern uint32_t bss_start, bss_end;

int main(void);
void start(void);

static void __attribute__((aligned(4), used)) fault(void)
{
    semihosting_print("FAULT\n");
    semihosting_exit(99);
}

static void __attribute__((used)) prepare(void)
{
    uintptr_t target;
    for (target = (uintptr_t)&bss_start; target < (uintptr_t)&bss_end; target += sizeof(uint32_t))
        *(volatile uint32_t *)target = 0u;
    semihosting_exit(main());
}

void __attribute__((naked, section(".start"))) start(void)
{
    __asm__ volatile(".option push\n"
                     ".option norelax\n"
                     "la gp, __global_pointer$\n"
                     ".option pop\n"
                     "la sp, stack_top\n"
                     "la t0, fault\n"
                     ".option push\n"
                     ".option arch, +zicsr\n"
                     "csrw mtvec, t0\n"
                     ".option pop\n"
                     "call prepare\n");
}
