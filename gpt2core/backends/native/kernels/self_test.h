/* Does this build compute by the definition? Asked once after loading, since a compiler's flags (-ffp-contract=fast,
   -funsafe-math-optimizations, ...) can change the arithmetic without a word. Takes less than a millisecond. */

#ifndef GPT2CORE_SELF_TEST_H
#define GPT2CORE_SELF_TEST_H

#define SELF_TEST_HASH UINT64_C(0xbebc1b07533b3c0c) /* of every processor and compiler */

#define HASH_START UINT64_C(0xcbf29ce484222325)
static uint64_t hash_words(uint64_t hash, const void *words, int64_t count) { /* FNV-1a over 32-bit words */
  for (int64_t i = 0; i < count; i++) {
    uint32_t word;
    memcpy(&word, (const char *)words + 4 * i, 4);
    hash = (hash ^ word) * UINT64_C(0x100000001b3);
  }
  return hash;
}

typedef struct {
  uint64_t state;
} Random;
static uint64_t next_random(Random *random) { /* splitmix64; Steele, Lea and Flood, OOPSLA 2014 */
  uint64_t z = random->state += UINT64_C(0x9e3779b97f4a7c15);
  z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
  z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
  return z ^ z >> 31;
}
/* Between -1 and 1, exactly representable: 24 bits with a sign. */
static float random_float(Random *random) {
  return (float)((int64_t)(next_random(random) >> 39) - (1 << 24)) * 0x1p-24f;
}
/* Of any size from 2**-20 to 2**7. */
static float random_wide_float(Random *random) {
  const float exponent = float_of_bits((uint32_t)(107 + next_random(random) % 28) << 23);
  return random_float(random) * exponent;
}

/* To nearest, subnormal numbers kept; a product and a sum not fused behind the definition's back. */
static __attribute__((noinline)) int floats_are_ieee(volatile float *one, volatile float *tiny) {
  const float product = *one * 0x1.001p0f; /* 1.001: the square is 1.002001, whose last bits a float drops */
  const float fused = product * product - 0x1.002p0f;
  f32v x = splat(*one) * 0x1.001p0f;
  x = x * x - 0x1.002p0f;
  const float upward = *one + 0x1p-24f, downward = -*one - 0x1p-24f;
  return fused == 0 && x[0] == 0 && x[LANES - 1] == 0 && upward == 1 && downward == -1 && *tiny * 0.5f != 0 &&
         *tiny * 0.5f * 2 == *tiny;
}

/* What hardware or software multiply_add must give, also where rounding twice goes wrong. */
static int multiply_add_is_exact(void) {
  static const float CASES[][4] = {
      {0x1.001p0f, 0x1.001p0f, -0x1.002p0f, 0x1p-24f},
      {0x1.fffffep-1f, 0x1.fffffep-1f, -0x1p0f, -0x1p-23f},
      {0x1p-75f, 0x1p-75f, 0x1p-127f, 0x1p-127f}, /* the middle of two subnormal numbers */
      {0x1.000002p-75f, 0x1p-75f, 0x1p-127f, 0x1.000004p-127f}, /* above it */
      {0x1.fffffep-76f, 0x1p-75f, 0x1p-127f, 0x1p-127f}, /* below it */
      {-0x1.000002p-75f, 0x1.000002p-75f, 0x1p-127f, 0x1.fffff8p-128f},
      {0x1p-80f, 0x1p-80f, 0x1p0f, 0x1p+0f},
      /* below the middle by less than a double holds: rounding twice gives the next float */
      {0x1.000002p0f, 0x1.fffffcp-25f, 0x1.000002p0f, 0x1.000002p0f},
      {0x1.000002p-75f, 0x1.fffffcp-76f, 0x1.000004p-127f, 0x1.000004p-127f},
      {0x1.fffffep127f, 0x1p1f, -0x1.fffffep127f, 0x1.fffffep+127f}, /* no overflow on the way */
      {0x1p100f, 0x1p100f, -0x1p100f, INFINITY},
  };
  for (unsigned i = 0; i < sizeof CASES / sizeof *CASES; i++)
    if (multiply_add_1(CASES[i][0], CASES[i][1], CASES[i][2]) != CASES[i][3]) return 0;
  return 1;
}

#define TEST_ROWS 5
#define TEST_INPUTS 64
#define TEST_OUTPUTS 53
#define TEST_PADDED ((TEST_OUTPUTS + WIDE - 1) / WIDE * WIDE)

static uint64_t hash_products(uint64_t hash, Random *random) {
  float x[TEST_ROWS * TEST_INPUTS], y[TEST_ROWS * TEST_PADDED];
  int8_t rounded[TEST_ROWS * TEST_INPUTS];
  float scales[TEST_ROWS * 2], sums[TEST_ROWS * 2];
  float plain[TEST_INPUTS * TEST_OUTPUTS], packed[TEST_INPUTS * TEST_PADDED];
  float scale[2 * TEST_PADDED] = {0}, zero[2 * TEST_PADDED] = {0}, int8_scale[TEST_PADDED] = {0};
  uint16_t bfloat16[TEST_INPUTS * TEST_OUTPUTS];
  int8_t int8[TEST_INPUTS * TEST_OUTPUTS];
  uint8_t int4[TEST_INPUTS / 2 * TEST_OUTPUTS];
  for (int i = 0; i < TEST_ROWS * TEST_INPUTS; i++) x[i] = random_wide_float(random);
  for (int i = 0; i < TEST_INPUTS * TEST_OUTPUTS; i++) {
    plain[i] = random_wide_float(random);
    bfloat16[i] = (uint16_t)(bits_of_float(plain[i]) >> 16);
    int8[i] = (int8_t)((int)(next_random(random) % 255) - 127);
    int4[i / 2] = (uint8_t)next_random(random);
  }
  for (int o = 0; o < TEST_OUTPUTS; o++) {
    int8_scale[o] = random_float(random);
    for (int g = 0; g < 2; g++) {
      const int at = (o / WIDE * 2 + g) * WIDE + o % WIDE; /* (strips, groups, WIDE) */
      scale[at] = random_float(random);
      zero[at] = (float)(next_random(random) % 16);
    }
  }
  for (int kind = FLOAT32; kind <= INT4; kind++) {
    Matrix m = {kind, kind == INT4 ? TEST_INPUTS / 2 : TEST_INPUTS, TEST_INPUTS, TEST_OUTPUTS,
                packed, kind == INT8 ? int8_scale : scale, zero};
    if (kind == FLOAT32) gpt2core_pack_float32(plain, TEST_OUTPUTS, 1, TEST_INPUTS, TEST_OUTPUTS, packed);
    if (kind == BFLOAT16)
      gpt2core_pack_bfloat16(bfloat16, TEST_OUTPUTS, 1, TEST_INPUTS, TEST_OUTPUTS, (uint16_t *)packed);
    if (kind == INT8)
      gpt2core_pack_int8(int8, TEST_OUTPUTS, 1, TEST_INPUTS, TEST_INPUTS, TEST_OUTPUTS, (uint8_t *)packed);
    if (kind == INT4) gpt2core_pack_int4(int4, TEST_INPUTS, TEST_OUTPUTS, (uint8_t *)packed);
    const int64_t groups = TEST_INPUTS / m.group;
    for (int r = 0; r < TEST_ROWS && kind >= INT8; r++)
      round_row(x + r * TEST_INPUTS, TEST_INPUTS - 3, &m, rounded + r * TEST_INPUTS, scales + r * groups,
                sums + r * groups);
    const Rows in = {x, TEST_INPUTS, rounded, scales, sums};
    const Result out = {y, TEST_PADDED, 0, 0, NULL, NULL};
    static void (*const products[])(const Matrix *, const Rows *, int64_t, const Result *, Range) = {
        product_float32, product_bfloat16, product_int8, product_int4};
    products[kind](&m, &in, TEST_ROWS, &out, (Range){0, TEST_PADDED / WIDE});
    for (int r = 0; r < TEST_ROWS; r++) hash = hash_words(hash, y + r * TEST_PADDED, TEST_OUTPUTS);
  }
  return hash;
}

static uint64_t hash_arithmetic(void) {
  Random random = {1};
  uint64_t hash = HASH_START;
  float x[256], y[256], weight[256], bias[256];
  for (int a = 0; a < ACTIVATIONS_COUNT; a++) {
    for (int i = 0; i < 256; i++) x[i] = random_wide_float(&random);
    if (ACTIVATIONS[a].function) ACTIVATIONS[a].function(x, 256);
    hash = hash_words(hash, x, 256);
  }
  for (int i = 0; i < 256; i++) weight[i] = random_float(&random), bias[i] = random_float(&random);
  for (int width = 1; width < 80; width += 3) {
    for (int i = 0; i < width; i++) x[i] = random_wide_float(&random);
    layer_norm(x, width, &(Norm){weight, bias}, 1e-5f, y);
    hash = hash_words(hash, y, width);
    const float share = softmax(x, width);
    hash = hash_words(hash_words(hash, x, width), &share, 1);
  }
  return hash_products(hash, &random);
}

/* 0: all is well. 1: the compiler rounds otherwise than IEEE 754 says, or fuses; 2: a wrong multiply_add; 3: another
   difference. -1: built with GPT2CORE_UNFUSED, without the promise. */
EXPORT int gpt2core_self_test(void) {
  const FloatEnvironment before = float_environment_enter();
  volatile float one = 1, tiny = FLT_MIN;
  int result = 0;
  if (!floats_are_ieee(&one, &tiny))
    result = 1;
#ifdef GPT2CORE_UNFUSED
  else
    result = -1;
#else
  else if (!multiply_add_is_exact())
    result = 2;
  else if (hash_arithmetic() != SELF_TEST_HASH)
    result = 3;
#endif
  float_environment_leave(before);
  return result;
}

#endif
