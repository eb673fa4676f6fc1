/* Threads that take one pass after another together. Within a pass they meet at barriers, where they wait
   actively, for microseconds; between passes they wait actively for a moment and then sleep. */

#ifndef GPT2CORE_TEAM_H
#define GPT2CORE_TEAM_H

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define AWAKE_NS 200000 /* after a pass: the next one of a text that is being decoded comes within this time */

typedef struct Team Team;
typedef struct {
  Team *team;
  int thread;
  pthread_t handle;
} Member;

struct Team {
  int threads, wanted_threads;
  pid_t process; /* a forked child has the structure, but not the threads */
  Member *members;
  void (*work)(void *what, int thread); /* of the current pass; none: go home */
  void *what;
  pthread_mutex_t lock;
  pthread_cond_t called;
  int sleeping;
  _Alignas(64) atomic_int calls;
  _Alignas(64) atomic_int arrived;
  _Alignas(64) atomic_int meetings;
  _Alignas(64) atomic_long next; /* of the items that `take` deals out */
};

static inline void rest(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

static long now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000L + now.tv_nsec;
}

/* Wait for all; the last to come sets `next` back. */
static void meet(Team *team) {
  int meeting = atomic_load(&team->meetings);
  if (atomic_fetch_add(&team->arrived, 1) == team->threads - 1) {
    atomic_store(&team->arrived, 0);
    atomic_store(&team->next, 0);
    atomic_fetch_add(&team->meetings, 1);
    return;
  }
  for (int spins = 0; atomic_load(&team->meetings) == meeting; spins++) {
    if (spins < 4096)
      rest();
    else
      sched_yield(); /* somebody else needs the core that a member of the team is waiting for */
  }
}

/* The first of `count` items that nobody has taken since the last meeting. */
static inline long take(Team *team, long count) { return atomic_fetch_add(&team->next, count); }

/* From the first to before the last. */
typedef struct {
  long first, last;
} Share;
static inline Share part_of(long count, long part, long parts) {
  return (Share){count * part / parts, count * (part + 1) / parts};
}
static inline Share share(const Team *team, int thread, long count) { return part_of(count, thread, team->threads); }

static void *attend_calls(void *argument) {
  Member *member = argument;
  Team *team = member->team;
  for (int seen = 0;; seen++) {
    long until = now_ns() + AWAKE_NS;
    for (int spins = 1; atomic_load(&team->calls) == seen; spins++) {
      rest();
      if (spins % 64 == 0 && now_ns() > until) {
        pthread_mutex_lock(&team->lock);
        team->sleeping++;
        while (atomic_load(&team->calls) == seen) pthread_cond_wait(&team->called, &team->lock);
        team->sleeping--;
        pthread_mutex_unlock(&team->lock);
      }
    }
    if (!team->work) return NULL;
    team->work(team->what, member->thread);
    meet(team);
  }
}

/* Have all threads, this one among them, do one pass. */
static void call(Team *team, void (*work)(void *, int), void *what) {
  team->work = work;
  team->what = what;
  pthread_mutex_lock(&team->lock);
  atomic_fetch_add(&team->calls, 1);
  if (team->sleeping) pthread_cond_broadcast(&team->called);
  pthread_mutex_unlock(&team->lock);
  if (!work) return;
  work(what, 0);
  meet(team);
}

static void gather(Team *team) {
  team->process = getpid();
  team->threads = 1;
  team->sleeping = 0;
  pthread_mutex_init(&team->lock, NULL);
  pthread_cond_init(&team->called, NULL);
  team->calls = team->arrived = team->meetings = 0;
  team->next = 0;
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
