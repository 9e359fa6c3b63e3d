"""Ternary codes and the bytes that hold them.

codes: int8 (N, K) in {-1, 0, 1}, N outputs and K inputs; W = scale * codes.  Each format stores
code + 1 in two bits, of which 3 is reserved and refused, or five codes a byte in base 3 (trits5),
of which the bytes from 243 on are.

======== ================================== ====================================================
format   shape, uint8                       what it is
======== ================================== ====================================================
tile16   (ceil(N/64), ceil(K/16), 4, 16, 4) what every kernel reads: byte (v, o, kk), bit pair p
                                            hold W[64 s + 16 v + o, 16 j + 4 p + kk]
trits5   (ceil(N/64), ceil(K/20), 4, 16, 4) 1.6 bits, read by the forward: byte (v, o, kk), code p
                                            hold W[64 s + 16 v + o, 20 j + 4 p + kk]
rows4    (N/4, K)                           the layout of transformers' BitNet; N % 4 == 0
seq2     (bytes,)                           four codes a byte, row by row
======== ================================== ====================================================

Arrays made here are 64-byte aligned, which kernels demand of tile16 and trits5.  A wrong dtype raises
TypeError, a wrong shape, layout or content ValueError, each naming the argument.
"""

from ._core import FORMATS, absmean, convert, empty, pack, random_codes, unpack, validate

__all__ = ["FORMATS", "absmean", "convert", "empty", "pack", "random_codes", "unpack", "validate"]
