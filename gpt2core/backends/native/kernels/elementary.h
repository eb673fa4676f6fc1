/* Exponential, sigmoid, error function and logarithm, made of operations that are the same on every processor. */

#ifndef GPT2CORE_ELEMENTARY_H
#define GPT2CORE_ELEMENTARY_H

#include "vectors.h"

#define ROUNDING_MAGIC 12582912.0f /* 1.5 * 2**23: adding it rounds to a whole number, which its low bits then show */
#define ROUNDING_MAGIC_BITS 0x4b400000u

/* e**x within 2 units in the last place: x = n ln 2 + r, a polynomial for e**r (Cephes, expf), n as an exponent.
   Below -87.3 it stays at 1e-38, above 88 at 1.7e38. */
INLINE f32v exponential(f32v x) {
  x = blend(x < -87.3f, splat(-87.3f), blend(x > 88.0f, splat(88.0f), x));
  f32v shifted = multiply_add(x, splat(1.44269504f), splat(ROUNDING_MAGIC));
  f32v n = shifted - ROUNDING_MAGIC;
  f32v r = multiply_add(n, splat(-0.693359375f), x);
  r = multiply_add(n, splat(2.12194440e-4f), r);
  f32v y = multiply_add(splat(1.9875691500e-4f), r, splat(1.3981999507e-3f));
  y = multiply_add(y, r, splat(8.3334519073e-3f));
  y = multiply_add(y, r, splat(4.1665795894e-2f));
  y = multiply_add(y, r, splat(1.6666665459e-1f));
  y = multiply_add(y, r, splat(5.0000001201e-1f));
  y = multiply_add(y * r, r, r) + 1.0f;
  u32v exponent = (u32v)shifted - ROUNDING_MAGIC_BITS;
  return y * (f32v)((exponent + 127u) << 23);
}

INLINE f32v sigmoid(f32v x) { return 1.0f / (1.0f + exponential(-x)); }

/* For |x| < 1 the Maclaurin series (DLMF 7.6.1), elsewhere erfc of Press et al., "Numerical Recipes in C", 6.2. */
static const float ERF_SERIES[] = {1.12837917f,     -0.376126389f,   0.112837917f,    -0.0268661706f, 0.00522397762f,
                                   -8.54832702e-4f, 1.20552935e-4f,  -1.49256504e-5f, 1.64621144e-6f, -1.63651339e-7f,
                                   1.48071923e-8f,  -1.22905301e-9f, 9.42275905e-11f};
static const float ERF_TAIL[] = {-1.26551223f, 1.00002368f,  0.37409196f, 0.09678418f,  -0.18628806f,
                                 0.27886807f,  -1.13520398f, 1.48851587f, -0.82215223f, 0.17087277f};
INLINE f32v error_function(f32v x) {
  f32v a = absolute(x), near = smaller(a, splat(1.0f)), square = near * near;
  f32v t = 1.0f / multiply_add(splat(0.5f), a, splat(1.0f));
  f32v series = splat(ERF_SERIES[12]), tail = splat(ERF_TAIL[9]);
  for (int i = 11; i >= 0; i--) series = multiply_add(series, square, splat(ERF_SERIES[i]));
  for (int i = 8; i >= 0; i--) tail = multiply_add(tail, t, splat(ERF_TAIL[i]));
  f32v far = multiply_add(-t, exponential(multiply_add(-a, a, tail)), splat(1.0f));
  far = (f32v)((u32v)far | ((u32v)x & 0x80000000u));
  return blend(a < 1.0f, x * series, far);
}

/* log(1 + x) for 0 <= x <= 1: with s = x / (2 + x) it is 2 artanh(s), a series in s**2 <= 1/9 (DLMF 4.6.4). */
INLINE f32v log_1_plus(f32v x) {
  f32v s = x / (2.0f + x), square = s * s, sum = splat(1.0f / 17);
  for (int odd = 15; odd > 0; odd -= 2) sum = multiply_add(sum, square, splat(1.0f / odd));
  return 2.0f * s * sum;
}

#endif
