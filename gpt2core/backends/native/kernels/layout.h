/* Sizes and offsets of the structures that Python fills: for each its size, then its fields' offsets in order. A
   library whose table is not that of `packing.py` is not used. */

#ifndef GPT2CORE_LAYOUT_H
#define GPT2CORE_LAYOUT_H

#include <stddef.h>

#define AT(type, field) (int64_t) offsetof(type, field)

static const int64_t LAYOUT[] = {
    sizeof(Matrix), AT(Matrix, kind), AT(Matrix, group), AT(Matrix, inputs), AT(Matrix, outputs), AT(Matrix, values),
    AT(Matrix, scale), AT(Matrix, zero),

    sizeof(Linear), AT(Linear, weight), AT(Linear, bias),

    sizeof(Norm), AT(Norm, weight), AT(Norm, bias),

    sizeof(Block), AT(Block, ln_1), AT(Block, ln_2), AT(Block, c_attn), AT(Block, attn_c_proj), AT(Block, c_fc),
    AT(Block, mlp_c_proj), AT(Block, attention_scale),

    sizeof(Model), AT(Model, layers), AT(Model, heads), AT(Model, width), AT(Model, mlp), AT(Model, vocabulary),
    AT(Model, epsilon), AT(Model, activation), AT(Model, table_kind), AT(Model, bfloat16_cache), AT(Model, wte),
    AT(Model, wte_scale), AT(Model, wpe), AT(Model, blocks), AT(Model, ln_f), AT(Model, head),

    sizeof(Cache), AT(Cache, keys), AT(Cache, values), AT(Cache, slots), AT(Cache, capacity),

    sizeof(Trace), AT(Trace, hidden_states), AT(Trace, attentions), AT(Trace, tokens),

    sizeof(Scores), AT(Scores, first), AT(Scores, top), AT(Scores, targets), AT(Scores, members), AT(Scores, ranks),
    AT(Scores, logprobs), AT(Scores, entropies), AT(Scores, member_logprobs), AT(Scores, top_ids),
    AT(Scores, top_logprobs),
};
_Static_assert(sizeof(Piece) == 16, "packing.py gives pieces as int32 (B, 4)");

/* The table; `count` becomes its length. */
EXPORT const int64_t *gpt2core_layout(int64_t *count) {
  *count = sizeof LAYOUT / sizeof *LAYOUT;
  return LAYOUT;
}

#endif
