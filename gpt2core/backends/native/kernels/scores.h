/* What logits say of given tokens, without keeping the logits: of each row the logarithm of one token's probability,
   its rank, the entropy, the probability of a set of tokens, and the likeliest tokens.

   The head's product is taken in blocks of SCORE_BLOCK outputs, GROUP_ROWS rows at a time, and each block is summed up
   before the next one is computed. The sums of a row's block are taken relative to the block's largest logit, as the
   rows' sums are relative to the row's, after Milakov and Gimelshein, "Online normalizer calculation for softmax"
   (2018). Exponentials are those of `elementary.h`; sums, products with them and logarithms are in double precision.
   Number i of a block belongs to sum i modulo LOGICAL_LANES, and blocks are added in their order: like all else the
   results have the same bits on every processor, in every batch and with any number of threads.

   P scored rows, V vocabulary, K likeliest tokens, B blocks */

#ifndef GPT2CORE_SCORES_H
#define GPT2CORE_SCORES_H

#include "products.h"

#define SCORE_BLOCK 768 /* outputs: whole strips, whatever their width */
#define BLOCK_STRIPS (SCORE_BLOCK / WIDE)
#define GROUP_ROWS 128 /* their block of logits stays in the second cache */
_Static_assert(SCORE_BLOCK % WIDE == 0 && SCORE_BLOCK % LOGICAL_LANES == 0, "a block is whole strips and sums");

typedef struct {
  int64_t first;          /* of the pass's rows of logits: those from here on are scored, and not given out */
  int64_t top;            /* K */
  const int32_t *targets; /* (P,) the token asked for */
  const float *members;   /* (V,) 1 for the tokens of a set, else 0; or NULL */
  int64_t *ranks;         /* (P,) one more than the tokens that are likelier */
  double *logprobs, *entropies, *member_logprobs; /* (P,) natural logarithms */
  int32_t *top_ids;                               /* (P, K) the likeliest first; of equals that with the lower id */
  double *top_logprobs;                           /* (P, K) */
} Scores;

typedef float f32x8 __attribute__((vector_size(32)));
typedef f32x8 f32x8u __attribute__((aligned(4), may_alias));
typedef double f64x8 __attribute__((vector_size(64)));

/* A block of a row. */
typedef struct {
  float largest;
  int32_t above;                 /* logits that are larger than the target's */
  double sum, weighted, members; /* of e**d, d e**d and the members' e**d; d: how far below `largest` */
} BlockSums;

typedef struct {
  float logit;
  int32_t id;
} Candidate;

/* What scoring works with. */
typedef struct {
  float *targets;        /* (P,) logits */
  float *blocks;         /* (threads, GROUP_ROWS, SCORE_BLOCK) logits */
  BlockSums *sums;       /* (P, B) */
  Candidate *candidates; /* (threads, P, K) each in order, and ids of -1 behind the last */
} ScoreWork;

static int64_t score_blocks(int64_t vocabulary) { return (vocabulary + SCORE_BLOCK - 1) / SCORE_BLOCK; }

static void product(const Matrix *m, const Rows *in, int64_t rows, float *y, int64_t stride) {
  const Result out = {y, stride, 0, 0, NULL, NULL};
  const Range strips = {0, (m->outputs + WIDE - 1) / WIDE};
  switch (m->kind) {
    case FLOAT32: product_float32(m, in, rows, &out, strips); break;
    case BFLOAT16: product_bfloat16(m, in, rows, &out, strips); break;
    case INT8: product_int8(m, in, rows, &out, strips); break;
    default: product_int4(m, in, rows, &out, strips);
  }
}

/* The outputs of `m` from strip `first` on, up to `strips` of them. */
static Matrix some_strips(const Matrix *m, int64_t first, int64_t strips) {
  static const int half_bytes[] = {8, 4, 2, 1};
  const int64_t numbers = first * WIDE * (m->kind == INT4 ? m->inputs / m->group : 1);
  Matrix part = *m;
  part.values = (const char *)m->values + first * m->inputs * WIDE * half_bytes[m->kind] / 2;
  if (m->scale) part.scale += numbers;
  if (m->zero) part.zero += numbers;
  part.outputs = m->outputs - first * WIDE;
  if (part.outputs > strips * WIDE) part.outputs = strips * WIDE;
  return part;
}

static Rows rows_from(const Rows *in, const Matrix *m, int64_t row) {
  const int64_t groups = m->inputs / m->group;
  if (m->kind == INT8 || m->kind == INT4)
    return (Rows){NULL, 0, in->rounded + row * m->inputs, in->scale + row * groups, in->sum + row * groups};
  return (Rows){in->x + row * in->stride, in->stride, NULL, NULL, NULL};
}

/* ln(x) for a normal x > 0, -inf for 0: x = m 2**n with m within a factor of the square root of 2 of 1, and with
   s = (m - 1) / (m + 1) ln(m) is 2 artanh(s), a series in s**2 < 0.0295 (DLMF 4.6.4). */
static double natural_logarithm(double x) {
  if (x == 0) return -INFINITY;
  uint64_t bits;
  memcpy(&bits, &x, 8);
  int64_t n = (int64_t)(bits >> 52) - 1023;
  bits = (bits & 0xfffffffffffffu) | 0x3ff0000000000000u;
  double m;
  memcpy(&m, &bits, 8);
  if (m > 1.4142135623730951) {
    m *= 0.5;
    n++;
  }
  const double s = (m - 1) / (m + 1), square = s * s;
  double sum = 1.0 / 25;
  for (int odd = 23; odd > 0; odd -= 2) sum = sum * square + 1.0 / odd;
  return (double)n * 0.6931471805599453 + 2 * s * sum;
}

static int comes_before(Candidate x, Candidate y) {
  return y.id < 0 || x.logit > y.logit || (x.logit == y.logit && x.id < y.id);
}

/* Put one among the `top` likeliest. */
static void insert(Candidate *best, int64_t top, Candidate one) {
  int64_t place = top - 1;
  for (; place > 0 && comes_before(one, best[place - 1]); place--) best[place] = best[place - 1];
  best[place] = one;
}

static double fold_lanes(f64x8 low, f64x8 high) {
  low += high;
  double lanes[8];
  memcpy(lanes, &low, sizeof lanes);
  for (int half = 4; half; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

INLINE f64x8 doubles(const float *p) { return __builtin_convertvector(*(const f32x8u *)p, f64x8); }

/* `logits` (count,) of one row; behind them is room up to a multiple of LOGICAL_LANES, which is written to. */
static BlockSums sum_block(float *logits, int64_t count, float target, const float *members) {
  const int64_t whole = (count + LOGICAL_LANES - 1) / LOGICAL_LANES * LOGICAL_LANES;
  for (int64_t i = count; i < whole; i++) logits[i] = -INFINITY;
  f32v largest = splat(-INFINITY);
  i32v above = {0};
  for (int64_t i = 0; i < whole; i += LANES) {
    const f32v x = load(logits + i);
    largest = larger(x, largest);
    above -= (i32v)(x > splat(target));
  }
  BlockSums sums = {.largest = largest[0]};
  for (int i = 0; i < LANES; i++) {
    if (largest[i] > sums.largest) sums.largest = largest[i];
    sums.above += above[i];
  }
  f64x8 sum[2] = {0}, weighted[2] = {0}, inside[2] = {0};
  for (int64_t i = 0; i < whole; i += LOGICAL_LANES) {
    float below[LOGICAL_LANES], powers[LOGICAL_LANES], chosen[LOGICAL_LANES] = {0};
    EACH(p, PARTS) {
      const f32v d = load(logits + i + p * LANES) - sums.largest;
      store(below + p * LANES, d);
      store(powers + p * LANES, exponential(d));
    }
    const int64_t last = count - i < LOGICAL_LANES ? count - i : LOGICAL_LANES;
    for (int64_t j = last; j < LOGICAL_LANES; j++) below[j] = powers[j] = 0;
    if (members) {
      if (last == LOGICAL_LANES)
        memcpy(chosen, members + i, sizeof chosen);
      else
        memcpy(chosen, members + i, 4 * last);
    }
    EACH(h, 2) {
      const f64x8 power = doubles(powers + 8 * h);
      sum[h] += power;
      weighted[h] += power * doubles(below + 8 * h);
      if (members) inside[h] += power * doubles(chosen + 8 * h);
    }
  }
  sums.sum = fold_lanes(sum[0], sum[1]);
  sums.weighted = fold_lanes(weighted[0], weighted[1]);
  sums.members = fold_lanes(inside[0], inside[1]);
  return sums;
}

static void score_block(const Scores *scores, const ScoreWork *work, Member *me, const Matrix *head, const Rows *in,
                        int64_t rows, int64_t block) {
  const int64_t blocks = score_blocks(head->outputs), top = scores->top;
  const Matrix part = some_strips(head, block * BLOCK_STRIPS, BLOCK_STRIPS);
  const float *members = scores->members ? scores->members + block * SCORE_BLOCK : NULL;
  float *logits = work->blocks + me->thread * GROUP_ROWS * SCORE_BLOCK;
  for (int64_t first = 0; first < rows; first += GROUP_ROWS) {
    const int64_t count = rows - first < GROUP_ROWS ? rows - first : GROUP_ROWS;
    const Rows group = rows_from(in, head, scores->first + first);
    product(&part, &group, count, logits, SCORE_BLOCK);
    for (int64_t r = 0; r < count; r++) {
      float *row = logits + r * SCORE_BLOCK;
      const int64_t n = first + r;
      const BlockSums sums = sum_block(row, part.outputs, work->targets[n], members);
      work->sums[n * blocks + block] = sums;
      if (!top) continue;
      Candidate *best = work->candidates + (me->thread * rows + n) * top;
      if (best[top - 1].id >= 0 && sums.largest < best[top - 1].logit) continue;
      for (int64_t i = 0; i < part.outputs; i++) {
        const Candidate one = {row[i], (int32_t)(block * SCORE_BLOCK + i)};
        if (comes_before(one, best[top - 1])) insert(best, top, one);
      }
    }
  }
}

static void sum_up(const Scores *scores, const ScoreWork *work, int threads, int64_t rows, int64_t blocks, int64_t n) {
  const BlockSums *parts = work->sums + n * blocks;
  const int64_t top = scores->top;
  float largest = parts[0].largest;
  for (int64_t b = 1; b < blocks; b++)
    if (parts[b].largest > largest) largest = parts[b].largest;
  double sum = 0, weighted = 0, inside = 0;
  int64_t above = 0;
  for (int64_t b = 0; b < blocks; b++) {
    const float below = parts[b].largest - largest;
    const double factor = exponential(splat(below))[0];
    sum += parts[b].sum * factor;
    weighted += (parts[b].weighted + parts[b].sum * below) * factor;
    inside += parts[b].members * factor;
    above += parts[b].above;
  }
  const double log_sum = natural_logarithm(sum);
  scores->logprobs[n] = ((double)work->targets[n] - (double)largest) - log_sum;
  scores->entropies[n] = log_sum - weighted / sum;
  scores->ranks[n] = above + 1;
  if (scores->members) scores->member_logprobs[n] = natural_logarithm(inside) - log_sum;
  if (!top) return;
  Candidate *best = work->candidates + n * top;
  for (int t = 1; t < threads; t++)
    for (int64_t k = 0; k < top; k++) {
      const Candidate one = work->candidates[(t * rows + n) * top + k];
      if (one.id < 0 || !comes_before(one, best[top - 1])) break;
      insert(best, top, one);
    }
  for (int64_t k = 0; k < top; k++) {
    scores->top_ids[n * top + k] = best[k].id;
    scores->top_logprobs[n * top + k] = ((double)best[k].logit - (double)largest) - log_sum;
  }
}

/* Stages: score the rows of `in` from `scores->first` on, `rows` of them. A row with a logit that is not finite gets an
   entropy that is not finite either. */
static void score_rows(const Scores *scores, const ScoreWork *work, Member *me, const Matrix *head, const Rows *in,
                       int64_t rows) {
  const int64_t blocks = score_blocks(head->outputs);
  STAGE(me, rows, 4, range)
  for (int64_t n = range.first; n < range.last; n++) {
    const int32_t target = scores->targets[n];
    const Matrix strip = some_strips(head, target / WIDE, 1);
    const Rows row = rows_from(in, head, scores->first + n);
    float logits[WIDE];
    product(&strip, &row, 1, logits, WIDE);
    work->targets[n] = logits[target % WIDE];
    for (int t = 0; t < me->team->threads; t++)
      for (int64_t k = 0; k < scores->top; k++)
        work->candidates[(t * rows + n) * scores->top + k] = (Candidate){-INFINITY, -1};
  }
  STAGE(me, rows ? blocks : 0, 8, range)
  for (int64_t block = range.first; block < range.last; block++)
    score_block(scores, work, me, head, in, rows, block);
  STAGE(me, rows, 4, range)
  for (int64_t n = range.first; n < range.last; n++) sum_up(scores, work, me->team->threads, rows, blocks, n);
}

#endif
