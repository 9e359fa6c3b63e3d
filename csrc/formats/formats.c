/* formats.c - pack, unpack, convert and validate, once for all packings.
 *
 * Plain int8 codes (N, K) are one more format here, so that there is one loop that writes and one that checks.  The check
 * comes first and whole: a refused input has changed nothing. */
#include "../base/pool.h"
#include "i2_s.h"
#include "rows4.h"
#include "seq2.h"
#include "tile16.h"
#include "tq1_0.h"
#include "tq2_0.h"
#include "trits5.h"

#include <stdatomic.h>
#include <string.h>

static const ob_format *const formats[OB_FORMAT_COUNT] = {
#define OB_FORMAT(name) &ob_format__##name,
#include "formats.def"
#undef OB_FORMAT
};

#define CODES_PER_TASK ((size_t)1 << 18)

static ob_status
plain_measure(size_t n, size_t k, ob_extent *e)
{
    *e = (ob_extent){.rows = n, .columns = k};
    return ob_mul(n, k, &e->bytes) && e->bytes <= PTRDIFF_MAX ? OB_OK : OB_OVERFLOW;
}

static void
plain_read(const uint8_t *bytes, const ob_extent *e, size_t row, size_t first, size_t count,
           uint8_t *codes)
{
    for (size_t i = 0; i < count; i++) {
        codes[i] = (uint8_t)(bytes[row * e->columns + first + i] + 1);
    }
}

static void
plain_write(uint8_t *bytes, const ob_extent *e, size_t row, size_t first, size_t count,
            const uint8_t *codes)
{
    for (size_t i = 0; i < count; i++) {
        bytes[row * e->columns + first + i] = (uint8_t)(codes[i] - 1);
    }
}

static const ob_format plain = {"int8", plain_measure, plain_read, plain_write};

typedef struct job {
    const ob_format *from, *to; /* to NULL: only check */
    ob_extent in, out;
    size_t n, k;
    const uint8_t *source;
    uint8_t *target;
    size_t quarter, quarter_rows_per_task; /* rows i, i + quarter, ... belong to one task */
    atomic_int wrong;                      /* bits: */
} job;

enum { WRONG_CODE = 1, WRONG_PADDING = 2 };

static void
check_row(job *j, size_t row)
{
    OB_ALIGNED(64) uint8_t codes[OB_FORMAT_CHUNK];
    for (size_t first = 0; first < j->in.columns; first += OB_FORMAT_CHUNK) {
        size_t count = OB_MIN(j->in.columns - first, OB_FORMAT_CHUNK);
        size_t inside = row < j->n && first < j->k ? OB_MIN(j->k - first, count) : 0;
        unsigned code = 0, padding = 0;
        j->from->read(j->source, &j->in, row, first, count, codes);
        for (size_t i = 0; i < inside; i++) {
            code |= codes[i] > 2;
        }
        for (size_t i = inside; i < count; i++) {
            code |= codes[i] > 2;
            padding |= codes[i] != 1;
        }
        if (code | padding) {
            atomic_fetch_or(&j->wrong, (code ? WRONG_CODE : 0) | (padding ? WRONG_PADDING : 0));
        }
    }
}

static void
move_row(job *j, size_t row)
{
    OB_ALIGNED(64) uint8_t codes[OB_FORMAT_CHUNK];
    for (size_t first = 0; first < j->out.columns; first += OB_FORMAT_CHUNK) {
        size_t count = OB_MIN(j->out.columns - first, OB_FORMAT_CHUNK), inside = 0;
        if (row < j->n && first < j->k) {
            inside = OB_MIN(j->k - first, count);
            j->from->read(j->source, &j->in, row, first,
                          OB_MIN(j->in.columns - first, OB_FORMAT_CHUNK), codes);
        }
        memset(codes + inside, 1, count - inside);
        j->to->write(j->target, &j->out, row, first, count, codes);
    }
}

static void
run_task(void *arg, size_t task, size_t thread)
{
    job *j = arg;
    size_t begin = task * j->quarter_rows_per_task;
    size_t end = OB_MIN(begin + j->quarter_rows_per_task, j->quarter);
    size_t rows = j->to ? j->out.rows : j->in.rows;
    (void)thread;
    for (size_t i = begin; i < end; i++) {
        for (size_t row = i; row < rows; row += j->quarter) {
            if (j->to) {
                move_row(j, row);
            }
            else {
                check_row(j, row);
            }
        }
    }
}

static void
for_all_rows(job *j)
{
    const ob_extent *e = j->to ? &j->out : &j->in;
    if (e->rows && e->columns) {
        j->quarter = OB_CEIL_DIV(e->rows, 4);
        j->quarter_rows_per_task = OB_CEIL_DIV(CODES_PER_TASK / 4, e->columns);
        ob_parallel(OB_CEIL_DIV(j->quarter, j->quarter_rows_per_task), run_task, j);
    }
}

static ob_status
check(const ob_format *from, size_t n, size_t k, const uint8_t *source)
{
    job j = {.from = from, .n = n, .k = k, .source = source};
    ob_status status = from->measure(n, k, &j.in);
    if (status != OB_OK) {
        return status;
    }
    for_all_rows(&j);
    int wrong = atomic_load(&j.wrong);
    if (wrong & WRONG_CODE) {
        return from == &plain ? OB_INVALID : OB_RESERVED_CODE;
    }
    return wrong ? OB_INVALID : OB_OK;
}

static ob_status
move(const ob_format *from, const ob_format *to, size_t n, size_t k, const uint8_t *source,
     uint8_t *target)
{
    job j = {.from = from, .to = to, .n = n, .k = k, .source = source, .target = target};
    ob_status status = to->measure(n, k, &j.out);
    status = status == OB_OK ? check(from, n, k, source) : status;
    if (status == OB_OK) {
        from->measure(n, k, &j.in);
        for_all_rows(&j);
    }
    return status;
}

static const ob_format *
format_at(ob_format_id id)
{
    return (unsigned)id < OB_FORMAT_COUNT ? formats[id] : NULL;
}

const char *
ob_format_name(ob_format_id id)
{
    const ob_format *format = format_at(id);
    return format ? format->name : NULL;
}

ob_status
ob_format_bytes(ob_format_id id, size_t n, size_t k, size_t *bytes)
{
    const ob_format *format = format_at(id);
    ob_extent e;
    ob_status status = format ? format->measure(n, k, &e) : OB_INVALID;
    if (status == OB_OK) {
        *bytes = e.bytes;
    }
    return status;
}

ob_status
ob_pack(ob_format_id id, size_t n, size_t k, const int8_t *codes, uint8_t *bytes)
{
    const ob_format *format = format_at(id);
    return format ? move(&plain, format, n, k, (const uint8_t *)codes, bytes) : OB_INVALID;
}

ob_status
ob_unpack(ob_format_id id, size_t n, size_t k, const uint8_t *bytes, int8_t *codes)
{
    const ob_format *format = format_at(id);
    return format ? move(format, &plain, n, k, bytes, (uint8_t *)codes) : OB_INVALID;
}

ob_status
ob_convert(ob_format_id from, ob_format_id to, size_t n, size_t k, const uint8_t *in, uint8_t *out)
{
    const ob_format *source = format_at(from), *target = format_at(to);
    return source && target ? move(source, target, n, k, in, out) : OB_INVALID;
}

ob_status
ob_validate(ob_format_id id, size_t n, size_t k, const uint8_t *bytes)
{
    const ob_format *format = format_at(id);
    return format ? check(format, n, k, bytes) : OB_INVALID;
}
