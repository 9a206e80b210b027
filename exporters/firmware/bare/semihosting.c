#include "semihosting.h"

enum {
    OPEN = 0x01,
    CLOSE = 0x02,
    WRITE_TEXT = 0x04,
    WRITE = 0x05,
    READ = 0x06,
    EXIT_EXTENDED = 0x20,
    APPLICATION_EXIT = 0x20026
};

static int32_t request(uint32_t operation, const void *parameters)
{
#if defined(__riscv)
    register uint32_t a0 __asm__("a0") = operation;
    register const void *a1 __asm__("a1") = parameters;
    /* The three instructions are the mark of a request: uncompressed, and on one page. */
    __asm__ volatile(".balign 16\n"
                     ".option push\n"
                     ".option norvc\n"
                     "slli zero, zero, 0x1f\n"
                     "ebreak\n"
                     "srai zero, zero, 7\n"
                     ".option pop\n"
                     : "+r"(a0)
                     : "r"(a1)
                     : "memory");
    return (int32_t)a0;
#else
    register uint32_t r0 __asm__("r0") = operation;
    register const void *r1 __asm__("r1") = parameters;
    __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
    return (int32_t)r0;
#endif
}

void semihosting_print(const char *text)
{
    (void)request(WRITE_TEXT, text);
}

void semihosting_print_number(uint64_t number)
{
    char digits[21];
    char *digit = &digits[20];
    *digit = '\0';
    do {
        *--digit = (char)('0' + (char)(number % 10u));
        number /= 10u;
    } while (number != 0u);
    semihosting_print(digit);
}

int32_t semihosting_open(const char *path, uint32_t mode)
{
    uint32_t length = 0u;
    uintptr_t parameters[3];
    while (path[length] != '\0')
        ++length;
    parameters[0] = (uintptr_t)path;
    parameters[1] = mode;
    parameters[2] = length;
    return request(OPEN, parameters);
}

uint32_t semihosting_read(int32_t file, void *to, uint32_t bytes)
{
    const uintptr_t parameters[3] = {(uintptr_t)file, (uintptr_t)to, bytes};
    return (uint32_t)request(READ, parameters);
}

uint32_t semihosting_write(int32_t file, const void *from, uint32_t bytes)
{
    const uintptr_t parameters[3] = {(uintptr_t)file, (uintptr_t)from, bytes};
    return (uint32_t)request(WRITE, parameters);
}

void semihosting_close(int32_t file)
{
    const uintptr_t parameters[1] = {(uintptr_t)file};
    (void)request(CLOSE, parameters);
}

void semihosting_exit(int32_t code)
{
    const uintptr_t parameters[2] = {APPLICATION_EXIT, (uintptr_t)code};
    for (;;)
        (void)request(EXIT_EXTENDED, parameters);
}
