/* Threads that take one pass after another together.

   A pass is a row of stages, and a stage a number of items. A thread takes items until none is left and waits
   until all are done; for threads that come late, because another program has their core, nobody waits. Within
   a pass waiting is active and takes microseconds; between passes it is active for a moment, then sleep. */

#ifndef GPT2CORE_TEAM_H
#define GPT2CORE_TEAM_H

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define AWAKE_NS 200000 /* after a pass: the next one of a text that is being decoded comes within this time */

typedef struct Team Team;
typedef struct {
  Team *team;
  int thread;
  uint32_t stage; /* that it works at; it may be behind the team's */
  pthread_t handle;
} Member;

struct Team {
  int threads, wanted_threads;
  pid_t process; /* a forked child has the structure, but not the threads */
  Member *members;
  void (*work)(void *what, Member *); /* of the current pass; none: go home */
  void *what;
  uint32_t first_stage; /* of the current pass */
  pthread_mutex_t lock;
  pthread_cond_t called;
  int sleeping;
  _Alignas(64) atomic_int calls;
  _Alignas(64) atomic_int open;      /* the current pass may be entered */
  _Alignas(64) atomic_int inside;    /* threads other than the caller's that are in it */
  _Alignas(64) atomic_ulong ticket;  /* the stage in the upper half, its next item in the lower */
  _Alignas(64) atomic_long finished; /* items of the stage */
};

static inline void rest(int spins) {
  if (spins > 4096)
    sched_yield(); /* somebody else needs the core that another thread waits for */
#if defined(__x86_64__)
  else
    __builtin_ia32_pause();
#endif
}

static long now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000L + now.tv_nsec;
}

/* From the first to before the last. */
typedef struct {
  long first, last;
} Share;
static inline Share part_of(long count, long part, long parts) {
  return (Share){count * part / parts, count * (part + 1) / parts};
}

/* Take one of the `parts` of `count` things of this stage; 0 once all parts are done, and the stage is over. */
static int next_share(Member *me, long count, long parts, Share *mine) {
  Team *team = me->team;
  if (parts > count) parts = count;
  if (parts == 0) return 0;
  unsigned long ticket = atomic_load(&team->ticket);
  while ((uint32_t)(ticket >> 32) == me->stage) {
    long part = (uint32_t)ticket;
    if (part == parts) {
      for (int spins = 0; (uint32_t)(atomic_load(&team->ticket) >> 32) == me->stage; spins++) rest(spins);
      break;
    }
    if (atomic_compare_exchange_weak(&team->ticket, &ticket, ticket + 1)) {
      *mine = part_of(count, part, parts);
      return 1;
    }
  }
  me->stage++;
  return 0;
}

static void finish_share(Member *me, long count, long parts) {
  Team *team = me->team;
  if (parts > count) parts = count;
  if (atomic_fetch_add(&team->finished, 1) + 1 < parts) return;
  atomic_store(&team->finished, 0);
  atomic_store(&team->ticket, (unsigned long)(me->stage + 1) << 32);
}

/* One stage of a pass: all threads go through `count` things together, `mine` at a time. `fineness` says into how
   many parts for each thread they are cut. */
#define STAGE(me, count, fineness, mine)                                            \
  for (Share mine; next_share(me, count, (fineness) * (me)->team->threads, &mine);  \
       finish_share(me, count, (fineness) * (me)->team->threads))

static void *attend_calls(void *argument) {
  Member *me = argument;
  Team *team = me->team;
  for (int seen = 0;;) {
    long until = now_ns() + AWAKE_NS;
    for (int spins = 1; atomic_load(&team->calls) == seen; spins++) {
      rest(0);
      if (spins % 64 == 0 && now_ns() > until) {
        pthread_mutex_lock(&team->lock);
        team->sleeping++;
        while (atomic_load(&team->calls) == seen) pthread_cond_wait(&team->called, &team->lock);
        team->sleeping--;
        pthread_mutex_unlock(&team->lock);
      }
    }
    atomic_fetch_add(&team->inside, 1);
    seen = atomic_load(&team->calls);
    int home = 0;
    if (atomic_load(&team->open)) {
      home = !team->work;
      me->stage = team->first_stage;
      if (!home) team->work(team->what, me);
    }
    atomic_fetch_sub(&team->inside, 1);
    if (home) return NULL;
  }
}

/* Have all threads, this one among them, do one pass. */
static void call(Team *team, void (*work)(void *, Member *), void *what) {
  Member *me = team->members;
  team->work = work;
  team->what = what;
  team->first_stage = me->stage;
  atomic_store(&team->open, 1);
  pthread_mutex_lock(&team->lock);
  atomic_fetch_add(&team->calls, 1);
  if (team->sleeping) pthread_cond_broadcast(&team->called);
  pthread_mutex_unlock(&team->lock);
  if (!work) return;
  work(what, me);
  atomic_store(&team->open, 0);
  for (int spins = 0; atomic_load(&team->inside); spins++) rest(spins);
}

static void gather(Team *team) {
  team->process = getpid();
  team->threads = 1;
  team->sleeping = 0;
  pthread_mutex_init(&team->lock, NULL);
  pthread_cond_init(&team->called, NULL);
  team->calls = team->open = team->inside = 0;
  team->ticket = 0;
  team->finished = 0;
  team->members[0] = (Member){.team = team};
  for (int i = 1; i < team->wanted_threads; i++) {
    team->members[i] = (Member){.team = team, .thread = i};
    if (pthread_create(&team->members[i].handle, NULL, attend_calls, team->members + i)) break;
    team->threads++;
  }
}

/* A team of `threads` threads, or of as many as the system gives; NULL where memory is wanting. */
Team *team_new(int threads) {
  Team *team = aligned_alloc(64, (sizeof(Team) + 63) / 64 * 64);
  Member *members = malloc(threads * sizeof *members);
  if (!team || !members) {
    free(team), free(members);
    return NULL;
  }
  memset(team, 0, sizeof *team);
  team->wanted_threads = threads;
  team->members = members;
  gather(team);
  return team;
}

void team_free(Team *team) {
  if (team->process == getpid()) {
    call(team, NULL, NULL);
    for (int i = 1; i < team->threads; i++) pthread_join(team->members[i].handle, NULL);
  }
  free(team->members);
  free(team);
}

#endif
