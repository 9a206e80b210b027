#if NET_HAS_ADD
/* (a * first + b * second + offset) / 2^shift, rounded to nearest, halves upwards. */
NET_INLINE int8_t net_add(int32_t a, int32_t b, int32_t first, int32_t second, int32_t offset, int32_t shift,
                          int32_t low, int32_t high)
{
    return net_clamp((a * first + b * second + offset) >> shift, low, high);
}
#endif

#if NET_HAS_MULTIPLY
NET_INLINE int8_t net_multiply(int32_t a, int32_t b, int32_t first_zero, int32_t second_zero, int32_t multiplier,
                               int32_t shift, int32_t zero_out, int32_t low, int32_t high)
{
    return net_requantize((a - first_zero) * (b - second_zero), multiplier, shift, zero_out, low, high);
}
#endif
