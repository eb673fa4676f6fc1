/* Threads that take one pass after another together.

   A pass is a row of stages, and a stage a number of items. A thread takes items until none is left and waits
   until all are done; for threads that come late, because another program has their core, nobody waits. Within
   a pass waiting is active and takes microseconds; between passes it is active for a moment, then sleep.

   Why the memory order is right. All atomic operations are sequentially consistent: there is one order of them that
   all threads agree on.

   1. Entering and closing a pass (`open`, `inside`) is Dekker's pattern. A worker does `inside += 1`, then reads
      `open`; the caller, who has done the last stage, does `open = 0`, then reads `inside`. In the one order either the
      worker's read comes after `open = 0`, and it leaves without touching the pass, or the caller's read comes after
      `inside += 1`, and it waits for that worker. With acquire and release alone both could read the old value.
   2. `work`, `pass` and `first_stage` are plain. The caller writes them while `open` is 0 and no worker is past its
      test of `open` (1, for the pass before); then it stores `open = 1`, and a worker reads them only after it has read
      that 1. A worker that was called to one pass may so enter the next: it then finds that pass's own fields.
   3. Within a stage, `ticket` gives each item to one thread (compare and exchange on stage and item together, so that
      a thread that fell asleep holding an old ticket fails). A thread's writes of an item come before its
      `finished += 1`, all those before the last thread's, and that before its store of the next stage's ticket, which
      every thread has read before it goes on. So a stage sees everything the stages before have written.
   4. `finished` is 0 again before the next stage's ticket appears, so that nobody adds to the old count. A stage number
      has 32 bits; a thread cannot be 2**32 stages late, since it is waited for while it holds an item (3), and holds
      the stage's own number otherwise. */

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

#include "allocation.h"
#include "export.h"
#include "float_environment.h"

#define AWAKE_NS 200000 /* after a pass: the next one of a text that is being decoded comes within this time */

_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2, "gpt2core's kernels need atomic 64-bit numbers without locks");

typedef struct Team Team;
typedef struct {
  Team *team;
  int thread;
  uint32_t stage; /* that it works at; it may be behind the team's */
  pthread_t handle;
} Member;

typedef void Work(void *pass, Member *);

struct Team {
  int threads, requested_threads;
  pid_t process; /* a forked child has the structure, but not the threads */
  Member *members;
  Work *work; /* of the current pass; NULL: end the thread */
  void *pass;
  uint32_t first_stage; /* of the current pass */
  pthread_mutex_t lock;
  pthread_cond_t called;
  int sleeping;
  _Alignas(64) atomic_int calls;
  _Alignas(64) atomic_int open;         /* the current pass may be entered */
  _Alignas(64) atomic_int inside;       /* threads other than the caller's that are in it */
  _Alignas(64) _Atomic uint64_t ticket; /* the stage in the upper half, its next item in the lower */
  _Alignas(64) _Atomic int64_t finished; /* items of the stage */
};

static inline void spin(int spins) {
  if (spins > 4096)
    sched_yield(); /* somebody else needs the core that another thread waits for */
#if defined(__x86_64__)
  else
    __builtin_ia32_pause();
#elif defined(__aarch64__)
  else
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

/* From the first to before the last. */
typedef struct {
  int64_t first, last;
} Range;
static inline Range part_of(int64_t count, int64_t part, int64_t parts) {
  return (Range){count * part / parts, count * (part + 1) / parts};
}

/* Take one of the `parts` of `count` things of this stage; 0 once all parts are done, and the stage is over. */
static int take_item(Member *me, int64_t count, int64_t parts, Range *item) {
  Team *team = me->team;
  if (parts > count) parts = count;
  if (parts == 0) return 0;
  uint64_t ticket = atomic_load(&team->ticket);
  while ((uint32_t)(ticket >> 32) == me->stage) {
    const int64_t part = (uint32_t)ticket;
    if (part == parts) {
      for (int spins = 0; (uint32_t)(atomic_load(&team->ticket) >> 32) == me->stage; spins++) spin(spins);
      break;
    }
    if (atomic_compare_exchange_weak(&team->ticket, &ticket, ticket + 1)) {
      *item = part_of(count, part, parts);
      return 1;
    }
  }
  me->stage++;
  return 0;
}

static void finish_item(Member *me, int64_t count, int64_t parts) {
  Team *team = me->team;
  if (parts > count) parts = count;
  if (atomic_fetch_add(&team->finished, 1) + 1 < parts) return;
  atomic_store(&team->finished, 0);
  atomic_store(&team->ticket, (uint64_t)(me->stage + 1) << 32);
}

/* One stage of a pass: all threads go through `count` things together, `range` of them at a time. `fineness` says into
   how many parts for each thread they are cut.

   It is a loop over this thread's items with a barrier behind it: a thread leaves it when every item of every thread
   is done. Therefore
   - all threads of a pass come to the same stages in the same order, with the same `count` and `fineness`: these
     depend on the pass alone, never on the thread or on what other items of the same stage write;
   - the body is never left by `break`, `return` or `goto`: its item would count as never finished, and all wait for
     ever (`continue` is allowed);
   - a stage of 0 things is none: no barrier. */
#define STAGE(me, count, fineness, range)                                            \
  for (Range range; take_item(me, count, (fineness) * (me)->team->threads, &range);  \
       finish_item(me, count, (fineness) * (me)->team->threads))

/* A worker's life: wait for a call, take part in the pass, wait again. */
static void *run_worker(void *argument) {
  Member *me = argument;
  Team *team = me->team;
  float_environment_enter(); /* nobody else computes in this thread */
  for (int seen = 0;;) {
    const int64_t until_ns = now_ns() + AWAKE_NS;
    for (int spins = 1; atomic_load(&team->calls) == seen; spins++) {
      spin(0);
      if (spins % 64 == 0 && now_ns() > until_ns) {
        pthread_mutex_lock(&team->lock);
        team->sleeping++;
        while (atomic_load(&team->calls) == seen) pthread_cond_wait(&team->called, &team->lock);
        team->sleeping--;
        pthread_mutex_unlock(&team->lock);
      }
    }
    atomic_fetch_add(&team->inside, 1);
    seen = atomic_load(&team->calls);
    int end = 0;
    if (atomic_load(&team->open)) {
      end = !team->work;
      me->stage = team->first_stage;
      if (!end) team->work(team->pass, me);
    }
    atomic_fetch_sub(&team->inside, 1);
    if (end) return NULL;
  }
}

/* Have all threads, this one among them, do one pass. */
static void team_run(Team *team, Work *work, void *pass) {
  Member *me = team->members;
  team->work = work;
  team->pass = pass;
  team->first_stage = me->stage;
  atomic_store(&team->open, 1);
  pthread_mutex_lock(&team->lock);
  atomic_fetch_add(&team->calls, 1);
  if (team->sleeping) pthread_cond_broadcast(&team->called);
  pthread_mutex_unlock(&team->lock);
  if (!work) return;
  const FloatEnvironment before = float_environment_enter();
  work(pass, me);
  float_environment_leave(before);
  atomic_store(&team->open, 0);
  for (int spins = 0; atomic_load(&team->inside); spins++) spin(spins);
}

static void team_start(Team *team) {
  team->process = getpid();
  team->threads = 1;
  team->sleeping = 0;
  pthread_mutex_init(&team->lock, NULL);
  pthread_cond_init(&team->called, NULL);
  team->calls = team->open = team->inside = 0;
  team->ticket = 0;
  team->finished = 0;
  team->members[0] = (Member){.team = team};
  for (int i = 1; i < team->requested_threads; i++) {
    team->members[i] = (Member){.team = team, .thread = i};
    if (pthread_create(&team->members[i].handle, NULL, run_worker, team->members + i)) break;
    team->threads++;
  }
}

/* A team of `threads` threads, or of as many as the system gives; NULL without memory for it. */
EXPORT Team *gpt2core_team_new(int threads) {
  Team *team = allocate_lines(sizeof(Team));
  Member *members = malloc(threads * sizeof *members);
  if (!team || !members) {
    free_lines(team), free(members);
    return NULL;
  }
  memset(team, 0, sizeof *team);
  team->requested_threads = threads;
  team->members = members;
  team_start(team);
  return team;
}

EXPORT void gpt2core_team_free(Team *team) {
  if (team->process == getpid()) {
    team_run(team, NULL, NULL);
    for (int i = 1; i < team->threads; i++) pthread_join(team->members[i].handle, NULL);
  }
  free(team->members);
  free_lines(team);
}

#endif
