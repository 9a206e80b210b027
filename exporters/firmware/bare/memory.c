/* What a compiler may call although the program calls no library. */
#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__) && !defined(__clang__)
/* Else the loops below become calls of the functions that they stand in. */
#pragma GCC optimize("no-tree-loop-distribute-patterns")
#endif

typedef uint32_t __attribute__((may_alias)) word;

void *memcpy(void *restrict to, const void *restrict from, size_t bytes);
void *memmove(void *to, const void *from, size_t bytes);
void *memset(void *to, int value, size_t bytes);
int memcmp(const void *first, const void *second, size_t bytes);

static int aligned(const void *first, const void *second)
{
    return ((((uintptr_t)first) | ((uintptr_t)second)) & 3u) == 0u;
}

void *memcpy(void *restrict to, const void *restrict from, size_t bytes)
{
    uint8_t *target = to;
    const uint8_t *source = from;
    if (aligned(to, from)) {
        for (; bytes >= 4u; bytes -= 4u) {
            *(word *)(void *)target = *(const word *)(const void *)source;
            target += 4;
            source += 4;
        }
    }
    for (; bytes != 0u; --bytes)
        *target++ = *source++;
    return to;
}

void *memmove(void *to, const void *from, size_t bytes)
{
    uint8_t *target = to;
    const uint8_t *source = from;
    if ((uintptr_t)to - (uintptr_t)from >= bytes)
        return memcpy(to, from, bytes);
    while (bytes != 0u) {
        --bytes;
        target[bytes] = source[bytes];
    }
    return to;
}

void *memset(void *to, int value, size_t bytes)
{
    uint8_t *target = to;
    const uint32_t filled = (uint32_t)(uint8_t)value * 0x01010101u;
    if (aligned(to, to)) {
        for (; bytes >= 4u; bytes -= 4u) {
            *(word *)(void *)target = filled;
            target += 4;
        }
    }
    for (; bytes != 0u; --bytes)
        *target++ = (uint8_t)value;
    return to;
}

int memcmp(const void *first, const void *second, size_t bytes)
{
    const uint8_t *a = first;
    const uint8_t *b = second;
    for (; bytes != 0u; --bytes, ++a, ++b) {
        if (*a != *b)
            return (*a < *b) ? -1 : 1;
    }
    return 0;
}
