/* A patch holds the windows of two neighbouring pixels as 16-bit numbers, four numbers of each in a block of 16 bytes.
   DSP: words (k0 k2) of both pixels, then words (k1 k3) of both. Plain C: the two pixels' numbers side by side. */
#if NET_DSP
#define NET_PLACE(k, pixel) ((((k) >> 2) * 8) + (((k) & 1) * 4) + (((k) >> 1) & 1) + ((pixel) * 2))
#else
#define NET_PLACE(k, pixel) (((k) * 2) + (pixel))
#endif

NET_INLINE void net_patch_copy(int16_t *patch, int32_t k, int32_t pixel, const int8_t *from, int32_t count,
                               int32_t by_words)
{
    int32_t i;
#if NET_DSP
    if (by_words != 0) {
        net_word *to = (net_word *)(void *)(patch + k * 2) + pixel;
        const int8_t *const end = from + count;
        if (((count >> 2) & 1) != 0) {
            const uint32_t word = net_load(from);
            to[0] = net_even(word);
            to[2] = net_odd(word);
            from += 4;
            to += 4;
        }
        while (from != end) {
            const uint32_t first = net_load(from), second = net_load(from + 4);
            to[0] = net_even(first);
            to[2] = net_odd(first);
            to[4] = net_even(second);
            to[6] = net_odd(second);
            from += 8;
            to += 8;
        }
        return;
    }
#else
    if (by_words != 0) {
        int16_t *to = patch + NET_PLACE(k, pixel);
        const int8_t *const end = from + count;
        for (; from != end; from += 4) {
            to[0] = from[0];
            to[2] = from[1];
            to[4] = from[2];
            to[6] = from[3];
            to += 8;
        }
        return;
    }
#endif
    for (i = 0; i < count; ++i)
        patch[NET_PLACE(k + i, pixel)] = from[i];
}

NET_INLINE void net_patch_fill(int16_t *patch, int32_t k, int32_t pixel, int32_t value, int32_t count)
{
    int32_t i;
    for (i = 0; i < count; ++i)
        patch[NET_PLACE(k + i, pixel)] = (int16_t)value;
}

/* The window of one pixel whose first column is `left`; `size` channels from `channel` on of each position. */
NET_INLINE void net_patch_window(int16_t *patch, int32_t pixel, const int8_t *const *rows, int32_t left, int32_t zero,
                                 int32_t width, int32_t channels, int32_t channel, int32_t size, int32_t kernel_height,
                                 int32_t kernel_width, int32_t dilation, int32_t padded)
{
    int32_t k = 0, y, x;
    for (y = 0; y < kernel_height; ++y) {
        const int8_t *const row = rows[y];
        if ((dilation == 1) && (size == channels)) {
            const int32_t before = ((padded != 0) && (left < 0)) ? -left : 0;
            const int32_t beyond = left + kernel_width - width;
            const int32_t after = ((padded != 0) && (beyond > 0)) ? beyond : 0;
            if ((padded != 0) && ((row == 0) || (before >= kernel_width) || (after >= kernel_width))) {
                net_patch_fill(patch, k, pixel, zero, kernel_width * size);
            } else {
                net_patch_fill(patch, k, pixel, zero, before * size);
                net_patch_copy(patch, k + before * size, pixel, row + (left + before) * channels,
                               (kernel_width - before - after) * size, (size & 3) == 0);
                net_patch_fill(patch, k + (kernel_width - after) * size, pixel, zero, after * size);
            }
            k += kernel_width * size;
        } else {
            for (x = 0; x < kernel_width; ++x) {
                const int32_t column = left + x * dilation;
                if ((row == 0) || (column < 0) || (column >= width))
                    net_patch_fill(patch, k, pixel, zero, size);
                else
                    net_patch_copy(patch, k, pixel, row + column * channels + channel, size, (size & 3) == 0);
                k += size;
            }
        }
    }
    net_patch_fill(patch, k, pixel, 0, (4 - (k & 3)) & 3);
}
