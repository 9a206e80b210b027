/* Pointers to `count` rows from row `first` on, `dilation` apart; a null pointer stands for a row of padding.
   `ring` rows are kept at `base`, row y in place y modulo `ring`. */
NET_NOINLINE void net_rows(const int8_t **rows, const int8_t *base, int32_t first, int32_t dilation, int32_t count,
                           int32_t height, int32_t ring, int32_t row_bytes)
{
    int32_t i;
    for (i = 0; i < count; ++i) {
        const int32_t y = first + i * dilation;
        rows[i] = ((y < 0) || (y >= height)) ? 0 : base + (y % ring) * row_bytes;
    }
}
