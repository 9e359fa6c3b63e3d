/* table.tmpl.h - the table of the including file's kernels: once by all.tmpl.h, and once more for an instruction set
 * that has products of its own and everything else in common.  That one defines anew what all.tmpl.h lists as the ISA
 * file's, and
 *   OB_PRODUCT(name)      its dot_forward and so on, if they have another name */

#ifndef OB_FORWARD_PANEL
#define OB_FORWARD_PANEL NULL
#define OB_PANEL_TOKENS SIZE_MAX
#endif
#ifndef OB_LEAVE
#define OB_LEAVE NULL
#endif
#ifndef OB_PRODUCT
#define OB_PRODUCT(name) name
#endif
#ifndef OB_TABLE_NAME
#define OB_TABLE_NAME_(isa) ob_kernels__##isa
#define OB_TABLE_NAME(isa) OB_TABLE_NAME_(isa)
#define OB_TEXT_(x) #x
#define OB_TEXT(x) OB_TEXT_(x)
#endif

const ob_kernels OB_TABLE_NAME(OB_ISA_NAME) = {
    .name = OB_TEXT(OB_ISA_NAME),
    .forward_rows = OB_FORWARD_ROWS,
    .input_rows = OB_INPUT_ROWS,
    .weight_rows = OB_WEIGHT_ROWS,
    .panel_tokens = OB_PANEL_TOKENS,
    .leave = OB_LEAVE,
    .quantize_row = quantize_row,
    .quantize_row_sr = quantize_row_sr,
    .column_absmax = column_absmax,
    .quantize_columns_sr = quantize_columns_sr,
    .sum_rows = sum_rows,
    .ternarize_row = ternarize_row,
    .dot_forward = OB_PRODUCT(dot_forward),
    .decode_forward_panel = OB_FORWARD_PANEL,
    .decode_trits = decode_trits,
    .decode_input_panel = OB_PRODUCT(decode_input_panel),
    .dot_input = OB_PRODUCT(dot_input),
    .pack_token_panel = OB_PRODUCT(pack_token_panel),
    .dot_weight = OB_PRODUCT(dot_weight),
    .store_rows = store_rows,
    .vote_tile =
        {
#define OB_RULE(name, residual_bits, momentum_bits, units, dead_zone) vote_tile_##name,
#include "../flip_rules/rules.def"
#undef OB_RULE
        },
    .hold_tile = hold_tile,
    .cast_row =
        {
#define OB_RULE(name, residual_bits, momentum_bits, units, dead_zone) cast_row_##name,
#include "../flip_rules/rules.def"
#undef OB_RULE
        },
    .flip_row =
        {
#define OB_RULE(name, residual_bits, momentum_bits, units, dead_zone) step_row_##name,
#include "../flip_rules/rules.def"
#undef OB_RULE
        },
};
