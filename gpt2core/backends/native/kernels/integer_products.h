/* Four int8 products per lane, added to its 32-bit sum: exact in every form, so that each processor may use its own.

   int4's weights are 0 to 15. int8's are kept as they are, or plus INT8_OFFSET without a sign, for the instructions
   that want one factor so (VPDPBUSD). */

#ifndef GPT2CORE_INTEGER_PRODUCTS_H
#define GPT2CORE_INTEGER_PRODUCTS_H

#include "vectors.h"

typedef int16_t Pairs __attribute__((vector_size(4 * LANES)));
#define PAIRS_STEPS 4 /* of eight inputs; a group has a multiple of 32 */

typedef struct {
  u8v unsigned_part; /* as dot_int8 wants it */
  u8v signs;         /* the weights with their signs, where dot_int8 wants these */
} Int8Weights;

#if LANES == 16 && defined(__AVX512VNNI__)
#define INT8_OFFSET 128 /* what dot_int8 counts each weight too large */
INLINE i32v dot_int4(i32v sum, u8v weights, int32_t four) {
  return (i32v)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, _mm512_set1_epi32(four));
}
#elif LANES == 8 && (defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__)))
#define INT8_OFFSET 128
INLINE i32v dot_int4(i32v sum, u8v weights, int32_t four) {
#if defined(__AVXVNNI__)
  return (i32v)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)weights, _mm256_set1_epi32(four));
#else
  return (i32v)_mm256_dpbusd_epi32((__m256i)sum, (__m256i)weights, _mm256_set1_epi32(four));
#endif
}

/* Pairs of products as 16 bits: 2 * 15 * 127 for int4, of which PAIRS_STEPS times two may be added (30480), and
   2 * 127 * 127 for int8, where the weight's sign has moved to the input; none saturates. */
#elif LANES == 16 && defined(__AVX512BW__)
#define INT8_OFFSET 0
#define PAIRS_INT4(weights, four) ((Pairs)_mm512_maddubs_epi16((__m512i)(weights), _mm512_set1_epi32(four)))
#define ADD_PAIRS(pairs) ((i32v)_mm512_madd_epi16((__m512i)(pairs), _mm512_set1_epi16(1)))
INLINE i32v dot_int8(i32v sum, const Int8Weights *w, int32_t four) {
  __m512i x = _mm512_set1_epi32(four);
  x = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask((__m512i)w->signs), _mm512_setzero_si512(), x);
  return (i32v)_mm512_add_epi32(
      (__m512i)sum, _mm512_madd_epi16(_mm512_maddubs_epi16((__m512i)w->unsigned_part, x), _mm512_set1_epi16(1)));
}
INLINE Int8Weights int8_weights(u8v raw) {
  return (Int8Weights){(u8v)_mm512_abs_epi8((__m512i)raw), raw};
}
#elif LANES == 8 && defined(__AVX2__)
#define INT8_OFFSET 0
#define PAIRS_INT4(weights, four) ((Pairs)_mm256_maddubs_epi16((__m256i)(weights), _mm256_set1_epi32(four)))
#define ADD_PAIRS(pairs) ((i32v)_mm256_madd_epi16((__m256i)(pairs), _mm256_set1_epi16(1)))
INLINE i32v dot_int8(i32v sum, const Int8Weights *w, int32_t four) {
  __m256i x = _mm256_sign_epi8(_mm256_set1_epi32(four), (__m256i)w->signs);
  return (i32v)_mm256_add_epi32(
      (__m256i)sum, _mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)w->unsigned_part, x), _mm256_set1_epi16(1)));
}
INLINE Int8Weights int8_weights(u8v raw) {
  return (Int8Weights){(u8v)_mm256_abs_epi8((__m256i)raw), raw};
}
#elif LANES == 4 && defined(__SSSE3__)
#define INT8_OFFSET 0
#define PAIRS_INT4(weights, four) ((Pairs)_mm_maddubs_epi16((__m128i)(weights), _mm_set1_epi32(four)))
#define ADD_PAIRS(pairs) ((i32v)_mm_madd_epi16((__m128i)(pairs), _mm_set1_epi16(1)))
INLINE i32v dot_int8(i32v sum, const Int8Weights *w, int32_t four) {
  __m128i x = _mm_sign_epi8(_mm_set1_epi32(four), (__m128i)w->signs);
  return (i32v)_mm_add_epi32((__m128i)sum,
                             _mm_madd_epi16(_mm_maddubs_epi16((__m128i)w->unsigned_part, x), _mm_set1_epi16(1)));
}
INLINE Int8Weights int8_weights(u8v raw) {
  return (Int8Weights){(u8v)_mm_abs_epi8((__m128i)raw), raw};
}

#elif LANES == 4 && defined(__aarch64__)
#define INT8_OFFSET 0
INLINE i32v dot_signed(i32v sum, u8v weights, int32_t four) {
  int8x16_t w = (int8x16_t)weights, x = vreinterpretq_s8_s32(vdupq_n_s32(four));
#if defined(__ARM_FEATURE_DOTPROD)
  return (i32v)vdotq_s32((int32x4_t)sum, w, x);
#else
  int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(x)));
  int32x4_t high = vpaddlq_s16(vmull_high_s8(w, x));
  return (i32v)vaddq_s32((int32x4_t)sum, vpaddq_s32(low, high));
#endif
}
INLINE i32v dot_int4(i32v sum, u8v weights, int32_t four) { return dot_signed(sum, weights, four); }
INLINE i32v dot_int8(i32v sum, const Int8Weights *w, int32_t four) { return dot_signed(sum, w->signs, four); }
INLINE Int8Weights int8_weights(u8v raw) { return (Int8Weights){raw, raw}; }

#if defined(__ARM_FEATURE_MATMUL_INT8)
#define SQUARES /* SMMLA: two rows times two outputs, eight inputs of each */
INLINE i32v multiply_square(i32v sums, u8v rows, u8v outputs) {
  return (i32v)vmmlaq_s32((int32x4_t)sums, (int8x16_t)rows, (int8x16_t)outputs);
}
/* Eight inputs of one row, then those of another. */
INLINE u8v two_rows(const int8_t *first, const int8_t *second) {
  return (u8v)vcombine_s8(vld1_s8(first), vld1_s8(second));
}
/* All eight inputs' weights of a vector's first two outputs, or of its last two. */
INLINE u8v two_outputs(const int last, u8v four, u8v next_four) {
  const uint32x4_t x = (uint32x4_t)four, y = (uint32x4_t)next_four;
  return (u8v)(last ? vzip2q_u32(x, y) : vzip1q_u32(x, y));
}
/* One row's sums of a vector's four outputs. */
INLINE i32v row_of_squares(const int second, i32v first_outputs, i32v last_outputs) {
  const int64x2_t x = (int64x2_t)first_outputs, y = (int64x2_t)last_outputs;
  return (i32v)(second ? vtrn2q_s64(x, y) : vtrn1q_s64(x, y));
}
#endif

#elif LANES == 4 && defined(__x86_64__) /* bytes 0 and 2 of a lane as two 16-bit numbers, then bytes 1 and 3 */
#define INT8_OFFSET 128
INLINE i32v dot_int4(i32v sum, u8v weights, int32_t four) {
  const __m128i w = (__m128i)weights, x = _mm_set1_epi32(four);
  const __m128i even = _mm_madd_epi16(_mm_and_si128(w, _mm_set1_epi16(255)), _mm_srai_epi16(_mm_slli_epi16(x, 8), 8));
  const __m128i odd = _mm_madd_epi16(_mm_srli_epi16(w, 8), _mm_srai_epi16(x, 8));
  return (i32v)_mm_add_epi32((__m128i)sum, _mm_add_epi32(even, odd));
}

#else
#define INT8_OFFSET 128
INLINE i32v dot_int4(i32v sum, u8v weights, int32_t four) {
  u32v w = (u32v)weights;
  sum += (i32v)(w & 255) * (int32_t)(int8_t)four;
  sum += (i32v)(w >> 8 & 255) * (int32_t)(int8_t)(four >> 8);
  sum += (i32v)(w >> 16 & 255) * (int32_t)(int8_t)(four >> 16);
  return sum + (i32v)(w >> 24) * (four >> 24);
}
#endif

#if INT8_OFFSET
INLINE i32v dot_int8(i32v sum, const Int8Weights *w, int32_t four) { return dot_int4(sum, w->unsigned_part, four); }
INLINE Int8Weights int8_weights(u8v raw) { return (Int8Weights){raw, raw}; }
#endif

#endif
