/* Attention over one head's cached keys and values.

   Keys lie in blocks of LANES positions, one position per lane, as the outputs of a matrix do; values lie
   position by position. So the scores of LANES positions, and LANES numbers of the result, are each one sum in
   one register. */

#ifndef GPT2CORE_ATTENTION_H
#define GPT2CORE_ATTENTION_H

#include "products.h"

#define QUERIES 6 /* that read keys and values together */
#define BLOCKS 4  /* of positions, or of the result, that are summed at once */

typedef struct {
  int bfloat16;   /* else float32 */
  long head_dim;  /* K */
  long value_dim; /* K in whole vectors */
  long capacity;  /* positions, a multiple of LANES */
} Shape;

INLINE uint16_t rounded_bfloat16(float x) { /* to nearest, ties to even */
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return 0x7fc0;
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Write one position's key and value of one head. */
static void remember(const Shape *shape, void *keys, void *values, long position, const float *k, const float *v) {
  long key = position / LANES * LANES * shape->head_dim + position % LANES, value = position * shape->value_dim;
  for (long i = 0; i < shape->head_dim; i++)
    if (shape->bfloat16) {
      ((uint16_t *)keys)[key + i * LANES] = rounded_bfloat16(k[i]);
      ((uint16_t *)values)[value + i] = rounded_bfloat16(v[i]);
    } else {
      ((float *)keys)[key + i * LANES] = k[i];
      ((float *)values)[value + i] = v[i];
    }
}

INLINE void weigh(const int bfloat16, const int rows, const int panels, const float *x, long stride, long inputs,
                  const void *w, long offset, long step, long apart, Soon soon, float *y, long y_stride) {
  Tile sums;
  if (bfloat16)
    sums_bfloat16(rows, panels, x, stride, inputs, (const uint16_t *)w + offset, step, apart, soon, sums);
  else
    sums_float32(rows, panels, x, stride, inputs, (const float *)w + offset, step, apart, soon, sums);
  EACH(r, rows)
    EACH(p, panels) store(y + r * y_stride + p * LANES, sums[r][p]);
}

/* exp(scores - their maximum) of the first `seen`, zeros up to `padded`; the factor that makes their sum 1. */
static float softmax(float *scores, long seen, long padded) {
  for (long t = seen; t < padded; t++) scores[t] = -INFINITY;
  f32v most = load(scores), sum = splat(0);
  for (long t = LANES; t < padded; t += LANES) most = larger(load(scores + t), most);
  float largest = most[0];
  for (int i = 1; i < LANES; i++) largest = most[i] > largest ? most[i] : largest;
  for (long t = 0; t < padded; t += LANES) {
    f32v power = exponential(load(scores + t) - largest);
    if (t + LANES > seen) /* exponential(-inf) is small, not 0 */
      for (int i = 0; i < LANES; i++)
        if (t + i >= seen) power[i] = 0;
    sum += power;
    store(scores + t, power);
  }
  return 1 / total(sum);
}

/* `rows` <= QUERIES neighbouring queries (scaled), the first at `position`, over all positions up to their own.
   q (rows, K), y (rows, K in whole vectors), scores (QUERIES, capacity). While keys are read, values are asked
   for, and meanwhile the `next` keys. */
INLINE void attend_rows(const int bfloat16, const int rows, const Shape *shape, const void *keys,
                        const void *values, const void *next, long position, const float *q, float *y, long stride,
                        float *scores) {
  const long seen = position + rows, padded = (seen + LANES - 1) / LANES * LANES;
  const long width = shape->head_dim, block = LANES * width, nbytes = bfloat16 ? 2 : 4;
  const long of_values = shape->value_dim * nbytes; /* per position */
  for (long t = 0; t < padded;) {
    const int many = t + BLOCKS * LANES <= padded;
    const Soon soon = {(const char *)values + t * of_values, (many ? BLOCKS : 1) * LANES * of_values / width, 1};
    if (many)
      weigh(bfloat16, rows, BLOCKS, q, width, width, keys, t * width, LANES, block, soon, scores + t, shape->capacity);
    else
      weigh(bfloat16, rows, 1, q, width, width, keys, t * width, LANES, block, soon, scores + t, shape->capacity);
    t += (many ? BLOCKS : 1) * LANES;
  }
  float share[QUERIES];
  EACH(r, rows) share[r] = softmax(scores + r * shape->capacity, position + r + 1, padded);
  float sums[QUERIES][BLOCKS * LANES];
  for (long d = 0; d < shape->value_dim;) {
    const int many = d + BLOCKS * LANES <= shape->value_dim;
    const Soon soon = {next, width * nbytes, 1};
    if (many)
      weigh(bfloat16, rows, BLOCKS, scores, shape->capacity, seen, values, d, shape->value_dim, LANES, soon, sums[0],
            BLOCKS * LANES);
    else
      weigh(bfloat16, rows, 1, scores, shape->capacity, seen, values, d, shape->value_dim, LANES, soon, sums[0],
            BLOCKS * LANES);
    const long done = (many ? BLOCKS : 1) * LANES, left = width - d < done ? width - d : done;
    EACH(r, rows)
      for (long i = 0; i < left; i++) y[r * stride + d + i] = sums[r][i] * share[r];
    d += done;
  }
}

#define ATTEND(name, bfloat16)                                                                         \
  static void name(int rows, const Shape *s, const void *keys, const void *values, const void *next,   \
                   long position, const float *q, float *y, long stride, float *scores) {              \
    switch (rows) {                                                                                    \
      case 1: attend_rows(bfloat16, 1, s, keys, values, next, position, q, y, stride, scores); break;  \
      case 2: attend_rows(bfloat16, 2, s, keys, values, next, position, q, y, stride, scores); break;  \
      case 3: attend_rows(bfloat16, 3, s, keys, values, next, position, q, y, stride, scores); break;  \
      case 4: attend_rows(bfloat16, 4, s, keys, values, next, position, q, y, stride, scores); break;  \
      case 5: attend_rows(bfloat16, 5, s, keys, values, next, position, q, y, stride, scores); break;  \
      default: attend_rows(bfloat16, QUERIES, s, keys, values, next, position, q, y, stride, scores);  \
    }                                                                                                  \
  }
ATTEND(attend_float32, 0)
ATTEND(attend_bfloat16, 1)

#endif
