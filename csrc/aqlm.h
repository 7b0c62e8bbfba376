/* aqlm.h: the public interface of the C core, all of it. Plain C11; no Python, no torch.
 *
 * It has two CPU bindings. csrc/python needs NumPy only, so the quantizer can be read, tested and used without torch;
 * csrc/torch gives models an operator and lets torch's threads run the core's loops.
 *
 * Letters used in every shape comment:
 *   out, in   out_features, in_features of the linear layer, W is [out, in]
 *   g, og     in_group_size, out_group_size; J = in / g groups along a row, O = out / og
 *   K, B, E   num_codebooks, nbits_per_codebook, E = 2^B entries in a codebook
 * Group (o, j) of W is scales[o] * sum_k codebooks[k, codes[o, j, k]]  (arXiv 2401.06118, section 3).
 *
 * Matrices are dense and row-major. Every function checks its sizes and returns a status; none of
 * them prints, exits, or keeps state. The process holds three pieces of state: the ISA table (core/runtime/dispatch.c),
 * the loop runner with its threads and poll function (core/runtime/parallel.c), on neither of which a result depends,
 * and aqlm_set_exact's choice (core/product/matmul.c).
 */
#ifndef AQLM_H
#define AQLM_H

#include "aqlm/product.h"
#include "aqlm/quantizer.h"
#include "aqlm/rounding.h"
#include "aqlm/runtime.h"
#include "aqlm/shape.h"
#include "aqlm/status.h"

#endif
