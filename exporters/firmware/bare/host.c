/* The network as a shared library: many inputs in one call, and every layer's output beside the last one. */
#include <stdlib.h>
#include <string.h>

#include "@name@.h"

#define GUARD_BYTES 64u
#define UNTOUCHED 0xa5

enum { DONE = 0, REFUSED = 1, BESIDE_ARENA = 2, NO_MEMORY = 3, TOO_MANY_BYTES = 4 };

/* Where the layers' bytes go: as many as `sizes` says for each, of one input after the other. */
typedef struct {
    const uint32_t *sizes;
    int8_t *const *buffers;
    uint32_t input;
    uint32_t filled[NET_LAYERS];
    int overflow;
} record;

static void keep(void *context, int layer, const int8_t *data, uint32_t bytes)
{
    record *kept = context;
    if (kept->buffers != NULL) {
        const size_t size = kept->sizes[layer];
        if (bytes > size - kept->filled[layer]) {
            kept->overflow = 1;
            return;
        }
        if (bytes != 0u)
            (void)memcpy(kept->buffers[layer] + (size * kept->input) + kept->filled[layer], data, bytes);
    }
    kept->filled[layer] += bytes;
}

static int touched(const unsigned char *guard)
{
    unsigned int i;
    for (i = 0u; i < GUARD_BYTES; ++i) {
        if (guard[i] != UNTOUCHED)
            return 1;
    }
    return 0;
}

static int run(const int8_t *inputs, int8_t *outputs, uint32_t count, record *kept)
{
    /* Memory from malloc is aligned, and so is what lies one guard further. */
    unsigned char *memory = malloc(GUARD_BYTES + NET_ARENA_BYTES + GUARD_BYTES);
    unsigned char *arena;
    uint32_t i;
    int status = DONE;
    if (memory == NULL)
        return NO_MEMORY;
    arena = memory + GUARD_BYTES;
    (void)memset(memory, UNTOUCHED, GUARD_BYTES);
    (void)memset(arena + NET_ARENA_BYTES, UNTOUCHED, GUARD_BYTES);
    for (i = 0u; (i < count) && (status == DONE); ++i) {
        const int8_t *in = inputs + ((size_t)i * NET_INPUT_BYTES);
        int8_t *out = outputs + ((size_t)i * NET_OUTPUT_BYTES);
        /* What an earlier run left in the arena must not matter. */
        (void)memset(arena, (int)((i * 85u) & 0xffu), NET_ARENA_BYTES);
        if (kept == NULL) {
            status = (net_run(in, out, arena) == 0) ? DONE : REFUSED;
        } else {
            kept->input = i;
            (void)memset(kept->filled, 0, sizeof kept->filled);
            status = (net_run_hooked(in, out, arena, keep, kept) == 0) ? DONE : REFUSED;
            if (kept->overflow)
                status = TOO_MANY_BYTES;
        }
        if ((status == DONE) && (touched(memory) || touched(arena + NET_ARENA_BYTES)))
            status = BESIDE_ARENA;
    }
    free(memory);
    return status;
}

void host_facts(uint32_t *facts);
int host_compute(const int8_t *inputs, int8_t *outputs, uint32_t count);
int host_count(const int8_t *input, int8_t *output, uint32_t *sizes);
int host_compute_layers(const int8_t *inputs, int8_t *outputs, uint32_t count, const uint32_t *sizes, int8_t *const *buffers);

/* Input bytes, output bytes, layers. */
void host_facts(uint32_t *facts)
{
    facts[0] = NET_INPUT_BYTES;
    facts[1] = NET_OUTPUT_BYTES;
    facts[2] = NET_LAYERS;
}

int host_compute(const int8_t *inputs, int8_t *outputs, uint32_t count)
{
    return run(inputs, outputs, count, NULL);
}

/* How many bytes each layer writes. */
int host_count(const int8_t *input, int8_t *output, uint32_t *sizes)
{
    record counted = {NULL, NULL, 0u, {0u}, 0};
    const int status = run(input, output, 1u, &counted);
    (void)memcpy(sizes, counted.filled, sizeof counted.filled);
    return status;
}

int host_compute_layers(const int8_t *inputs, int8_t *outputs, uint32_t count, const uint32_t *sizes, int8_t *const *buffers)
{
    record kept = {sizes, buffers, 0u, {0u}, 0};
    return run(inputs, outputs, count, &kept);
}
