/* One row of a convolution in which every channel has a filter of its own. weights: for each four channels, four bytes
   for each position of the filter. blank: a pixel of padding. */
NET_INLINE void net_depthwise_row(const int8_t *const *rows, int8_t *out, const int8_t *weights,
                                  const int32_t *constants, const uint8_t *shifts, const int8_t *blank,
                                  int32_t zero_out, int32_t low, int32_t high, int32_t width, int32_t channels,
                                  int32_t out_width, int32_t kernel_height, int32_t kernel_width, int32_t stride,
                                  int32_t left, int32_t dilation)
{
    const int32_t taps = kernel_height * kernel_width;
    const int8_t *window[NET_MOST_TAPS];
    int32_t x, y, column, channel, tap, lane;
    for (x = 0; x < out_width; ++x) {
        const int8_t *weight = weights;
        tap = 0;
        for (y = 0; y < kernel_height; ++y) {
            for (column = 0; column < kernel_width; ++column) {
                const int32_t position = x * stride - left + column * dilation;
                window[tap++] = ((rows[y] == 0) || (position < 0) || (position >= width))
                                    ? blank
                                    : rows[y] + position * channels;
            }
        }
        for (channel = 0; channel + 4 <= channels; channel += 4) {
            const int32_t *const constant = constants + 2 * channel;
            int32_t a = constant[0], b = constant[2], c = constant[4], d = constant[6];
            for (tap = 0; tap < taps; ++tap) {
                const int8_t *const from = window[tap] + channel;
#if NET_DSP
                const uint32_t values = net_load(from), factors = net_load(weight);
                const uint32_t even = net_even(values), odd = net_odd(values);
                const uint32_t even_factors = net_even(factors), odd_factors = net_odd(factors);
                a = net_low_product(even, even_factors, a);
                b = net_low_product(odd, odd_factors, b);
                c = net_high_product(even, even_factors, c);
                d = net_high_product(odd, odd_factors, d);
#else
                a += from[0] * weight[0];
                b += from[1] * weight[1];
                c += from[2] * weight[2];
                d += from[3] * weight[3];
#endif
                weight += 4;
            }
            out[0] = net_requantize(a, constant[1], (shifts != 0) ? shifts[channel] : 32, zero_out, low, high);
            out[1] = net_requantize(b, constant[3], (shifts != 0) ? shifts[channel + 1] : 32, zero_out, low, high);
            out[2] = net_requantize(c, constant[5], (shifts != 0) ? shifts[channel + 2] : 32, zero_out, low, high);
            out[3] = net_requantize(d, constant[7], (shifts != 0) ? shifts[channel + 3] : 32, zero_out, low, high);
            out += 4;
        }
        for (lane = 0; channel + lane < channels; ++lane) {
            const int32_t *const constant = constants + 2 * (channel + lane);
            int32_t sum = constant[0];
            for (tap = 0; tap < taps; ++tap)
                sum += window[tap][channel + lane] * weight[4 * tap + lane];
            *out++ = net_requantize(sum, constant[1], (shifts != 0) ? shifts[channel + lane] : 32, zero_out, low, high);
        }
    }
}
