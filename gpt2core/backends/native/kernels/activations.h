/* The activations of `gpt2core.config.ACTIVATIONS`, in place over `count` floats, a multiple of LANES. */

#ifndef GPT2CORE_ACTIVATIONS_H
#define GPT2CORE_ACTIVATIONS_H

#include "elementary.h"

typedef void Activation(float *values, int64_t count);

#define ACTIVATION(name, ...)                         \
  static void name(float *values, int64_t count) {    \
    for (int64_t i = 0; i < count; i += LANES) {      \
      f32v x = load(values + i);                      \
      store(values + i, (__VA_ARGS__));               \
    }                                                 \
  }

INLINE f32v clip(f32v x, float low, float high) {
  return blend(x < low, splat(low), blend(x > high, splat(high), x));
}
INLINE f32v gelu_of(f32v x) { return x * 0.5f * (1.0f + error_function(x * 0.70710678f)); }
/* x / 2 (1 + tanh u) = x sigmoid(2 u) */
INLINE f32v gelu_tanh_of(f32v x) {
  return x * sigmoid(1.5957691216f * x * multiply_add(0.044715f * x, x, splat(1.0f)));
}
INLINE f32v mish_of(f32v x) { /* tanh(log(1 + e**x)) as a fraction of e**x */
  f32v e = exponential(smaller(x, splat(20.0f))), n = e * (e + 2.0f);
  return blend(x > 20.0f, x, x * n / (n + 2.0f));
}
INLINE f32v sqrt_softplus_of(f32v x) { /* log(1 + e**x) = max(x, 0) + log(1 + e**-|x|) */
  return square_root(blend(x < 0.0f, splat(0), x) + log_1_plus(exponential(-absolute(x))));
}

ACTIVATION(gelu_tanh, gelu_tanh_of(x))
ACTIVATION(gelu_erf, gelu_of(x))
ACTIVATION(gelu_10, clip(gelu_of(x), -10, 10))
ACTIVATION(quick_gelu, x *sigmoid(1.702f * x))
ACTIVATION(silu, x *sigmoid(x))
ACTIVATION(logistic, sigmoid(x))
ACTIVATION(hyperbolic_tangent, multiply_add(splat(2.0f), sigmoid(2.0f * x), splat(-1.0f)))
ACTIVATION(hardswish, x *clip(x + 3.0f, 0, 6) / 6.0f)
ACTIVATION(laplace, 0.5f * (1.0f + error_function((x - 0.707107f) / (0.282095f * 1.41421356f))))
ACTIVATION(leaky_relu, blend(x < 0.0f, 0.01f * x, x))
ACTIVATION(mish, mish_of(x))
ACTIVATION(relu, blend(x < 0.0f, splat(0), x))
ACTIVATION(relu2, blend(x < 0.0f, splat(0), x *x))
ACTIVATION(relu6, clip(x, 0, 6))
ACTIVATION(sqrt_softplus, sqrt_softplus_of(x))

static const struct {
  const char *name;
  Activation *function; /* NULL: the identity */
} ACTIVATIONS[] = {
    {"gelu", gelu_erf},
    {"gelu_10", gelu_10},
    {"gelu_accurate", gelu_tanh},
    {"gelu_fast", gelu_tanh},
    {"gelu_new", gelu_tanh},
    {"gelu_python", gelu_erf},
    {"gelu_python_tanh", gelu_tanh},
    {"gelu_pytorch_tanh", gelu_tanh},
    {"hardswish", hardswish},
    {"laplace", laplace},
    {"leaky_relu", leaky_relu},
    {"linear", NULL},
    {"mish", mish},
    {"quick_gelu", quick_gelu},
    {"relu", relu},
    {"relu2", relu2},
    {"relu6", relu6},
    {"sigmoid", logistic},
    {"silu", silu},
    {"sqrtsoftplus", sqrt_softplus},
    {"swish", silu},
    {"tanh", hyperbolic_tangent},
};
#define ACTIVATIONS_COUNT ((int)(sizeof ACTIVATIONS / sizeof *ACTIVATIONS))

#endif
