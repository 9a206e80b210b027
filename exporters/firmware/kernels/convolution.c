/* One row of a convolution: `outputs` channels of `out_width` pixels, two pixels and two channels at a time.
   table: null, or the entries that weights are numbers of, with the next channel's `table_step` further on. constants:
   bias and multiplier of each channel; shifts: null where every shift is 32. The arguments after `zero_out` are known
   when this is compiled. */
NET_INLINE void net_convolution_row(const int8_t *const *rows, int8_t *out, void *scratch, const void *weights,
                                    const int8_t *table, const int32_t *constants, const uint8_t *shifts,
                                    int32_t zero, int32_t zero_out,
                                    int32_t low, int32_t high, int32_t width, int32_t channels, int32_t out_width,
                                    int32_t outputs, int32_t groups, int32_t kernel_height, int32_t kernel_width,
                                    int32_t stride, int32_t left, int32_t dilation, int32_t padded, int32_t bits,
                                    int32_t table_step, int32_t paired)
{
    const int32_t size = channels / groups, wanted = outputs / groups;
    const int32_t blocks = (kernel_height * kernel_width * size + 3) / 4;
    int16_t *const patch = (int16_t *)scratch;
    int32_t x, group, n;
#if NET_HAS_DOT_TABLE
    const uint32_t *twos = 0;
#if NET_HAS_DOT_PAIRS && NET_DSP
    if (paired != 0) {
        net_expand(table, bits, (uint32_t *)scratch + 4 * blocks);
        twos = (const uint32_t *)scratch + 4 * blocks;
    }
#endif
#endif
    (void)table;
    (void)table_step;
    (void)paired;
    for (x = 0; x < out_width; x += 2) {
        /* The last pixel of an odd row is computed twice. */
        const int32_t next = (x + 1 < out_width) ? x + 1 : x;
        const int8_t *weight = (const int8_t *)weights;
        const int32_t *constant = constants;
        int8_t *first = out + x * outputs, *second = out + next * outputs;
        for (group = 0; group < groups; ++group) {
            net_patch_window(patch, 0, rows, x * stride - left, zero, width, channels, group * size, size,
                             kernel_height, kernel_width, dilation, padded);
            net_patch_window(patch, 1, rows, next * stride - left, zero, width, channels, group * size, size,
                             kernel_height, kernel_width, dilation, padded);
#if NET_HAS_DOT4
            int32_t totals[2];
            if ((bits == 4) && (table == 0))
                net_patch_totals(patch, blocks, totals);
#endif
            for (n = 0; n < wanted; n += 2) {
                const int32_t index = group * wanted + n;
                /* With an odd number of channels the last one is computed twice. */
                const int32_t *const other = constant + ((n + 1 < wanted) ? 2 : 0);
                int32_t sums[4];
                sums[0] = sums[1] = constant[0];
                sums[2] = sums[3] = other[0];
#if NET_HAS_DOT4
                if ((bits == 4) && (table == 0))
                    net_dot4((const uint32_t *)(const void *)weight, patch, blocks, totals, sums);
#endif
#if NET_HAS_DOT_TABLE
                if (table != 0) {
                    const int8_t *const entries = table + index * table_step;
                    net_dot_table(weight, patch, blocks, bits, entries, entries + ((n + 1 < wanted) ? table_step : 0),
                                  twos, paired, sums);
                }
#endif
#if NET_HAS_DOT8
                if (bits == 8)
                    net_dot8(weight, patch, blocks, sums);
#endif
                weight += blocks * bits;
                first[0] = net_requantize(sums[0], constant[1], (shifts != 0) ? shifts[index] : 32, zero_out, low, high);
                second[0] = net_requantize(sums[1], constant[1], (shifts != 0) ? shifts[index] : 32, zero_out, low, high);
                if (n + 1 < wanted) {
                    const int32_t shift = (shifts != 0) ? shifts[index + 1] : 32;
                    first[1] = net_requantize(sums[2], other[1], shift, zero_out, low, high);
                    second[1] = net_requantize(sums[3], other[1], shift, zero_out, low, high);
                }
                constant = other + 2;
                first += (n + 1 < wanted) ? 2 : 1;
                second += (n + 1 < wanted) ? 2 : 1;
            }
        }
    }
}
