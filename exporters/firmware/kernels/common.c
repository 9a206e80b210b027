/* Little-endian bytes and arithmetic right shifts are what every kernel builds on. */
typedef char net_assert_arithmetic_shift[((-1 >> 1) == -1) ? 1 : -1];
#if defined(__BYTE_ORDER__) && (__BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__)
#error "the weights are laid out for little-endian processors"
#endif

#if defined(__GNUC__)
#define NET_INLINE static inline __attribute__((always_inline))
#define NET_NOINLINE static __attribute__((noinline))
#define NET_FENCE() __asm__ volatile("" ::: "memory")
typedef uint32_t __attribute__((may_alias)) net_word;
#else
#define NET_INLINE static inline
#define NET_NOINLINE static
#define NET_FENCE() ((void)0)
typedef uint32_t net_word;
#endif

typedef struct net_state {
    const int8_t *in;
    int8_t *out;
    int8_t *arena;
#if !defined(NET_NO_HOOKS)
    net_hook hook;
    void *context;
#endif
} net_state;

#if defined(NET_NO_HOOKS)
#define NET_BEGIN(state, layer) ((void)0)
#define NET_END(state, layer, data, bytes) ((void)0)
#else
#define NET_BEGIN(state, layer)                                  \
    do {                                                         \
        if ((state)->hook != 0)                                  \
            (state)->hook((state)->context, (layer), 0, 0u);     \
    } while (0)
#define NET_END(state, layer, data, bytes)                       \
    do {                                                         \
        if ((state)->hook != 0)                                  \
            (state)->hook((state)->context, (layer), (data), (bytes)); \
    } while (0)
#endif

#if NET_DSP
typedef struct {
    uint32_t value;
} __attribute__((packed, may_alias)) net_loose_word;

/* Four bytes from any address. */
NET_INLINE uint32_t net_load(const int8_t *from)
{
    return ((const net_loose_word *)(const void *)from)->value;
}

/* Bytes 0 and 2 as two signed halves, bytes 1 and 3 likewise. */
NET_INLINE uint32_t net_even(uint32_t word)
{
    uint32_t result;
    __asm__("sxtb16 %0, %1" : "=r"(result) : "r"(word));
    return result;
}

NET_INLINE uint32_t net_odd(uint32_t word)
{
    uint32_t result;
    __asm__("sxtb16 %0, %1, ror #8" : "=r"(result) : "r"(word));
    return result;
}

/* sum + a.low * b.low + a.high * b.high */
NET_INLINE int32_t net_dual(uint32_t a, uint32_t b, int32_t sum)
{
    int32_t result;
    __asm__("smlad %0, %1, %2, %3" : "=r"(result) : "r"(a), "r"(b), "r"(sum));
    return result;
}

NET_INLINE int32_t net_low_product(uint32_t a, uint32_t b, int32_t sum)
{
    int32_t result;
    __asm__("smlabb %0, %1, %2, %3" : "=r"(result) : "r"(a), "r"(b), "r"(sum));
    return result;
}

NET_INLINE int32_t net_high_product(uint32_t a, uint32_t b, int32_t sum)
{
    int32_t result;
    __asm__("smlatt %0, %1, %2, %3" : "=r"(result) : "r"(a), "r"(b), "r"(sum));
    return result;
}
#endif

NET_INLINE int8_t net_clamp(int32_t value, int32_t low, int32_t high)
{
#if NET_DSP
    if ((low == -128) && (high == 127)) {
        int32_t result;
        __asm__("ssat %0, #8, %1" : "=r"(result) : "r"(value));
        return (int8_t)result;
    }
#endif
    /* From 0 up, where compilers know an instruction for it. */
    value += 128;
    value = (value < low + 128) ? low + 128 : value;
    value = (value > high + 128) ? high + 128 : value;
    return (int8_t)(value - 128);
}

/* floor((value * multiplier + 2^(shift - 1)) / 2^shift) + zero, clamped: the one rounding rule of the network. */
NET_INLINE int8_t net_requantize(int32_t value, int32_t multiplier, int32_t shift, int32_t zero, int32_t low,
                                 int32_t high)
{
    int64_t wide;
    if (shift == 32) {
        int32_t result;
#if NET_DSP
        __asm__("smmlar %0, %1, %2, %3" : "=r"(result) : "r"(value), "r"(multiplier), "r"(zero));
#else
        wide = (int64_t)value * multiplier + ((int64_t)1 << 31);
        result = (int32_t)(wide >> 32) + zero;
#endif
        return net_clamp(result, low, high);
    }
    wide = (((int64_t)value * multiplier + ((int64_t)1 << (shift - 1))) >> shift) + zero;
    wide = (wide < low) ? low : wide;
    return (int8_t)((wide > high) ? high : wide);
}
