#include "counting.h"

#if defined(__riscv)

/* Named here and not by -march, with which the compiler would take its library for another width. */
#define READ(variable, name)                  \
    __asm__ volatile(".option push\n"         \
                     ".option arch, +zicsr\n" \
                     "csrr %0, " name "\n"    \
                     ".option pop\n"          \
                     : "=r"(variable))

void counting_start(void)
{
}

void counting_stop(void)
{
}

uint64_t counting_read(void)
{
    uint32_t high, low, again;
    do {
        READ(high, "minstreth");
        READ(low, "minstret");
        READ(again, "minstreth");
    } while (high != again);
    return ((uint64_t)high << 32) | low;
}

int __attribute__((naked)) counting_on_stack(int (*function)(void), void *top)
{
    (void)function;
    (void)top;
    __asm__ volatile("addi sp, sp, -16\n"
                     "sw ra, 12(sp)\n"
                     "sw s0, 8(sp)\n"
                     "mv s0, sp\n"
                     "mv sp, a1\n"
                     "jalr a0\n"
                     "mv sp, s0\n"
                     "lw s0, 8(sp)\n"
                     "lw ra, 12(sp)\n"
                     "addi sp, sp, 16\n"
                     "ret\n");
}

#else

#define CONTROL (*(volatile uint32_t *)0xe000e010u)
#define RELOAD (*(volatile uint32_t *)0xe000e014u)
#define CURRENT (*(volatile uint32_t *)0xe000e018u)
/* The timer counts 24 bits down. */
#define LARGEST 0xffffffu

static volatile uint32_t wraps;

void systick(void);

void systick(void)
{
    ++wraps;
}

void counting_start(void)
{
    wraps = 0u;
    RELOAD = LARGEST;
    CURRENT = 0u;
    CONTROL = 7u;
}

void counting_stop(void)
{
    CONTROL = 0u;
}

uint64_t counting_read(void)
{
    uint32_t before, left;
    do {
        before = wraps;
        left = CURRENT;
    } while (before != wraps);
    return ((uint64_t)before * (LARGEST + 1u)) + (LARGEST - left);
}

int __attribute__((naked)) counting_on_stack(int (*function)(void), void *top)
{
    (void)function;
    (void)top;
    __asm__ volatile("push {r4, lr}\n"
                     "mov r4, sp\n"
                     "mov sp, r1\n"
                     "blx r0\n"
                     "mov sp, r4\n"
                     "pop {r4, pc}\n");
}

#endif
