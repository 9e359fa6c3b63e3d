/* amxint8.h - the products of isa/amxint8.c, by the contracts of kernels/kernel.h; isa/avx512vnni.c has their table. */
#ifndef OB_AMXINT8_H
#define OB_AMXINT8_H

#include "../kernels/kernel.h"

void ob_amxint8_leave(void);
void ob_amxint8_dot_forward(size_t rows, size_t k_steps, const uint8_t *packed_strip,
                            const int8_t *x, size_t ldx, const int32_t *sum, ob_acc *acc);
void ob_amxint8_decode_forward_panel(size_t k_steps, const uint8_t *packed_strip, uint8_t *panel);
void ob_amxint8_decode_input_panel(size_t n, size_t k_steps, const uint8_t *packed, size_t strip,
                                   uint8_t *panel);
void ob_amxint8_dot_input(size_t rows, size_t n_padded, const uint8_t *panel, const int8_t *q,
                          size_t ldq, const int32_t *sum, ob_acc *acc);
void ob_amxint8_pack_token_panel(size_t m, const int8_t *xq, size_t ldx, size_t strip,
                                 uint8_t *panel);
void ob_amxint8_dot_weight(size_t rows, size_t m_padded, const uint8_t *panel, const int8_t *h,
                           size_t ldh, const int32_t *sum, ob_acc *acc);

#endif
