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
        for (char *c = err->text; *c; c++) /* names come from files: one line, and no terminal sequences */
            if ((unsigned char)*c < 0x20 || *c == 0x7f)
                *c = '?';
    }
    return status;
}
