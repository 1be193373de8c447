/* Status codes and error texts, the one way in which anything in ltn fails. */
#ifndef LTN_STATUS_H
#define LTN_STATUS_H

#ifdef __cplusplus
extern "C" {
#endif

enum ltn_status {
    LTN_OK = 0,
    LTN_ERR_INPUT,       /* a file, a value or a token is not what it must be */
    LTN_ERR_IO,          /* the operating system refused a read or a write */
    LTN_ERR_MEMORY,      /* not enough memory, on the host or on the device */
    LTN_ERR_DEVICE,      /* the device or its library failed */
    LTN_ERR_UNSUPPORTED, /* valid, but not something this build or machine can do */
    LTN_ERR_STOPPED,     /* a callback asked to stop */
};

/* One line without a newline: what thing, where in it, what was expected, what was found. */
struct ltn_error {
    enum ltn_status status;
    char text[512];
};

/* Writes status and the formatted text to *err (a longer text is cut; err may be NULL) and returns status, so
 * that `return ltn_fail(err, LTN_ERR_INPUT, "...")` is how a function fails. Never returns LTN_OK for a
 * failure status. */
#ifdef __GNUC__
__attribute__((format(printf, 3, 4), visibility("default")))
#endif
enum ltn_status
ltn_fail(struct ltn_error *err, enum ltn_status status, const char *format, ...);

/* Leaves the enclosing function with the status of `call` unless it is LTN_OK. */
#define LTN_TRY(call)                                                                                        \
    do {                                                                                                     \
        enum ltn_status ltn_try_status_ = (call);                                                            \
        if (ltn_try_status_ != LTN_OK)                                                                       \
            return ltn_try_status_;                                                                          \
    } while (0)

#ifdef __cplusplus
}
#endif
#endif
