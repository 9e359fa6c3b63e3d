/* all.tmpl.h - expands every kernel template on the including file's vocabulary, and their table (table.tmpl.h).
 *
 * The ISA file defines, before it includes this:
 *   OB_ISA_NAME           identifier, e.g. avx2
 *   OB_FORWARD_ROWS, OB_INPUT_ROWS, OB_WEIGHT_ROWS   tile heights
 *   vf, vi                16 float / 16 int32 lanes, and on them
 *     vf_load vf_store vf_set1 vf_add vf_mul vf_min vf_max vf_clip vf_one_nan vf_add_uniform vf_sum vf_sum_pair vf_bits
 *     vf_to_bits
 *     vi_load vi_store vi_set1 vi_iota vi_add vi_sub vi_mul vi_and vi_andnot vi_or vi_xor vi_srl vi_sra vi_sll vi_srlv
 *     vi_max vi_hmax vi_sum vi_sum64 vi_add_where vi_sub_unless vi_to_f32 vi_from_f32 vi_rint vi_floor
 *     vi_load_i8 vi_store_i8 vi_load_u16 vi_store_u16 v_add64 v_mask_beyond64 v_transpose16
 *   dot_forward decode_input_panel dot_input pack_token_panel dot_weight   the integer tiles (contracts: kernel.h)
 *   OB_FORWARD_PANEL, OB_PANEL_TOKENS   optional: its decode_forward_panel, and from how many tokens on
 *   OB_LEAVE              optional: its leave
 * Rules every vocabulary keeps: vf_sum adds lanes l + (l+8), then +4, +2, +1, vf_sum_pair does two at once; vi_rint is half to
 * even for |x| < 2^22; vi_floor is only given |x| < 2^20, vi_from_f32 whole numbers; vf_clip(x, limit) = clamp(x, +-limit), x no
 * NaN; vf_one_nan makes every NaN 0x7FC00000 (sign and payload depend on the machine and on the order of operands);
 * vf_add_uniform(v, r) = v + r * 2^-32, r unsigned, a multiple of 256; vi_add_where(sum, a, x, mask) adds a where x & mask is not
 * 0, vi_sub_unless subtracts it where it is; v_add64(e, d) = clamp(e + clamp(d, +-127), +-127) on 64 int8;
 * no operation is contracted into another. */

#include "kernel.h"

#include <string.h>

#include "lanes.tmpl.h"

#include "quantize.tmpl.h"

#include "store.tmpl.h"

#include "codes.tmpl.h"

#include "absmean.tmpl.h"

#include "trits.tmpl.h"

#include "../flip_rules/momentum.h"

#include "../flip_rules/residual8.h"

#include "../flip_rules/byte.h"
#include "../flip_rules/residual16.h"
#include "../flip_rules/residual4.h"

#include "../flip_rules/residual2.h"
#include "../flip_rules/residual4_momentum4.h"
#include "../flip_rules/residual8_momentum4.h"
#include "../flip_rules/residual8_momentum8.h"
#include "../flip_rules/stochastic.h"

#include "vote.tmpl.h"

#include "held.tmpl.h"

#include "table.tmpl.h"
