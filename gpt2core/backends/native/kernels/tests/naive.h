/* The definition of the arithmetic, to be read: one row at a time, one number at a time, in plain C. No vectors, no
   strips, no threads, no doubles. `hash_model.c` shows that the kernels give these bits.

   Two rules: what is written `fmaf` is rounded once, everything else after each operation; a sum across a row has 16
   lanes (`sum_of_lanes`), every other sum is taken in the order of its terms. */

#ifndef GPT2CORE_NAIVE_H
#define GPT2CORE_NAIVE_H

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { PLAIN_FLOAT32, PLAIN_BFLOAT16, PLAIN_INT8, PLAIN_INT4 };

/* A weight matrix with I inputs and O outputs, not rearranged. */
typedef struct {
  int kind;
  int64_t inputs, outputs, group; /* `group` inputs share a scale: int8 all, int4 32, 64 or 128 */
  float *float32;                 /* (I, O) */
  uint16_t *bfloat16;             /* (I, O) */
  int8_t *int8;                   /* (I, O) */
  uint8_t *int4;                  /* (O, padded I), one value each */
  float *scale, *zero;            /* int8 (O,); int4 (O, groups) */
  float *bias;                    /* (O,) */
} PlainMatrix;

typedef struct {
  float *ln_1[2], *ln_2[2]; /* weight, bias */
  PlainMatrix c_attn, attn_c_proj, c_fc, mlp_c_proj;
  float attention_scale;
} PlainBlock;

typedef struct {
  int64_t layers, heads, width, mlp, vocabulary, context;
  const char *activation;
  int precision;
  float epsilon;
  PlainMatrix head; /* (D, V); its columns are the embeddings too */
  float *wpe, *ln_f[2];
  PlainBlock *blocks;
} PlainModel;

static float widen_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
static uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

/* ------------------------------------------------------------------------------------------- elementary functions */

static float naive_exp(float x) {
  const float magic = 12582912.0f; /* 1.5 * 2**23 */
  if (x < -87.3f) x = -87.3f;
  if (x > 88.0f) x = 88.0f;
  const float shifted = fmaf(x, 1.44269504f, magic), n = shifted - magic;
  float r = fmaf(n, -0.693359375f, x);
  r = fmaf(n, 2.12194440e-4f, r);
  float y = 1.9875691500e-4f;
  y = fmaf(y, r, 1.3981999507e-3f);
  y = fmaf(y, r, 8.3334519073e-3f);
  y = fmaf(y, r, 4.1665795894e-2f);
  y = fmaf(y, r, 1.6666665459e-1f);
  y = fmaf(y, r, 5.0000001201e-1f);
  y = fmaf(y * r, r, r) + 1.0f;
  return y * widen_bits((bits_of(shifted) - 0x4b400000u + 127u) << 23);
}
static float naive_sigmoid(float x) { return 1.0f / (1.0f + naive_exp(-x)); }
static float naive_erf(float x) {
  static const float near_zero[] = {1.12837917f,     -0.376126389f,   0.112837917f,    -0.0268661706f, 0.00522397762f,
                                    -8.54832702e-4f, 1.20552935e-4f,  -1.49256504e-5f, 1.64621144e-6f, -1.63651339e-7f,
                                    1.48071923e-8f,  -1.22905301e-9f, 9.42275905e-11f};
  static const float far[] = {-1.26551223f, 1.00002368f,  0.37409196f, 0.09678418f,  -0.18628806f,
                              0.27886807f,  -1.13520398f, 1.48851587f, -0.82215223f, 0.17087277f};
  const float a = fabsf(x);
  if (a < 1) {
    float sum = near_zero[12];
    for (int i = 11; i >= 0; i--) sum = fmaf(sum, a * a, near_zero[i]);
    return x * sum;
  }
  const float t = 1.0f / fmaf(0.5f, a, 1.0f);
  float sum = far[9];
  for (int i = 8; i >= 0; i--) sum = fmaf(sum, t, far[i]);
  return copysignf(fmaf(-t, naive_exp(fmaf(-a, a, sum)), 1.0f), x);
}
static float naive_log_1_plus(float x) {
  const float s = x / (2.0f + x);
  float sum = 1.0f / 17;
  for (int odd = 15; odd > 0; odd -= 2) sum = fmaf(sum, s * s, 1.0f / odd);
  return 2.0f * s * sum;
}
static float naive_clip(float x, float low, float high) { return x < low ? low : x > high ? high : x; }
static float naive_gelu(float x) { return x * 0.5f * (1.0f + naive_erf(x * 0.70710678f)); }

static float naive_activation(const char *name, float x) {
  const struct {
    const char *name;
    const char *means;
  } same[] = {{"gelu_python", "gelu"},          {"gelu_accurate", "gelu_new"},    {"gelu_fast", "gelu_new"},
              {"gelu_python_tanh", "gelu_new"}, {"gelu_pytorch_tanh", "gelu_new"}, {"swish", "silu"}};
  for (unsigned i = 0; i < sizeof same / sizeof *same; i++)
    if (!strcmp(name, same[i].name)) name = same[i].means;
  if (!strcmp(name, "gelu")) return naive_gelu(x);
  if (!strcmp(name, "gelu_10")) return naive_clip(naive_gelu(x), -10, 10);
  if (!strcmp(name, "gelu_new")) return x * naive_sigmoid(1.5957691216f * x * fmaf(0.044715f * x, x, 1.0f));
  if (!strcmp(name, "quick_gelu")) return x * naive_sigmoid(1.702f * x);
  if (!strcmp(name, "silu")) return x * naive_sigmoid(x);
  if (!strcmp(name, "sigmoid")) return naive_sigmoid(x);
  if (!strcmp(name, "tanh")) return fmaf(2.0f, naive_sigmoid(2.0f * x), -1.0f);
  if (!strcmp(name, "hardswish")) return x * naive_clip(x + 3.0f, 0, 6) / 6.0f;
  if (!strcmp(name, "laplace")) return 0.5f * (1.0f + naive_erf((x - 0.707107f) / (0.282095f * 1.41421356f)));
  if (!strcmp(name, "leaky_relu")) return x < 0 ? 0.01f * x : x;
  if (!strcmp(name, "relu")) return x < 0 ? 0 : x;
  if (!strcmp(name, "relu2")) return x < 0 ? 0 : x * x;
  if (!strcmp(name, "relu6")) return naive_clip(x, 0, 6);
  if (!strcmp(name, "sqrtsoftplus")) return sqrtf((x < 0 ? 0 : x) + naive_log_1_plus(naive_exp(-fabsf(x))));
  if (!strcmp(name, "mish")) {
    const float e = naive_exp(x < 20 ? x : 20), n = e * (e + 2.0f);
    return x > 20 ? x : x * n / (n + 2.0f);
  }
  return x; /* linear */
}

/* ---------------------------------------------------------------------------------------------------- parts of a pass */

/* Term i has been added to lane i % 16; the upper half is added to the lower one until one number is left. */
static float sum_of_lanes(float *lanes) {
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

static void naive_layer_norm(const float *x, int64_t width, float *const norm[2], float epsilon, float *y) {
  float sums[16] = {0}, squares[16] = {0};
  for (int64_t i = 0; i < width; i++) sums[i % 16] += x[i];
  const float mean = sum_of_lanes(sums) / (float)width;
  for (int64_t i = 0; i < width; i++) squares[i % 16] = fmaf(x[i] - mean, x[i] - mean, squares[i % 16]);
  const float factor = 1 / sqrtf(sum_of_lanes(squares) / (float)width + epsilon);
  for (int64_t i = 0; i < width; i++) y[i] = fmaf((x[i] - mean) * factor, norm[0][i], norm[1][i]);
}

/* A group of inputs as whole numbers from -127 to 127; their scale. */
static float naive_round(const float *x, int64_t count, int32_t *rounded) {
  float largest = 0;
  for (int64_t i = 0; i < count; i++) largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
  const float factor = largest >= 0x1p-100f ? 127 / largest : 0, magic = 12582912.0f;
  for (int64_t i = 0; i < count; i++) rounded[i] = (int32_t)(fmaf(x[i], factor, magic) - magic);
  return largest >= 0x1p-100f ? largest / 127 : 0;
}

static float naive_product(const PlainMatrix *m, const float *x, int64_t output) {
  float sum = 0;
  if (m->kind == PLAIN_FLOAT32)
    for (int64_t k = 0; k < m->inputs; k++) sum = fmaf(m->float32[k * m->outputs + output], x[k], sum);
  else if (m->kind == PLAIN_BFLOAT16)
    for (int64_t k = 0; k < m->inputs; k++)
      sum = fmaf(widen_bits((uint32_t)m->bfloat16[k * m->outputs + output] << 16), x[k], sum);
  else {
    const int64_t groups = (m->inputs + m->group - 1) / m->group;
    int32_t *rounded = malloc(m->group * sizeof *rounded);
    for (int64_t g = 0; g < groups; g++) {
      const int64_t first = g * m->group, left = m->inputs - first, count = left < m->group ? left : m->group;
      const float x_scale = naive_round(x + first, count, rounded);
      int32_t products = 0, inputs = 0;
      for (int64_t k = 0; k < count; k++) {
        products += rounded[k] * (m->kind == PLAIN_INT8 ? m->int8[(first + k) * m->outputs + output]
                                                        : m->int4[output * groups * m->group + first + k]);
        inputs += rounded[k];
      }
      if (m->kind == PLAIN_INT8)
        sum = (float)products * (m->scale[output] * x_scale);
      else {
        const float without_zero = fmaf(-m->zero[output * groups + g], (float)inputs, (float)products);
        sum = fmaf(without_zero, m->scale[output * groups + g] * x_scale, sum);
      }
    }
    free(rounded);
  }
  return sum;
}
static void naive_linear(const PlainMatrix *m, const float *x, float *y, int add) {
  for (int64_t o = 0; o < m->outputs; o++) {
    float value = naive_product(m, x, o) + m->bias[o];
    y[o] = add ? value + y[o] : value;
  }
}

static float naive_bfloat16(float x) { /* to nearest, ties to even */
  const uint32_t bits = bits_of(x);
  return widen_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u);
}

/* Positions 0 to `last` of one head; keys and values (positions, D). */
static void naive_attend(const float *q, const float *keys, const float *values, int64_t last, int64_t head_dim,
                         int64_t width, float *y) {
  float *power = malloc((last + 1) * sizeof *power), max = -INFINITY, lanes[16] = {0};
  for (int64_t t = 0; t <= last; t++) {
    power[t] = 0;
    for (int64_t d = 0; d < head_dim; d++) power[t] = fmaf(keys[t * width + d], q[d], power[t]);
    if (power[t] > max) max = power[t];
  }
  for (int64_t t = 0; t <= last; t++) {
    power[t] = naive_exp(power[t] - max);
    lanes[t % 16] += power[t];
  }
  const float share = 1 / sum_of_lanes(lanes);
  for (int64_t d = 0; d < head_dim; d++) {
    float sum = 0;
    for (int64_t t = 0; t <= last; t++) sum = fmaf(values[t * width + d], power[t], sum);
    y[d] = sum * share;
  }
  free(power);
}

/* Logits (count, V) of a text from its beginning. */
static inline void naive_forward(const PlainModel *m, const int32_t *tokens, int64_t count, float *logits) {
  const int64_t width = m->width, head_dim = width / m->heads;
  const int bfloat16_cache = m->precision == PLAIN_INT8 || m->precision == PLAIN_INT4;
  float *keys = malloc(m->layers * count * width * 4), *values = malloc(m->layers * count * width * 4);
  float *x = malloc(width * 4), *y = malloc(width * 4), *qkv = malloc(3 * width * 4), *h = malloc(m->mlp * 4);
  for (int64_t n = 0; n < count; n++) {
    for (int64_t i = 0; i < width; i++) {
      const int64_t at = i * m->vocabulary + tokens[n];
      const float embedding = m->head.kind == PLAIN_FLOAT32    ? m->head.float32[at]
                              : m->head.kind == PLAIN_BFLOAT16 ? widen_bits((uint32_t)m->head.bfloat16[at] << 16)
                                                               : (float)m->head.int8[at] * m->head.scale[tokens[n]];
      x[i] = embedding + m->wpe[n * width + i];
    }
    for (int64_t layer = 0; layer < m->layers; layer++) {
      const PlainBlock *b = m->blocks + layer;
      float *k = keys + layer * count * width, *v = values + layer * count * width;
      naive_layer_norm(x, width, b->ln_1, m->epsilon, y);
      naive_linear(&b->c_attn, y, qkv, 0);
      for (int64_t i = 0; i < width; i++) {
        qkv[i] = qkv[i] * b->attention_scale;
        k[n * width + i] = bfloat16_cache ? naive_bfloat16(qkv[width + i]) : qkv[width + i];
        v[n * width + i] = bfloat16_cache ? naive_bfloat16(qkv[2 * width + i]) : qkv[2 * width + i];
      }
      for (int64_t at = 0; at < width; at += head_dim)
        naive_attend(qkv + at, k + at, v + at, n, head_dim, width, y + at);
      naive_linear(&b->attn_c_proj, y, x, 1);
      naive_layer_norm(x, width, b->ln_2, m->epsilon, y);
      naive_linear(&b->c_fc, y, h, 0);
      for (int64_t i = 0; i < m->mlp; i++) h[i] = naive_activation(m->activation, h[i]);
      naive_linear(&b->mlp_c_proj, h, x, 1);
    }
    naive_layer_norm(x, width, m->ln_f, m->epsilon, y);
    for (int64_t o = 0; o < m->vocabulary; o++) logits[n * m->vocabulary + o] = naive_product(&m->head, y, o);
  }
  free(keys), free(values), free(x), free(y), free(qkv), free(h);
}

#endif
