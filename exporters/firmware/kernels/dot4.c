/* The same with weights of 4 bits, stored as w + 8. Each block is one word; from its lowest bits: k0 and k1 of the first
   channel, k0 and k1 of the second, then k2 and k3 of both in the same order. What the 8 adds is taken off again with
   the sums of the patch, totals[0] and [1]. */
NET_INLINE void net_dot4(const uint32_t *weights, const int16_t *patch, int32_t blocks, const int32_t *totals,
                           int32_t *sums)
{
    int32_t a = sums[0] - 8 * totals[0], b = sums[1] - 8 * totals[1];
    int32_t c = sums[2] - 8 * totals[0], d = sums[3] - 8 * totals[1];
    do {
        const uint32_t word = *weights++;
#if NET_DSP
        const net_word *const pair = (const net_word *)(const void *)patch;
        uint32_t w = word & 0x000F000Fu;
        a = net_dual(w, pair[0], a);
        b = net_dual(w, pair[1], b);
        w = (word >> 8) & 0x000F000Fu;
        c = net_dual(w, pair[0], c);
        d = net_dual(w, pair[1], d);
        w = (word >> 4) & 0x000F000Fu;
        a = net_dual(w, pair[2], a);
        b = net_dual(w, pair[3], b);
        w = (word >> 12) & 0x000F000Fu;
        c = net_dual(w, pair[2], c);
        d = net_dual(w, pair[3], d);
#else
#define NET_STEP(k, bit)                                               \
    do {                                                               \
        const int32_t u = (int32_t)((word >> (bit)) & 15u);            \
        const int32_t v = (int32_t)((word >> ((bit) + 8)) & 15u);      \
        const int32_t x = patch[2 * (k)], y = patch[2 * (k) + 1];      \
        a += u * x;                                                    \
        b += u * y;                                                    \
        c += v * x;                                                    \
        d += v * y;                                                    \
    } while (0)
        NET_STEP(0, 0);
        NET_STEP(1, 4);
        NET_STEP(2, 16);
        NET_STEP(3, 20);
#undef NET_STEP
#endif
        patch += 8;
    } while (--blocks != 0);
    sums[0] = a;
    sums[1] = b;
    sums[2] = c;
    sums[3] = d;
}

/* The sums of both pixels of a patch. */
NET_NOINLINE void net_patch_totals(const int16_t *patch, int32_t blocks, int32_t *totals)
{
    int32_t k, a = 0, b = 0;
    for (k = 0; k < 4 * blocks; ++k) {
        a += patch[NET_PLACE(k, 0)];
        b += patch[NET_PLACE(k, 1)];
    }
    totals[0] = a;
    totals[1] = b;
}
