/* vote.h - one call of ob_vote: what its two halves share. */
#ifndef OB_VOTE_H
#define OB_VOTE_H

#include "../kernels/kernel.h"

typedef struct vote_call {
    const ob_kernels *kernels;
    const ob_weights *w;
    ob_planes *planes; /* NULL: only ds and db */
    const double *control;
    ob_dtype dt;
    size_t strips, blocks, threads, m_padded;
    size_t task_blocks;         /* blocks of 256 rows that one task walks, >= 1 */
    size_t rows, first, stride; /* outputs that own planes: first + stride * i */
    uint64_t moved;             /* by votes */
    /* this chunk of tokens */
    size_t m, micro;
    const char *dy;
    const int8_t *xq;
    const float *sx;
    uint64_t key;
    int nonfinite;
    /* scratch */
    float *h_scale, *g_scale, *a;   /* (rows,) */
    float *c;                       /* (strips, 64) */
    float *bias_sum;                /* (N,) */
    int32_t *h_sum;                 /* (rows,) */
    uint32_t *sign;                 /* (strips, 64) */
    uint32_t *random;               /* (rows,) numbers of column 0 */
    int8_t *hq;                     /* (rows, m_padded) */
    uint8_t *panels;                /* (threads, 64 * m_padded) */
    char *gathered;                 /* (threads, M, 64) of dY: rows that are not contiguous */
    float *col_square;              /* (blocks, strips, 64) */
    float *row_square, *row_sketch; /* (strips, rows) */
    int64_t *row_code;              /* (threads, rows) */
} vote_call;

/* vote_outputs.c: dY of this chunk -> hq, h_sum, h_scale of the rows that own planes, bias_sum of all.  Sets nonfinite. */
void ob_vote_quantize(vote_call *v);

#endif
