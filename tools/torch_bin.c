#include "tools/torch_bin.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { MAX_PICKLE = 4 << 20 }; /* the 330 tensors of a 7B checkpoint take 50 KB */

enum opcode {
    OP_MARK = '(',
    OP_EMPTY_TUPLE = ')',
    OP_STOP = '.',
    OP_BININT = 'J',
    OP_BININT1 = 'K',
    OP_BININT2 = 'M',
    OP_NONE = 'N',
    OP_BINPERSID = 'Q',
    OP_REDUCE = 'R',
    OP_BINUNICODE = 'X',
    OP_BUILD = 'b',
    OP_GLOBAL = 'c',
    OP_BINGET = 'h',
    OP_LONG_BINGET = 'j',
    OP_BINPUT = 'q',
    OP_LONG_BINPUT = 'r',
    OP_SETITEM = 's',
    OP_TUPLE = 't',
    OP_SETITEMS = 'u',
    OP_EMPTY_DICT = '}',
    OP_PROTO = 0x80,
    OP_TUPLE1 = 0x85,
    OP_TUPLE2 = 0x86,
    OP_TUPLE3 = 0x87,
    OP_NEWTRUE = 0x88,
    OP_NEWFALSE = 0x89,
    OP_LONG1 = 0x8a,
};

enum global { ORDERED_DICT, REBUILD_TENSOR, HALF_STORAGE, BFLOAT16_STORAGE, FLOAT_STORAGE, DOUBLE_STORAGE };

static const char *const globals[] = {
    [ORDERED_DICT] = "collections\nOrderedDict\n", [REBUILD_TENSOR] = "torch._utils\n_rebuild_tensor_v2\n",
    [HALF_STORAGE] = "torch\nHalfStorage\n",       [BFLOAT16_STORAGE] = "torch\nBFloat16Storage\n",
    [FLOAT_STORAGE] = "torch\nFloatStorage\n",     [DOUBLE_STORAGE] = "torch\nDoubleStorage\n",
};
enum { N_GLOBALS = sizeof globals / sizeof *globals };

static const enum ltn_st_dtype storage_dtypes[] = {
    [HALF_STORAGE] = LTN_ST_F16,
    [BFLOAT16_STORAGE] = LTN_ST_BF16,
    [FLOAT_STORAGE] = LTN_ST_F32,
    [DOUBLE_STORAGE] = LTN_ST_F64,
};

enum kind { UNSET, MARK, NONE, BOOL, INT, STRING, TUPLE, DICT, GLOBAL, STORAGE, TENSOR };

static const char *const kind_names[] = {
    [UNSET] = "nothing",   [MARK] = "a mark",       [NONE] = "None",       [BOOL] = "a boolean",
    [INT] = "an integer",  [STRING] = "text",       [TUPLE] = "a tuple",   [DICT] = "a dictionary",
    [GLOBAL] = "a global", [STORAGE] = "a storage", [TENSOR] = "a tensor",
};

struct value {
    enum kind kind;
    int64_t n; /* BOOL, INT: the value; STRING: bytes; TUPLE: items; DICT, STORAGE, TENSOR: number of; GLOBAL:
                  which */
    size_t at; /* STRING: where in the pickle; TUPLE: where in items */
};

struct storage {
    enum ltn_st_dtype dtype;
    zip_uint64_t entry;
    uint64_t bytes;
    int64_t numel;
};

struct pair {
    int64_t dict;
    struct value key, value;
};

/* An array that grows; `n` of `room` elements are in use. */
#define ARRAY(type)                                                                                          \
    struct {                                                                                                 \
        type *v;                                                                                             \
        size_t n, room;                                                                                      \
    }

struct machine {
    struct ltn_torch_bin *bin;
    struct ltn_error *err;
    const char *root; /* of the archive: data.pkl is ROOT/data.pkl */
    const uint8_t *text;
    size_t bytes, at, op_at;
    ARRAY(struct value) stack;
    ARRAY(struct value) memo;
    ARRAY(struct value) items; /* of all tuples */
    ARRAY(struct pair) pairs;  /* of all dictionaries */
    ARRAY(struct storage) storages;
    ARRAY(struct ltn_torch_tensor) tensors; /* without names */
    int64_t n_dicts;
};

static bool grow(void **v, size_t *room, size_t n, size_t size)
{
    if (n <= *room)
        return true;
    size_t more = n + n / 2 + 16;
    void *p = realloc(*v, more * size);
    if (!p)
        return false;
    memset((char *)p + *room * size, 0, (more - *room) * size);
    *v = p;
    *room = more;
    return true;
}

/* Room for `more` elements after the n that are there. */
#define RESERVE(m, array, more)                                                                              \
    (grow((void **)&(m)->array.v, &(m)->array.room, (m)->array.n + (more), sizeof *(m)->array.v)             \
         ? LTN_OK                                                                                            \
         : ltn_fail((m)->err, LTN_ERR_MEMORY, "%s: no memory for its pickle", (m)->bin->path))

__attribute__((format(printf, 2, 3))) static enum ltn_status bad(const struct machine *m, const char *format,
                                                                 ...)
{
    char text[256];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return ltn_fail(m->err, LTN_ERR_INPUT, "%s: pickle, byte %zu: %s", m->bin->path, m->op_at, text);
}

/* ---- the machine's parts ---- */

static enum ltn_status push(struct machine *m, enum kind kind, int64_t n, size_t at)
{
    LTN_TRY(RESERVE(m, stack, 1));
    m->stack.v[m->stack.n++] = (struct value){.kind = kind, .n = n, .at = at};
    return LTN_OK;
}

static enum ltn_status pop(struct machine *m, struct value *out)
{
    if (m->stack.n == 0 || m->stack.v[m->stack.n - 1].kind == MARK)
        return bad(m, "the stack holds too little");
    *out = m->stack.v[--m->stack.n];
    return LTN_OK;
}

static enum ltn_status pop_kind(struct machine *m, struct value *out, enum kind kind)
{
    LTN_TRY(pop(m, out));
    return out->kind == kind ? LTN_OK
                             : bad(m, "found %s, expected %s", kind_names[out->kind], kind_names[kind]);
}

/* Little-endian number of the next n <= 8 bytes. */
static enum ltn_status fetch(struct machine *m, size_t n, uint64_t *out)
{
    if (n > m->bytes - m->at)
        return bad(m, "the pickle ends inside an operation");
    *out = 0;
    for (size_t i = 0; i < n; i++)
        *out |= (uint64_t)m->text[m->at + i] << 8 * i;
    m->at += n;
    return LTN_OK;
}

static enum ltn_status make_tuple(struct machine *m, size_t n)
{
    if (n > m->stack.n)
        return bad(m, "the stack holds too little");
    LTN_TRY(RESERVE(m, items, n));
    m->stack.n -= n;
    for (size_t i = 0; i < n; i++) {
        if (m->stack.v[m->stack.n + i].kind == MARK)
            return bad(m, "a mark inside a tuple");
        m->items.v[m->items.n + i] = m->stack.v[m->stack.n + i];
    }
    m->items.n += n;
    return push(m, TUPLE, (int64_t)n, m->items.n - n);
}

/* Values above the topmost mark. */
static enum ltn_status above_mark(struct machine *m, size_t *n)
{
    for (*n = 0; *n < m->stack.n; ++*n)
        if (m->stack.v[m->stack.n - 1 - *n].kind == MARK)
            return LTN_OK;
    return bad(m, "no mark on the stack");
}

/* Puts the topmost 2 n values, key and value by turns, into the dictionary below `gap` more. */
static enum ltn_status set_items(struct machine *m, size_t n, size_t gap)
{
    if (n % 2 || n + gap >= m->stack.n)
        return bad(m, "items without their dictionary");
    const struct value *first = &m->stack.v[m->stack.n - n], *dict = first - gap - 1;
    if (dict->kind != DICT)
        return bad(m, "found %s, expected a dictionary", kind_names[dict->kind]);
    LTN_TRY(RESERVE(m, pairs, n / 2));
    for (size_t i = 0; i < n; i += 2) {
        if (first[i].kind == MARK || first[i + 1].kind == MARK)
            return bad(m, "a mark inside a dictionary");
        m->pairs.v[m->pairs.n++] = (struct pair){dict->n, first[i], first[i + 1]};
    }
    m->stack.n -= n + gap;
    return LTN_OK;
}

static enum ltn_status put_memo(struct machine *m, uint64_t at)
{
    if (at >= m->bytes) /* a pickler counts its puts, and each is at least one byte */
        return bad(m, "memo number %" PRIu64 " in a pickle of %zu bytes", at, m->bytes);
    if (m->stack.n == 0 || m->stack.v[m->stack.n - 1].kind == MARK)
        return bad(m, "nothing to put into the memo");
    if (at >= m->memo.n) {
        LTN_TRY(RESERVE(m, memo, at + 1 - m->memo.n));
        m->memo.n = at + 1; /* those between are UNSET, which is zero */
    }
    m->memo.v[at] = m->stack.v[m->stack.n - 1];
    return LTN_OK;
}

static enum ltn_status get_memo(struct machine *m, uint64_t at)
{
    if (at >= m->memo.n || m->memo.v[at].kind == UNSET)
        return bad(m, "memo number %" PRIu64 " was never set", at);
    const struct value v = m->memo.v[at];
    return push(m, v.kind, v.n, v.at);
}

static enum ltn_status get_global(struct machine *m)
{
    const char *name = (const char *)m->text + m->at;
    size_t left = m->bytes - m->at;
    for (int i = 0; i < N_GLOBALS; i++) {
        size_t n = strlen(globals[i]);
        if (left >= n && memcmp(name, globals[i], n) == 0) {
            m->at += n;
            return push(m, GLOBAL, i, 0);
        }
    }
    char shown[80] = "";
    for (size_t i = 0, lines = 0; i < left && i < sizeof shown - 1; i++) {
        if (name[i] == '\n' && ++lines == 2)
            break;
        shown[i] = name[i] == '\n' ? '.' : name[i];
    }
    return bad(m, "asks for \"%s\", which no checkpoint of weights needs; refused", shown);
}

/* ("storage", type, key, location, numel) -> STORAGE */
static enum ltn_status load_storage(struct machine *m)
{
    struct value id = {0};
    LTN_TRY(pop_kind(m, &id, TUPLE));
    const struct value *item = m->items.v + id.at;
    if (id.n != 5 || item[0].kind != STRING || item[0].n != 7 ||
        memcmp(m->text + item[0].at, "storage", 7) != 0 || item[1].kind != GLOBAL ||
        item[1].n < HALF_STORAGE || item[2].kind != STRING || item[4].kind != INT)
        return bad(m, "a persistent id that is not (\"storage\", type, key, location, numel)");
    if (item[2].n > 40 || memchr(m->text + item[2].at, 0, (size_t)item[2].n))
        return bad(m, "a storage key that is no key");
    char name[512];
    int length = snprintf(name, sizeof name, "%s/data/%.*s", m->root, (int)item[2].n, m->text + item[2].at);
    if (length < 0 || (size_t)length >= sizeof name)
        return bad(m, "a storage name of %d bytes", length);
    zip_int64_t entry = zip_name_locate(m->bin->zip, name, 0);
    zip_stat_t stat;
    if (entry < 0 || zip_stat_index(m->bin->zip, (zip_uint64_t)entry, 0, &stat) != 0)
        return bad(m, "the archive has no entry \"%s\"", name);
    const zip_uint64_t need = ZIP_STAT_SIZE | ZIP_STAT_COMP_METHOD | ZIP_STAT_ENCRYPTION_METHOD;
    if ((stat.valid & need) != need || stat.comp_method != ZIP_CM_STORE ||
        stat.encryption_method != ZIP_EM_NONE)
        return bad(m, "entry \"%s\" is compressed or encrypted, expected stored", name);
    enum ltn_st_dtype dtype = storage_dtypes[item[1].n];
    if (item[4].n < 0 || (uint64_t)item[4].n > stat.size / ltn_st_dtype_size(dtype))
        return bad(m, "storage \"%s\" of %" PRId64 " %s elements has an entry of %" PRIu64 " bytes", name,
                   item[4].n, ltn_st_dtype_name(dtype), (uint64_t)stat.size);
    LTN_TRY(RESERVE(m, storages, 1));
    m->storages.v[m->storages.n] = (struct storage){
        .dtype = dtype, .entry = (zip_uint64_t)entry, .bytes = stat.size, .numel = item[4].n};
    return push(m, STORAGE, (int64_t)m->storages.n++, 0);
}

static enum ltn_status read_sizes(struct machine *m, int64_t *out, const struct value *tuple)
{
    for (int64_t i = 0; i < tuple->n; i++) {
        const struct value *v = &m->items.v[tuple->at + (size_t)i];
        if (v->kind != INT || v->n < 0)
            return bad(m, "a size or stride that is not a number from 0 up");
        out[i] = v->n;
    }
    return LTN_OK;
}

/* _rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks) */
static enum ltn_status rebuild_tensor(struct machine *m, const struct value *args)
{
    const struct value *a = m->items.v + args->at;
    if (args->n != 6 || a[0].kind != STORAGE || a[1].kind != INT || a[2].kind != TUPLE ||
        a[3].kind != TUPLE || a[4].kind != BOOL || a[5].kind != DICT)
        return bad(
            m, "_rebuild_tensor_v2 with other arguments than (storage, offset, size, stride, flag, hooks)");
    const struct storage *s = &m->storages.v[a[0].n];
    struct ltn_torch_tensor t = {
        .dtype = s->dtype, .offset = a[1].n, .entry = s->entry, .entry_bytes = s->bytes};
    if (a[2].n != a[3].n || a[2].n > LTN_ST_MAX_RANK)
        return bad(m, "a tensor of %" PRId64 " sizes and %" PRId64 " strides, at most %d are allowed", a[2].n,
                   a[3].n, LTN_ST_MAX_RANK);
    t.rank = (int32_t)a[2].n;
    LTN_TRY(read_sizes(m, t.shape, &a[2]));
    LTN_TRY(read_sizes(m, t.stride, &a[3]));
    int64_t last = 0, numel = 1;
    bool empty = false, good = t.offset >= 0;
    for (int32_t i = 0; i < t.rank; i++)
        empty |= t.shape[i] == 0;
    for (int32_t i = 0; i < t.rank && good && !empty; i++) {
        int64_t reach;
        good = !__builtin_mul_overflow(t.shape[i] - 1, t.stride[i], &reach) &&
               !__builtin_add_overflow(last, reach, &last) &&
               !__builtin_mul_overflow(numel, t.shape[i], &numel);
    }
    if (!good || t.offset > s->numel || (!empty && last >= s->numel - t.offset))
        return bad(m, "a tensor that reaches outside its storage of %" PRId64 " elements", s->numel);
    t.span = empty ? 0 : last + 1;
    LTN_TRY(RESERVE(m, tensors, 1));
    m->tensors.v[m->tensors.n] = t;
    return push(m, TENSOR, (int64_t)m->tensors.n++, 0);
}

static enum ltn_status reduce(struct machine *m)
{
    struct value args = {0}, callable = {0};
    LTN_TRY(pop_kind(m, &args, TUPLE));
    LTN_TRY(pop_kind(m, &callable, GLOBAL));
    if (callable.n == ORDERED_DICT && args.n == 0)
        return push(m, DICT, m->n_dicts++, 0);
    if (callable.n == REBUILD_TENSOR)
        return rebuild_tensor(m, &args);
    return bad(m, "calls something that is not to be called so; refused");
}

/* Follows the program up to STOP. */
static enum ltn_status run(struct machine *m)
{
    struct value v = {0};
    uint64_t n = 0;
    size_t items = 0;
    for (;;) {
        m->op_at = m->at;
        LTN_TRY(fetch(m, 1, &n));
        uint8_t op = (uint8_t)n;
        if ((m->op_at == 0) != (op == OP_PROTO))
            return bad(m, "does not begin with a protocol, or names one later");
        enum ltn_status status = LTN_OK;
        switch (op) {
        case OP_PROTO:
            LTN_TRY(fetch(m, 1, &n));
            if (n != 2)
                return bad(m, "protocol %d, expected 2", (int)n);
            break;
        case OP_STOP:
            return LTN_OK;
        case OP_MARK:
            status = push(m, MARK, 0, 0);
            break;
        case OP_NONE:
            status = push(m, NONE, 0, 0);
            break;
        case OP_NEWTRUE:
        case OP_NEWFALSE:
            status = push(m, BOOL, op == OP_NEWTRUE, 0);
            break;
        case OP_BININT1:
            LTN_TRY(fetch(m, 1, &n));
            status = push(m, INT, (int64_t)n, 0);
            break;
        case OP_BININT2:
            LTN_TRY(fetch(m, 2, &n));
            status = push(m, INT, (int64_t)n, 0);
            break;
        case OP_BININT:
            LTN_TRY(fetch(m, 4, &n));
            status = push(m, INT, (int32_t)(uint32_t)n, 0);
            break;
        case OP_LONG1: {
            LTN_TRY(fetch(m, 1, &n));
            if (n > 8)
                return bad(m, "an integer of %d bytes", (int)n);
            uint64_t digits = 0;
            LTN_TRY(fetch(m, n, &digits));
            if (n > 0 && n < 8 && digits >> (8 * n - 1))
                digits |= ~UINT64_C(0) << 8 * n; /* two's complement */
            status = push(m, INT, (int64_t)digits, 0);
            break;
        }
        case OP_BINUNICODE:
            LTN_TRY(fetch(m, 4, &n));
            if (n > m->bytes - m->at)
                return bad(m, "a text of %" PRIu64 " bytes, %zu are left", n, m->bytes - m->at);
            status = push(m, STRING, (int64_t)n, m->at);
            m->at += n;
            break;
        case OP_EMPTY_TUPLE:
            status = make_tuple(m, 0);
            break;
        case OP_TUPLE1:
        case OP_TUPLE2:
        case OP_TUPLE3:
            status = make_tuple(m, (size_t)(op - OP_TUPLE1 + 1));
            break;
        case OP_TUPLE:
            LTN_TRY(above_mark(m, &items));
            LTN_TRY(make_tuple(m, items));
            m->stack.v[m->stack.n - 2] = m->stack.v[m->stack.n - 1]; /* over the mark */
            m->stack.n--;
            break;
        case OP_EMPTY_DICT:
            status = push(m, DICT, m->n_dicts++, 0);
            break;
        case OP_SETITEM:
            status = set_items(m, 2, 0);
            break;
        case OP_SETITEMS:
            LTN_TRY(above_mark(m, &items));
            status = set_items(m, items, 1);
            break;
        case OP_BUILD: /* attributes of a dictionary, such as _metadata: of no interest */
            LTN_TRY(pop_kind(m, &v, DICT));
            if (m->stack.n == 0 || m->stack.v[m->stack.n - 1].kind != DICT)
                return bad(m, "attributes for something that is no dictionary");
            break;
        case OP_GLOBAL:
            status = get_global(m);
            break;
        case OP_REDUCE:
            status = reduce(m);
            break;
        case OP_BINPERSID:
            status = load_storage(m);
            break;
        case OP_BINPUT:
        case OP_LONG_BINPUT:
            LTN_TRY(fetch(m, op == OP_BINPUT ? 1 : 4, &n));
            status = put_memo(m, n);
            break;
        case OP_BINGET:
        case OP_LONG_BINGET:
            LTN_TRY(fetch(m, op == OP_BINGET ? 1 : 4, &n));
            status = get_memo(m, n);
            break;
        default:
            return bad(m, "opcode 0x%02x, which no checkpoint of weights needs; refused", op);
        }
        LTN_TRY(status);
    }
}

/* The tensors of the dictionary that the program left, under their names. */
static enum ltn_status name_tensors(struct machine *m)
{
    struct value top = {0};
    LTN_TRY(pop_kind(m, &top, DICT));
    if (m->stack.n != 0 || m->at != m->bytes)
        return bad(m, "something is left after its end");
    m->bin->tensors = calloc(m->pairs.n + 1, sizeof *m->bin->tensors);
    if (!m->bin->tensors)
        return ltn_fail(m->err, LTN_ERR_MEMORY, "%s: no memory for its tensors", m->bin->path);
    for (size_t i = 0; i < m->pairs.n; i++) {
        const struct pair *p = &m->pairs.v[i];
        if (p->dict != top.n)
            continue;
        if (p->key.kind != STRING || memchr(m->text + p->key.at, 0, (size_t)p->key.n))
            return bad(m, "a key that is no name");
        const char *name = (const char *)m->text + p->key.at;
        if (p->value.kind != TENSOR)
            return bad(m, "\"%.*s\" is %s, expected a tensor", p->key.n < 100 ? (int)p->key.n : 100, name,
                       kind_names[p->value.kind]);
        struct ltn_torch_tensor *t = &m->bin->tensors[m->bin->n_tensors];
        *t = m->tensors.v[p->value.n];
        t->name = strndup(name, (size_t)p->key.n);
        if (!t->name)
            return ltn_fail(m->err, LTN_ERR_MEMORY, "%s: no memory for its tensors", m->bin->path);
        m->bin->n_tensors++;
    }
    return LTN_OK;
}

/* ---- the archive ---- */

/* The one entry ROOT/data.pkl, ROOT without a slash. */
static enum ltn_status find_pickle(struct ltn_torch_bin *bin, zip_stat_t *stat, struct ltn_error *err)
{
    zip_int64_t n = zip_get_num_entries(bin->zip, 0), found = -1;
    for (zip_int64_t i = 0; i < n; i++) {
        const char *name = zip_get_name(bin->zip, (zip_uint64_t)i, 0);
        const char *slash = name ? strchr(name, '/') : NULL;
        if (!slash || strcmp(slash, "/data.pkl") != 0)
            continue;
        if (found >= 0)
            return ltn_fail(err, LTN_ERR_INPUT, "%s: more than one data.pkl in the archive", bin->path);
        found = i;
    }
    if (found < 0)
        return ltn_fail(err, LTN_ERR_INPUT, "%s: not a torch checkpoint: the archive has no data.pkl",
                        bin->path);
    if (zip_stat_index(bin->zip, (zip_uint64_t)found, 0, stat) != 0 || !(stat->valid & ZIP_STAT_SIZE) ||
        stat->size > MAX_PICKLE)
        return ltn_fail(err, LTN_ERR_INPUT, "%s: %s is larger than %d bytes", bin->path, stat->name,
                        MAX_PICKLE);
    return LTN_OK;
}

static enum ltn_status read_pickle(struct ltn_torch_bin *bin, struct ltn_error *err)
{
    zip_stat_t stat;
    LTN_TRY(find_pickle(bin, &stat, err));
    size_t bytes = (size_t)stat.size;
    uint8_t *text = malloc(bytes + 1);
    char *root = strndup(stat.name, strcspn(stat.name, "/"));
    zip_file_t *file = zip_fopen_index(bin->zip, stat.index, 0);
    enum ltn_status status = LTN_OK;
    if (!text || !root)
        status = ltn_fail(err, LTN_ERR_MEMORY, "%s: no memory for its pickle", bin->path);
    else if (!file)
        status = ltn_fail(err, LTN_ERR_INPUT, "%s: cannot read %s: %s", bin->path, stat.name,
                          zip_strerror(bin->zip));
    else if (zip_fread(file, text, bytes + 1) != (zip_int64_t)bytes) /* one more: so the CRC is checked */
        status = ltn_fail(err, LTN_ERR_INPUT, "%s: %s is damaged", bin->path, stat.name);
    if (status == LTN_OK) {
        struct machine m = {.bin = bin, .err = err, .root = root, .text = text, .bytes = bytes};
        status = run(&m);
        if (status == LTN_OK)
            status = name_tensors(&m);
        free(m.stack.v);
        free(m.memo.v);
        free(m.items.v);
        free(m.pairs.v);
        free(m.storages.v);
        free(m.tensors.v);
    }
    if (file)
        zip_fclose(file);
    free(root);
    free(text);
    return status;
}

enum ltn_status ltn_torch_open(struct ltn_torch_bin *bin, const char *path, struct ltn_error *err)
{
    struct stat st;
    *bin = (struct ltn_torch_bin){.path = strdup(path)};
    enum ltn_status status = LTN_OK;
    int code = 0;
    if (!bin->path) {
        status = ltn_fail(err, LTN_ERR_MEMORY, "%s: no memory for its name", path);
    } else if (stat(path, &st) != 0) {
        status = ltn_fail(err, LTN_ERR_IO, "%s: cannot open: %s", path, strerror(errno));
    } else if (!S_ISREG(st.st_mode)) {
        status = ltn_fail(err, LTN_ERR_INPUT, "%s: not a regular file", path);
    } else if (!(bin->zip = zip_open(path, ZIP_RDONLY | ZIP_CHECKCONS, &code))) {
        zip_error_t error;
        zip_error_init_with_code(&error, code);
        status = ltn_fail(err, code == ZIP_ER_OPEN || code == ZIP_ER_READ ? LTN_ERR_IO : LTN_ERR_INPUT,
                          "%s: not a whole torch checkpoint (a zip archive, PyTorch 1.6 and later): %s", path,
                          zip_error_strerror(&error));
        zip_error_fini(&error);
    } else {
        status = read_pickle(bin, err);
    }
    if (status != LTN_OK)
        ltn_torch_close(bin);
    return status;
}

void ltn_torch_close(struct ltn_torch_bin *bin)
{
    for (size_t i = 0; i < bin->n_tensors; i++)
        free(bin->tensors[i].name);
    free(bin->tensors);
    if (bin->zip)
        zip_discard(bin->zip);
    free(bin->path);
    *bin = (struct ltn_torch_bin){0};
}
