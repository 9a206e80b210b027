/* Runs the network on the inputs of the file inputs.bin, one after the other, and writes each output and the checksum
   of each layer to outputs.bin. Then it counts the instructions and the stack of one run, on the first input. */
#include "@name@.h"
#include "counting.h"
#include "semihosting.h"

#define STACK_BYTES 65536u
#define UNTOUCHED 0xa5u
#define GUARD_BYTES 32u

static int8_t input[NET_INPUT_BYTES];
static int8_t output[NET_OUTPUT_BYTES];
static uint32_t checksums[NET_LAYERS];
static uint64_t layer_ticks[NET_LAYERS];
static uint32_t layer_pieces[NET_LAYERS];
static uint64_t began;
static uint8_t stack[STACK_BYTES] __attribute__((aligned(16)));

/* What lies around the arena must be left alone. */
static struct {
    uint8_t before[GUARD_BYTES];
    uint8_t bytes[NET_ARENA_BYTES] __attribute__((aligned(NET_ARENA_ALIGN)));
    uint8_t after[GUARD_BYTES];
} arena __attribute__((aligned(NET_ARENA_ALIGN)));

static void fail(const char *why)
{
    semihosting_print("error=");
    semihosting_print(why);
    semihosting_print("\n");
    semihosting_exit(1);
}

static void print(const char *key, uint64_t value)
{
    semihosting_print(key);
    semihosting_print("=");
    semihosting_print_number(value);
    semihosting_print("\n");
}

static void fill(uint8_t *bytes, uint32_t count, uint8_t value)
{
    uint32_t i;
    for (i = 0u; i < count; ++i)
        bytes[i] = value;
}

static void check_guards(void)
{
    uint32_t i;
    for (i = 0u; i < GUARD_BYTES; ++i) {
        if ((arena.before[i] != UNTOUCHED) || (arena.after[i] != UNTOUCHED))
            fail("the network writes beside its arena");
    }
}

/* FNV-1a of each layer's bytes in the order in which they come. */
static void add_checksums(void *context, int layer, const int8_t *data, uint32_t bytes)
{
    uint32_t *sums = context;
    uint32_t sum = sums[layer];
    uint32_t i;
    for (i = 0u; i < bytes; ++i)
        sum = (sum ^ (uint8_t)data[i]) * 16777619u;
    sums[layer] = sum;
}

static void add_ticks(void *context, int layer, const int8_t *data, uint32_t bytes)
{
    const uint64_t now = counting_read();
    (void)context;
    (void)data;
    if (bytes != 0u) {
        layer_ticks[layer] += now - began;
        ++layer_pieces[layer];
    }
    began = counting_read();
}

static int run(void)
{
    return net_run(input, output, arena.bytes);
}

/* All inputs of the file; the first one is left in `input`. */
static void compare(void)
{
    const int32_t from = semihosting_open("inputs.bin", SEMIHOSTING_READ);
    const int32_t to = semihosting_open("outputs.bin", SEMIHOSTING_WRITE);
    uint8_t remains = 0u;
    int layer;
    if ((from < 0) || (to < 0))
        fail("inputs.bin or outputs.bin cannot be opened");
    while (semihosting_read(from, input, sizeof input) == 0u) {
        for (layer = 0; layer < (int)NET_LAYERS; ++layer)
            checksums[layer] = 2166136261u;
        /* What an earlier run left in the arena must not matter. */
        fill(arena.bytes, sizeof arena.bytes, remains);
        remains = (uint8_t)(remains + 85u);
        if (net_run_hooked(input, output, arena.bytes, add_checksums, checksums) != 0)
            fail("the network refuses its arena");
        check_guards();
        if (semihosting_write(to, output, sizeof output) != 0u)
            fail("outputs.bin cannot be written");
        if (semihosting_write(to, checksums, sizeof checksums) != 0u)
            fail("outputs.bin cannot be written");
    }
    semihosting_close(to);
    semihosting_close(from);
}

static void read_first(void)
{
    const int32_t file = semihosting_open("inputs.bin", SEMIHOSTING_READ);
    if ((file < 0) || (semihosting_read(file, input, sizeof input) != 0u))
        fail("inputs.bin holds no input");
    semihosting_close(file);
}

static void count_instructions(void)
{
    /* Called where the compiler does not see through it, as the network calls its hook. */
    void (*volatile hook)(void *, int, const int8_t *, uint32_t) = add_ticks;
    uint64_t start, nothing, whole;
    uint64_t piece;
    int layer;

    counting_start();
    start = counting_read();
    nothing = counting_read() - start;
    start = counting_read();
    (void)run();
    whole = counting_read() - start - nothing;
    print("ticks", whole);

    hook(0, 0, 0, 0u);
    hook(0, 0, output, 1u);
    piece = layer_ticks[0];
    layer_ticks[0] = 0u;
    layer_pieces[0] = 0u;
    (void)net_run_hooked(input, output, arena.bytes, add_ticks, 0);
    counting_stop();
    semihosting_print("layer_ticks=");
    for (layer = 0; layer < (int)NET_LAYERS; ++layer) {
        const uint64_t hooks = piece * layer_pieces[layer];
        semihosting_print_number((layer_ticks[layer] > hooks) ? layer_ticks[layer] - hooks : 0u);
        semihosting_print(" ");
    }
    semihosting_print("\n");
}

static void count_stack(void)
{
    uint32_t free = 0u;
    fill(stack, STACK_BYTES, UNTOUCHED);
    (void)counting_on_stack(run, &stack[STACK_BYTES]);
    while ((free < STACK_BYTES) && (stack[free] == UNTOUCHED))
        ++free;
    if (free == 0u)
        fail("the network needs more stack than there is");
    print("stack", STACK_BYTES - free);
}

int main(void)
{
    fill(arena.before, GUARD_BYTES, UNTOUCHED);
    fill(arena.after, GUARD_BYTES, UNTOUCHED);
    print("output_bytes", NET_OUTPUT_BYTES);
    print("layers", NET_LAYERS);
    compare();
    read_first();
    count_stack();
    count_instructions();
    return 0;
}
