/* From matrices (inputs, outputs) of any strides to strips. */

#ifndef GPT2CORE_PACKING_H
#define GPT2CORE_PACKING_H

#include "export.h"
#include "integer_products.h"

EXPORT int64_t gpt2core_strip_width(void) { return WIDE; }

#define PACK(name, type)                                                                                       \
  EXPORT void name(const type *from, int64_t input_stride, int64_t output_stride, int64_t inputs,              \
                   int64_t outputs, type *to) {                                                                \
    for (int64_t first = 0; first < outputs; first += WIDE, to += inputs * WIDE) {                             \
      int64_t count = outputs - first < WIDE ? outputs - first : WIDE;                                         \
      for (int64_t k = 0; k < inputs; k++)                                                                     \
        for (int64_t i = 0; i < WIDE; i++)                                                                     \
          to[k * WIDE + i] = i < count ? from[k * input_stride + (first + i) * output_stride] : (type)0;       \
    }                                                                                                          \
  }
PACK(gpt2core_pack_float32, float)
PACK(gpt2core_pack_bfloat16, uint16_t)

/* `padded` inputs, a multiple of 8; the weights become unsigned by adding 128 where dot_int8 wants them so. */
EXPORT void gpt2core_pack_int8(const int8_t *from, int64_t input_stride, int64_t output_stride, int64_t inputs,
                               int64_t padded, int64_t outputs, uint8_t *to) {
  for (int64_t first = 0; first < outputs; first += WIDE, to += padded * WIDE)
    for (int64_t k = 0; k < padded; k++)
      for (int64_t i = 0; i < WIDE; i++) {
        int is_weight = k < inputs && first + i < outputs;
        to[k / 4 * 4 * WIDE + i * 4 + k % 4] =
            (uint8_t)(INT8_OFFSET + (is_weight ? from[k * input_stride + (first + i) * output_stride] : 0));
      }
}

/* From (outputs, inputs / 2) bytes of two neighbors, the lower half first; `inputs` is a multiple of 8. */
EXPORT void gpt2core_pack_int4(const uint8_t *from, int64_t inputs, int64_t outputs, uint8_t *to) {
  for (int64_t first = 0; first < outputs; first += WIDE, to += inputs / 2 * WIDE)
    for (int64_t i = 0; i < WIDE; i++)
      for (int64_t k = 0; k < inputs; k += 8)
        for (int64_t j = 0; j < 4; j++) {
          uint8_t low = 0, high = 0;
          if (first + i < outputs) {
            const uint8_t *eight = from + (first + i) * (inputs / 2) + k / 2;
            low = eight[j / 2] >> (j % 2 * 4) & 15;
            high = eight[2 + j / 2] >> (j % 2 * 4) & 15;
          }
          to[k / 8 * 4 * WIDE + i * 4 + j] = (uint8_t)(low | high << 4);
        }
}

#endif
