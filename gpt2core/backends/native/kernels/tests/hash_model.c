/* Hashes of the logits' bits of random models: the same on every processor and from every compiler.

       hash_model FIRST COUNT POSITIONS [--naive | --library PATH]

   builds models of odd shapes from the seeds FIRST and on, whole numbers deciding everything, and runs each in every
   precision over texts of POSITIONS tokens or a few more in all: in chunks of random sizes, beside one another, with 1
   to 3 threads. With --naive the logits are those of `naive.h`, with --library those of a compiled library. Prints one
   line for each precision: its name, the hash, the number of positions. */

#include <stdio.h>
#if defined(_WIN32)
/* of windows.h, which defines INT8 and other names of ours */
__declspec(dllimport) void *LoadLibraryA(const char *path);
__declspec(dllimport) void *GetProcAddress(void *library, const char *name);
#define open_library(path) LoadLibraryA(path)
#define find_symbol(library, name) GetProcAddress(library, name)
#else
#include <dlfcn.h>
#define open_library(path) dlopen(path, RTLD_NOW | RTLD_LOCAL)
#define find_symbol(library, name) dlsym(library, name)
#endif

#include "../gpt2.c"
#include "naive.h"

_Static_assert((int)PLAIN_INT4 == (int)INT4 && (int)PLAIN_INT8 == (int)INT8, "one order of precisions");

/* This program's own kernels, or those of a library. */
#define KERNELS(use)                                                                                            \
  use(self_test) use(strip_width) use(activation_named) use(team_new) use(team_free) use(forward)               \
      use(pack_float32) use(pack_bfloat16) use(pack_int8) use(pack_int4)
#define DECLARE(name) __typeof__(&gpt2core_##name) name;
#define OWN(name) gpt2core_##name,
static struct {
  KERNELS(DECLARE)
} kernels = {KERNELS(OWN)};
static int64_t wide = WIDE; /* outputs of a strip */

static void load_kernels(const char *path) {
  void *library = open_library(path), *symbol;
#define LOAD(name)                                                                                              \
  symbol = library ? find_symbol(library, "gpt2core_" #name) : NULL;                                            \
  if (!symbol) fprintf(stderr, "%s does not load, or has no %s\n", path, #name), exit(1);                       \
  memcpy(&kernels.name, &symbol, sizeof symbol);
  KERNELS(LOAD)
  wide = kernels.strip_width();
}

static const char *const PRECISIONS[] = {"float32", "bfloat16", "int8", "int4"};
#define MAX_ALLOCATIONS 1000
static void *allocations[MAX_ALLOCATIONS];
static int allocations_count;

static void *allocate(int64_t nbytes) { /* zeroed, until `release` */
  void *p = calloc(1, (nbytes + 64) / 64 * 64);
  if (!p || allocations_count == MAX_ALLOCATIONS) exit(1);
  return allocations[allocations_count++] = p;
}
static void release(void) {
  while (allocations_count) free(allocations[--allocations_count]);
}

static int64_t below(Random *random, int64_t limit) { return (int64_t)(next_random(random) % (uint64_t)limit); }

static float *random_floats(Random *random, int64_t count, float center, float spread) {
  float *x = allocate(4 * count);
  for (int64_t i = 0; i < count; i++) x[i] = center + spread * random_float(random);
  return x;
}

/* A power of two near 2 / sqrt(inputs): products of it are exact. */
static float spread_of(int64_t inputs) {
  float spread = 2;
  for (int64_t size = 1; size < inputs; size *= 4) spread *= 0.5f;
  return spread;
}

static PlainMatrix random_matrix(Random *random, int kind, int64_t inputs, int64_t outputs, int64_t group) {
  PlainMatrix m = {.kind = kind, .inputs = inputs, .outputs = outputs, .group = kind == INT4 ? group : inputs};
  const int64_t count = inputs * outputs, groups = (inputs + group - 1) / group;
  const float spread = spread_of(inputs);
  if (kind == FLOAT32) m.float32 = random_floats(random, count, 0, spread);
  if (kind == BFLOAT16) {
    m.bfloat16 = allocate(2 * count);
    for (int64_t i = 0; i < count; i++)
      m.bfloat16[i] = (uint16_t)(bits_of_float(spread * random_float(random)) >> 16);
  }
  if (kind == INT8) {
    m.int8 = allocate(count);
    for (int64_t i = 0; i < count; i++) m.int8[i] = (int8_t)(below(random, 255) - 127);
    m.scale = random_floats(random, outputs, spread * 0x1p-7f, spread * 0x1p-8f);
  }
  if (kind == INT4) {
    m.int4 = allocate(outputs * groups * group);
    m.zero = allocate(4 * outputs * groups);
    m.scale = random_floats(random, outputs * groups, spread * 0x1p-3f, spread * 0x1p-4f);
    for (int64_t i = 0; i < outputs * groups; i++) m.zero[i] = (float)below(random, 16);
    for (int64_t o = 0; o < outputs; o++)
      for (int64_t k = 0; k < groups * group; k++)
        m.int4[o * groups * group + k] =
            k < inputs ? (uint8_t)below(random, 16) : (uint8_t)m.zero[o * groups + k / group];
  }
  m.bias = random_floats(random, outputs, 0, 0.125f);
  return m;
}

static PlainModel random_model(Random *random, int precision) {
  PlainModel m = {.precision = precision, .epsilon = 1e-5f};
  m.heads = 1 + below(random, 4);
  m.width = m.heads * (1 + below(random, 24));
  m.mlp = 1 + below(random, 140);
  m.vocabulary = 2 + below(random, 150);
  m.layers = 1 + below(random, 2);
  m.context = 16 + below(random, 80);
  m.activation = ACTIVATIONS[below(random, ACTIVATIONS_COUNT)].name;
  const int64_t group = 32 << below(random, 3);
  m.head = random_matrix(random, precision == INT4 ? INT8 : precision, m.width, m.vocabulary, group);
  m.wpe = random_floats(random, m.context * m.width, 0, 0.5f);
  m.blocks = allocate(m.layers * sizeof *m.blocks);
  for (int64_t layer = 0; layer < m.layers; layer++) {
    PlainBlock *b = m.blocks + layer;
    for (int i = 0; i < 2; i++) {
      b->ln_1[i] = random_floats(random, m.width, 1 - i, 0.25f);
      b->ln_2[i] = random_floats(random, m.width, 1 - i, 0.25f);
    }
    b->c_attn = random_matrix(random, precision, m.width, 3 * m.width, group);
    b->attn_c_proj = random_matrix(random, precision, m.width, m.width, group);
    b->c_fc = random_matrix(random, precision, m.width, m.mlp, group);
    b->mlp_c_proj = random_matrix(random, precision, m.mlp, m.width, group);
    b->attention_scale = 1 / sqrtf((float)(m.width / m.heads));
  }
  for (int i = 0; i < 2; i++) m.ln_f[i] = random_floats(random, m.width, 1 - i, 0.25f);
  return m;
}

/* ------------------------------------------------------------------------------------------- for the kernels to read */

static const float *in_strips(const float *x, int64_t count) {
  float *padded = allocate(4 * round_up(count, wide));
  memcpy(padded, x, 4 * count);
  return padded;
}

static Matrix pack(const PlainMatrix *m) {
  const int64_t strips = (m->outputs + wide - 1) / wide;
  Matrix packed = {m->kind, (int)m->group, m->inputs, m->outputs, NULL, NULL, NULL};
  if (m->kind == INT8) packed.inputs = round_up(m->inputs, 8), packed.group = (int)packed.inputs;
  if (m->kind == INT4) packed.inputs = round_up(m->inputs, m->group);
  void *to = allocate(strips * wide * packed.inputs * 4);
  packed.values = to;
  if (m->kind == FLOAT32) kernels.pack_float32(m->float32, m->outputs, 1, m->inputs, m->outputs, to);
  if (m->kind == BFLOAT16) kernels.pack_bfloat16(m->bfloat16, m->outputs, 1, m->inputs, m->outputs, to);
  if (m->kind == INT8) {
    kernels.pack_int8(m->int8, m->outputs, 1, m->inputs, packed.inputs, m->outputs, to);
    packed.scale = in_strips(m->scale, m->outputs);
  }
  if (m->kind == INT4) {
    const int64_t groups = packed.inputs / m->group;
    uint8_t *nibbles = allocate(m->outputs * packed.inputs / 2);
    for (int64_t i = 0; i < m->outputs * packed.inputs; i++) nibbles[i / 2] |= (uint8_t)(m->int4[i] << (i % 2 * 4));
    kernels.pack_int4(nibbles, packed.inputs, m->outputs, to);
    float *scale = allocate(4 * strips * wide * groups), *zero = allocate(4 * strips * wide * groups);
    for (int64_t o = 0; o < m->outputs; o++)
      for (int64_t g = 0; g < groups; g++) {
        const int64_t at = (o / wide * groups + g) * wide + o % wide;
        scale[at] = m->scale[o * groups + g];
        zero[at] = m->zero[o * groups + g];
      }
    packed.scale = scale;
    packed.zero = zero;
  }
  return packed;
}
static Linear pack_linear(const PlainMatrix *m) { return (Linear){pack(m), in_strips(m->bias, m->outputs)}; }
static Norm pack_norm(float *const norm[2], int64_t width) {
  return (Norm){in_strips(norm[0], width), in_strips(norm[1], width)};
}

static Model pack_model(const PlainModel *m) {
  Block *blocks = allocate(m->layers * sizeof *blocks);
  for (int64_t layer = 0; layer < m->layers; layer++) {
    const PlainBlock *b = m->blocks + layer;
    blocks[layer] = (Block){pack_norm(b->ln_1, m->width), pack_norm(b->ln_2, m->width), pack_linear(&b->c_attn),
                            pack_linear(&b->attn_c_proj), pack_linear(&b->c_fc), pack_linear(&b->mlp_c_proj),
                            b->attention_scale};
  }
  const int size = m->head.kind == FLOAT32 ? 4 : m->head.kind == BFLOAT16 ? 2 : 1;
  const char *by_columns = m->head.kind == FLOAT32    ? (char *)m->head.float32
                           : m->head.kind == BFLOAT16 ? (char *)m->head.bfloat16
                                                      : (char *)m->head.int8;
  char *wte = allocate(m->vocabulary * m->width * size);
  for (int64_t v = 0; v < m->vocabulary; v++)
    for (int64_t i = 0; i < m->width; i++)
      memcpy(wte + (v * m->width + i) * size, by_columns + (i * m->vocabulary + v) * size, size);
  return (Model){m->layers, m->heads, m->width, m->mlp, m->vocabulary, m->epsilon,
                 kernels.activation_named(m->activation), m->head.kind, m->precision >= INT8, wte, m->head.scale,
                 m->wpe, blocks, pack_norm(m->ln_f, m->width), pack(&m->head)};
}

/* -------------------------------------------------------------------------------------------------------------- runs */

#define ROWS 4

/* The same pass again, with its last rows scored instead of given out: what it says of them must be what a loop in
   double precision says of their logits. */
static void check_scores(Team *team, const Model *model, const Cache *cache, const int32_t *tokens, int64_t count,
                         const Piece *pieces, int64_t pieces_count, const int32_t *logits_at, const float *want) {
  enum { TOP = 3 };
  const int64_t vocabulary = model->vocabulary, first = count / 3, scored = count - first;
  float *out = malloc(4 * (first * vocabulary + 1)), *members = malloc(4 * vocabulary);
  double *sums = malloc(8 * scored * (3 + TOP));
  int64_t *ranks = malloc(8 * scored);
  int32_t *targets = malloc(4 * scored), *top_ids = malloc(4 * scored * TOP);
  for (int64_t v = 0; v < vocabulary; v++) members[v] = v % 3 == 1;
  for (int64_t n = 0; n < scored; n++) targets[n] = (int32_t)((tokens[first + n] + 7 * n) % vocabulary);
  const Scores scores = {first, vocabulary < TOP ? vocabulary : TOP, targets, members, ranks, sums, sums + scored,
                         sums + 2 * scored, top_ids, sums + 3 * scored};
  int wrong =
      kernels.forward(team, model, cache, tokens, count, pieces, pieces_count, logits_at, count, out, NULL, &scores);
  wrong |= memcmp(out, want, 4 * first * vocabulary) != 0;
  for (int64_t n = 0; n < scored && !wrong; n++) {
    const float *row = want + (first + n) * vocabulary;
    int64_t best = 0, above = 0;
    for (int64_t v = 0; v < vocabulary; v++) {
      if (row[v] > row[best]) best = v;
      above += row[v] > row[targets[n]];
    }
    double sum = 0, weighted = 0, inside = 0;
    for (int64_t v = 0; v < vocabulary; v++) {
      const double below = (double)row[v] - row[best], power = exp(below);
      sum += power;
      weighted += power * below;
      inside += power * members[v];
    }
    const double logarithm = log(sum);
    wrong |= ranks[n] != above + 1 || top_ids[n * scores.top] != best;
    wrong |= fabs(scores.logprobs[n] - ((double)row[targets[n]] - row[best] - logarithm)) > 1e-6;
    wrong |= fabs(scores.entropies[n] - (logarithm - weighted / sum)) > 1e-5;
    wrong |= inside > 0 && fabs(scores.member_logprobs[n] - (log(inside) - logarithm)) > 1e-5;
    wrong |= fabs(scores.top_logprobs[n * scores.top] + logarithm) > 1e-6;
  }
  free(out), free(members), free(sums), free(ranks), free(targets), free(top_ids);
  if (wrong) fprintf(stderr, "scores differ from those of the logits\n"), exit(1);
}

/* Texts of `lengths` tokens, side by side in chunks of random sizes; logits (ROWS, context, V). */
static void run_kernels(const PlainModel *plain, Random *random, int32_t *const tokens[], const int64_t *lengths,
                        float *logits) {
  const Model model = pack_model(plain);
  const int64_t capacity = round_up(plain->context, LOGICAL_LANES), head_dim = plain->width / plain->heads;
  const int64_t numbers = plain->layers * ROWS * plain->heads * capacity;
  const Cache cache = {allocate(4 * numbers * head_dim), allocate(4 * numbers * round_up(head_dim, LOGICAL_LANES)),
                       ROWS, capacity};
  Team *team = kernels.team_new(1 + (int)below(random, 3));
  int64_t done[ROWS] = {0};
  for (;;) {
    int32_t batch[ROWS * 128], logits_at[ROWS * 128];
    Piece pieces[ROWS];
    int64_t count = 0, pieces_count = 0;
    for (int row = 0; row < ROWS; row++) {
      const int64_t left = lengths[row] - done[row];
      if (!left || below(random, 4) == 0) continue;
      const int64_t size = 1 + below(random, below(random, 3) ? left : 1);
      pieces[pieces_count++] = (Piece){(int32_t)count, (int32_t)size, (int32_t)done[row], row};
      for (int64_t i = 0; i < size; i++, count++) {
        batch[count] = tokens[row][done[row] + i];
        logits_at[count] = (int32_t)count;
      }
    }
    float *out = malloc(4 * (count + 1) * plain->vocabulary);
    if (count && kernels.forward(team, &model, &cache, batch, count, pieces, pieces_count, logits_at, count, out, NULL,
                                 NULL))
      exit(1);
    if (count) check_scores(team, &model, &cache, batch, count, pieces, pieces_count, logits_at, out);
    for (int64_t p = 0; p < pieces_count; p++) {
      const Piece piece = pieces[p];
      memcpy(logits + (piece.slot * plain->context + piece.start) * plain->vocabulary,
             out + piece.first * plain->vocabulary, 4 * piece.count * plain->vocabulary);
      done[piece.slot] += piece.count;
    }
    free(out);
    if (!memcmp(done, lengths, sizeof done)) break;
  }
  kernels.team_free(team);
}

int main(int argc, char **argv) {
  if (argc < 4) return fprintf(stderr, "usage: hash_model FIRST COUNT POSITIONS [--naive | --library PATH]\n"), 2;
  const int64_t first = atoll(argv[1]), count = atoll(argv[2]), positions = atoll(argv[3]);
  const int naive = argc > 4 && !strcmp(argv[4], "--naive");
  if (argc > 5 && !strcmp(argv[4], "--library")) load_kernels(argv[5]);
  const int self_test = kernels.self_test();
  if (self_test > 0) return fprintf(stderr, "the self-test failed: %d\n", self_test), 1;
  for (int precision = FLOAT32; precision <= INT4; precision++) {
    uint64_t hash = HASH_START;
    int64_t all = 0;
    for (int64_t seed = first; seed < first + count; seed++) {
      Random random = {(uint64_t)seed * 4 + (uint64_t)precision}, schedule = {(uint64_t)seed};
      const PlainModel model = random_model(&random, precision);
      float *logits = allocate(4 * ROWS * model.context * model.vocabulary);
      for (int64_t ran = 0; ran < positions;) {
        const int kept = allocations_count;
        int32_t *tokens[ROWS];
        int64_t lengths[ROWS];
        for (int row = 0; row < ROWS; row++) {
          lengths[row] = 1 + below(&random, model.context);
          tokens[row] = allocate(4 * model.context);
          for (int64_t i = 0; i < lengths[row]; i++) tokens[row][i] = (int32_t)below(&random, model.vocabulary);
        }
        if (!naive) run_kernels(&model, &schedule, tokens, lengths, logits);
        for (int row = 0; row < ROWS; row++) {
          float *row_logits = logits + row * model.context * model.vocabulary;
          if (naive) naive_forward(&model, tokens[row], lengths[row], row_logits);
          hash = hash_words(hash, row_logits, lengths[row] * model.vocabulary);
          ran += lengths[row];
        }
        while (allocations_count > kept) free(allocations[--allocations_count]);
        if (ran >= positions) all += ran;
      }
      release();
    }
    printf("%s %016llx %lld\n", PRECISIONS[precision], (unsigned long long)hash, (long long)all);
  }
  return 0;
}
