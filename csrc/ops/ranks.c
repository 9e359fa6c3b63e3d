/* ranks.c - the mean of what the processes of a distributed run hold in their residuals. */
#include "../base/check.h"
#include "../base/pool.h"
#include "ops.h"

enum { TASK_COLUMNS = 1 << 16 }; /* weights of one task */

typedef struct mean_call {
    size_t ranks, share, first, columns;
    size_t row_first, row_stride;
    int bytes; /* of one residual */
    const void *parts;
    void *mean;
    uint64_t key;
} mean_call;

static int32_t
residual_at(const mean_call *c, size_t index)
{
    return c->bytes == 1 ? ((const int8_t *)c->parts)[index] : ((const int16_t *)c->parts)[index];
}

static void
average_task(void *arg, size_t task, size_t thread)
{
    const mean_call *c = arg;
    size_t end = OB_MIN(c->share, (task + 1) * TASK_COLUMNS), row = SIZE_MAX;
    int32_t ranks = (int32_t)c->ranks;
    uint32_t random = 0;
    (void)thread;
    for (size_t i = task * TASK_COLUMNS; i < end; i++) {
        int32_t sum = 0;
        for (size_t rank = 0; rank < c->ranks; rank++) {
            sum += residual_at(c, rank * c->share + i);
        }
        if ((c->first + i) / c->columns != row) {
            row = (c->first + i) / c->columns;
            random = ob_rng_first(c->key, c->row_first + c->row_stride * row, 0);
        }
        uint64_t number = ob_rng_number(random, (uint32_t)((c->first + i) % c->columns));
        sum += (int32_t)(number * c->ranks >> 32);
        int32_t mean = sum / ranks - (sum % ranks < 0); /* floor */
        if (c->bytes == 1) {
            ((int8_t *)c->mean)[i] = (int8_t)mean;
        }
        else {
            ((int16_t *)c->mean)[i] = (int16_t)mean;
        }
    }
}

ob_status
ob_average_residuals(size_t ranks, size_t share, int bytes, const void *parts, size_t first,
                     size_t columns, const double *control, void *mean)
{
    size_t count, last, stripes = control[OB_CTL_STRIPES] > 1 ? (size_t)control[OB_CTL_STRIPES] : 1;
    if (ranks < 1 || ranks > OB_MAX_RANKS || columns < 1 || columns > OB_MAX_K ||
        (bytes != 1 && bytes != 2)) {
        return OB_INVALID;
    }
    if (!ob_mul(ranks, share, &count) || !ob_add(first, share, &last)) {
        return OB_OVERFLOW;
    }
    mean_call c = {.ranks = ranks,
                   .share = share,
                   .first = first,
                   .columns = columns,
                   .row_first = stripes > 1 ? (size_t)control[OB_CTL_STRIPE] : 0,
                   .row_stride = stripes,
                   .bytes = bytes,
                   .parts = parts,
                   .mean = mean,
                   .key = ob_control_key(control, 0.0, OB_STREAM_COMBINE)};
    ob_parallel(OB_CEIL_DIV(share, (size_t)TASK_COLUMNS), average_task, &c);
    return OB_OK;
}
