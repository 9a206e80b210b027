static uint64_t net_test_arena[(NET_ARENA_BYTES + 7u) / 8u];

#if !defined(NET_NO_HOOKS)
static void net_test_hook(void *context, int layer, const int8_t *data, uint32_t bytes)
{
    uint32_t *const sum = (uint32_t *)context + layer;
    uint32_t i;
    for (i = 0; i < bytes; ++i)
        *sum = (*sum ^ (uint8_t)data[i]) * 16777619u;
}
#endif

int net_selftest(void)
{
    int failures = 0;
    uint32_t test, i;
    for (test = 0; test < NET_TESTS; ++test) {
        int8_t out[NET_OUTPUT_BYTES];
        int wrong;
#if defined(NET_NO_HOOKS)
        wrong = net_run(net_test_inputs[test], out, net_test_arena);
#else
        uint32_t sums[NET_LAYERS];
        for (i = 0; i < NET_LAYERS; ++i)
            sums[i] = 2166136261u;
        wrong = net_run_hooked(net_test_inputs[test], out, net_test_arena, net_test_hook, sums);
        for (i = 0; i < NET_LAYERS; ++i)
            failures += (sums[i] != net_test_checksums[test][i]) ? 1 : 0;
#endif
        for (i = 0; i < NET_OUTPUT_BYTES; ++i)
            wrong |= out[i] ^ net_test_outputs[test][i];
        failures += (wrong != 0) ? 1 : 0;
    }
    return failures;
}
