#if defined(__ARM_FEATURE_DSP) && (__ARM_FEATURE_DSP == 1) && defined(__GNUC__) && !defined(NET_PLAIN_C)
#define NET_DSP 1
#else
#define NET_DSP 0
#endif

/* Whether plain C should multiply halves of words: processors that have an instruction for it. */
#if !defined(NET_HALF_PRODUCTS)
#if defined(__ARM_FEATURE_DSP) && !NET_DSP
#define NET_HALF_PRODUCTS 1
#else
#define NET_HALF_PRODUCTS 0
#endif
#endif

#if defined(__GNUC__)
#if defined(NET_WEIGHTS_SECTION)
#define NET_CONSTANT __attribute__((aligned(4), section(NET_WEIGHTS_SECTION)))
#else
#define NET_CONSTANT __attribute__((aligned(4)))
#endif
#else
#define NET_CONSTANT
#endif
