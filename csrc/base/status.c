/* status.c - words for ob_status. */
#include "../onebit.h"

const char *
ob_status_text(ob_status status)
{
    switch (status) {
    case OB_OK:
        return "no error";
    case OB_NO_MEMORY:
        return "out of memory";
    case OB_OVERFLOW:
        return "a size is too large";
    case OB_INVALID:
        return "an argument is outside its domain";
    case OB_RESERVED_CODE:
        return "a reserved code, which stands for no ternary value";
    case OB_UNSUPPORTED:
        return "not supported by this build or machine";
    }
    return "unknown status";
}
