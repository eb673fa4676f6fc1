/* Which instructions this processor has and this system lets programs use: asked of the least of a platform's prebuilt
   libraries, before one that needs more is loaded. The names are those of Linux' /proc/cpuinfo. */

#ifndef GPT2CORE_PROCESSOR_H
#define GPT2CORE_PROCESSOR_H

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "export.h"

#if defined(__x86_64__)

enum { EAX, EBX, ECX, EDX };
#define SAVES_AVX 0x06    /* of XCR0: the system keeps XMM and YMM registers when it switches tasks */
#if defined(__APPLE__)
#define SAVES_AVX512 SAVES_AVX /* macOS adds the others once a program uses them */
#else
#define SAVES_AVX512 0xe6 /* mask registers and ZMM too */
#endif

static const struct {
  const char *name;
  unsigned leaf, subleaf, word, bit, saved;
} FEATURES[] = {
    {"ssse3", 1, 0, ECX, 9, 0},
    {"fma", 1, 0, ECX, 12, SAVES_AVX},
    {"cx16", 1, 0, ECX, 13, 0},
    {"sse4_1", 1, 0, ECX, 19, 0},
    {"sse4_2", 1, 0, ECX, 20, 0},
    {"movbe", 1, 0, ECX, 22, 0},
    {"popcnt", 1, 0, ECX, 23, 0},
    {"avx", 1, 0, ECX, 28, SAVES_AVX},
    {"f16c", 1, 0, ECX, 29, SAVES_AVX},
    {"bmi1", 7, 0, EBX, 3, 0},
    {"avx2", 7, 0, EBX, 5, SAVES_AVX},
    {"bmi2", 7, 0, EBX, 8, 0},
    {"avx512f", 7, 0, EBX, 16, SAVES_AVX512},
    {"avx512dq", 7, 0, EBX, 17, SAVES_AVX512},
    {"avx512cd", 7, 0, EBX, 28, SAVES_AVX512},
    {"avx512bw", 7, 0, EBX, 30, SAVES_AVX512},
    {"avx512vl", 7, 0, EBX, 31, SAVES_AVX512},
    {"avx512_vnni", 7, 0, ECX, 11, SAVES_AVX512},
    {"avx_vnni", 7, 1, EAX, 4, SAVES_AVX},
    {"avx512_bf16", 7, 1, EAX, 5, SAVES_AVX512},
    {"lahf_lm", 0x80000001, 0, ECX, 0, 0},
    {"abm", 0x80000001, 0, ECX, 5, 0}, /* LZCNT */
};

static unsigned saved_registers(void) {
  unsigned words[4] = {0};
  __get_cpuid(1, words, words + 1, words + 2, words + 3);
  if (!(words[ECX] >> 27 & 1)) return 0; /* no XGETBV: the system saves no more than SSE's */
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

static int has_feature(const char *name) {
  for (unsigned i = 0; i < sizeof FEATURES / sizeof *FEATURES; i++)
    if (!strcmp(FEATURES[i].name, name)) {
      unsigned words[4] = {0}, last = 0;
      if (FEATURES[i].subleaf) { /* leaf 7 says in EAX which of its parts is the last */
        __get_cpuid_count(FEATURES[i].leaf, 0, &last, words + 1, words + 2, words + 3);
        if (last < FEATURES[i].subleaf) return 0;
      }
      if (!__get_cpuid_count(FEATURES[i].leaf, FEATURES[i].subleaf, words, words + 1, words + 2, words + 3)) return 0;
      return (words[FEATURES[i].word] >> FEATURES[i].bit & 1) &&
             (saved_registers() & FEATURES[i].saved) == FEATURES[i].saved;
    }
  return -1;
}

#elif defined(__aarch64__) && defined(__linux__)

static int has_feature(const char *name) {
  if (!strcmp(name, "asimddp")) return (int)(getauxval(AT_HWCAP) >> 20 & 1);
  if (!strcmp(name, "i8mm")) return (int)(getauxval(AT_HWCAP2) >> 13 & 1);
  return -1;
}

#elif defined(__aarch64__) && defined(__APPLE__)

static int has_feature(const char *name) {
  const char *ours = !strcmp(name, "asimddp") ? "hw.optional.arm.FEAT_DotProd"
                     : !strcmp(name, "i8mm")  ? "hw.optional.arm.FEAT_I8MM"
                                              : NULL;
  int has = 0;
  size_t nbytes = sizeof has;
  if (!ours) return -1;
  return !sysctlbyname(ours, &has, &nbytes, NULL, 0) && has; /* a name that the system does not know is an error */
}

#else

static int has_feature(const char *name) { return (void)name, -1; }

#endif

/* 1: it is there. 0: it is not. -1: this source does not know the name. */
EXPORT int gpt2core_processor_has(const char *name) { return has_feature(name); }

#endif
