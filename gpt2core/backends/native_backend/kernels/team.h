/* Threads that take one pass together: they meet at barriers and wait there actively, for microseconds. */

#ifndef GPT2CORE_TEAM_H
#define GPT2CORE_TEAM_H

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

typedef struct {
  int threads;
  _Alignas(64) atomic_int complete; /* the number of threads is known */
  atomic_int arrived;
  _Alignas(64) atomic_int meetings;
  _Alignas(64) atomic_long next; /* of the items that `take` deals out */
} Team;

static inline void rest(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

/* Wait until `number` is no longer `old`. */
static void wait_for(atomic_int *number, int old) {
  for (int spins = 0; atomic_load(number) == old; spins++) {
    if (spins < 4096)
      rest();
    else
      sched_yield(); /* somebody else needs the core that a member of the team is waiting for */
  }
}

/* Wait for all; the last to come sets `next` back. */
static void meet(Team *team) {
  if (team->threads == 1) {
    team->next = 0;
    return;
  }
  int meeting = atomic_load(&team->meetings);
  if (atomic_fetch_add(&team->arrived, 1) == team->threads - 1) {
    atomic_store(&team->arrived, 0);
    atomic_store(&team->next, 0);
    atomic_fetch_add(&team->meetings, 1);
    return;
  }
  wait_for(&team->meetings, meeting);
}

/* The next item that nobody has taken since the last meeting. */
static inline long take(Team *team) { return atomic_fetch_add(&team->next, 1); }

/* From the first to before the last. */
typedef struct {
  long first, last;
} Share;
static inline Share part_of(long count, long part, long parts) {
  return (Share){count * part / parts, count * (part + 1) / parts};
}
static inline Share share(const Team *team, int thread, long count) { return part_of(count, thread, team->threads); }

#endif
