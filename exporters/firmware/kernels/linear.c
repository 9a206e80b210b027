#if NET_HAS_LINEAR8
/* Sums of four outputs; weights: for each block of four inputs four bytes of each output. */
NET_NOINLINE void net_linear8(const void *weights, const uint32_t *pairs, int32_t blocks, int32_t *sums)
{
    int32_t a = 0, b = 0, c = 0, d = 0;
#if NET_DSP
    const net_word *weight = (const net_word *)weights;
    uint32_t even, odd, word, next, half;
#define NET_BLOCK                              \
    "ldrd %[e], %[o], [%[p]], #8\n"            \
    "ldrd %[u], %[v], [%[w]], #8\n"            \
    "uxtb16 %[t], %[u]\n"                      \
    "smlad %[a], %[t], %[e], %[a]\n"           \
    "uxtb16 %[t], %[u], ror #8\n"              \
    "smlad %[a], %[t], %[o], %[a]\n"           \
    "uxtb16 %[t], %[v]\n"                      \
    "smlad %[b], %[t], %[e], %[b]\n"           \
    "uxtb16 %[t], %[v], ror #8\n"              \
    "smlad %[b], %[t], %[o], %[b]\n"           \
    "ldrd %[u], %[v], [%[w]], #8\n"            \
    "uxtb16 %[t], %[u]\n"                      \
    "smlad %[c], %[t], %[e], %[c]\n"           \
    "uxtb16 %[t], %[u], ror #8\n"              \
    "smlad %[c], %[t], %[o], %[c]\n"           \
    "uxtb16 %[t], %[v]\n"                      \
    "smlad %[d], %[t], %[e], %[d]\n"           \
    "uxtb16 %[t], %[v], ror #8\n"              \
    "smlad %[d], %[t], %[o], %[d]\n"
    __asm__ volatile("lsrs %[n], %[n], #1\n"
                     "bcc 1f\n" NET_BLOCK "cmp %[n], #0\n"
                     "beq 2f\n"
                     "1:\n" NET_BLOCK NET_BLOCK "subs %[n], %[n], #1\n"
                     "bne 1b\n"
                     "2:\n"
                     : [a] "+r"(a), [b] "+r"(b), [c] "+r"(c), [d] "+r"(d), [w] "+r"(weight), [p] "+r"(pairs),
                       [n] "+r"(blocks), [u] "=&r"(word), [v] "=&r"(next), [e] "=&r"(even), [o] "=&r"(odd),
                       [t] "=&r"(half)
                     :
                     : "cc", "memory");
#undef NET_BLOCK
#elif NET_HALF_PRODUCTS
    /* Defined elsewhere: what the compiler does not know it keeps in a register. */
    const uint32_t mask = net_lanes;
    const net_word *weight = (const net_word *)weights;
#define NET_WORDS(sum, other, index)                                                \
    do {                                                                            \
        const uint32_t word = weight[index], next = weight[(index) + 1];            \
        NET_PRODUCT(sum, (word & mask) + even);                                     \
        NET_PRODUCT(sum, ((word >> 8) & mask) + odd);                               \
        NET_PRODUCT(other, (next & mask) + even);                                   \
        NET_PRODUCT(other, ((next >> 8) & mask) + odd);                             \
        NET_FENCE();                                                                \
    } while (0)
#define NET_BLOCK(index)                                                            \
    do {                                                                            \
        const uint32_t even = pairs[2 * (index)], odd = pairs[2 * (index) + 1];     \
        NET_WORDS(a, b, 4 * (index));                                               \
        NET_WORDS(c, d, 4 * (index) + 2);                                           \
    } while (0)
    for (; (blocks & 3) != 0; --blocks) {
        NET_BLOCK(0);
        pairs += 2;
        weight += 4;
    }
    for (; blocks != 0; blocks -= 4) {
        NET_BLOCK(0);
        NET_BLOCK(1);
        NET_BLOCK(2);
        NET_BLOCK(3);
        pairs += 8;
        weight += 16;
    }
#undef NET_BLOCK
#undef NET_WORDS
#else
    const int16_t *in = (const int16_t *)(const void *)pairs;
    const uint8_t *byte = (const uint8_t *)weights;
#define NET_STEP(k)                     \
    do {                                \
        const int32_t x = in[k];        \
        a += byte[k] * x;               \
        b += byte[4 + (k)] * x;         \
        c += byte[8 + (k)] * x;         \
        d += byte[12 + (k)] * x;        \
    } while (0)
    for (; blocks != 0; --blocks) {
        NET_STEP(0);
        NET_STEP(1);
        NET_STEP(2);
        NET_STEP(3);
        in += 4;
        byte += 16;
    }
#undef NET_STEP
#endif
    sums[0] = a;
    sums[1] = b;
    sums[2] = c;
    sums[3] = d;
}
#endif

#if NET_HAS_LINEAR4
/* The same with weights of 4 bits: two words for each block, of two outputs each, in the order of a patch's weights. */
NET_NOINLINE void net_linear4(const void *weights, const uint32_t *pairs, int32_t blocks, int32_t *sums)
{
    const uint32_t *weight = (const uint32_t *)weights;
    int32_t a = 0, b = 0, c = 0, d = 0;
#if NET_DSP
#define NET_HALF(sum, shift)                                                           \
    do {                                                                               \
        (sum) = net_dual((word >> (shift)) & 0x000F000Fu, pairs[0], (sum));            \
        (sum) = net_dual((word >> ((shift) + 4)) & 0x000F000Fu, pairs[1], (sum));      \
    } while (0)
#elif NET_HALF_PRODUCTS
#define NET_HALF(sum, shift)                                                           \
    do {                                                                               \
        NET_PRODUCT(sum, ((word >> (shift)) & 0x000F000Fu) + pairs[0]);                \
        NET_PRODUCT(sum, ((word >> ((shift) + 4)) & 0x000F000Fu) + pairs[1]);          \
    } while (0)
#else
#define NET_HALF(sum, shift)                                                           \
    do {                                                                               \
        const int16_t *const in = (const int16_t *)(const void *)pairs;                \
        (sum) += (int32_t)((word >> (shift)) & 15u) * in[0];                           \
        (sum) += (int32_t)((word >> ((shift) + 4)) & 15u) * in[1];                     \
        (sum) += (int32_t)((word >> ((shift) + 16)) & 15u) * in[2];                    \
        (sum) += (int32_t)((word >> ((shift) + 20)) & 15u) * in[3];                    \
    } while (0)
#endif
    do {
        uint32_t word = weight[0];
        NET_HALF(a, 0);
        NET_HALF(b, 8);
        word = weight[1];
        NET_HALF(c, 0);
        NET_HALF(d, 8);
        pairs += 2;
        weight += 2;
    } while (--blocks != 0);
#undef NET_HALF
    sums[0] = a;
    sums[1] = b;
    sums[2] = c;
    sums[3] = d;
}
#endif

/* The inputs are taken in chunks of `chunk`; between chunks the sums of all outputs wait behind the pairs in `scratch`,
   and behind them lie the entries of every two numbers where there are any. table, constants, shifts: as in a
   convolution. */
NET_INLINE void net_linear(const int8_t *in, int8_t *out, void *scratch, const void *weights, const int8_t *table,
                           const int32_t *constants, const uint8_t *shifts, int32_t zero_out, int32_t low,
                           int32_t high, int32_t inputs, int32_t outputs, int32_t chunk, int32_t bits,
                           int32_t table_step, int32_t paired)
{
    uint32_t *const pairs = (uint32_t *)scratch;
    int32_t *const waiting = (int32_t *)scratch + chunk / 2;
    const int8_t *weight = (const int8_t *)weights;
    int32_t start, n, i;
#if NET_HAS_LINEAR_PAIRS
    uint32_t *const twos = (uint32_t *)scratch + chunk / 2 + ((chunk < inputs) ? outputs : 0);
#if NET_DSP || NET_HALF_PRODUCTS
    if (paired != 0)
        net_expand(table, bits, twos);
#endif
#endif
    (void)table;
    (void)table_step;
    (void)paired;
    for (start = 0; start < inputs; start += chunk) {
        const int32_t count = (inputs - start < chunk) ? inputs - start : chunk;
        const int32_t blocks = (count + 3) / 4;
        const int32_t common = net_linear_inputs(in + start, count, pairs, (table != 0) ? 0 : (bits == 8) ? 128 : 8);
        for (n = 0; n < outputs; n += 4) {
            int32_t sums[4];
#if NET_HAS_LINEAR4
            if ((bits == 4) && (table == 0))
                net_linear4(weight, pairs, blocks, sums);
#endif
#if NET_HAS_LINEAR8
            if (bits == 8)
                net_linear8(weight, pairs, blocks, sums);
#endif
#if NET_HAS_LINEAR_TABLE4
            if ((bits == 4) && (table != 0) && (paired == 0))
                net_linear_table4(weight, pairs, blocks, table + n * table_step, table_step, 0, sums);
#endif
#if NET_HAS_LINEAR_TABLE2
            if ((bits == 2) && (paired == 0))
                net_linear_table2(weight, pairs, blocks, table + n * table_step, table_step, 0, sums);
#endif
#if NET_HAS_LINEAR_PAIRS4
            if ((bits == 4) && (paired != 0))
                net_linear_pairs4(weight, pairs, blocks, table, 0, twos, sums);
#endif
#if NET_HAS_LINEAR_PAIRS2
            if ((bits == 2) && (paired != 0))
                net_linear_pairs2(weight, pairs, blocks, table, 0, twos, sums);
#endif
            weight += blocks * 2 * bits;
            for (i = 0; (i < 4) && (n + i < outputs); ++i) {
                int32_t sum = (int32_t)((uint32_t)sums[i] - (uint32_t)common);
                if (start != 0)
                    sum = (int32_t)((uint32_t)sum + (uint32_t)waiting[n + i]);
                if (start + chunk < inputs) {
                    waiting[n + i] = sum;
                } else {
                    const int32_t *const constant = constants + 2 * (n + i);
                    sum = (int32_t)((uint32_t)sum + (uint32_t)constant[0]);
                    out[n + i] = net_requantize(sum, constant[1], (shifts != 0) ? shifts[n + i] : 32, zero_out, low,
                                                high);
                }
            }
        }
    }
}
