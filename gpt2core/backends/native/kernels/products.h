/* Products of rows with weight matrices in float32, bfloat16, int8 and int4.

   A matrix is kept in strips of WIDE outputs, one after the other. Within a strip the weights of one input
   (float32, bfloat16), of four inputs (int8) or of eight (int4) lie side by side for all its outputs, so that a
   product reads memory once and straight ahead.

   Each sum is taken by one register in the order of the inputs, whatever the number of rows: a row's result
   does not depend, to the last bit, on the rows beside it. */

#ifndef GPT2CORE_PRODUCTS_H
#define GPT2CORE_PRODUCTS_H

#include "activations.h"
#include "team.h"

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#include <immintrin.h>
#endif

enum { FLOAT32, BFLOAT16, INT8, INT4 };

typedef struct {
  int kind;
  int group;   /* inputs that share a scale; int8: all */
  long inputs; /* rounded up to whole groups for int8 and int4 */
  long outputs;
  const void *values; /* strips */
  const float *scale; /* int8 (strips, WIDE), int4 (strips, groups, WIDE) */
  const float *zero;  /* int4: as scale */
} Matrix;

/* Rows to be multiplied: as they are, or rounded to int8 with a scale for each group of inputs. */
typedef struct {
  const float *x;
  long stride;
  const int8_t *rounded; /* (rows, inputs) */
  const float *scale;    /* (rows, groups) */
  const float *sum;      /* (rows, groups) of the rounded numbers */
} Rows;

typedef struct {
  float *y;
  long stride;
  int exact; /* nothing may be written behind a row's outputs */
  int add;   /* to what is there */
  const float *bias;
  Activation *activation;
} Result;

INLINE i32v dot4(i32v sum, u8v weights, int32_t four) { /* unsigned weights times four signed inputs */
#if defined(__AVX512VNNI__)
  return (i32v)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, _mm512_set1_epi32(four));
#elif defined(__AVXVNNI__)
  return (i32v)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)weights, _mm256_set1_epi32(four));
#else
  u32v w = (u32v)weights;
  sum += (i32v)(w & 255) * (int32_t)(int8_t)four;
  sum += (i32v)(w >> 8 & 255) * (int32_t)(int8_t)(four >> 8);
  sum += (i32v)(w >> 16 & 255) * (int32_t)(int8_t)(four >> 16);
  return sum + (i32v)(w >> 24) * (four >> 24);
#endif
}

INLINE int32_t four_at(const int8_t *p) {
  int32_t four;
  memcpy(&four, p, 4);
  return four;
}

#define MOST_ROWS 8 /* of a tile; its sums stay in registers, since all loops over them are unrolled */
#define MOST_PANELS 4
typedef f32v Tile[MOST_ROWS][MOST_PANELS];
#define EACH(i, count) _Pragma("GCC unroll 8") for (int i = 0; i < (count); i++)

/* Where to ask for memory before it is needed, and how far to go on with each step of a sum. */
typedef struct {
  const char *from;
  long step;
  int far; /* into the second cache: more can be on its way there at once */
} Soon;
INLINE void ask(Soon soon, long step) {
  const char *line = soon.from + step * soon.step;
  if (soon.far) {
    EACH(i, 2) __builtin_prefetch(line + 64 * i, 0, 1);
  } else {
    EACH(i, STRIP) __builtin_prefetch(line + 64 * i);
  }
}

/* sums[row][panel] of `rows` rows with `panels` vectors of outputs, `apart` elements from one another; `step`
   elements lie between the weights of one input and those of the next. */
#define SUMS(name, type, load)                                                                                 \
  INLINE void name(const int rows, const int panels, const float *x, long stride, long inputs, const type *w,  \
                   long step, long apart, Soon soon, Tile sums) {                                              \
    EACH(r, rows)                                                                                              \
      EACH(p, panels) sums[r][p] = splat(0);                                                                   \
    for (long k = 0; k < inputs; k++) {                                                                        \
      f32v weights[MOST_PANELS];                                                                               \
      EACH(p, panels) weights[p] = load(w + k * step + p * apart);                                             \
      ask(soon, k);                                                                                            \
      EACH(r, rows)                                                                                            \
        EACH(p, panels) sums[r][p] += weights[p] * x[r * stride + k];                                          \
    }                                                                                                          \
  }
SUMS(sums_float32, float, load)
SUMS(sums_bfloat16, uint16_t, widened)

INLINE void sums_int8(const int rows, const Matrix *m, const Rows *in, long row, long strip, Soon soon, Tile sums) {
  const uint8_t *w = (const uint8_t *)m->values + strip * m->inputs * WIDE;
  const int8_t *x = in->rounded + row * m->inputs;
  i32v whole[MOST_ROWS][STRIP];
  EACH(r, rows)
    EACH(p, STRIP) whole[r][p] = (i32v){0};
  for (long k = 0; k < m->inputs; k += 4) {
    u8v weights[STRIP];
    EACH(p, STRIP) weights[p] = *(const u8u *)(w + k * WIDE + 4 * LANES * p);
    ask(soon, k / 4);
    EACH(r, rows) {
      int32_t four = four_at(x + r * m->inputs + k);
      EACH(p, STRIP) whole[r][p] = dot4(whole[r][p], weights[p], four);
    }
  }
  EACH(r, rows) {
    int32_t offset = 128 * (int32_t)in->sum[row + r]; /* the weights are kept 128 too large */
    EACH(p, STRIP)
      sums[r][p] = __builtin_convertvector(whole[r][p] - offset, f32v) *
                   (load(m->scale + strip * WIDE + LANES * p) * in->scale[row + r]);
  }
}

INLINE void sums_int4(const int rows, const Matrix *m, const Rows *in, long row, long strip, Soon soon, Tile sums) {
  const long groups = m->inputs / m->group;
  const uint8_t *w = (const uint8_t *)m->values + strip * m->inputs / 2 * WIDE;
  EACH(r, rows)
    EACH(p, STRIP) sums[r][p] = splat(0);
  for (long g = 0; g < groups; g++) {
    const int8_t *x = in->rounded + row * m->inputs + g * m->group;
    i32v whole[MOST_ROWS][STRIP];
    EACH(r, rows)
      EACH(p, STRIP) whole[r][p] = (i32v){0};
    for (long k = 0; k < m->group; k += 8, w += 4 * WIDE) {
      u8v low[STRIP], high[STRIP];
      EACH(p, STRIP) {
        u8v both = *(const u8u *)(w + 4 * LANES * p);
        low[p] = both & 15;
        high[p] = (u8v)((u32v)both >> 4) & 15;
      }
      ask(soon, (g * m->group + k) / 8);
      EACH(r, rows) {
        int32_t four = four_at(x + r * m->inputs + k), more = four_at(x + r * m->inputs + k + 4);
        EACH(p, STRIP) {
          whole[r][p] = dot4(whole[r][p], low[p], four);
          whole[r][p] = dot4(whole[r][p], high[p], more);
        }
      }
    }
    EACH(p, STRIP) {
      long at = (strip * groups + g) * WIDE + LANES * p;
      f32v scale = load(m->scale + at), zero = load(m->zero + at);
      EACH(r, rows) {
        float x_scale = in->scale[(row + r) * groups + g], x_sum = in->sum[(row + r) * groups + g];
        sums[r][p] += (__builtin_convertvector(whole[r][p], f32v) - zero * x_sum) * (scale * x_scale);
      }
    }
  }
}

INLINE void tile(const int kind, const int rows, const Matrix *m, const Rows *in, long row, long strip, Soon soon,
                 const Result *out) {
  Tile sums;
  const float *x = in->x + row * in->stride;
  const long first = strip * m->inputs * WIDE; /* weight */
  if (kind == FLOAT32)
    sums_float32(rows, STRIP, x, in->stride, m->inputs, (const float *)m->values + first, WIDE, LANES, soon, sums);
  else if (kind == BFLOAT16)
    sums_bfloat16(rows, STRIP, x, in->stride, m->inputs, (const uint16_t *)m->values + first, WIDE, LANES, soon,
                  sums);
  else if (kind == INT8)
    sums_int8(rows, m, in, row, strip, soon, sums);
  else
    sums_int4(rows, m, in, row, strip, soon, sums);
  EACH(r, rows) {
    float *y = out->y + (row + r) * out->stride + strip * WIDE;
    EACH(p, STRIP) {
      f32v value = sums[r][p];
      if (out->bias) value += load(out->bias + strip * WIDE + LANES * p);
      long left = m->outputs - strip * WIDE - LANES * p;
      if (out->exact && left < LANES) {
        if (left > 0) memcpy(y + LANES * p, &value, 4 * left);
        continue;
      }
      if (out->add) value += load(y + LANES * p);
      store(y + LANES * p, value);
    }
    if (out->activation) out->activation(y, WIDE);
  }
}

#define AHEAD 2048 /* bytes */

/* Bytes of a strip's weights for one step of a sum. */
INLINE long step_nbytes(const int kind) { return kind == BFLOAT16 ? 2 * WIDE : 4 * WIDE; }
INLINE long steps(const int kind, const Matrix *m) {
  return kind == INT4 ? m->inputs / 8 : kind == INT8 ? m->inputs / 4 : m->inputs;
}

/* All rows with one strip, then with the next: a strip stays in the cache meanwhile, and the next is asked for
   by parts. */
#define PRODUCT(name, kind)                                                                                       \
  static void name(const Matrix *m, const Rows *in, long rows, const Result *out, Share strips) {                 \
    const long count = steps(kind, m), nbytes = count * step_nbytes(kind);                                        \
    const long tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;                                                        \
    for (long strip = strips.first; strip < strips.last; strip++) {                                               \
      const char *here = (const char *)m->values + strip * nbytes;                                                \
      for (long t = 0; t < tiles; t++) {                                                                          \
        const Soon soon = tiles == 1 ? (Soon){here + AHEAD, step_nbytes(kind), 0}                                 \
                                     : (Soon){here + nbytes + nbytes * t / tiles, step_nbytes(kind) / tiles, 0};  \
        const Share mine = part_of(rows, t, tiles);                                                               \
        switch (mine.last - mine.first) {                                                                         \
          case 1: tile(kind, 1, m, in, mine.first, strip, soon, out); break;                                      \
          case 2: tile(kind, 2, m, in, mine.first, strip, soon, out); break;                                      \
          case 3: tile(kind, 3, m, in, mine.first, strip, soon, out); break;                                      \
          case 4: tile(kind, 4, m, in, mine.first, strip, soon, out); break;                                      \
          WIDE_CASES(kind)                                                                                        \
        }                                                                                                         \
      }                                                                                                           \
    }                                                                                                             \
  }
#if TILE_ROWS == 8
#define WIDE_CASES(kind)                                              \
  case 5: tile(kind, 5, m, in, mine.first, strip, soon, out); break;  \
  case 6: tile(kind, 6, m, in, mine.first, strip, soon, out); break;  \
  case 7: tile(kind, 7, m, in, mine.first, strip, soon, out); break;  \
  case 8: tile(kind, 8, m, in, mine.first, strip, soon, out); break;
#else
#define WIDE_CASES(kind)
#endif

PRODUCT(product_float32, FLOAT32)
PRODUCT(product_bfloat16, BFLOAT16)
PRODUCT(product_int8, INT8)
PRODUCT(product_int4, INT4)

/* A stage: `rows` times `m`. */
static void multiply(Member *me, const Matrix *m, const Rows *in, long rows, const Result *out) {
  static void (*const products[])(const Matrix *, const Rows *, long, const Result *, Share) = {
      product_float32, product_bfloat16, product_int8, product_int4};
  const int fineness = rows > TILE_ROWS ? 2 : 4; /* the next strip is asked for, and had better be one's own */
  STAGE(me, rows ? (m->outputs + WIDE - 1) / WIDE : 0, fineness, mine)
  products[m->kind](m, in, rows, out, mine);
}

/* Round a row to int8, each group by its largest number; what is not finite makes its group's scale so. */
static void round_row(const float *x, long count, const Matrix *m, int8_t *rounded, float *scales, float *sums) {
  for (long first = 0; first < m->inputs; first += m->group) {
    long last = first + m->group < count ? first + m->group : count;
    u32v most = {0};
    long k = first;
    for (; k + LANES <= last; k += LANES) {
      u32v size = (u32v)absolute(load(x + k)); /* as whole numbers, NaN is the largest */
      most = (u32v)(((i32v)(size > most) & (i32v)size) | (~(i32v)(size > most) & (i32v)most));
    }
    uint32_t largest_bits = 0;
    for (int i = 0; i < LANES; i++) largest_bits = most[i] > largest_bits ? most[i] : largest_bits;
    for (; k < last; k++) {
      uint32_t bits;
      memcpy(&bits, x + k, 4);
      bits &= 0x7fffffff;
      largest_bits = bits > largest_bits ? bits : largest_bits;
    }
    float largest;
    memcpy(&largest, &largest_bits, 4);
    float factor = largest > 0 ? 127 / largest : 0;
    const float whole = 12582912.0f; /* adding it rounds to the nearest whole number */
    int32_t sum = 0;
    i32v part = {0};
    for (k = first; k + LANES <= last; k += LANES) {
      i32v q = (i32v)(load(x + k) * factor + whole) - 0x4b400000;
      part += q;
      *(i8u *)(rounded + k) = __builtin_convertvector(q, i8v);
    }
    for (int i = 0; i < LANES; i++) sum += part[i];
    for (; k < last; k++) {
      float shifted = x[k] * factor + whole;
      int32_t bits;
      memcpy(&bits, &shifted, 4);
      rounded[k] = (int8_t)(bits - 0x4b400000);
      sum += rounded[k];
    }
    for (; k < first + m->group; k++) rounded[k] = 0;
    *scales++ = largest / 127;
    *sums++ = (float)sum;
  }
}

#endif
