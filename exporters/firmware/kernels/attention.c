#if NET_HAS_MATRIX_PRODUCT
/* Products of matrices (rows, inner) and (inner, columns), for each of a batch; both are read by strides. */
NET_INLINE void net_matrix_product(const int8_t *first, const int8_t *second, int8_t *out, int32_t zero_first,
                                   int32_t zero_second, int32_t zero_out, int32_t low, int32_t high,
                                   int32_t multiplier, int32_t shift, int32_t rows, int32_t inner, int32_t columns,
                                   int32_t first_row, int32_t first_step, int32_t second_step, int32_t second_column)
{
    int32_t row, column, k;
    for (row = 0; row < rows; ++row) {
        for (column = 0; column < columns; ++column) {
            const int8_t *a = first + row * first_row, *b = second + column * second_column;
            int32_t sum = 0;
            for (k = 0; k < inner; ++k) {
                sum += (*a - zero_first) * (*b - zero_second);
                a += first_step;
                b += second_step;
            }
            *out++ = net_requantize(sum, multiplier, shift, zero_out, low, high);
        }
    }
}
#endif

#if NET_HAS_SOFTMAX
/* Rows of `count` codes as probabilities in steps of 1 / 2^bits; table: exp(-d) for a distance d from the largest. */
NET_INLINE void net_softmax(const int8_t *in, int8_t *out, const uint32_t *table, int32_t rows, int32_t count,
                            int32_t bits)
{
    int32_t row, i;
    for (row = 0; row < rows; ++row) {
        int32_t largest = -128;
        uint32_t sum = 0;
        for (i = 0; i < count; ++i)
            largest = (in[i] > largest) ? in[i] : largest;
        for (i = 0; i < count; ++i)
            sum += table[largest - in[i]];
        for (i = 0; i < count; ++i) {
            const uint32_t share = ((table[largest - in[i]] << bits) + sum / 2u) / sum;
            out[i] = (int8_t)((share > 255u) ? 127 : (int32_t)share - 128);
        }
        in += count;
        out += count;
    }
}
#endif

#if NET_HAS_LAYER_NORM
/* The largest integer whose square is at most `value`. */
NET_INLINE uint32_t net_square_root(uint32_t value)
{
    uint32_t root = 0, bit = 1u << 15;
    for (; bit != 0u; bit >>= 1) {
        const uint32_t tried = root | bit;
        if (tried * tried <= value)
            root = tried;
    }
    return root;
}

/* Rows of `count` codes less their mean, over their standard deviation. factors: weight and bias of each number. */
NET_INLINE void net_layer_norm(const int8_t *in, int8_t *out, const int32_t *factors, uint64_t epsilon, int32_t shift,
                               int32_t zero_out, int32_t low, int32_t high, int32_t rows, int32_t count)
{
    int32_t row, i;
    for (row = 0; row < rows; ++row) {
        int32_t sum = 0, squares = 0, scale = 0, bits = 0;
        int64_t reciprocal = 0;
        uint64_t spread, rest;
        for (i = 0; i < count; ++i) {
            sum += in[i];
            squares += in[i] * in[i];
        }
        spread = (uint64_t)((int64_t)count * squares - (int64_t)sum * sum);
        if (spread != 0u) {
            spread = (spread << 16) + epsilon;
            for (rest = spread; rest != 0u; rest >>= 1)
                ++bits;
            /* Half of 32 - bits, rounded down. */
            scale = 16 - (bits + 1) / 2;
            spread = (scale >= 0) ? spread << (2 * scale) : spread >> (-2 * scale);
            reciprocal = 0xFFFFFFFFu / net_square_root((uint32_t)spread);
        }
        for (i = 0; i < count; ++i) {
            const int64_t difference = (count * in[i] - sum) * reciprocal;
            const int64_t normalised = (difference + ((int64_t)1 << (7 - scale))) >> (8 - scale);
            int64_t value = normalised * factors[2 * i] + (int64_t)factors[2 * i + 1] * 65536;
            value = ((value + ((int64_t)1 << (15 + shift))) >> (16 + shift)) + zero_out;
            value = (value < low) ? low : value;
            out[i] = (int8_t)((value > high) ? high : value);
        }
        in += count;
        out += count;
    }
}
#endif

#if NET_HAS_EMBEDDING
/* A row of `width` codes for each code. */
NET_INLINE void net_embedding(const int8_t *in, int8_t *out, const int8_t *table, int32_t count, int32_t width)
{
    int32_t i, k;
    for (i = 0; i < count; ++i) {
        const int8_t *const row = table + (in[i] + 128) * width;
        for (k = 0; k < width; ++k)
            *out++ = row[k];
    }
}
#endif
