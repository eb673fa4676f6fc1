/* From matrices (inputs, outputs) of any strides to strips. */

#ifndef GPT2CORE_PACKING_H
#define GPT2CORE_PACKING_H

#include "vectors.h"

long strip_width(void) { return WIDE; }

#define PACK(name, type)                                                                                        \
  void name(const type *from, long input_stride, long output_stride, long inputs, long outputs, type *to) {     \
    for (long first = 0; first < outputs; first += WIDE, to += inputs * WIDE) {                                 \
      long count = outputs - first < WIDE ? outputs - first : WIDE;                                             \
      for (long k = 0; k < inputs; k++)                                                                         \
        for (long i = 0; i < WIDE; i++)                                                                         \
          to[k * WIDE + i] = i < count ? from[k * input_stride + (first + i) * output_stride] : (type)0;        \
    }                                                                                                           \
  }
PACK(pack_float32, float)
PACK(pack_bfloat16, uint16_t)

/* `padded` inputs, a multiple of 4; the weights become unsigned by adding 128. */
void pack_int8(const int8_t *from, long input_stride, long output_stride, long inputs, long padded, long outputs,
               uint8_t *to) {
  for (long first = 0; first < outputs; first += WIDE, to += padded * WIDE)
    for (long k = 0; k < padded; k++)
      for (long i = 0; i < WIDE; i++) {
        long inside = k < inputs && first + i < outputs;
        to[k / 4 * 4 * WIDE + i * 4 + k % 4] =
            (uint8_t)(128 + (inside ? from[k * input_stride + (first + i) * output_stride] : 0));
      }
}

/* From (outputs, inputs / 2) bytes of two neighbours, the lower half first; `inputs` is a multiple of 8. */
void pack_int4(const uint8_t *from, long inputs, long outputs, uint8_t *to) {
  for (long first = 0; first < outputs; first += WIDE, to += inputs / 2 * WIDE)
    for (long i = 0; i < WIDE; i++)
      for (long k = 0; k < inputs; k += 8)
        for (long j = 0; j < 4; j++) {
          const uint8_t *eight = from + (first + i) * (inputs / 2) + k / 2;
          uint8_t low = 0, high = 0;
          if (first + i < outputs) {
            low = eight[j / 2] >> (j % 2 * 4) & 15;
            high = eight[2 + j / 2] >> (j % 2 * 4) & 15;
          }
          to[k / 8 * 4 * WIDE + i * 4 + j] = (uint8_t)(low | high << 4);
        }
}

#endif
