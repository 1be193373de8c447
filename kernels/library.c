#include "kernels/library.h"

#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

bool ltn_cuda_device(const char *text, int *device)
{
    char *end;
    *device = 0;
    if (strcmp(text, "cuda") == 0)
        return true;
    if (strncmp(text, "cuda:", 5) != 0 || text[5] < '0' || text[5] > '9')
        return false;
    long n = strtol(text + 5, &end, 10);
    *device = (int)n;
    return *end == 0 && n < 1024;
}

void *ltn_library_open(const char *name, bool *present, struct ltn_error *err)
{
    static const char *const places[] = {"", "../lib/", "../lib/ltn/"};
    char exe[PATH_MAX], path[2 * PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1);
    struct stat st;

    *present = true;
    for (size_t i = 0; n > 0 && i < sizeof places / sizeof *places; i++) {
        exe[n] = 0;
        snprintf(path, sizeof path, "%.*s/%s%s", (int)(strrchr(exe, '/') - exe), exe, places[i], name);
        if (stat(path, &st) != 0)
            continue;
        void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (!library)
            ltn_fail(err, LTN_ERR_DEVICE, "%s", dlerror());
        return library;
    }
    void *library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        /* the loader's way of saying that the library itself, not one that it needs, is nowhere */
        const char *why = dlerror(), *nowhere = ": cannot open";
        *present = strncmp(why, name, strlen(name)) != 0 ||
                   strncmp(why + strlen(name), nowhere, strlen(nowhere)) != 0;
        if (*present)
            ltn_fail(err, LTN_ERR_DEVICE, "%s", why);
        else
            ltn_fail(err, LTN_ERR_UNSUPPORTED, "%s was not found: built without CUDA?", name);
    }
    return library;
}
