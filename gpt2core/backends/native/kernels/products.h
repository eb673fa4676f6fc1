/* Products of rows with weight matrices in float32, bfloat16, int8 and int4.

   A matrix is kept in strips of WIDE outputs, one after the other. Within a strip the weights of one input
   (float32, bfloat16), of four inputs (int8) or of eight (int4) lie side by side for all its outputs, so that a
   product reads memory once and straight ahead.

   Each sum is taken by one lane in the order of the inputs, whatever the number of rows, lanes or threads: a row's
   result does not depend, to the last bit, on the rows beside it, nor on the processor. */

#ifndef GPT2CORE_PRODUCTS_H
#define GPT2CORE_PRODUCTS_H

#include "activations.h"
#include "integer_products.h"
#include "team.h"

enum { FLOAT32, BFLOAT16, INT8, INT4 };

typedef struct {
  int kind;
  int group;      /* inputs that share a scale; int8: all */
  int64_t inputs; /* for int8 rounded up to a multiple of 8, for int4 to whole groups */
  int64_t outputs;
  const void *values; /* strips */
  const float *scale; /* int8 (strips, WIDE), int4 (strips, groups, WIDE) */
  const float *zero;  /* int4: as scale */
} Matrix;

/* Rows to be multiplied: as they are, or rounded to int8 with a scale for each group of inputs. */
typedef struct {
  const float *x;
  int64_t stride;
  const int8_t *rounded; /* (rows, inputs) */
  const float *scale;    /* (rows, groups) */
  const float *sum;      /* (rows, groups) of the rounded numbers */
} Rows;

typedef struct {
  float *y;
  int64_t stride;
  int exact; /* nothing may be written behind a row's outputs */
  int add;   /* to what is there */
  const float *bias;
  Activation *activation;
} Result;

/* int4's weights of eight inputs: those of the first four, or of the last. */
INLINE u8v int4_weights(const int last, const uint8_t *p) {
  const u8v both = *(const u8u *)p;
  return (last ? (u8v)(*(const u16w *)p >> 4) : both) & 15;
}
INLINE int32_t load_four(const int8_t *p) {
  int32_t four;
  memcpy(&four, p, 4);
  return four;
}

#define MAX_ROWS 8 /* of a tile; its accumulators stay in registers, since all loops over them are unrolled */
#define MAX_PANELS 4
typedef f32v Tile[MAX_ROWS][MAX_PANELS];

/* A vector in a register of its own: with 16 registers gcc would rather load weights anew for each row. */
#if LANES == 8 && defined(__x86_64__) && !defined(__clang__)
#define KEEP_IN_REGISTER(x) __asm__("" : "+x"(x))
#else
#define KEEP_IN_REGISTER(x) (void)(x)
#endif

/* After each row: gcc would otherwise load the numbers of all rows first, into registers that the sums need. */
#if defined(__aarch64__) && !defined(__clang__) && !defined(GPT2CORE_SCALAR)
#define ROW_DONE(p, sum) __asm__ volatile("" : "+r"(p), "+w"(sum))
#else
#define ROW_DONE(p, sum) (void)(p)
#endif

/* A loop that stays one: unrolled it would want more registers than there are. */
#ifdef __clang__
#define NOT_UNROLLED _Pragma("clang loop unroll(disable)")
#else
#define NOT_UNROLLED _Pragma("GCC unroll 1")
#endif
/* Let the compiler load again what lies at `p`, instead of keeping it in registers. */
#define LOAD_AGAIN(p) __asm__ volatile("" : "+r"(p))
/* Let the compiler have added all up to here, instead of adding numbers later that lie in registers till then. */
#define IN_ORDER(x) __asm__("" : "+v"(x))

/* Where to prefetch from, and how far to go on with each step of a sum. */
typedef struct {
  const char *from;
  int64_t step_nbytes;
  int second_level_lines; /* so many into the second cache: more can be on their way to it at once; 0: a strip's step */
} Prefetch;
#define LINE_NBYTES 64
#define STEP_LINES ((4 * WIDE + LINE_NBYTES - 1) / LINE_NBYTES)
INLINE void prefetch(Prefetch ahead, int64_t step) {
  const char *line = ahead.from + step * ahead.step_nbytes;
  if (ahead.second_level_lines) {
    EACH(i, ahead.second_level_lines) __builtin_prefetch(line + LINE_NBYTES * i, 0, 1);
  } else {
    EACH(i, STEP_LINES) __builtin_prefetch(line + LINE_NBYTES * i);
  }
}

INLINE void prefetch_next(Prefetch *ahead) {
  prefetch(*ahead, 0);
  ahead->from += ahead->step_nbytes;
}

/* sums[row][panel] of `rows` rows with `panels` vectors of outputs, `apart` elements from one another; `step`
   elements lie between the weights of one input and those of the next. With `triangle` row r has r inputs more than
   the first. */
#define ACCUMULATE(name, type, load_weights)                                                                    \
  INLINE void name(const int rows, const int panels, const int triangle, const float *x, int64_t stride,        \
                   int64_t inputs, const type *w, int64_t step, int64_t apart, Prefetch ahead, Tile sums) {     \
    EACH(r, rows)                                                                                               \
      EACH(p, panels) sums[r][p] = splat(0);                                                                    \
    for (int64_t k = 0; k < inputs; k++) {                                                                      \
      f32v weights[MAX_PANELS];                                                                                 \
      EACH(p, panels) {                                                                                         \
        weights[p] = load_weights(w + k * step + p * apart);                                                    \
        KEEP_IN_REGISTER(weights[p]);                                                                           \
      }                                                                                                         \
      prefetch(ahead, k);                                                                                       \
      const float *from = x + k;                                                                                \
      EACH(r, rows) {                                                                                           \
        const f32v input = splat(from[r * stride]);                                                             \
        EACH(p, panels) sums[r][p] = multiply_add(weights[p], input, sums[r][p]);                               \
        EACH(p, panels) ROW_DONE(from, sums[r][p]);                                                                \
      }                                                                                                         \
    }                                                                                                           \
    if (triangle)                                                                                               \
      EACH(extra, rows - 1)                                                                                     \
        EACH(r, rows)                                                                                           \
          if (r > extra) {                                                                                      \
            const f32v input = splat(x[r * stride + inputs + extra]);                                           \
            EACH(p, panels)                                                                                     \
              sums[r][p] = multiply_add(load_weights(w + (inputs + extra) * step + p * apart), input, sums[r][p]); \
          }                                                                                                     \
  }
ACCUMULATE(accumulate_float32, float, load)
ACCUMULATE(accumulate_bfloat16, uint16_t, load_bfloat16)

typedef i32v Sums[MAX_ROWS][STRIP]; /* of products of whole numbers */

INLINE void clear(const int rows, Sums sums) {
  EACH(r, rows)
    EACH(p, STRIP) sums[r][p] = (i32v){0};
}

/* A strip's products in int8: w (inputs / 4, WIDE, 4), x (rows, inputs). */
INLINE void sum_int8(const int rows, const uint8_t *w, const int8_t *x, int64_t inputs, Prefetch ahead, Sums sums) {
  clear(rows, sums);
  for (int64_t k = 0; k < inputs; k += 4) {
    prefetch(ahead, k / 4);
    const int8_t *from = x + k;
#if MAX_SUMS < 24 && INT8_OFFSET == 0
    EACH(p, STRIP) { /* 16 registers do not hold the weights of all panels, with and without their signs */
      const Int8Weights weights = int8_weights(*(const u8u *)(w + k * WIDE + 4 * LANES * p));
      LOAD_AGAIN(from);
      EACH(r, rows) sums[r][p] = dot_int8(sums[r][p], &weights, load_four(from + r * inputs));
    }
#else
    Int8Weights weights[STRIP];
    EACH(p, STRIP) weights[p] = int8_weights(*(const u8u *)(w + k * WIDE + 4 * LANES * p));
    EACH(r, rows) {
      const int32_t four = load_four(from + r * inputs);
      EACH(p, STRIP) sums[r][p] = dot_int8(sums[r][p], &weights[p], four);
      EACH(p, STRIP) ROW_DONE(from, sums[r][p]);
    }
#endif
  }
}

/* clang would keep the weights of all panels beside twelve sums, an input and the mask, for which 16 registers are too
   few; so it gets the panels one after the other. */
#if LANES == 8 && defined(__clang__)
#define PANELS_IN_TURN(rows) ((rows) * STRIP == MAX_SUMS)
#else
#define PANELS_IN_TURN(rows) 0
#endif

/* One group of inputs of a strip in int4: w (group / 8, WIDE, 4), of x (rows, stride) the first `group`. */
INLINE void sum_int4(const int rows, const uint8_t *w, const int8_t *x, int64_t stride, int64_t group, Prefetch *ahead,
                     Sums sums) {
  clear(rows, sums);
#ifdef PAIRS_INT4
  for (int64_t first = 0; first < group; first += 8 * PAIRS_STEPS) {
    Pairs pairs[MAX_ROWS][STRIP];
    EACH(r, rows)
      EACH(p, STRIP) pairs[r][p] = (Pairs){0};
    NOT_UNROLLED
    for (int64_t k = first; k < first + 8 * PAIRS_STEPS; k += 8, w += 4 * WIDE) {
      prefetch_next(ahead);
      u8v weights[STRIP];
      EACH(p, STRIP) weights[p] = int4_weights(0, w + 4 * LANES * p);
      EACH(r, rows)
        EACH(p, STRIP) pairs[r][p] += PAIRS_INT4(weights[p], load_four(x + r * stride + k));
      EACH(r, rows)
        EACH(p, STRIP) IN_ORDER(pairs[r][p]);
      LOAD_AGAIN(w);
      EACH(p, STRIP) weights[p] = int4_weights(1, w + 4 * LANES * p);
      EACH(r, rows)
        EACH(p, STRIP) pairs[r][p] += PAIRS_INT4(weights[p], load_four(x + r * stride + k + 4));
    }
    EACH(r, rows)
      EACH(p, STRIP) sums[r][p] += ADD_PAIRS(pairs[r][p]);
  }
#else
  for (int64_t k = 0; k < group; k += 8, w += 4 * WIDE) {
    const int8_t *from = x + k;
    prefetch_next(ahead);
    if (PANELS_IN_TURN(rows)) {
      EACH(last, 2)
        EACH(p, STRIP) {
          const u8v weights = int4_weights(last, w + 4 * LANES * p);
          LOAD_AGAIN(from);
          EACH(r, rows) sums[r][p] = dot_int4(sums[r][p], weights, load_four(from + r * stride + 4 * last));
        }
      continue;
    }
    u8v weights[STRIP];
    EACH(p, STRIP) weights[p] = int4_weights(0, w + 4 * LANES * p);
    EACH(r, rows) {
      const int32_t four = load_four(from + r * stride);
      EACH(p, STRIP) sums[r][p] = dot_int4(sums[r][p], weights[p], four);
      EACH(p, STRIP) ROW_DONE(from, sums[r][p]);
    }
    LOAD_AGAIN(w);
    EACH(p, STRIP) weights[p] = int4_weights(1, w + 4 * LANES * p);
    EACH(r, rows) {
      const int32_t four = load_four(from + r * stride + 4);
      EACH(p, STRIP) sums[r][p] = dot_int4(sums[r][p], weights[p], four);
      EACH(p, STRIP) ROW_DONE(from, sums[r][p]);
    }
  }
#endif
}

#ifdef SQUARES /* the same with two rows and two outputs at a time */
typedef i32v Squares[MAX_ROWS / 2][STRIP][2]; /* of two rows; with two of a panel's outputs each: (2, 2) */
#define ROW_PAIRS(rows) (((rows) + 1) / 2)    /* a last row without another is multiplied twice */

INLINE void clear_squares(const int rows, Squares squares) {
  EACH(i, ROW_PAIRS(rows))
    EACH(p, STRIP) squares[i][p][0] = squares[i][p][1] = (i32v){0};
}

INLINE void load_row_pairs(const int rows, const int8_t *x, int64_t stride, u8v inputs[MAX_ROWS / 2]) {
  EACH(i, ROW_PAIRS(rows)) inputs[i] = two_rows(x + 2 * i * stride, x + (2 * i + (2 * i + 1 < rows)) * stride);
}

INLINE void add_squares(const int rows, const int panel, u8v four, u8v next_four, const u8v inputs[MAX_ROWS / 2],
                        Squares squares) {
  EACH(last, 2) {
    const u8v outputs = two_outputs(last, four, next_four);
    EACH(i, ROW_PAIRS(rows)) squares[i][panel][last] = multiply_square(squares[i][panel][last], inputs[i], outputs);
  }
}

INLINE void rows_of_squares(const int rows, Squares squares, Sums sums) {
  EACH(r, rows)
    EACH(p, STRIP) sums[r][p] = row_of_squares(r % 2, squares[r / 2][p][0], squares[r / 2][p][1]);
}

INLINE void sum_int8_squares(const int rows, const uint8_t *w, const int8_t *x, int64_t inputs, Prefetch ahead,
                             Sums sums) {
  Squares squares;
  clear_squares(rows, squares);
  for (int64_t k = 0; k < inputs; k += 8) {
    u8v pairs[MAX_ROWS / 2];
    EACH(half, 2) prefetch(ahead, k / 4 + half);
    load_row_pairs(rows, x + k, inputs, pairs);
    const uint8_t *from = w + k * WIDE;
    EACH(p, STRIP) {
      const u8u *four = (const u8u *)(from + 4 * LANES * p), *next_four = four + STRIP;
      add_squares(rows, p, *four, *next_four, pairs, squares);
      ROW_DONE(from, squares[0][p][0]);
    }
  }
  rows_of_squares(rows, squares, sums);
}

INLINE void sum_int4_squares(const int rows, const uint8_t *w, const int8_t *x, int64_t stride, int64_t group,
                             Prefetch *ahead, Sums sums) {
  Squares squares;
  clear_squares(rows, squares);
  for (int64_t k = 0; k < group; k += 8, w += 4 * WIDE) {
    u8v pairs[MAX_ROWS / 2];
    prefetch_next(ahead);
    load_row_pairs(rows, x + k, stride, pairs);
    EACH(p, STRIP) {
      const u8v eight = *(const u8u *)(w + 4 * LANES * p);
      add_squares(rows, p, eight & 15, eight >> 4, pairs, squares);
      ROW_DONE(w, squares[0][p][0]);
    }
  }
  rows_of_squares(rows, squares, sums);
}
#define FOR_SQUARES(rows) ((rows) > 1)
#else
#define FOR_SQUARES(rows) 0
#define sum_int8_squares sum_int8
#define sum_int4_squares sum_int4
#endif

INLINE void accumulate_int8(const int rows, const Matrix *m, const Rows *in, int64_t row, int64_t strip,
                            Prefetch ahead, Tile sums) {
  const uint8_t *w = (const uint8_t *)m->values + strip * m->inputs * WIDE;
  const int8_t *x = in->rounded + row * m->inputs;
  Sums whole;
  if (FOR_SQUARES(rows))
    sum_int8_squares(rows, w, x, m->inputs, ahead, whole);
  else
    sum_int8(rows, w, x, m->inputs, ahead, whole);
  EACH(r, rows) {
    const int32_t offset = INT8_OFFSET * (int32_t)in->sum[row + r];
    EACH(p, STRIP)
      sums[r][p] = __builtin_convertvector(whole[r][p] - offset, f32v) *
                   (load(m->scale + strip * WIDE + LANES * p) * in->scale[row + r]);
  }
}

INLINE void accumulate_int4(const int rows, const Matrix *m, const Rows *in, int64_t row, int64_t strip,
                            Prefetch ahead, Tile sums) {
  const int64_t groups = m->inputs / m->group;
  const uint8_t *w = (const uint8_t *)m->values + strip * m->inputs / 2 * WIDE;
  EACH(r, rows)
    EACH(p, STRIP) sums[r][p] = splat(0);
  for (int64_t g = 0; g < groups; g++, w += m->group / 2 * WIDE) {
    const int8_t *x = in->rounded + row * m->inputs + g * m->group;
    Sums whole;
    if (FOR_SQUARES(rows))
      sum_int4_squares(rows, w, x, m->inputs, m->group, &ahead, whole);
    else
      sum_int4(rows, w, x, m->inputs, m->group, &ahead, whole);
    EACH(p, STRIP) {
      const int64_t at = (strip * groups + g) * WIDE + LANES * p;
      const f32v scale = load(m->scale + at), zero = load(m->zero + at);
      EACH(r, rows) {
        const float x_scale = in->scale[(row + r) * groups + g], x_sum = in->sum[(row + r) * groups + g];
        const f32v products = __builtin_convertvector(whole[r][p], f32v);
        sums[r][p] = multiply_add(multiply_add(-zero, splat(x_sum), products), scale * x_scale, sums[r][p]);
      }
    }
  }
}

INLINE void multiply_tile(const int kind, const int rows, const Matrix *m, const Rows *in, int64_t row, int64_t strip,
                          Prefetch ahead, const Result *out) {
  Tile sums;
  const float *x = in->x + row * in->stride;
  const int64_t first = strip * m->inputs * WIDE; /* weight */
  if (kind == FLOAT32)
    accumulate_float32(rows, STRIP, 0, x, in->stride, m->inputs, (const float *)m->values + first, WIDE, LANES, ahead,
                       sums);
  else if (kind == BFLOAT16)
    accumulate_bfloat16(rows, STRIP, 0, x, in->stride, m->inputs, (const uint16_t *)m->values + first, WIDE, LANES,
                        ahead, sums);
  else if (kind == INT8)
    accumulate_int8(rows, m, in, row, strip, ahead, sums);
  else
    accumulate_int4(rows, m, in, row, strip, ahead, sums);
  EACH(r, rows) {
    float *y = out->y + (row + r) * out->stride + strip * WIDE;
    EACH(p, STRIP) {
      f32v value = sums[r][p];
      if (out->bias) value += load(out->bias + strip * WIDE + LANES * p);
      const int64_t left = m->outputs - strip * WIDE - LANES * p;
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

#define PREFETCH_NBYTES 2048 /* ahead, within a strip */

/* Bytes of a strip's weights for one step of a sum. */
INLINE int64_t step_nbytes(const int kind) { return kind == BFLOAT16 ? 2 * WIDE : 4 * WIDE; }
INLINE int64_t steps(const int kind, const Matrix *m) {
  return kind == INT4 ? m->inputs / 8 : kind == INT8 ? m->inputs / 4 : m->inputs;
}

/* All rows with one strip, then with the next: a strip stays in the cache meanwhile, and the next is prefetched by
   parts. */
#define PRODUCT(name, kind)                                                                                           \
  static void name(const Matrix *m, const Rows *in, int64_t rows, const Result *out, Range strips) {                  \
    const int64_t count = steps(kind, m), nbytes = count * step_nbytes(kind);                                         \
    const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;                                                         \
    for (int64_t strip = strips.first; strip < strips.last; strip++) {                                                \
      const char *here = (const char *)m->values + strip * nbytes;                                                    \
      for (int64_t t = 0; t < tiles; t++) {                                                                           \
        const Prefetch ahead =                                                                                        \
            tiles == 1 ? (Prefetch){here + PREFETCH_NBYTES, step_nbytes(kind), 0}                                     \
                       : (Prefetch){here + nbytes + nbytes * t / tiles, step_nbytes(kind) / tiles, 0};                \
        const Range tile = part_of(rows, t, tiles);                                                                   \
        switch (tile.last - tile.first) {                                                                             \
          case 1: multiply_tile(kind, 1, m, in, tile.first, strip, ahead, out); break;                                \
          case 2: multiply_tile(kind, 2, m, in, tile.first, strip, ahead, out); break;                                \
          case 3: multiply_tile(kind, 3, m, in, tile.first, strip, ahead, out); break;                                \
          case 4: multiply_tile(kind, 4, m, in, tile.first, strip, ahead, out); break;                                \
          FURTHER_CASES(kind)                                                                                         \
        }                                                                                                             \
      }                                                                                                               \
    }                                                                                                                 \
  }
#if TILE_ROWS == 8
#define FURTHER_CASES(kind)                                                     \
  case 5: multiply_tile(kind, 5, m, in, tile.first, strip, ahead, out); break;  \
  case 6: multiply_tile(kind, 6, m, in, tile.first, strip, ahead, out); break;  \
  case 7: multiply_tile(kind, 7, m, in, tile.first, strip, ahead, out); break;  \
  case 8: multiply_tile(kind, 8, m, in, tile.first, strip, ahead, out); break;
#else
#define FURTHER_CASES(kind)
#endif

PRODUCT(product_float32, FLOAT32)
PRODUCT(product_bfloat16, BFLOAT16)
PRODUCT(product_int8, INT8)
PRODUCT(product_int4, INT4)

/* A stage: `rows` times `m`. Threads divide the strips among them; where there are more threads than that gives work,
   the rows too. */
static void multiply(Member *me, const Matrix *m, const Rows *in, int64_t rows, const Result *out) {
  static void (*const products[])(const Matrix *, const Rows *, int64_t, const Result *, Range) = {
      product_float32, product_bfloat16, product_int8, product_int4};
  const int fineness = rows > TILE_ROWS ? 2 : 4; /* the next strip is prefetched, and had better be one's own */
  const int64_t strips = (m->outputs + WIDE - 1) / WIDE, groups = m->inputs / m->group;
  const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
  const int64_t wanted = (fineness * me->team->threads + strips - 1) / strips;
  const int64_t parts = wanted < tiles ? wanted : tiles;
  STAGE(me, parts * strips, fineness, range)
  for (int64_t item = range.first; item < range.last;) {
    const int64_t part = item / strips, next = (part + 1) * strips < range.last ? (part + 1) * strips : range.last;
    const Range some = part_of(rows, part, parts);
    const Rows from = {in->x + some.first * in->stride, in->stride, in->rounded + some.first * m->inputs,
                       in->scale + some.first * groups, in->sum + some.first * groups};
    Result to = *out;
    to.y += some.first * out->stride;
    products[m->kind](m, &from, some.last - some.first, &to, (Range){item - part * strips, next - part * strips});
    item = next;
  }
}

#define SMALLEST_ROUNDED 0x1p-100f /* 127 divided by less might not be finite */

/* Round a row to int8, each group by its largest number. A group of numbers below SMALLEST_ROUNDED counts as zeros; one
   with a number that is not finite too, and its scale is NaN. */
static void round_row(const float *x, int64_t count, const Matrix *m, int8_t *rounded, float *scales, float *sums) {
  for (int64_t first = 0; first < m->inputs; first += m->group) {
    const int64_t last = first + m->group < count ? first + m->group : count;
    u32v lane_max_bits = {0}; /* of absolute values: as whole numbers they are in order, and NaN is the largest */
    int64_t k = first;
    for (; k + LANES <= last; k += LANES) {
      u32v bits = (u32v)absolute(load(x + k));
      lane_max_bits = (u32v)blend((i32v)(bits > lane_max_bits), (f32v)bits, (f32v)lane_max_bits);
    }
    uint32_t max_bits = 0;
    for (int i = 0; i < LANES; i++) max_bits = lane_max_bits[i] > max_bits ? lane_max_bits[i] : max_bits;
    for (; k < last; k++) {
      const uint32_t bits = bits_of_float(x[k]) & 0x7fffffff;
      max_bits = bits > max_bits ? bits : max_bits;
    }
    const float largest = float_of_bits(max_bits);
    if (!(largest >= SMALLEST_ROUNDED && largest <= FLT_MAX)) {
      memset(rounded + first, 0, m->group);
      *scales++ = largest <= FLT_MAX ? 0 : NAN;
      *sums++ = 0;
      continue;
    }
    const float factor = 127 / largest;
    i32v partial_sums = {0};
    for (k = first; k + LANES <= last; k += LANES) {
      i32v q = (i32v)multiply_add(load(x + k), splat(factor), splat(ROUNDING_MAGIC)) - (int32_t)ROUNDING_MAGIC_BITS;
      partial_sums += q;
      *(i8u *)(rounded + k) = __builtin_convertvector(q, i8v);
    }
    int32_t sum = 0;
    for (int i = 0; i < LANES; i++) sum += partial_sums[i];
    for (; k < last; k++) {
      const float shifted = multiply_add_1(x[k], factor, ROUNDING_MAGIC);
      rounded[k] = (int8_t)(bits_of_float(shifted) - ROUNDING_MAGIC_BITS);
      sum += rounded[k];
    }
    for (; k < first + m->group; k++) rounded[k] = 0;
    *scales++ = largest / 127;
    *sums++ = (float)sum;
  }
}

#endif
