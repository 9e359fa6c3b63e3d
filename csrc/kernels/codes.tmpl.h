/* codes.tmpl.h - 64 columns of one output row in the tile16 plane as lanes, and the small packings of the planes. */

/* The four dwords that hold a row's codes of one strip; dword v is columns 16v .. 16v+15, 256 bytes apart. */
typedef struct code_row {
    uint8_t *first;
} code_row;

OB_INLINE code_row
code_row_at(uint8_t *packed, size_t k_steps, size_t n, size_t strip)
{
    code_row row = {packed + ob_tile16_byte(k_steps, n, strip * OB_STRIP)};
    return row;
}

/* Move the code of column k of the row by sign, +-1; 0 if it is at its bound.  No branch: which codes can move is noise. */
OB_INLINE int
move_code(const ob_flip_row *row, size_t k, int sign)
{
    uint8_t *byte = row->packed + ob_tile16_byte(row->k_steps, row->n, k);
    unsigned shift = ob_tile16_shift(k), code = (*byte >> shift) & 3u;
    int moves = code + (unsigned)sign <= 2u;
    *byte = (uint8_t)(*byte + ((moves * sign) * (1 << shift)));
    return moves;
}

/* `bits` at the place of each lane's code */
#define CODE_LANES(bits)                                                           \
    (int32_t)((bits) << 0), (int32_t)((bits) << 8), (int32_t)((bits) << 16),       \
        (int32_t)((bits) << 24), (int32_t)((bits) << 2), (int32_t)((bits) << 10),  \
        (int32_t)((bits) << 18), (int32_t)((bits) << 26), (int32_t)((bits) << 4),  \
        (int32_t)((bits) << 12), (int32_t)((bits) << 20), (int32_t)((bits) << 28), \
        (int32_t)((bits) << 6), (int32_t)((bits) << 14), (int32_t)((bits) << 22),  \
        (int32_t)((bits) << 30)

/* Lane k of 16: byte kk = k % 4 of the dword, bits 2p with p = k / 4. */
OB_INLINE vi
code_shifts(void)
{
    vi lane = vi_iota();
    return vi_add(vi_sll(vi_and(lane, vi_set1(3)), 3), vi_sll(vi_srl(lane, 2), 1));
}

/* The dword of columns 16v .. 16v+15 in every lane. */
OB_INLINE vi
load_code_bits(const code_row *row, size_t v)
{
    int32_t dword;
    memcpy(&dword, row->first + 256 * v, sizeof dword);
    return vi_set1(dword);
}

/* Codes 0..2 of columns 16v .. 16v+15. */
OB_INLINE vi
load_codes(const code_row *row, size_t v)
{
    return vi_and(vi_srlv(load_code_bits(row, v), code_shifts()), vi_set1(3));
}

/* sum += T * a for the codes -1..1 of those columns: where the high bit is set plus, where neither is minus. */
OB_INLINE vi
add_coded(vi sum, const code_row *row, size_t v, vi a)
{
    static const int32_t high[LANES] = {CODE_LANES(2u)}, either[LANES] = {CODE_LANES(3u)};
    vi bits = load_code_bits(row, v);
    return vi_sub_unless(vi_add_where(sum, a, bits, vi_load(high)), a, bits, vi_load(either));
}

/* Write codes 0..2 of the first `count` of those columns (the rest is padding and stays); returns how many changed. */
OB_INLINE uint64_t
store_codes(const code_row *row, size_t v, size_t count, vi codes)
{
    static const int32_t weight[LANES] = {CODE_LANES(1u)};
    uint32_t before, mask = 0;
    uint32_t after =
        (uint32_t)vi_sum(vi_mul(codes, vi_load(weight))); /* disjoint bits: a sum is an OR */
    memcpy(&before, row->first + 256 * v, sizeof before);
    for (size_t k = count; k < LANES; k++) {
        mask |= 3u * (uint32_t)weight[k];
    }
    after = (after & ~mask) | (before & mask);
    memcpy(row->first + 256 * v, &after, sizeof after);
    uint32_t changed = before ^ after;
    return (uint64_t)__builtin_popcount((changed | changed >> 1) & 0x55555555u);
}

/* 64 signed nibbles in 32 bytes: byte j = column j (low) and column j + 32 (high). */
OB_INLINE void
load_nibbles(const uint8_t *bytes, vi *e)
{
    for (size_t half = 0; half < 2; half++) {
        vi both = vi_load_i8((const int8_t *)bytes + half * LANES);
        e[half] = vi_sra(vi_sll(both, 28), 28);
        e[half + 2] = vi_sra(vi_sll(both, 24), 28);
    }
}

OB_INLINE void
store_nibbles(uint8_t *bytes, const vi *e)
{
    for (size_t half = 0; half < 2; half++) {
        vi low = vi_and(e[half], vi_set1(15)), high = vi_sll(vi_and(e[half + 2], vi_set1(15)), 4);
        vi both = vi_sra(vi_sll(vi_or(low, high), 24), 24); /* vi_store_i8 takes values of int8 */
        vi_store_i8((int8_t *)bytes + half * LANES, both);
    }
}

/* The first `count` of 16 int16 as lanes, zeros beyond; and back. */
OB_INLINE vi
load_words(const int16_t *words, size_t count)
{
    uint16_t tail[LANES] = {0};
    const uint16_t *p = (const uint16_t *)words;
    if (count < LANES) {
        memcpy(tail, words, count * sizeof *words);
        p = tail;
    }
    return vi_sra(vi_sll(vi_load_u16(p), 16), 16);
}

OB_INLINE void
store_words(int16_t *words, size_t count, vi e)
{
    vi bits = vi_and(e, vi_set1(0xFFFF)); /* vi_store_u16 takes values of uint16 */
    if (count == LANES) {
        vi_store_u16((uint16_t *)words, bits);
        return;
    }
    uint16_t tail[LANES];
    vi_store_u16(tail, bits);
    memcpy(words, tail, count * sizeof *words);
}
