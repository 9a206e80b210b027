#if !NET_DSP || NET_HAS_LINEAR_TABLE
/* Sums of two outputs whose weights are entries of a table, the second one's `step` behind the first one's. twos: with
   `paired` the entries of every two numbers, see `net_expand`. Inputs have no offset; of each block of four outputs a
   word (4 bits) or half a word (2 bits) is read. */
NET_INLINE void net_linear_entries(const int8_t *weights, const uint32_t *pairs, int32_t blocks, int32_t bits,
                                   const int8_t *table, int32_t step, const uint32_t *twos, int32_t paired,
                                   int32_t *sums)
{
    const int8_t *const next = table + step;
    int32_t a = 0, b = 0;
#if NET_DSP || NET_HALF_PRODUCTS
#if NET_DSP
#define NET_ADD(sum, weight, inputs) (sum) = net_dual((weight), (inputs), (sum))
#else
#define NET_ADD(sum, weight, inputs) NET_PRODUCT(sum, (weight) + (inputs))
#endif
#define NET_HALF(sum, entries, place)                                                                       \
    do {                                                                                                    \
        NET_ADD(sum, net_looked_up(entries, twos, word >> ((place) * bits), bits, paired), pairs[0]);       \
        NET_ADD(sum, net_looked_up(entries, twos, word >> (((place) + 2) * bits), bits, paired), pairs[1]); \
    } while (0)
#else
    const uint32_t mask = (1u << bits) - 1u;
    (void)twos;
    (void)paired;
#define NET_ADD(sum, entries, k, place) (sum) += (entries)[(word >> ((place) * bits)) & mask] * in[k]
#define NET_HALF(sum, entries, place)                                     \
    do {                                                                  \
        const int16_t *const in = (const int16_t *)(const void *)pairs;   \
        NET_ADD(sum, entries, 0, place);                                  \
        NET_ADD(sum, entries, 1, (place) + 2);                            \
        NET_ADD(sum, entries, 2, (place) + 1);                            \
        NET_ADD(sum, entries, 3, (place) + 3);                            \
    } while (0)
#endif
    do {
        const uint32_t word = (bits == 4) ? *(const uint32_t *)(const void *)weights
                                          : *(const uint16_t *)(const void *)weights;
        NET_HALF(a, table, 0);
        NET_HALF(b, next, 4);
        pairs += 2;
        weights += 2 * bits;
    } while (--blocks != 0);
#undef NET_HALF
#undef NET_ADD
    sums[0] = a;
    sums[1] = b;
}

#endif

/* Sums of four outputs. */
#define NET_LINEAR_ENTRIES(name, bits, paired)                                                                    \
    NET_NOINLINE void name(const int8_t *weights, const uint32_t *pairs, int32_t blocks, const int8_t *table,     \
                           int32_t step, const uint32_t *twos, int32_t *sums)                                     \
    {                                                                                                             \
        int32_t i;                                                                                                \
        for (i = 0; i < 2; ++i)                                                                                   \
            net_linear_entries(weights + i * (bits), pairs, blocks, bits, table + 2 * i * step, step, twos,       \
                               paired, sums + 2 * i);                                                             \
    }
#if NET_HAS_LINEAR_TABLE4
NET_LINEAR_ENTRIES(net_linear_table4, 4, 0)
#endif
#if NET_HAS_LINEAR_TABLE2
NET_LINEAR_ENTRIES(net_linear_table2, 2, 0)
#endif

#if NET_DSP
/* The same from `twos`, four outputs at once: every two weights are found and multiplied by three instructions. */
#define NET_LOOK(sum, start, next, width)                 \
    "ubfx %[t], %[u], #" start ", #" width "\n"                     \
    "ldr %[t], [%[y], %[t], lsl #2]\n"                              \
    "ubfx %[s], %[u], #" next ", #" width "\n"                      \
    "ldr %[s], [%[y], %[s], lsl #2]\n"                              \
    "smlad %[" sum "], %[t], %[e], %[" sum "]\n"                \
    "smlad %[" sum "], %[s], %[o], %[" sum "]\n"
#define NET_LINEAR_PAIRS(name, block)                                                                             \
    NET_NOINLINE void name(const int8_t *weights, const uint32_t *pairs, int32_t blocks, const int8_t *table,     \
                           int32_t step, const uint32_t *twos, int32_t *sums)                                     \
    {                                                                                                             \
        int32_t a = 0, b = 0, c = 0, d = 0;                                                                       \
        uint32_t word, even, odd, one, other;                                                                     \
        (void)table;                                                                                              \
        (void)step;                                                                                               \
        __asm__ volatile("1:\n"                                                                                   \
                         "ldrd %[e], %[o], [%[p]], #8\n"                                                          \
                         "ldr %[u], [%[w]], #4\n" block "subs %[n], %[n], #1\n"                                   \
                         "bne 1b\n"                                                                               \
                         : [a] "+r"(a), [b] "+r"(b), [c] "+r"(c), [d] "+r"(d), [w] "+r"(weights), [p] "+r"(pairs), \
                           [n] "+r"(blocks), [u] "=&r"(word), [e] "=&r"(even), [o] "=&r"(odd), [t] "=&r"(one),    \
                           [s] "=&r"(other)                                                                       \
                         : [y] "r"(twos)                                                                          \
                         : "cc", "memory");                                                                       \
        sums[0] = a;                                                                                              \
        sums[1] = b;                                                                                              \
        sums[2] = c;                                                                                              \
        sums[3] = d;                                                                                              \
    }
#if NET_HAS_LINEAR_PAIRS4
NET_LINEAR_PAIRS(net_linear_pairs4, NET_LOOK("a", "0", "8", "8") NET_LOOK("b", "16", "24", "8")
                 "ldr %[u], [%[w]], #4\n"
                 NET_LOOK("c", "0", "8", "8") NET_LOOK("d", "16", "24", "8"))
#endif
#if NET_HAS_LINEAR_PAIRS2
NET_LINEAR_PAIRS(net_linear_pairs2, NET_LOOK("a", "0", "4", "4") NET_LOOK("b", "8", "12", "4")
                 NET_LOOK("c", "16", "20", "4") NET_LOOK("d", "24", "28", "4"))
#endif
#undef NET_LINEAR_PAIRS
#undef NET_LOOK
#else
#if NET_HAS_LINEAR_PAIRS4
NET_LINEAR_ENTRIES(net_linear_pairs4, 4, 1)
#endif
#if NET_HAS_LINEAR_PAIRS2
NET_LINEAR_ENTRIES(net_linear_pairs2, 2, 1)
#endif
#endif
#undef NET_LINEAR_ENTRIES
