/* The self test: code 0 when every test vector comes out to the byte. */
#include "@name@.h"
#include "semihosting.h"

int main(void)
{
    const int wrong = net_selftest();
    if (wrong == 0) {
        semihosting_print("PASS\n");
        return 0;
    }
    semihosting_print("FAIL: ");
    semihosting_print_number((uint64_t)wrong);
    semihosting_print(" outputs and layers differ\n");
    return 1;
}
