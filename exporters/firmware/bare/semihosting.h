/* Files, messages and the end of the program by way of the debugger or the emulator. */
#ifndef SEMIHOSTING_H
#define SEMIHOSTING_H

#include <stdint.h>

enum { SEMIHOSTING_READ = 1, SEMIHOSTING_WRITE = 5 };

/* A message, or a number in decimal. */
void semihosting_print(const char *text);
void semihosting_print_number(uint64_t number);

/* A file of the host; mode: one of the above. The handle, -1 when the file cannot be opened. */
int32_t semihosting_open(const char *path, uint32_t mode);

/* Both return how many bytes were left over: 0 when all went well. */
uint32_t semihosting_read(int32_t file, void *to, uint32_t bytes);
uint32_t semihosting_write(int32_t file, const void *from, uint32_t bytes);
void semihosting_close(int32_t file);

void semihosting_exit(int32_t code) __attribute__((noreturn));

#endif
