#include <stdio.h>

#include "@name@.h"

int main(void)
{
    const int failures = @name@_selftest();
    if (failures == 0)
        puts("PASS");
    else
        printf("FAIL: %d outputs or layers differ\n", failures);
    return failures != 0;
}
