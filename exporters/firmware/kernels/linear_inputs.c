/* A matrix product with one row of inputs, four outputs at a time. Weights are stored unsigned, as w + offset with an
   offset of 128 (8 bits) or 8 (4 bits); what the offset adds to every output is summed once for all of them.

   Where a processor multiplies the halves of a word in one instruction, two halves at once serve as they are (DSP), and
   plain C halves the multiplications with S. Winograd's identity (1968)
       w0 x0 + w2 x2 = (x2 + 256 + w0) (x0 + w2) - (x2 + 256) x0 - (256 + w0) w2:
   one product of the two halves of a word of inputs plus weights. What depends on the inputs alone is again summed once,
   what depends on the weights alone is in the bias. */
#if NET_DSP
/* Inputs as words (k0 k2) and (k1 k3); returns what the offset of the weights adds to every output. */
NET_INLINE int32_t net_linear_inputs(const int8_t *in, int32_t count, uint32_t *pairs, int32_t offset)
{
    int32_t k, total = 0;
    for (k = 0; k + 4 <= count; k += 4) {
        const uint32_t word = net_load(in + k);
        pairs[0] = net_even(word);
        pairs[1] = net_odd(word);
        total = net_dual(pairs[0], 0x00010001u, total);
        total = net_dual(pairs[1], 0x00010001u, total);
        pairs += 2;
    }
    if (k < count) {
        uint32_t word = 0;
        int32_t byte;
        for (byte = 0; k + byte < count; ++byte) {
            total += in[k + byte];
            word |= (uint32_t)(uint8_t)in[k + byte] << (8 * byte);
        }
        pairs[0] = net_even(word);
        pairs[1] = net_odd(word);
    }
    return offset * total;
}
#elif NET_HALF_PRODUCTS
NET_INLINE int32_t net_linear_inputs(const int8_t *in, int32_t count, uint32_t *pairs, int32_t offset)
{
    int32_t k, total = 0;
    for (k = 0; k < count; k += 4) {
        const int32_t a = in[k], b = (k + 1 < count) ? in[k + 1] : 0;
        const int32_t c = (k + 2 < count) ? in[k + 2] : 0, d = (k + 3 < count) ? in[k + 3] : 0;
        total += a * (c + 256) + b * (d + 256);
        *pairs++ = ((uint32_t)(a - offset) << 16) + (uint32_t)(c + 256 - offset);
        *pairs++ = ((uint32_t)(b - offset) << 16) + (uint32_t)(d + 256 - offset);
    }
    return total;
}

#define NET_PRODUCT(sum, lanes)                                           \
    do {                                                                  \
        const uint32_t both = (lanes);                                    \
        (sum) += (int16_t)both * ((int32_t)both >> 16);                   \
    } while (0)
#else
/* Inputs as 16-bit numbers, filled up with zeros. */
NET_INLINE int32_t net_linear_inputs(const int8_t *in, int32_t count, uint32_t *pairs, int32_t offset)
{
    int16_t *const wide = (int16_t *)(void *)pairs;
    int32_t k, total = 0;
    for (k = 0; k < count; ++k) {
        wide[k] = in[k];
        total += in[k];
    }
    for (; (k & 3) != 0; ++k)
        wide[k] = 0;
    return offset * total;
}
#endif
