/* Adds products of two pixels and two channels: to sums[0] and [1] of the first channel, [2] and [3] of the second.
   weights: for each block four signed bytes of the first channel, then four of the second. */
NET_INLINE void net_dot8(const int8_t *weights, const int16_t *patch, int32_t blocks, int32_t *sums)
{
    int32_t a = sums[0], b = sums[1], c = sums[2], d = sums[3];
#if NET_DSP
    uint32_t first, second, x, y, pair;
#define NET_BLOCK                       \
    "ldrd %[first], %[second], [%[w]], #8\n" \
    "ldrd %[x], %[y], [%[p]], #8\n"     \
    "sxtb16 %[t], %[first]\n"           \
    "smlad %[a], %[t], %[x], %[a]\n"    \
    "smlad %[b], %[t], %[y], %[b]\n"    \
    "sxtb16 %[t], %[second]\n"          \
    "smlad %[c], %[t], %[x], %[c]\n"    \
    "smlad %[d], %[t], %[y], %[d]\n"    \
    "ldrd %[x], %[y], [%[p]], #8\n"     \
    "sxtb16 %[t], %[first], ror #8\n"   \
    "smlad %[a], %[t], %[x], %[a]\n"    \
    "smlad %[b], %[t], %[y], %[b]\n"    \
    "sxtb16 %[t], %[second], ror #8\n"  \
    "smlad %[c], %[t], %[x], %[c]\n"    \
    "smlad %[d], %[t], %[y], %[d]\n"
    __asm__ volatile("lsrs %[n], %[n], #1\n"
                     "bcc 1f\n" NET_BLOCK "cmp %[n], #0\n"
                     "beq 2f\n"
                     "1:\n" NET_BLOCK NET_BLOCK "subs %[n], %[n], #1\n"
                     "bne 1b\n"
                     "2:\n"
                     : [a] "+r"(a), [b] "+r"(b), [c] "+r"(c), [d] "+r"(d), [w] "+r"(weights), [p] "+r"(patch),
                       [n] "+r"(blocks), [first] "=&r"(first), [second] "=&r"(second), [x] "=&r"(x), [y] "=&r"(y),
                       [t] "=&r"(pair)
                     :
                     : "cc", "memory");
#undef NET_BLOCK
#else
#define NET_STEP(k)                                          \
    do {                                                     \
        const int32_t u = weights[k], v = weights[4 + (k)];  \
        const int32_t x = patch[2 * (k)], y = patch[2 * (k) + 1]; \
        a += u * x;                                          \
        b += u * y;                                          \
        c += v * x;                                          \
        d += v * y;                                          \
    } while (0)
#define NET_BLOCK()     \
    do {                \
        NET_STEP(0);    \
        NET_STEP(1);    \
        NET_STEP(2);    \
        NET_STEP(3);    \
        weights += 8;   \
        patch += 8;     \
    } while (0)
    for (; (blocks & 3) != 0; --blocks)
        NET_BLOCK();
    for (; blocks != 0; blocks -= 4) {
        NET_BLOCK();
        NET_BLOCK();
        NET_BLOCK();
        NET_BLOCK();
    }
#undef NET_BLOCK
#undef NET_STEP
#endif
    sums[0] = a;
    sums[1] = b;
    sums[2] = c;
    sums[3] = d;
}
