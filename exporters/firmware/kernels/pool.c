#if NET_HAS_MAX_POOL
/* One row of the largest codes of windows; padding never wins. */
NET_INLINE void net_max_pool_row(const int8_t *const *rows, int8_t *out, int32_t width, int32_t channels,
                                 int32_t out_width, int32_t kernel_height, int32_t kernel_width, int32_t stride,
                                 int32_t left, int32_t dilation)
{
    int32_t x, y, column, channel;
    for (x = 0; x < out_width; ++x) {
        for (channel = 0; channel < channels; ++channel)
            out[channel] = -128;
        for (y = 0; y < kernel_height; ++y) {
            for (column = 0; column < kernel_width; ++column) {
                const int32_t position = x * stride - left + column * dilation;
                if ((rows[y] != 0) && (position >= 0) && (position < width)) {
                    const int8_t *const from = rows[y] + position * channels;
                    for (channel = 0; channel < channels; ++channel)
                        out[channel] = (from[channel] > out[channel]) ? from[channel] : out[channel];
                }
            }
        }
        out += channels;
    }
}
#endif

#if NET_HAS_AVERAGE_POOL
/* One row of rescaled sums of windows, in which padding counts as zeros. */
NET_INLINE void net_average_pool_row(const int8_t *const *rows, int8_t *out, int32_t zero, int32_t zero_out,
                                     int32_t low, int32_t high, int32_t multiplier, int32_t shift, int32_t width,
                                     int32_t channels, int32_t out_width, int32_t kernel_height, int32_t kernel_width,
                                     int32_t stride, int32_t left)
{
    int32_t x, y, column, channel;
    for (x = 0; x < out_width; ++x) {
        const int32_t start = x * stride - left;
        const int32_t first = (start < 0) ? 0 : start;
        const int32_t last = (start + kernel_width < width) ? start + kernel_width : width;
        for (channel = 0; channel < channels; ++channel) {
            int32_t sum = 0, count = 0;
            for (y = 0; y < kernel_height; ++y) {
                if (rows[y] != 0) {
                    const int8_t *from = rows[y] + first * channels + channel;
                    for (column = first; column < last; ++column) {
                        sum += *from;
                        from += channels;
                    }
                    count += last - first;
                }
            }
            *out++ = net_requantize(sum - count * zero, multiplier, shift, zero_out, low, high);
        }
    }
}
#endif
