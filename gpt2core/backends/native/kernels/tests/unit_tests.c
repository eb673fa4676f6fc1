/* Parts of the kernels against plain C: `unit_tests` prints what fails and ends with 1, or with 0 and no word. */

#include <stdio.h>

#include "../gpt2.c"
#include "naive.h"

static int failures;
#define CHECK(condition, ...)                 \
  do {                                        \
    if (!(condition) && failures++ < 20) {    \
      printf("%s:%d: ", __FILE__, __LINE__);  \
      printf(__VA_ARGS__);                    \
      printf("\n");                           \
    }                                         \
  } while (0)

static int same(float x, float y) { return bits_of_float(x) == bits_of_float(y) || (x != x && y != y); }

/* Any bits: also subnormal numbers, infinities and NaN; often such that sums cancel or lie near a middle. */
static float any_float(Random *random) {
  const uint64_t bits = next_random(random);
  switch (bits >> 60) {
    case 0: return float_of_bits((uint32_t)bits & 0x807fffff);                              /* subnormal */
    case 1: return float_of_bits(((uint32_t)bits & 0x80000000) | 0x7f800000);               /* infinite */
    case 2: return float_of_bits(((uint32_t)bits & 0x80000003) | 0x3f800000);               /* near 1 */
    case 3: return float_of_bits(((uint32_t)bits & 0x80000003) | 0x33800000);               /* near 2**-24 */
    case 4: return float_of_bits(((uint32_t)bits & 0x80000003) | 0x1a7ffffc);               /* near 2**-74 */
    case 5: return float_of_bits(((uint32_t)bits & 0x80000003) | 0x00400000);               /* near 2**-127 */
    case 6: return float_of_bits(((uint32_t)bits & 0x80000003) | 0x7f7ffffc);               /* near the largest */
    case 7: return float_of_bits((uint32_t)bits & 0x80000000);                              /* zero */
    default: return float_of_bits((uint32_t)bits);
  }
}

static void test_multiply_add(void) {
  Random random = {7};
  for (int i = 0; i < 3000000; i++) {
    float x = any_float(&random), y = any_float(&random), z = any_float(&random);
    if (i % 3 == 0) z = -(x * y); /* what is left is rounding */
    const float got = multiply_add_1(x, y, z), want = fmaf(x, y, z);
    CHECK(same(got, want), "multiply_add(%a, %a, %a) is %a, not %a", x, y, z, got, want);
  }
}

static void test_activations(void) {
  Random random = {8};
  for (int a = 0; a < ACTIVATIONS_COUNT; a++)
    for (int i = 0; i < 20000; i++) {
      float x[LANES];
      EACH(lane, LANES) x[lane] = i % 2 ? random_wide_float(&random) : any_float(&random);
      float y[LANES];
      memcpy(y, x, sizeof x);
      if (ACTIVATIONS[a].function) ACTIVATIONS[a].function(y, LANES);
      EACH(lane, LANES) {
        const float want = naive_activation(ACTIVATIONS[a].name, x[lane]);
        CHECK(same(y[lane], want), "%s(%a) is %a, not %a", ACTIVATIONS[a].name, x[lane], y[lane], want);
      }
    }
}

static void test_elementary_functions_are_near_the_librarys(void) {
  for (float x = -87; x < 88; x += 0.01f) {
    const double off = exponential(splat(x))[0] / exp(x) - 1;
    CHECK(fabs(off) < 3e-7, "exponential(%a) is off by %g", x, off);
  }
  for (float x = 0; x <= 1; x += 1e-4f) {
    const double off = log_1_plus(splat(x))[0] - log1p(x);
    CHECK(fabs(off) <= 3e-7 * log1p(x), "log_1_plus(%a) is off by %g", x, off);
  }
  for (float x = -5; x < 5; x += 1e-3f) {
    const double off = error_function(splat(x))[0] - erf(x);
    CHECK(fabs(off) < 4e-7, "error_function(%a) is off by %g", x, off);
  }
}

static void test_layer_norm_and_softmax(void) {
  Random random = {9};
  float x[256], y[256], want[256], weight[256], bias[256];
  for (int width = 1; width <= 200; width++) {
    for (int i = 0; i < width; i++) {
      x[i] = random_wide_float(&random);
      weight[i] = random_float(&random);
      bias[i] = random_float(&random);
    }
    layer_norm(x, width, &(Norm){weight, bias}, 1e-5f, y);
    naive_layer_norm(x, width, (float *const[]){weight, bias}, 1e-5f, want);
    CHECK(!memcmp(y, want, 4 * width), "layer_norm of %d numbers", width);
    float max = -INFINITY, lanes[16] = {0};
    for (int i = 0; i < width; i++) max = x[i] > max ? x[i] : max;
    for (int i = 0; i < width; i++) lanes[i % 16] += want[i] = naive_exp(x[i] - max);
    const float share = softmax(x, width);
    CHECK(!memcmp(x, want, 4 * width) && same(share, 1 / sum_of_lanes(lanes)), "softmax of %d numbers", width);
  }
}

static void test_rounding(void) {
  Random random = {10};
  for (int count = 1; count <= 100; count++) {
    float x[104], scale, sum;
    int8_t rounded[104];
    int32_t want[104] = {0}, want_sum = 0;
    for (int i = 0; i < count; i++) x[i] = count % 7 ? random_wide_float(&random) : 0x1p-120f * random_float(&random);
    const int64_t inputs = round_up(count, 4);
    const Matrix m = {.kind = INT8, .group = (int)inputs, .inputs = inputs};
    round_row(x, count, &m, rounded, &scale, &sum);
    const float want_scale = naive_round(x, count, want);
    for (int i = 0; i < inputs; i++) {
      CHECK(rounded[i] == want[i], "number %d of %d is rounded to %d, not %d", i, count, rounded[i], want[i]);
      want_sum += want[i];
    }
    CHECK(same(scale, want_scale) && sum == (float)want_sum, "scale or sum of %d numbers", count);
    x[count / 2] = count % 2 ? NAN : INFINITY;
    round_row(x, count, &m, rounded, &scale, &sum);
    CHECK(scale != scale && sum == 0, "a group with a number that is not finite");
  }
}

static void test_float_environment(void) {
#if defined(__x86_64__)
  _mm_setcsr(0xffc0); /* toward zero, FTZ, DAZ */
  const FloatEnvironment before = float_environment_enter();
  CHECK(_mm_getcsr() == 0x1f80, "rules within");
  float_environment_leave(before);
  CHECK((_mm_getcsr() & 0xffc0) == 0xffc0, "rules afterwards");
  CHECK(gpt2core_self_test() == 0, "the self-test under FTZ and DAZ");
  _mm_setcsr(0x1f80);
#endif
}

/* Sums as large as they can be: an instruction that saturates, or 16 bits that overflow, would show. */
static void test_integer_products_of_the_largest_numbers(void) {
  enum { INPUTS = 128, ROWS = 9 };
  const float one[WIDE] = {[0 ... WIDE - 1] = 1}, zero[WIDE] = {0};
  float x[ROWS * INPUTS], y[ROWS * WIDE], scales[ROWS], sums[ROWS];
  int8_t rounded[ROWS * INPUTS], plain[INPUTS * WIDE];
  uint8_t nibbles[WIDE * INPUTS / 2], packed[INPUTS * WIDE];
  for (int signs = 0; signs < 3; signs++) { /* of weights: all -, all +, by turns; rows: the same and more */
    for (int i = 0; i < INPUTS * WIDE; i++) plain[i] = signs == 1 || (signs == 2 && i / WIDE % 2) ? 127 : -127;
    memset(nibbles, signs == 2 ? 0xf0 : 0xff, sizeof nibbles);
    for (int r = 0; r < ROWS; r++)
      for (int k = 0; k < INPUTS; k++) x[r * INPUTS + k] = r == 0 || (r > 1 && k >> (r - 2) & 1) ? 127 : -127;
    for (int kind = INT8; kind <= INT4; kind++) {
      const Matrix m = {kind, INPUTS, INPUTS, WIDE, packed, one, zero};
      if (kind == INT8) gpt2core_pack_int8(plain, WIDE, 1, INPUTS, INPUTS, WIDE, packed);
      if (kind == INT4) gpt2core_pack_int4(nibbles, INPUTS, WIDE, packed);
      for (int r = 0; r < ROWS; r++)
        round_row(x + r * INPUTS, INPUTS, &m, rounded + r * INPUTS, scales + r, sums + r);
      (kind == INT8 ? product_int8 : product_int4)(&m, &(Rows){x, INPUTS, rounded, scales, sums}, ROWS,
                                                   &(Result){y, WIDE, 0, 0, NULL, NULL}, (Range){0, 1});
      for (int r = 0; r < ROWS; r++) {
        int64_t want = 0;
        for (int k = 0; k < INPUTS; k++)
          want += (int64_t)x[r * INPUTS + k] * (kind == INT8 ? plain[k * WIDE] : nibbles[0] >> (k % 2 * 4) & 15);
        for (int o = 0; o < WIDE; o++)
          CHECK(y[r * WIDE + o] == (float)want, "product of kind %d: %g, not %g", kind, y[r * WIDE + o], (float)want);
      }
    }
  }
}

int main(void) {
  CHECK(gpt2core_self_test() == 0, "the self-test");
  test_multiply_add();
  test_activations();
  test_elementary_functions_are_near_the_librarys();
  test_layer_norm_and_softmax();
  test_rounding();
  test_integer_products_of_the_largest_numbers();
  test_float_environment();
  return failures > 0;
}
