/* GPT-2 in C: one forward pass, taken by a team of threads. What the functions are given is described in
   `packing.py` and `session.py`; structures here and there have the same fields in the same order.

   N new tokens of a pass, B its pieces of rows, M wanted logits, D width, H heads, K head width, V vocabulary */

#include "attention.h"
#include "packing.h"

typedef struct {
  Matrix weight;
  const float *bias;
} Linear;

typedef struct {
  const float *weight, *bias;
} Norm;

typedef struct {
  Norm ln_1, ln_2;
  Linear c_attn, attn_c_proj, c_fc, mlp_c_proj;
  float attention_scale;
} Block;

typedef struct {
  long layers, heads, width, mlp, vocabulary; /* L, H, D, _, V */
  float epsilon;
  int activation; /* of ACTIVATIONS */
  int table_kind; /* of `wte`, a table (V, D): FLOAT32, BFLOAT16 or INT8 */
  int bfloat16_cache;
  const void *wte;
  const float *wte_scale; /* int8: (V,) */
  const float *wpe;
  const Block *blocks;
  Norm ln_f;
  Matrix head;
} Model;

/* New tokens of one row that follow one another. */
typedef struct {
  int32_t first, count; /* of the pass's tokens */
  int32_t start, slot;
} Piece;

typedef struct {
  void *keys;   /* (L, slots, H, C / LANES, K, LANES) */
  void *values; /* (L, slots, H, C, K in whole vectors) */
  long slots, capacity;
} Cache;

/* What a pass over one row, from its beginning and perhaps in several passes, shows of itself; T tokens in all. */
typedef struct {
  float *hidden_states; /* (2 L + 1, T, D) */
  float *attentions;    /* (L, H, T, T), zero where a token sees nothing */
  long tokens;          /* T */
} Trace;

typedef struct {
  const Model *model;
  const Cache *cache;
  const Trace *trace; /* or NULL; then the wanted tokens are all tokens in their order */
  const int32_t *tokens;
  const Piece *pieces;
  const int32_t *wanted; /* (M,) of the pass's tokens */
  long tokens_count, pieces_count, wanted_count;
  float *logits; /* (M, V) */
  /* what the team works with */
  Team *team;
  Shape shape;
  long padded, mlp_padded, qkv_padded; /* widths in whole strips */
  float *x, *qkv, *y, *h, *kept_x, *kept_y, *scores;
  int8_t *rounded;
  float *round_scale, *round_sum;
} Pass;

long lanes(void) { return LANES; }

static void layer_norm(const float *x, long width, const Norm *norm, float epsilon, float *y) {
  f32v sums = splat(0), squares = splat(0);
  long i = 0;
  float mean = 0, variance = 0;
  for (; i + LANES <= width; i += LANES) sums += load(x + i);
  mean = total(sums);
  for (; i < width; i++) mean += x[i];
  mean /= width;
  for (i = 0; i + LANES <= width; i += LANES) {
    f32v off = load(x + i) - mean;
    squares += off * off;
  }
  variance = total(squares);
  for (; i < width; i++) variance += (x[i] - mean) * (x[i] - mean);
  float factor = 1 / sqrtf(variance / width + epsilon);
  for (i = 0; i + LANES <= width; i += LANES)
    store(y + i, (load(x + i) - mean) * factor * load(norm->weight + i) + load(norm->bias + i));
  for (; i < width; i++) y[i] = (x[i] - mean) * factor * norm->weight[i] + norm->bias[i];
}

static void embed(const Pass *p, long n, int position) {
  const Model *m = p->model;
  long token = p->tokens[n], row = token * m->width;
  const float *there = m->wpe + position * m->width;
  float *x = p->x + n * p->padded;
  for (long i = 0; i < m->width; i++) {
    float value;
    if (m->table_kind == FLOAT32)
      value = ((const float *)m->wte)[row + i];
    else if (m->table_kind == BFLOAT16) {
      uint32_t bits = (uint32_t)((const uint16_t *)m->wte)[row + i] << 16;
      memcpy(&value, &bits, 4);
    } else
      value = ((const int8_t *)m->wte)[row + i] * m->wte_scale[token];
    x[i] = value + there[i];
  }
}

/* Give `m` its rows: normalised where `norm` is given, rounded where it wants them so; a stage, unless nothing is
   to be done. Rows are `stride` apart; `normal` may be `x`. */
static Rows prepare(Pass *p, Member *me, const Matrix *m, const Norm *norm, const float *x, long stride, long width,
                    long rows, float *normal) {
  const int rounds = m->kind == INT8 || m->kind == INT4;
  const long groups = m->inputs / m->group;
  STAGE(me, norm || rounds ? rows : 0, 4, mine)
  for (long n = mine.first; n < mine.last; n++) {
    const float *from = x + n * stride;
    if (norm) {
      layer_norm(from, width, norm, p->model->epsilon, normal + n * stride);
      from = normal + n * stride;
    }
    if (rounds)
      round_row(from, width, m, p->rounded + n * m->inputs, p->round_scale + n * groups, p->round_sum + n * groups);
  }
  return (Rows){norm ? normal : x, stride, p->rounded, p->round_scale, p->round_sum};
}

static void apply(Member *me, const Linear *l, const Rows *in, long rows, float *y, long stride, int add,
                  Activation *activation) {
  multiply(me, &l->weight, in, rows, &(Result){y, stride, 0, add, l->bias, activation});
}

static void *cached(const Pass *p, void *all, long layer, long slot, long head, long width) {
  long bytes = p->shape.bfloat16 ? 2 : 4;
  return (char *)all + ((layer * p->cache->slots + slot) * p->model->heads + head) * p->cache->capacity * width * bytes;
}

/* Write the new keys and values of one token, and scale its queries. */
static void remember_token(const Pass *p, long layer, const Piece *piece, long i) {
  const Model *m = p->model;
  const long width = p->shape.head_dim;
  float *q = p->qkv + (piece->first + i) * p->qkv_padded, *k = q + m->width, *v = k + m->width;
  for (long d = 0; d < m->width; d++) q[d] *= m->blocks[layer].attention_scale;
  for (long head = 0; head < m->heads; head++)
    remember(&p->shape, cached(p, p->cache->keys, layer, piece->slot, head, width),
             cached(p, p->cache->values, layer, piece->slot, head, p->shape.value_dim), piece->start + i,
             k + head * width, v + head * width);
}

/* Copy the residual stream for the trace; the part of `hidden_states` it is. A stage, where there is a trace. */
static void trace_hidden_state(const Pass *p, Member *me, long part, const float *x) {
  const Trace *trace = p->trace;
  STAGE(me, trace ? p->tokens_count : 0, 4, mine)
  for (long n = mine.first; n < mine.last; n++)
    memcpy(trace->hidden_states + (part * trace->tokens + p->pieces->start + n) * p->model->width, x + n * p->padded,
           4 * p->model->width);
}

/* Copy the shares of one head that `attend` left in `scores`, whose sum is not yet 1. */
static void trace_attention(const Pass *p, long layer, long head, long position, const float *scores) {
  const Trace *trace = p->trace;
  float *to = trace->attentions + ((layer * p->model->heads + head) * trace->tokens + position) * trace->tokens;
  double sum = 0;
  for (long t = 0; t <= position; t++) sum += scores[t];
  for (long t = 0; t <= position; t++) to[t] = scores[t] / sum;
}

/* The queries `i` and up to QUERIES - 1 that follow in a piece, in one head. */
static void attend(const Pass *p, long layer, const Piece *piece, long head, long i, float *scores) {
  const long width = p->shape.head_dim, rows = piece->count - i < QUERIES ? piece->count - i : QUERIES;
  float q[QUERIES * width];
  for (long r = 0; r < rows; r++)
    memcpy(q + r * width, p->qkv + (piece->first + i + r) * p->qkv_padded + head * width, 4 * width);
  const void *keys = cached(p, p->cache->keys, layer, piece->slot, head, width);
  const void *next = cached(p, p->cache->keys, layer, piece->slot, head + 1, width); /* likely, and harmless */
  const void *values = cached(p, p->cache->values, layer, piece->slot, head, p->shape.value_dim);
  (p->shape.bfloat16 ? attend_bfloat16 : attend_float32)(
      rows, &p->shape, keys, values, next, piece->start + i, q,
      p->y + (piece->first + i) * p->padded + head * width, p->padded, scores);
  for (long r = 0; p->trace && r < rows; r++)
    trace_attention(p, layer, head, piece->start + i + r, scores + r * p->cache->capacity);
}

static void attention(Pass *p, Member *me, long layer) {
  const long heads = p->model->heads;
  STAGE(me, p->tokens_count, 4, mine)
  for (long b = 0; b < p->pieces_count; b++)
    for (long i = 0; i < p->pieces[b].count; i++) {
      long n = p->pieces[b].first + i;
      if (n >= mine.first && n < mine.last) remember_token(p, layer, p->pieces + b, i);
    }
  long items = 0;
  for (long b = 0; b < p->pieces_count; b++) items += (p->pieces[b].count + QUERIES - 1) / QUERIES * heads;
  float *scores = p->scores + me->thread * QUERIES * p->cache->capacity;
  STAGE(me, items, items > 8 * p->pieces_count * heads ? 32 : 4, mine) {
    long before = 0;
    for (long b = 0; b < p->pieces_count && before < mine.last; b++) {
      const Piece *piece = p->pieces + b;
      const long all = (piece->count + QUERIES - 1) / QUERIES * heads;
      for (long item = before < mine.first ? mine.first : before; item < mine.last && item < before + all; item++)
        attend(p, layer, piece, (item - before) % heads, (item - before) / heads * QUERIES, scores);
      before += all;
    }
  }
}

static void take_part(Pass *p, Member *me) {
  const Model *m = p->model;
  Activation *activation = ACTIVATIONS[m->activation].function;
  long rows = p->tokens_count;
  float *x = p->x, *y = p->y;
  STAGE(me, rows, 4, mine)
  for (long b = 0; b < p->pieces_count; b++)
    for (long i = 0; i < p->pieces[b].count; i++) {
      long n = p->pieces[b].first + i;
      if (n >= mine.first && n < mine.last) embed(p, n, p->pieces[b].start + i);
    }
  trace_hidden_state(p, me, 0, x);
  for (long layer = 0; layer < m->layers; layer++) {
    const Block *block = m->blocks + layer;
    Rows in = prepare(p, me, &block->c_attn.weight, &block->ln_1, x, p->padded, m->width, rows, y);
    apply(me, &block->c_attn, &in, rows, p->qkv, p->qkv_padded, 0, NULL);
    attention(p, me, layer);
    if (layer == m->layers - 1) { /* from here on only the wanted tokens matter */
      rows = p->wanted_count;
      STAGE(me, rows, 4, mine)
      for (long n = mine.first; n < mine.last; n++) {
        memcpy(p->kept_x + n * p->padded, x + p->wanted[n] * p->padded, 4 * p->padded);
        memcpy(p->kept_y + n * p->padded, y + p->wanted[n] * p->padded, 4 * p->padded);
      }
      x = p->kept_x;
      y = p->kept_y;
    }
    in = prepare(p, me, &block->attn_c_proj.weight, NULL, y, p->padded, m->width, rows, NULL);
    apply(me, &block->attn_c_proj, &in, rows, x, p->padded, 1, NULL);
    trace_hidden_state(p, me, 2 * layer + 1, x);
    in = prepare(p, me, &block->c_fc.weight, &block->ln_2, x, p->padded, m->width, rows, y);
    apply(me, &block->c_fc, &in, rows, p->h, p->mlp_padded, 0, activation);
    in = prepare(p, me, &block->mlp_c_proj.weight, NULL, p->h, p->mlp_padded, m->mlp, rows, NULL);
    apply(me, &block->mlp_c_proj, &in, rows, x, p->padded, 1, NULL);
    trace_hidden_state(p, me, 2 * layer + 2, x);
  }
  Rows in = prepare(p, me, &m->head, &m->ln_f, x, p->padded, m->width, rows, y);
  multiply(me, &m->head, &in, rows, &(Result){p->logits, m->vocabulary, 1, 0, NULL, NULL});
}

static void work(void *pass, Member *me) { take_part(pass, me); }

static long whole_vectors(long count) { return (count + LANES - 1) / LANES * LANES; }
static long whole_strips(long count) { return (count + WIDE - 1) / WIDE * WIDE; }

static long larger_of(long x, long y) { return x > y ? x : y; }

/* Of all matrices, which may be rounded up by their groups. */
static long widest_inputs(const Model *model) {
  long most = model->head.inputs;
  for (long layer = 0; layer < model->layers; layer++) {
    const Block *block = model->blocks + layer;
    most = larger_of(most, larger_of(block->c_attn.weight.inputs, block->attn_c_proj.weight.inputs));
    most = larger_of(most, larger_of(block->c_fc.weight.inputs, block->mlp_c_proj.weight.inputs));
  }
  return most;
}

/* Append the tokens to the cache and compute the wanted logits. 0, or -1 where memory is wanting: then
   nothing was written. */
int forward(Team *team, const Model *model, const Cache *cache, const int32_t *tokens, long tokens_count,
            const Piece *pieces, long pieces_count, const int32_t *wanted, long wanted_count, float *logits,
            const Trace *trace) {
  const long width = model->width, kept = larger_of(wanted_count, tokens_count);
  Pass pass = {.model = model, .cache = cache, .tokens = tokens, .pieces = pieces, .wanted = wanted,
               .tokens_count = tokens_count, .pieces_count = pieces_count, .wanted_count = wanted_count,
               .logits = logits, .trace = trace, .team = team};
  pass.shape = (Shape){model->bfloat16_cache, width / model->heads, whole_vectors(width / model->heads),
                       cache->capacity};
  pass.padded = whole_strips(width);
  pass.mlp_padded = whole_strips(model->mlp);
  pass.qkv_padded = whole_strips(3 * width);
  const long rounded = kept * widest_inputs(model); /* numbers; their groups have 8 or more */
  const struct {
    void *place;
    long floats;
  } parts[] = {
      {&pass.x, kept * pass.padded},
      {&pass.y, kept * pass.padded},
      {&pass.h, kept * pass.mlp_padded},
      {&pass.qkv, tokens_count * pass.qkv_padded},
      {&pass.kept_x, wanted_count * pass.padded},
      {&pass.kept_y, wanted_count * pass.padded},
      {&pass.scores, team->threads * QUERIES * cache->capacity},
      {&pass.rounded, rounded / 4},
      {&pass.round_scale, rounded / 8 + kept},
      {&pass.round_sum, rounded / 8 + kept},
  };
  const int count = sizeof parts / sizeof *parts;
  long all = 0;
  for (int i = 0; i < count; i++) all += whole_strips(parts[i].floats + 1);
  float *arena = aligned_alloc(64, 4 * all);
  if (!arena) return -1;
  float *at = arena;
  for (int i = 0; i < count; i++) {
    memcpy(parts[i].place, &at, sizeof at);
    at += whole_strips(parts[i].floats + 1);
  }
  if (team->process != getpid()) gather(team);
  call(team, work, &pass);
  free(arena);
  return 0;
}

