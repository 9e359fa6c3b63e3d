/* args.h - Python object -> checked view or number; every message about an argument is made here.
 *
 * TypeError: kind (not an array, dtype, byte order).  ValueError: shape, layout, alignment, range.
 * BufferError: a read-only output, or an output that overlaps another array.  MemoryError.
 * Messages read `function(): 'name' must be WANTED, got GOT`. */
#ifndef OB_ARGS_H
#define OB_ARGS_H

enum { /* element kinds, a set */
       OB_KIND_F32 = 1,
       OB_KIND_F64 = 2,
       OB_KIND_I8 = 4,
       OB_KIND_U8 = 8,
       OB_KIND_U16 = 16,
       OB_KIND_I16 = 64,
       OB_KIND_BF16 =
           32, /* a dtype named bfloat16 (ml_dtypes), known by name: nothing is imported */
       OB_KIND_RAW_BF16 = OB_KIND_BF16 | OB_KIND_U16, /* uint16: the raw bits */
       OB_KIND_FLOAT = OB_KIND_F32 | OB_KIND_RAW_BF16
};

enum {                 /* flags of a spec, a set */
       OB_WRITE = 1,   /* an output: must be writeable and overlap no other array of the call */
       OB_ALIGN64 = 2, /* data at a multiple of 64 bytes, as the kernels read `packed` */
       OB_LEADING = 4, /* any number of dimensions before those named */
       OB_OR_ONE = 8   /* one dimension: (n,) or (1,) */
};

#define OB_MAX_DIMS 8
#define OB_MAX_VIEWS 24
#define OB_FREE (-1) /* a dimension of any length; shown by its letter in `letters` */

typedef struct ob_spec {
    unsigned kinds, flags;
    int ndim;
    npy_intp dims[OB_MAX_DIMS];
    const char *letters;
} ob_spec;

typedef struct ob_view {
    const char *name;
    PyArrayObject *array; /* strong */
    void *data;
    size_t bytes;
    int write;
} ob_view;

typedef struct ob_call { /* one call: its name for messages and the arrays it holds */
    const char *function;
    size_t count;
    ob_view views[OB_MAX_VIEWS];
} ob_call;

/* The view maker.  NULL with an exception set when `object` does not fit `spec`. */
ob_view *ob_take_array(ob_call *call, PyObject *object, const char *name, ob_spec spec);
/* An array of our own joins the call: held, and part of the overlap check. */
void ob_hold_array(ob_call *call, PyArrayObject *array, const char *name, int write);
/* Last check: no output overlaps any other array of the call.  -1 with BufferError. */
int ob_check_overlap(const ob_call *call);
void ob_release(ob_call *call); /* drop all references */

/* What an array must be to be copied over `like` */
ob_spec ob_spec_like(PyArrayObject *like);

ob_dtype ob_view_dtype(const ob_view *view);       /* of an OB_KIND_FLOAT view */
size_t ob_view_rows(const ob_view *view);          /* product of all dimensions but the last */
size_t ob_view_dim(const ob_view *view, int axis); /* axis < 0 counts from the end */

/* Numbers and names.  0, or -1 with an exception set.  bool is not a number here. */
int ob_take_size(const ob_call *call, PyObject *object, const char *name, size_t low, size_t high,
                 size_t *out);
int ob_take_double(const ob_call *call, PyObject *object, const char *name, double low, double high,
                   double *out);
int ob_take_flag(const ob_call *call, PyObject *object, const char *name, int *out);
int ob_take_name(const ob_call *call, PyObject *object, const char *name, size_t count,
                 const char *(*text)(size_t), size_t *out);
/* Two numbers in [0, 1): decays of first and second moments. */
int ob_take_betas(const ob_call *call, PyObject *object, const char *name, double out[2]);
/* (N, K), both at most OB_MAX_K */
int ob_take_shape(const ob_call *call, PyObject *object, const char *name, size_t *n, size_t *k);

int ob_fail(const ob_call *call, PyObject *exception, const char *format, ...); /* -1 */
int ob_fail_status(const ob_call *call, ob_status status); /* 0 if OB_OK, else -1 */

/* A C-contiguous array on memory of ob_alloc, owned through a capsule.  Steals `descr` (may be NULL
 * with an exception set: passed on). */
PyArrayObject *ob_new_array(PyArray_Descr *descr, int ndim, const npy_intp *dims, int zeroed);
PyArrayObject *ob_new_typed(int type, int ndim, const npy_intp *dims, int zeroed);
/* Of the dtype and shape of x with `columns` in place of its last dimension. */
PyArrayObject *ob_new_like(const ob_view *x, size_t columns);
/* A second array on the same memory, so that its holder's own array cannot be reshaped from Python. */
PyObject *ob_alias(PyArrayObject *array);

/* views.c: the groups of arrays that several functions share ------------------------------------- */
/* The packings that kernels read: tile16 (of an object NULL too) and trits5.  Their array: 64-byte aligned where taken. */
int ob_take_packing(const ob_call *call, PyObject *object, ob_format_id *packing);
ob_spec ob_packed_spec(ob_format_id packing, size_t n, size_t k, unsigned flags);
uint8_t *ob_take_packed_as(ob_call *call, PyObject *packed, ob_format_id packing, size_t n,
                           size_t k, unsigned flags);
PyArrayObject *ob_new_packed_as(ob_format_id packing, size_t n, size_t k);
/* packed (with `flags`), scale and (bias may be None or NULL) of a layer of n outputs and k inputs */
int ob_take_weights(ob_call *call, PyObject *packed, ob_format_id packing, PyObject *scale,
                    PyObject *bias, size_t n, size_t k, unsigned flags, ob_weights *out);
uint8_t *ob_take_packed(ob_call *call, PyObject *packed, size_t n, size_t k, unsigned flags);
double *ob_take_control(ob_call *call, PyObject *control, const char *name, unsigned flags);
typedef struct ob_control_init {
    double seed, layer, eta, cap, clip, beta1, beta2, scale_init;
    double rule, stripes, stripe; /* zero: residual8, all rows */
} ob_control_init;

const char *ob_control_field(size_t index);
PyArrayObject *ob_new_control(const ob_control_init *init);
PyArrayObject *ob_new_packed(size_t n, size_t k);

/* planes.c -------------------------------------------------------------------------------------------
 * n, k: in/out; SIZE_MAX takes the length from the factors, and then n is the least that fits them.  out->codes is NULL:
 * the caller gives it for rules that move codes in votes. */
int ob_take_planes(ob_call *call, PyObject *planes, size_t *n, size_t *k, ob_planes *out);
/* The packed codes of planes whose n was taken from them; n grows to what both allow */
uint8_t *ob_take_packed_of(ob_call *call, PyObject *packed, size_t *n, size_t k,
                           const ob_planes *planes, unsigned flags);
void ob_hold_planes(ob_call *call,
                    PyObject *planes); /* all arrays of such a dict join the call as outputs */

/* Fresh planes for the rule, stripe and random position of `control`, which is stolen and becomes theirs; NULL passes an
 * exception on.  votes: with a vote plane.  packed: read for rule `byte`, else it may be NULL. */
PyObject *ob_new_planes(size_t n, size_t k, PyArrayObject *control, int votes,
                        const uint8_t *packed);
PyObject *ob_plane_specs(size_t n, size_t k, const double *control,
                         int votes); /* name -> (shape, dtype) */
/* The planes of a dict made by ob_new_planes, without checks; -1 with an exception. */
int ob_view_planes(PyObject *planes, uint8_t *codes, ob_planes *out);

ob_rule ob_find_rule(int residual_bits,
                     int momentum_bits); /* OB_RULE_COUNT: none has these widths */
const char *ob_rule_text(size_t rule);
const char *ob_format_text(size_t format);

#endif
