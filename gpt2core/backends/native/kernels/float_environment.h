/* The processor's rules for floats: to nearest, subnormal numbers kept. Other libraries of a process change them
   (torch.set_flush_denormal, code linked with -ffast-math), and a new thread inherits them. So whoever computes here
   sets them for as long as that takes. */

#ifndef GPT2CORE_FLOAT_ENVIRONMENT_H
#define GPT2CORE_FLOAT_ENVIRONMENT_H

#include <stdint.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#else
#include <fenv.h>
#endif

typedef struct {
#if defined(__x86_64__) || defined(__aarch64__)
  uint64_t control;
#else
  fenv_t control;
#endif
} FloatEnvironment;

/* The barriers keep loads, and with them all arithmetic, between enter and leave. */
#define MEMORY_BARRIER() __asm__ volatile("" ::: "memory")

static inline FloatEnvironment float_environment_enter(void) {
  FloatEnvironment before;
#if defined(__x86_64__)
  before.control = _mm_getcsr();
  _mm_setcsr(0x1f80); /* no exception traps, to nearest, neither FTZ nor DAZ */
#elif defined(__aarch64__)
  __asm__ volatile("mrs %0, fpcr" : "=r"(before.control));
  __asm__ volatile("msr fpcr, %0" ::"r"((uint64_t)0));
#else
  fegetenv(&before.control);
  fesetenv(FE_DFL_ENV);
#endif
  MEMORY_BARRIER();
  return before;
}

static inline void float_environment_leave(FloatEnvironment before) {
  MEMORY_BARRIER();
#if defined(__x86_64__)
  _mm_setcsr((unsigned)before.control);
#elif defined(__aarch64__)
  __asm__ volatile("msr fpcr, %0" ::"r"(before.control));
#else
  fesetenv(&before.control);
#endif
}

#endif
