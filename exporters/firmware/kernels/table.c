/* Weights that are entries of a table of signed bytes, stored as numbers of 4 or 2 bits. Two numbers side by side stand
   for what one dual product multiplies: k0 and k2 of a block of four, or k1 and k3. */

#if NET_DSP || (NET_HALF_PRODUCTS && (NET_HAS_LINEAR_TABLE || NET_HAS_LINEAR_PAIRS))
/* Two entries as halves; where the halves of a word of inputs and a word of weights are added, the sum of both as they
   stand. */
NET_INLINE uint32_t net_two(int32_t low, int32_t high)
{
#if NET_DSP
    uint32_t result;
    __asm__("pkhbt %0, %1, %2, lsl #16" : "=r"(result) : "r"(low), "r"(high));
    return result;
#else
    return (uint32_t)low + ((uint32_t)high << 16);
#endif
}

#if NET_HAS_LINEAR_PAIRS || (NET_DSP && NET_HAS_DOT_PAIRS)
/* The entries of every two numbers, so that one load finds two weights. */
NET_NOINLINE void net_expand(const int8_t *table, int32_t bits, uint32_t *twos)
{
    const int8_t *const end = table + (1 << bits);
    const int8_t *high, *low;
    for (high = table; high != end; ++high) {
        for (low = table; low != end; low += 4) {
            twos[0] = net_two(low[0], *high);
            twos[1] = net_two(low[1], *high);
            twos[2] = net_two(low[2], *high);
            twos[3] = net_two(low[3], *high);
            twos += 4;
        }
    }
}
#endif

#if NET_HAS_LINEAR_TABLE || (NET_DSP ? NET_HAS_DOT_TABLE : NET_HAS_LINEAR_PAIRS)
/* Two weights by their numbers: from `twos` where `paired` is not 0, else from `table`. */
NET_INLINE uint32_t net_looked_up(const int8_t *table, const uint32_t *twos, uint32_t numbers, int32_t bits,
                                  int32_t paired)
{
    const uint32_t mask = (1u << bits) - 1u;
    if (paired != 0)
        return twos[numbers & ((1u << (2 * bits)) - 1u)];
    return net_two(table[numbers & mask], table[(numbers >> bits) & mask]);
}
#endif
#endif
