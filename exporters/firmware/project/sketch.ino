// Runs the network once on an input of zeros and prints its output.
#include <@name@.h>

alignas(@NAME@_ARENA_ALIGN) static uint8_t arena[@NAME@_ARENA_BYTES];

void setup() {
  Serial.begin(115200);
  int8_t *in = @name@_input(arena);
  int8_t *out = @name@_output(arena);
  for (unsigned i = 0; i < @NAME@_INPUT_BYTES; ++i) in[i] = @NAME@_INPUT_ZERO_POINT;
  const unsigned long start = micros();
  @name@_run(in, out, arena);
  Serial.print(micros() - start);
  Serial.println(" microseconds");
  for (unsigned i = 0; i < @NAME@_OUTPUT_BYTES; ++i) {
    Serial.println((out[i] - @NAME@_OUTPUT_ZERO_POINT) * @NAME@_OUTPUT_SCALE);
  }
}

void loop() {}
