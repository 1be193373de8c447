#include "kernels/status.h"

#include <stdarg.h>
#include <stdio.h>

enum ltn_status ltn_fail(struct ltn_error *err, enum ltn_status status, const char *format, ...)
{
    if (err) {
        va_list args;
        va_start(args, format);
        err->status = status;
        vsnprintf(err->text, sizeof err->text, format, args);
        va_end(args);
    }
    return status;
}
