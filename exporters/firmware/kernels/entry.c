#if defined(NET_DEFAULT_ARENA)
static uint64_t net_own_arena[NET_ARENA_BYTES / 8u];
#endif

static int net_start(net_state *state, const int8_t *in, int8_t *out, void *arena)
{
#if defined(NET_DEFAULT_ARENA)
    if (arena == 0)
        arena = net_own_arena;
#endif
    if ((in == 0) || (out == 0) || (arena == 0) || (((uintptr_t)arena % NET_ARENA_ALIGN) != 0u))
        return -1;
    state->in = in;
    state->out = out;
    state->arena = (int8_t *)arena;
    return 0;
}

int net_run(const int8_t *in, int8_t *out, void *arena)
{
    net_state state;
    if (net_start(&state, in, out, arena) != 0)
        return -1;
#if !defined(NET_NO_HOOKS)
    state.hook = 0;
    state.context = 0;
#endif
    net_schedule(&state);
    return 0;
}

#if !defined(NET_NO_HOOKS)
int net_run_hooked(const int8_t *in, int8_t *out, void *arena, net_hook hook, void *context)
{
    net_state state;
    if (net_start(&state, in, out, arena) != 0)
        return -1;
    state.hook = hook;
    state.context = context;
    net_schedule(&state);
    return 0;
}
#endif

int8_t *net_input(void *arena)
{
    return (int8_t *)arena + NET_INPUT_OFFSET;
}

int8_t *net_output(void *arena)
{
    return (int8_t *)arena + NET_OUTPUT_OFFSET;
}
