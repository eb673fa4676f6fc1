/* Attention over one head's cached keys and values.

   Keys lie in blocks of LANES positions, one position per lane, as the outputs of a matrix do; values lie
   position by position. So the scores of LANES positions, and LANES numbers of the result, are each one sum in
   one register. */

#ifndef GPT2CORE_ATTENTION_H
#define GPT2CORE_ATTENTION_H

#include "products.h"

#define QUERIES 6 /* that read keys and values together; at most MAX_ROWS */
#define BLOCKS 4  /* of positions, or of the result, that are summed at once by few queries; at most MAX_PANELS */

typedef struct {
  int bfloat16;      /* else float32 */
  int64_t head_dim;  /* K */
  int64_t value_dim; /* K rounded up to a multiple of LOGICAL_LANES */
  int64_t capacity;  /* positions, a multiple of LOGICAL_LANES */
} Shape;

INLINE uint16_t round_to_bfloat16(float x) { /* to nearest, ties to even */
  const uint32_t bits = bits_of_float(x);
  if (x != x) return 0x7fc0;
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Write one position's key and value of one head. */
static void write_key_value(const Shape *shape, void *keys, void *values, int64_t position, const float *k,
                            const float *v) {
  const int64_t key = position / LANES * LANES * shape->head_dim + position % LANES;
  const int64_t value = position * shape->value_dim;
  for (int64_t i = 0; i < shape->head_dim; i++)
    if (shape->bfloat16) {
      ((uint16_t *)keys)[key + i * LANES] = round_to_bfloat16(k[i]);
      ((uint16_t *)values)[value + i] = round_to_bfloat16(v[i]);
    } else {
      ((float *)keys)[key + i * LANES] = k[i];
      ((float *)values)[value + i] = v[i];
    }
}

INLINE void multiply_cached(const int bfloat16, const int rows, const int panels, const int triangle, const float *x,
                            int64_t stride, int64_t inputs, const void *w, int64_t offset, int64_t step, int64_t apart,
                            Prefetch ahead, float *y, int64_t y_stride) {
  Tile sums;
  if (bfloat16)
    accumulate_bfloat16(rows, panels, triangle, x, stride, inputs, (const uint16_t *)w + offset, step, apart, ahead,
                        sums);
  else
    accumulate_float32(rows, panels, triangle, x, stride, inputs, (const float *)w + offset, step, apart, ahead, sums);
  EACH(r, rows)
    EACH(p, panels) store(y + r * y_stride + p * LANES, sums[r][p]);
}

/* exp(scores - their maximum) of the first `count`, in place; the factor that makes their sum 1. Up to the next
   multiple of LOGICAL_LANES, `scores` is overwritten. */
static float softmax(float *scores, int64_t count) {
  const int64_t padded = (count + LOGICAL_LANES - 1) / LOGICAL_LANES * LOGICAL_LANES;
  for (int64_t t = count; t < padded; t++) scores[t] = -INFINITY;
  f32v lane_max = load(scores);
  for (int64_t t = LANES; t < padded; t += LANES) lane_max = larger(load(scores + t), lane_max);
  float max = lane_max[0]; /* where a score is NaN it does not matter which: all shares become NaN */
  for (int i = 1; i < LANES; i++) max = lane_max[i] > max ? lane_max[i] : max;
  Lanes sums = {0};
  const int64_t whole = count / LOGICAL_LANES * LOGICAL_LANES;
  for (int64_t t = 0; t < whole; t += LOGICAL_LANES)
    EACH(p, PARTS) {
      const f32v power = exponential(load(scores + t + p * LANES) - max);
      sums.part[p] += power;
      store(scores + t + p * LANES, power);
    }
  float lanes[LOGICAL_LANES];
  store_lanes(lanes, &sums);
  if (whole < padded) {
    EACH(p, PARTS) store(scores + whole + p * LANES, exponential(load(scores + whole + p * LANES) - max));
    for (int64_t t = whole; t < count; t++) lanes[t - whole] += scores[t];
  }
  return 1 / fold(lanes);
}

/* `rows` <= QUERIES neighboring queries (scaled), the first at `position`, over all positions up to their own.
   q (rows, K), y (rows, K rounded up to LOGICAL_LANES), scores (QUERIES, capacity). While keys are read, values are
   prefetched, and meanwhile the `next` keys. */
INLINE void attend_rows(const int bfloat16, const int rows, const Shape *shape, const void *keys, const void *values,
                        const void *next, int64_t position, const float *q, float *y, int64_t stride, float *scores) {
  const int blocks = rows * BLOCKS <= MAX_SUMS ? BLOCKS : MAX_SUMS / rows;
  const int64_t padded = (position + rows + LANES - 1) / LANES * LANES;
  const int64_t width = shape->head_dim, block = LANES * width, nbytes = bfloat16 ? 2 : 4;
  const int64_t value_nbytes = shape->value_dim * nbytes; /* per position */
  const int lines = blocks * LANES * (bfloat16 ? 2 : 4) > LINE_NBYTES ? 2 : 1; /* of a step: half of them will do */
  for (int64_t t = 0; t < padded;) {
    const int wide = t + blocks * LANES <= padded;
    const Prefetch ahead = {(const char *)values + t * value_nbytes,
                            (wide ? blocks : 1) * LANES * value_nbytes / width, lines};
    if (wide)
      multiply_cached(bfloat16, rows, blocks, 0, q, width, width, keys, t * width, LANES, block, ahead, scores + t,
                      shape->capacity);
    else
      multiply_cached(bfloat16, rows, 1, 0, q, width, width, keys, t * width, LANES, block, ahead, scores + t,
                      shape->capacity);
    t += (wide ? blocks : 1) * LANES;
  }
  float share[MAX_ROWS];
  EACH(r, rows) share[r] = softmax(scores + r * shape->capacity, position + r + 1);
  float sums[MAX_ROWS][BLOCKS * LANES];
  for (int64_t d = 0; d < width;) {
    const int wide = d + blocks * LANES <= shape->value_dim;
    const int64_t done = (wide ? blocks : 1) * LANES, left = width - d < done ? width - d : done;
    const Prefetch ahead = {(const char *)next + d * (position + 1) * nbytes, done * nbytes, lines};
    if (wide)
      multiply_cached(bfloat16, rows, blocks, 1, scores, shape->capacity, position + 1, values, d, shape->value_dim,
                      LANES, ahead, sums[0], BLOCKS * LANES);
    else
      multiply_cached(bfloat16, rows, 1, 1, scores, shape->capacity, position + 1, values, d, shape->value_dim, LANES,
                      ahead, sums[0], BLOCKS * LANES);
    EACH(r, rows)
      for (int64_t i = 0; i < left; i++) y[r * stride + d + i] = sums[r][i] * share[r];
    d += done;
  }
}

#define ATTEND(name, bfloat16)                                                                               \
  static void name(int rows, const Shape *s, const void *keys, const void *values, const void *next,         \
                   int64_t position, const float *q, float *y, int64_t stride, float *scores) {              \
    switch (rows) {                                                                                          \
      case 1: attend_rows(bfloat16, 1, s, keys, values, next, position, q, y, stride, scores); break;        \
      case 2: attend_rows(bfloat16, 2, s, keys, values, next, position, q, y, stride, scores); break;        \
      case 3: attend_rows(bfloat16, 3, s, keys, values, next, position, q, y, stride, scores); break;        \
      case 4: attend_rows(bfloat16, 4, s, keys, values, next, position, q, y, stride, scores); break;        \
      case 5: attend_rows(bfloat16, 5, s, keys, values, next, position, q, y, stride, scores); break;        \
      default: attend_rows(bfloat16, QUERIES, s, keys, values, next, position, q, y, stride, scores);        \
    }                                                                                                        \
  }
ATTEND(attend_float32, 0)
ATTEND(attend_bfloat16, 1)

#endif
