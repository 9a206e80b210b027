/* The same with weights that are entries of a table: `first` for the first channel, `second` for the second; twos:
   with `paired` the entries of every two numbers, for both channels. Each block is a word (4 bits) or half of one (2 bits). */
NET_INLINE void net_dot_table(const int8_t *weights, const int16_t *patch, int32_t blocks, int32_t bits,
                              const int8_t *first, const int8_t *second, const uint32_t *twos, int32_t paired,
                              int32_t *sums)
{
    int32_t a = sums[0], b = sums[1], c = sums[2], d = sums[3];
    do {
        const uint32_t word = (bits == 4) ? *(const uint32_t *)(const void *)weights
                                          : *(const uint16_t *)(const void *)weights;
#if NET_DSP
        const net_word *const pair = (const net_word *)(const void *)patch;
        uint32_t w = net_looked_up(first, twos, word, bits, paired);
        a = net_dual(w, pair[0], a);
        b = net_dual(w, pair[1], b);
        w = net_looked_up(second, twos, word >> (4 * bits), bits, paired);
        c = net_dual(w, pair[0], c);
        d = net_dual(w, pair[1], d);
        w = net_looked_up(first, twos, word >> (2 * bits), bits, paired);
        a = net_dual(w, pair[2], a);
        b = net_dual(w, pair[3], b);
        w = net_looked_up(second, twos, word >> (6 * bits), bits, paired);
        c = net_dual(w, pair[2], c);
        d = net_dual(w, pair[3], d);
#else
        const uint32_t mask = (1u << bits) - 1u;
        (void)twos;
        (void)paired;
#define NET_STEP(k, place)                                                  \
    do {                                                                    \
        const int32_t u = first[(word >> ((place) * bits)) & mask];         \
        const int32_t v = second[(word >> (((place) + 4) * bits)) & mask];  \
        const int32_t x = patch[2 * (k)], y = patch[2 * (k) + 1];           \
        a += u * x;                                                         \
        b += u * y;                                                         \
        c += v * x;                                                         \
        d += v * y;                                                         \
    } while (0)
        NET_STEP(0, 0);
        NET_STEP(1, 2);
        NET_STEP(2, 1);
        NET_STEP(3, 3);
#undef NET_STEP
#endif
        weights += bits;
        patch += 8;
    } while (--blocks != 0);
    sums[0] = a;
    sums[1] = b;
    sums[2] = c;
    sums[3] = d;
}
