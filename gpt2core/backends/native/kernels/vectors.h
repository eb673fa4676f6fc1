/* Vectors of floats in the compilers' own notation, so that one source serves every processor, and the few
   operations that all arithmetic is made of.

   The same numbers come out, to the last bit, on every processor and from every compiler (docs/reproducibility.md).
   For that
   - a product that is added to something is one `multiply_add`, rounded once, and nothing else is fused;
   - a sum across a row is taken by LOGICAL_LANES lanes and folded as a tree, whatever a register holds;
   - beside + - * / and square roots, which IEEE 754 fixes, no function of the C library is used. */

#ifndef GPT2CORE_VECTORS_H
#define GPT2CORE_VECTORS_H

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "gpt2core's kernels give wrong numbers under -ffast-math, -Ofast and -ffinite-math-only; leave these flags out"
#endif
#if FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16 /* 16 concerns half precision alone */
#error "gpt2core's kernels need float arithmetic that is rounded to float (on x86: -mfpmath=sse)"
#endif
_Static_assert(sizeof(void *) == 8, "gpt2core's kernels need a 64-bit system");

#ifdef __clang__
#pragma STDC FP_CONTRACT OFF /* gcc takes -ffp-contract=off instead; the self-test knows whether it was given */
#endif

#if defined(__x86_64__) && !defined(GPT2CORE_SCALAR)
#include <immintrin.h>
#elif defined(__aarch64__) && !defined(GPT2CORE_SCALAR)
#include <arm_neon.h>
#endif

/* floats per register, and rows of a tile: its TILE_ROWS x STRIP accumulators fill the registers */
#if defined(GPT2CORE_SCALAR)
#define LANES 1
#define TILE_ROWS 4
#elif defined(__AVX512F__)
#define LANES 16
#define TILE_ROWS 8
#elif defined(__AVX2__) /* AVX alone has no whole numbers of 256 bits, and its fma in software fills one register */
#define LANES 8
#define TILE_ROWS 4
#elif defined(__aarch64__)
#define LANES 4
#define TILE_ROWS 8
#else
#define LANES 4
#define TILE_ROWS 4
#endif
#if LANES == 16 || defined(__aarch64__) /* processors with 32 registers */
#define MAX_SUMS 24 /* that a tile keeps in them */
#else
#define MAX_SUMS 12
#endif
#define STRIP 3               /* vectors of outputs that are summed at once */
#define WIDE (STRIP * LANES) /* outputs of a strip */

#define LOGICAL_LANES 16 /* of sums across a row: part of the arithmetic's definition */
#define PARTS (LOGICAL_LANES / LANES)

typedef float f32v __attribute__((vector_size(4 * LANES)));
typedef int32_t i32v __attribute__((vector_size(4 * LANES)));
typedef uint32_t u32v __attribute__((vector_size(4 * LANES)));
typedef uint16_t u16v __attribute__((vector_size(2 * LANES)));
typedef uint8_t u8v __attribute__((vector_size(4 * LANES))); /* four bytes for each lane */
typedef int8_t i8v __attribute__((vector_size(LANES)));
typedef f32v f32u __attribute__((aligned(4), may_alias));
typedef u16v u16u __attribute__((aligned(2), may_alias));
typedef i8v i8u __attribute__((aligned(1), may_alias));
typedef u8v u8u __attribute__((aligned(1), may_alias));
typedef uint16_t u16w __attribute__((vector_size(4 * LANES), aligned(1), may_alias));

#define INLINE static inline __attribute__((always_inline))

/* A loop that is unrolled as a whole, so that arrays indexed by it are registers; `count` <= 8 is a constant once
   the function is inlined. */
#ifdef __clang__
#define EACH(i, count) _Pragma("clang loop unroll(full)") for (int i = 0; i < (count); i++)
#else
#define EACH(i, count) _Pragma("GCC unroll 16") for (int i = 0; i < (count); i++)
#endif

INLINE f32v load(const float *p) { return *(const f32u *)p; }
INLINE void store(float *p, f32v x) { *(f32u *)p = x; }
INLINE f32v splat(float x) { return x - (f32v){0}; }
INLINE f32v blend(i32v condition, f32v yes, f32v no) {
  return (f32v)((condition & (i32v)yes) | (~condition & (i32v)no));
}
INLINE f32v larger(f32v x, f32v y) { return blend(x > y, x, y); }
INLINE f32v smaller(f32v x, f32v y) { return blend(x < y, x, y); }
INLINE f32v absolute(f32v x) { return (f32v)((i32v)x & 0x7fffffff); }
/* In the processors' own instructions, of which gcc makes up to five times as many for the generic form. */
#if LANES == 16
INLINE f32v load_bfloat16(const uint16_t *p) {
  return (f32v)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
}
#elif LANES == 8
INLINE f32v load_bfloat16(const uint16_t *p) {
  return (f32v)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
}
#elif LANES == 4 && defined(__x86_64__)
INLINE f32v load_bfloat16(const uint16_t *p) {
  return (f32v)_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64((const __m128i *)p));
}
#elif LANES == 4 && defined(__aarch64__)
INLINE f32v load_bfloat16(const uint16_t *p) { return (f32v)vshll_n_u16(vld1_u16(p), 16); }
#else
INLINE f32v load_bfloat16(const uint16_t *p) {
  return (f32v)(__builtin_convertvector(*(const u16u *)p, u32v) << 16);
}
#endif
INLINE float float_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
INLINE uint32_t bits_of_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

/* x y + z, rounded once. */
#if defined(GPT2CORE_UNFUSED) /* fast where hardware cannot do it, and without the promise of portable bits */
INLINE f32v multiply_add(f32v x, f32v y, f32v z) { return x * y + z; }
#elif LANES == 16
INLINE f32v multiply_add(f32v x, f32v y, f32v z) { return (f32v)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z); }
#elif LANES == 8 && defined(__FMA__)
INLINE f32v multiply_add(f32v x, f32v y, f32v z) { return (f32v)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z); }
#elif LANES == 4 && defined(__FMA__)
INLINE f32v multiply_add(f32v x, f32v y, f32v z) { return (f32v)_mm_fmadd_ps((__m128)x, (__m128)y, (__m128)z); }
#elif LANES == 4 && defined(__aarch64__)
INLINE f32v multiply_add(f32v x, f32v y, f32v z) {
  return (f32v)vfmaq_f32((float32x4_t)z, (float32x4_t)x, (float32x4_t)y);
}
#elif defined(__FMA__) || defined(__aarch64__) || defined(__FP_FAST_FMAF)
INLINE f32v multiply_add(f32v x, f32v y, f32v z) {
  f32v result;
  EACH(i, LANES) result[i] = __builtin_fmaf(x[i], y[i], z[i]);
  return result;
}
#else
#define SOFTWARE_FMA
/* In double precision and integers, after Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved
   algorithms using rounding to odd" (IEEE Trans. Computers 57, 2008):
   1. A product of two floats has at most 48 significant bits and an exponent of -298 to 256: a double holds it.
   2. `error` is exactly what rounding took from `sum` (Knuth's TwoSum; no sum of such numbers overflows).
   3. Where that is not zero, the true sum is "rounded to odd": toward zero, which is one down where the error's sign is
      not the sum's, and then its last bit is set.
   4. A number rounded to odd with 53 bits, then to nearest with p <= 51 bits, equals the true one rounded to nearest
      with p bits: an inexact sum never looks like the middle between two floats, since that would end in zeros. A
      float has p <= 24, below 2**-126 fewer, and a double's own exponents reach far below: subnormal floats need no
      care, and neither does overflow, which the last conversion decides.
   With infinities and NaN `error` is NaN, both comparisons are false, and `sum` is right as it is. */
#if LANES == 4 && defined(__x86_64__) /* two numbers at a time: of 32 bytes compilers keep none in registers here */
INLINE __m128d multiply_add_odd(__m128d x, __m128d y, __m128d z) {
  const __m128d zero = _mm_setzero_pd(), product = _mm_mul_pd(x, y), sum = _mm_add_pd(product, z);
  const __m128d part = _mm_sub_pd(sum, product);
  const __m128d error = _mm_add_pd(_mm_sub_pd(product, _mm_sub_pd(sum, part)), _mm_sub_pd(z, part));
  const __m128d less = _mm_cmplt_pd(error, zero), inexact = _mm_or_pd(less, _mm_cmpgt_pd(error, zero));
  const __m128d opposite = _mm_and_pd(_mm_xor_pd(less, _mm_cmplt_pd(sum, zero)), inexact);
  const __m128i toward_zero = _mm_add_epi64(_mm_castpd_si128(sum), _mm_castpd_si128(opposite));
  return _mm_castsi128_pd(_mm_or_si128(toward_zero, _mm_srli_epi64(_mm_castpd_si128(inexact), 63)));
}
INLINE __m128d upper_doubles(f32v x) { return _mm_cvtps_pd(_mm_movehl_ps((__m128)x, (__m128)x)); }
INLINE f32v multiply_add(f32v x, f32v y, f32v z) {
  const __m128d low = multiply_add_odd(_mm_cvtps_pd((__m128)x), _mm_cvtps_pd((__m128)y), _mm_cvtps_pd((__m128)z));
  const __m128d high = multiply_add_odd(upper_doubles(x), upper_doubles(y), upper_doubles(z));
  return (f32v)_mm_movelh_ps(_mm_cvtpd_ps(low), _mm_cvtpd_ps(high));
}
#else
typedef double f64v __attribute__((vector_size(8 * LANES)));
typedef int64_t i64v __attribute__((vector_size(8 * LANES)));
INLINE f32v multiply_add(f32v x, f32v y, f32v z) {
  f64v product = __builtin_convertvector(x, f64v) * __builtin_convertvector(y, f64v);
  f64v addend = __builtin_convertvector(z, f64v), sum = product + addend;
  f64v part = sum - product;
  f64v error = (product - (sum - part)) + (addend - part);
  i64v less = error < 0, inexact = less | (error > 0);
  i64v toward_zero = (i64v)sum + ((less ^ (sum < 0)) & inexact);
  return __builtin_convertvector((f64v)(toward_zero | (inexact & 1)), f32v);
}
#endif
#endif

INLINE float multiply_add_1(float x, float y, float z) { return multiply_add(splat(x), splat(y), splat(z))[0]; }

INLINE f32v square_root(f32v x) {
  EACH(i, LANES) x[i] = __builtin_sqrtf(x[i]);
  return x;
}

/* A sum across a row: its number i belongs to lane i modulo LOGICAL_LANES. */
typedef struct {
  f32v part[PARTS];
} Lanes;

/* The lanes' sum: the upper half is added to the lower one until one number is left. */
INLINE float fold(const float lanes[LOGICAL_LANES]) {
  float sums[LOGICAL_LANES];
  memcpy(sums, lanes, sizeof sums);
  for (int half = LOGICAL_LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) sums[i] += sums[i + half];
  return sums[0];
}
INLINE void store_lanes(float to[LOGICAL_LANES], const Lanes *lanes) {
  EACH(p, PARTS) store(to + p * LANES, lanes->part[p]);
}

#endif
