/* Memory that begins on a line of the processor's cache. */

#ifndef GPT2CORE_ALLOCATION_H
#define GPT2CORE_ALLOCATION_H

#include <stdint.h>
#include <stdlib.h>
#if defined(_WIN32)
#include <malloc.h>
#endif

#define LINE_NBYTES 64

/* For `free_lines`; NULL where there is none. */
static inline void *allocate_lines(int64_t nbytes) {
  const size_t whole = (size_t)((nbytes + LINE_NBYTES - 1) / LINE_NBYTES * LINE_NBYTES);
#if defined(_WIN32)
  return _aligned_malloc(whole, LINE_NBYTES);
#else
  return aligned_alloc(LINE_NBYTES, whole);
#endif
}

static inline void free_lines(void *lines) {
#if defined(_WIN32)
  _aligned_free(lines);
#else
  free(lines);
#endif
}

#endif
