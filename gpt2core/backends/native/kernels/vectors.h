/* Vectors of floats in the compilers' own notation, so that one source serves every processor. */

#ifndef GPT2CORE_VECTORS_H
#define GPT2CORE_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16 /* floats per vector */
#define TILE_ROWS 8 /* rows that share the weights they are multiplied with: 8 x 3 sums in 32 registers */
#else
#define LANES 8
#define TILE_ROWS 4
#endif
#define STRIP 3               /* vectors of outputs that are summed at once */
#define WIDE (STRIP * LANES) /* outputs of a strip */

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

#define INLINE static inline __attribute__((always_inline))

INLINE f32v load(const float *p) { return *(const f32u *)p; }
INLINE void store(float *p, f32v x) { *(f32u *)p = x; }
INLINE f32v splat(float x) { return x - (f32v){0}; }
INLINE f32v either(i32v which, f32v yes, f32v no) { return (f32v)((which & (i32v)yes) | (~which & (i32v)no)); }
INLINE f32v larger(f32v x, f32v y) { return either(x > y, x, y); }
INLINE f32v smaller(f32v x, f32v y) { return either(x < y, x, y); }
INLINE f32v absolute(f32v x) { return (f32v)((i32v)x & 0x7fffffff); }
INLINE f32v widened(const uint16_t *p) { /* bfloat16 */
  return (f32v)(__builtin_convertvector(*(const u16u *)p, u32v) << 16);
}
INLINE float total(f32v x) {
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += x[i];
  return sum;
}

/* e**x within 2 units in the last place: x = n ln 2 + r, a polynomial for e**r (Cephes, expf), n as an exponent.
   Below -87.3 it stays at 1e-38, above 88 at 1.7e38. */
INLINE f32v exponential(f32v x) {
  const float whole = 12582912.0f; /* 1.5 * 2**23: adding it rounds to a whole number */
  x = either(x < -87.3f, splat(-87.3f), either(x > 88.0f, splat(88.0f), x));
  f32v shifted = x * 1.44269504f + whole;
  f32v n = shifted - whole;
  f32v r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  f32v y = splat(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  i32v exponent = (i32v)shifted - 0x4b400000;
  return y * (f32v)((exponent + 127) << 23);
}

INLINE f32v sigmoid(f32v x) { return 1.0f / (1.0f + exponential(-x)); }

/* For |x| < 1 the Maclaurin series (DLMF 7.6.1), elsewhere erfc of Press et al., "Numerical Recipes in C", 6.2. */
INLINE f32v error_function(f32v x) {
  static const float series[] = {1.12837917f,     -0.376126389f,   0.112837917f,    -0.0268661706f, 0.00522397762f,
                                 -8.54832702e-4f, 1.20552935e-4f,  -1.49256504e-5f, 1.64621144e-6f, -1.63651339e-7f,
                                 1.48071923e-8f,  -1.22905301e-9f, 9.42275905e-11f};
  static const float tail[] = {-1.26551223f, 1.00002368f,  0.37409196f, 0.09678418f,  -0.18628806f,
                               0.27886807f,  -1.13520398f, 1.48851587f, -0.82215223f, 0.17087277f};
  f32v a = absolute(x), near = smaller(a, splat(1.0f)), square = near * near;
  f32v t = 1.0f / (1.0f + 0.5f * a);
  f32v s = splat(series[12]), p = splat(tail[9]);
  for (int i = 11; i >= 0; i--) s = s * square + series[i];
  for (int i = 8; i >= 0; i--) p = p * t + tail[i];
  f32v far = 1.0f - t * exponential(p - a * a);
  far = (f32v)((i32v)far | ((i32v)x & (int32_t)0x80000000));
  return either(a < 1.0f, x * s, far);
}

#endif
