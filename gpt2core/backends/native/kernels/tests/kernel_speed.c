/* The kernels' speed on this processor, in one thread, with all they read in the cache:
   `kernel_speed [MILLISECONDS [NAME]]`, NAME being a part of the kernels' names; or how long stages of a pass take:
   `kernel_speed MILLISECONDS stages THREADS`.

   `scripts/kernel-speed` builds this for each instruction set and compares. Prints lines of a kernel's name, a number
   of rows, and 10**9 operations a second (a product and its addition are two), the most in MILLISECONDS of each. First
   come the peaks, of loops whose operands are in registers. */

#include <stdio.h>
#include <time.h>

#include "../gpt2.c"

#ifndef INPUTS
#define INPUTS 768
#endif
#define OUTPUTS 480 /* whole strips of every width; in float32 these weights are 1.5 MB */
#ifndef GROUP
#define GROUP 128
#endif
#define MAX_PROMPT 512
#define HEAD_DIM 64

static double now_s(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static double milliseconds = 20;
static const char *wanted = "";

/* Print 10**9 operations a second: of runs that take half a millisecond or more, the fastest. */
static void show_speed(const char *kernel, const char *precision, int rows, void (*run)(const void *, int64_t),
                       const void *of, double operations) {
  char name[100];
  snprintf(name, sizeof name, "%s %s", kernel, precision);
  if (!strstr(name, wanted)) return;
  double best = 0;
  const double until = now_s() + 1e-3 * milliseconds;
  int64_t times = 1;
  for (int runs = 0; runs < 3 || now_s() < until; runs++) {
    const double began = now_s();
    run(of, times);
    const double took = now_s() - began, rate = 1e-9 * operations * (double)times / took;
    if (rate > best) best = rate;
    if (took < 5e-4) times *= 2, runs = 0;
  }
  printf("%s %d %.2f\n", name, rows, best);
}

/* -------------------------------------------------------------------------------------------------------------- peaks */

/* A value that the compiler knows nothing about, in its register. */
#if defined(GPT2CORE_SCALAR)
#define OPAQUE(x) __asm__ volatile("" : "+m"(x))
#elif defined(__x86_64__)
#define OPAQUE(x) __asm__ volatile("" : "+v"(x))
#elif defined(__aarch64__)
#define OPAQUE(x) __asm__ volatile("" : "+w"(x))
#endif

#define CHAINS 12 /* that do not wait for each other */
static volatile float sink;

static void peak_float(const void *of, int64_t times) {
  f32v sums[CHAINS], factor = splat(*(const float *)of);
  EACH(i, CHAINS) sums[i] = splat((float)i); /* else they were one to the compiler */
  for (int64_t n = 0; n < times; n++) {
    OPAQUE(factor);
#ifdef SOFTWARE_FMA
    EACH(i, CHAINS) sums[i] = sums[i] * factor + factor; /* what the hardware has */
#else
    EACH(i, CHAINS) sums[i] = multiply_add(sums[i], factor, factor);
#endif
  }
  EACH(i, CHAINS) sink = sums[i][0];
}

#ifdef SQUARES
#define PRODUCTS 8 /* of one vector of sums */
static void peak_int8(const void *of, int64_t times) {
  i32v sums[CHAINS];
  u8v weights = *(const u8u *)of;
  EACH(i, CHAINS) sums[i] = (i32v){0} + i;
  for (int64_t n = 0; n < times; n++)
    EACH(i, CHAINS) {
      OPAQUE(weights);
      sums[i] = multiply_square(sums[i], weights, weights);
    }
  EACH(i, CHAINS) sink = (float)sums[i][0];
}
#define peak_int4 peak_int8
#else
#define PRODUCTS 4
static void peak_int8(const void *of, int64_t times) {
  i32v sums[CHAINS];
  u8v raw = *(const u8u *)of;
  const int32_t four = load_four(of);
  EACH(i, CHAINS) sums[i] = (i32v){0} + i;
  for (int64_t n = 0; n < times; n++)
    EACH(i, CHAINS) {
      Int8Weights weights = int8_weights(raw);
      OPAQUE(weights.unsigned_part);
      OPAQUE(weights.signs);
      sums[i] = dot_int8(sums[i], &weights, four);
    }
  EACH(i, CHAINS) sink = (float)sums[i][0];
}

static void peak_int4(const void *of, int64_t times) {
#ifdef PAIRS_INT4
#define DOT_INT4(sum) sum += PAIRS_INT4(weights, four) /* and now and then an ADD_PAIRS */
  Pairs sums[CHAINS];
#else
#define DOT_INT4(sum) sum = dot_int4(sum, weights, four)
  i32v sums[CHAINS];
#endif
  u8v weights = *(const u8u *)of & 15;
  const int32_t four = load_four(of);
  EACH(i, CHAINS) memset(sums + i, i, sizeof *sums);
  for (int64_t n = 0; n < times; n++)
    EACH(i, CHAINS) {
      OPAQUE(weights);
      DOT_INT4(sums[i]);
    }
  EACH(i, CHAINS) sink = (float)sums[i][0];
}
#endif

/* ----------------------------------------------------------------------------------------------------------- products */

typedef struct {
  Matrix matrix;
  Rows in;
  Result out;
  int64_t rows;
} Product;

static void run_product(const void *of, int64_t times) {
  static void (*const products[])(const Matrix *, const Rows *, int64_t, const Result *, Range) = {
      product_float32, product_bfloat16, product_int8, product_int4};
  const Product *p = of;
  for (int64_t n = 0; n < times; n++)
    products[p->matrix.kind](&p->matrix, &p->in, p->rows, &p->out, (Range){0, OUTPUTS / WIDE});
}

/* ---------------------------------------------------------------------------------------------------------- attention */

typedef struct {
  Shape shape;
  const void *keys, *values;
  const float *q;
  float *y, *scores;
  int64_t first, last; /* positions of the queries */
} Attention;

static void run_attention(const void *of, int64_t times) {
  const Attention *a = of;
  for (int64_t n = 0; n < times; n++)
    for (int64_t i = a->first; i < a->last; i += QUERIES) {
      const int rows = (int)(a->last - i < QUERIES ? a->last - i : QUERIES);
      (a->shape.bfloat16 ? attend_bfloat16 : attend_float32)(rows, &a->shape, a->keys, a->values, a->keys, i, a->q,
                                                             a->y, HEAD_DIM, a->scores);
    }
}

/* ------------------------------------------------------------------------------------------------------------- stages */

#define STAGES 200      /* of a pass; a model of 12 layers has 110 */
#define ITEM_STEPS 1000 /* of an item, one after the other: about a microsecond, in which the others come too */

static void run_stages(void *per_thread, Member *me) {
  const int fineness = *(const int *)per_thread;
  for (int n = 0; n < STAGES; n++)
    STAGE(me, fineness * me->team->threads, fineness, item) {
      f32v x = splat(1), factor = splat((float)item.last);
      for (int step = 0; step < ITEM_STEPS; step++) {
        OPAQUE(factor);
        x = multiply_add(x, factor, factor);
      }
      sink = x[0];
    }
}

/* Print how long a stage takes `threads` threads: nanoseconds, with one item for each, and with four. What it takes
   more than in one thread is the cost of meeting. */
static int show_stages(int threads) {
  Team *team = gpt2core_team_new(threads);
  if (!team || team->threads != threads) return 1;
  for (int fineness = 1; fineness <= 4; fineness += 3) {
    double best = INFINITY;
    const double until = now_s() + 1e-3 * milliseconds;
    for (int runs = 0; runs < 3 || now_s() < until; runs++) {
      const double began = now_s();
      team_run(team, run_stages, &fineness);
      const double took = now_s() - began;
      if (took < best) best = took;
    }
    printf("%d %d %.0f\n", threads, fineness, 1e9 * best / STAGES);
  }
  gpt2core_team_free(team);
  return 0;
}

static float *random_floats(Random *random, int64_t count) {
  float *x = aligned_alloc(64, (4 * count + 63) / 64 * 64);
  if (!x) exit(1);
  for (int64_t i = 0; i < count; i++) x[i] = random_float(random);
  return x;
}

int main(int argc, char **argv) {
  static const char *const PRECISIONS[] = {"float32", "bfloat16", "int8", "int4"};
  static const int ROWS[] = {1, 8, 32, MAX_PROMPT};
  if (argc > 1) milliseconds = atof(argv[1]);
  if (argc > 3 && !strcmp(argv[2], "stages")) return show_stages(atoi(argv[3]));
  if (argc > 2) wanted = argv[2];
  Random random = {1};
  float *x = random_floats(&random, MAX_PROMPT * INPUTS), *y = random_floats(&random, MAX_PROMPT * OUTPUTS);
  float *weights = random_floats(&random, INPUTS * OUTPUTS);
  const float factor = 0.5f;
  static uint8_t bytes[4 * LANES] = {1, 2, 3, 4};
  show_speed("peak", "float", 0, peak_float, &factor, 2 * CHAINS * LANES);
  show_speed("peak", "int8", 0, peak_int8, bytes, 2 * PRODUCTS * CHAINS * LANES);
  show_speed("peak", "int4", 0, peak_int4, bytes, 2 * PRODUCTS * CHAINS * LANES);
  for (int kind = FLOAT32; kind <= INT4; kind++) {
    float *scale = random_floats(&random, INPUTS / 8 * OUTPUTS);
    uint8_t *values = aligned_alloc(64, INPUTS * OUTPUTS * 4);
    if (!values) return 1;
    for (int64_t i = 0; i < INPUTS * OUTPUTS * 4; i++) values[i] = (uint8_t)next_random(&random);
    if (kind <= BFLOAT16) memcpy(values, weights, INPUTS * OUTPUTS * 4); /* any bits but NaN's, which are slower */
    if (kind == BFLOAT16)
      for (int64_t i = 0; i < INPUTS * OUTPUTS; i++) ((uint16_t *)values)[i] = round_to_bfloat16(weights[i]);
    Product p = {.matrix = {kind, kind == INT4 ? GROUP : INPUTS, INPUTS, OUTPUTS, values, scale, scale},
                 .out = {y, OUTPUTS, 0, 0, NULL, NULL}};
    int8_t *rounded = aligned_alloc(64, MAX_PROMPT * INPUTS);
    float *scales = random_floats(&random, MAX_PROMPT * INPUTS / 8);
    float *sums = random_floats(&random, MAX_PROMPT * INPUTS / 8);
    if (!rounded) return 1;
    const int64_t groups = INPUTS / p.matrix.group;
    for (int64_t r = 0; r < MAX_PROMPT && kind >= INT8; r++)
      round_row(x + r * INPUTS, INPUTS, &p.matrix, rounded + r * INPUTS, scales + r * groups, sums + r * groups);
    p.in = (Rows){x, INPUTS, rounded, scales, sums};
    for (int i = 0; i < 4; i++) {
      p.rows = ROWS[i];
      show_speed("product", PRECISIONS[kind], ROWS[i], run_product, &p, 2.0 * INPUTS * OUTPUTS * ROWS[i]);
    }
    free(scale), free(values), free(rounded), free(scales), free(sums);
  }
  for (int bfloat16 = 0; bfloat16 < 2; bfloat16++) {
    Attention a = {.shape = {bfloat16, HEAD_DIM, HEAD_DIM, MAX_PROMPT}, .keys = weights, .values = weights, .q = x,
                   .y = y,
                   .scores = random_floats(&random, QUERIES * MAX_PROMPT)};
    static uint16_t halves[MAX_PROMPT * HEAD_DIM] __attribute__((aligned(64)));
    for (int64_t i = 0; i < MAX_PROMPT * HEAD_DIM; i++) halves[i] = round_to_bfloat16(weights[i]);
    if (bfloat16) a.keys = a.values = halves;
    for (int i = 0; i < 2; i++) {
      a.first = i ? 0 : MAX_PROMPT - 1;
      a.last = MAX_PROMPT;
      const double pairs = i ? 0.5 * MAX_PROMPT * (MAX_PROMPT + 1) : MAX_PROMPT;
      show_speed("attention", PRECISIONS[bfloat16], i ? MAX_PROMPT : 1, run_attention, &a, 4.0 * HEAD_DIM * pairs);
    }
    free(a.scores);
  }
  return 0;
}
