/* GPT-2 in C: one forward pass, taken by a team of threads. What the functions are given is described in
   `packing.py` and `backend.py`; structures there have the same fields in the same order, which `layout.h` lets them
   check.

   N new tokens of a pass, B its pieces of rows, M logits asked for, D width, H heads, K head width, V vocabulary */

#include "attention.h"
#include "packing.h"
#include "processor.h"
#include "scores.h"

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
  int64_t layers, heads, width, mlp, vocabulary; /* L, H, D, _, V */
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
  void *values; /* (L, slots, H, C, K rounded up to LOGICAL_LANES) */
  int64_t slots, capacity; /* S, C: a multiple of LOGICAL_LANES */
} Cache;

/* What a pass over one row, from its beginning and perhaps in several passes, shows of itself; T tokens in all. */
typedef struct {
  float *hidden_states; /* (2 L + 1, T, D) */
  float *attentions;    /* (L, H, T, T), zero where a token sees nothing */
  int64_t tokens;       /* T */
} Trace;

#include "layout.h"

typedef struct {
  const Model *model;
  const Cache *cache;
  const Trace *trace; /* or NULL; then `logits_at` names all tokens in their order */
  const int32_t *tokens;
  const Piece *pieces;
  const int32_t *logits_at; /* (M,) of the pass's tokens */
  int64_t tokens_count, pieces_count, logits_count;
  float *logits; /* (M, V), of those before the scored ones */
  const Scores *scores; /* or NULL */
  /* what the team works with */
  Shape shape;
  ScoreWork score_work;
  int64_t padded, mlp_padded, qkv_padded; /* widths in whole strips */
  float *x, *qkv, *y, *h, *last_x, *last_y, *attention_scores;
  int8_t *rounded;
  float *round_scale, *round_sum;
} Pass;

/* Positions and a head's values are cached in multiples of this. */
EXPORT int64_t gpt2core_lanes(void) { return LOGICAL_LANES; }

/* Keys are cached in blocks of so many positions. */
EXPORT int64_t gpt2core_key_block(void) { return LANES; }

/* The index of an activation in ACTIVATIONS, or -1. */
EXPORT int gpt2core_activation_named(const char *name) {
  for (int i = 0; i < ACTIVATIONS_COUNT; i++)
    if (!strcmp(ACTIVATIONS[i].name, name)) return i;
  return -1;
}

static void layer_norm(const float *x, int64_t width, const Norm *norm, float epsilon, float *y) {
  const int64_t whole = width / LOGICAL_LANES * LOGICAL_LANES;
  Lanes sums = {0}, squares = {0};
  float lanes[LOGICAL_LANES];
  for (int64_t i = 0; i < whole; i += LOGICAL_LANES)
    EACH(p, PARTS) sums.part[p] += load(x + i + p * LANES);
  store_lanes(lanes, &sums);
  for (int64_t i = whole; i < width; i++) lanes[i - whole] += x[i];
  const float mean = fold(lanes) / (float)width;
  for (int64_t i = 0; i < whole; i += LOGICAL_LANES)
    EACH(p, PARTS) {
      const f32v off = load(x + i + p * LANES) - mean;
      squares.part[p] = multiply_add(off, off, squares.part[p]);
    }
  store_lanes(lanes, &squares);
  for (int64_t i = whole; i < width; i++) {
    const float off = x[i] - mean;
    lanes[i - whole] = multiply_add_1(off, off, lanes[i - whole]);
  }
  const float factor = 1 / __builtin_sqrtf(fold(lanes) / (float)width + epsilon);
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES)
    store(y + i, multiply_add((load(x + i) - mean) * factor, load(norm->weight + i), load(norm->bias + i)));
  for (; i < width; i++) y[i] = multiply_add_1((x[i] - mean) * factor, norm->weight[i], norm->bias[i]);
}

static void embed(const Pass *p, int64_t n, int position) {
  const Model *m = p->model;
  int64_t token = p->tokens[n], row = token * m->width;
  const float *wpe = m->wpe + position * m->width;
  float *x = p->x + n * p->padded;
  for (int64_t i = 0; i < m->width; i++) {
    float value;
    if (m->table_kind == FLOAT32)
      value = ((const float *)m->wte)[row + i];
    else if (m->table_kind == BFLOAT16)
      value = float_of_bits((uint32_t)((const uint16_t *)m->wte)[row + i] << 16);
    else
      value = ((const int8_t *)m->wte)[row + i] * m->wte_scale[token];
    x[i] = value + wpe[i];
  }
}

/* Give `m` its rows: normalized where `norm` is given, rounded where it wants them so; a stage, unless nothing is
   to be done. Rows are `stride` apart; `normal` may be `x`. */
static Rows prepare_rows(Pass *p, Member *me, const Matrix *m, const Norm *norm, const float *x, int64_t stride,
                         int64_t width, int64_t rows, float *normal) {
  const int rounds = m->kind == INT8 || m->kind == INT4;
  const int64_t groups = m->inputs / m->group;
  STAGE(me, norm || rounds ? rows : 0, 4, range)
  for (int64_t n = range.first; n < range.last; n++) {
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

static void linear(Member *me, const Linear *l, const Rows *in, int64_t rows, float *y, int64_t stride, int add,
                   Activation *activation) {
  multiply(me, &l->weight, in, rows, &(Result){y, stride, 0, add, l->bias, activation});
}

static void *cached(const Pass *p, void *all, int64_t layer, int64_t slot, int64_t head, int64_t width) {
  int64_t bytes = p->shape.bfloat16 ? 2 : 4;
  return (char *)all + ((layer * p->cache->slots + slot) * p->model->heads + head) * p->cache->capacity * width * bytes;
}

/* Write the new keys and values of one token, and scale its queries. */
static void cache_token(const Pass *p, int64_t layer, const Piece *piece, int64_t i) {
  const Model *m = p->model;
  const int64_t width = p->shape.head_dim;
  float *q = p->qkv + (piece->first + i) * p->qkv_padded, *k = q + m->width, *v = k + m->width;
  for (int64_t d = 0; d < m->width; d++) q[d] *= m->blocks[layer].attention_scale;
  for (int64_t head = 0; head < m->heads; head++)
    write_key_value(&p->shape, cached(p, p->cache->keys, layer, piece->slot, head, width),
                    cached(p, p->cache->values, layer, piece->slot, head, p->shape.value_dim), piece->start + i,
                    k + head * width, v + head * width);
}

/* Copy the residual stream for the trace; the part of `hidden_states` it is. A stage, where there is a trace. */
static void trace_hidden_state(const Pass *p, Member *me, int64_t part, const float *x) {
  const Trace *trace = p->trace;
  STAGE(me, trace ? p->tokens_count : 0, 4, range)
  for (int64_t n = range.first; n < range.last; n++)
    memcpy(trace->hidden_states + (part * trace->tokens + p->pieces->start + n) * p->model->width, x + n * p->padded,
           4 * p->model->width);
}

/* Copy the shares of one head that `attend` left in `scores`, and make their sum 1 as `softmax` does. */
static void trace_attention(const Pass *p, int64_t layer, int64_t head, int64_t position, const float *scores) {
  const Trace *trace = p->trace;
  float *to = trace->attentions + ((layer * p->model->heads + head) * trace->tokens + position) * trace->tokens;
  float lanes[LOGICAL_LANES] = {0};
  for (int64_t t = 0; t <= position; t++) lanes[t % LOGICAL_LANES] += scores[t];
  const float share = 1 / fold(lanes);
  for (int64_t t = 0; t <= position; t++) to[t] = scores[t] * share;
}

/* The queries `i` and up to QUERIES - 1 that follow in a piece, in one head. */
static void attend(const Pass *p, int64_t layer, const Piece *piece, int64_t head, int64_t i, float *scores) {
  const int64_t width = p->shape.head_dim, rows = piece->count - i < QUERIES ? piece->count - i : QUERIES;
  float q[QUERIES * width];
  for (int64_t r = 0; r < rows; r++)
    memcpy(q + r * width, p->qkv + (piece->first + i + r) * p->qkv_padded + head * width, 4 * width);
  const void *keys = cached(p, p->cache->keys, layer, piece->slot, head, width);
  const void *next = cached(p, p->cache->keys, layer, piece->slot, head + 1, width); /* likely, and harmless */
  const void *values = cached(p, p->cache->values, layer, piece->slot, head, p->shape.value_dim);
  (p->shape.bfloat16 ? attend_bfloat16 : attend_float32)(
      rows, &p->shape, keys, values, next, piece->start + i, q,
      p->y + (piece->first + i) * p->padded + head * width, p->padded, scores);
  for (int64_t r = 0; p->trace && r < rows; r++)
    trace_attention(p, layer, head, piece->start + i + r, scores + r * p->cache->capacity);
}

static void attention(Pass *p, Member *me, int64_t layer) {
  const int64_t heads = p->model->heads;
  STAGE(me, p->tokens_count, 4, range)
  for (int64_t b = 0; b < p->pieces_count; b++)
    for (int64_t i = 0; i < p->pieces[b].count; i++) {
      int64_t n = p->pieces[b].first + i;
      if (n >= range.first && n < range.last) cache_token(p, layer, p->pieces + b, i);
    }
  int64_t items = 0;
  for (int64_t b = 0; b < p->pieces_count; b++) items += (p->pieces[b].count + QUERIES - 1) / QUERIES * heads;
  float *scores = p->attention_scores + me->thread * QUERIES * p->cache->capacity;
  STAGE(me, items, items > 8 * p->pieces_count * heads ? 32 : 4, range) {
    int64_t before = 0;
    for (int64_t b = 0; b < p->pieces_count && before < range.last; b++) {
      const Piece *piece = p->pieces + b;
      const int64_t all = (piece->count + QUERIES - 1) / QUERIES * heads;
      for (int64_t item = before < range.first ? range.first : before; item < range.last && item < before + all; item++)
        attend(p, layer, piece, (item - before) % heads, (item - before) / heads * QUERIES, scores);
      before += all;
    }
  }
}

static void run_pass(Pass *p, Member *me) {
  const Model *m = p->model;
  Activation *activation = ACTIVATIONS[m->activation].function;
  int64_t rows = p->tokens_count;
  float *x = p->x, *y = p->y;
  STAGE(me, rows, 4, range)
  for (int64_t b = 0; b < p->pieces_count; b++)
    for (int64_t i = 0; i < p->pieces[b].count; i++) {
      int64_t n = p->pieces[b].first + i;
      if (n >= range.first && n < range.last) embed(p, n, p->pieces[b].start + i);
    }
  trace_hidden_state(p, me, 0, x);
  for (int64_t layer = 0; layer < m->layers; layer++) {
    const Block *block = m->blocks + layer;
    Rows in = prepare_rows(p, me, &block->c_attn.weight, &block->ln_1, x, p->padded, m->width, rows, y);
    linear(me, &block->c_attn, &in, rows, p->qkv, p->qkv_padded, 0, NULL);
    attention(p, me, layer);
    if (layer == m->layers - 1) { /* from here on only tokens whose logits are asked for matter */
      rows = p->logits_count;
      STAGE(me, rows, 4, range)
      for (int64_t n = range.first; n < range.last; n++) {
        memcpy(p->last_x + n * p->padded, x + p->logits_at[n] * p->padded, 4 * p->padded);
        memcpy(p->last_y + n * p->padded, y + p->logits_at[n] * p->padded, 4 * p->padded);
      }
      x = p->last_x;
      y = p->last_y;
    }
    in = prepare_rows(p, me, &block->attn_c_proj.weight, NULL, y, p->padded, m->width, rows, NULL);
    linear(me, &block->attn_c_proj, &in, rows, x, p->padded, 1, NULL);
    trace_hidden_state(p, me, 2 * layer + 1, x);
    in = prepare_rows(p, me, &block->c_fc.weight, &block->ln_2, x, p->padded, m->width, rows, y);
    linear(me, &block->c_fc, &in, rows, p->h, p->mlp_padded, 0, activation);
    in = prepare_rows(p, me, &block->mlp_c_proj.weight, NULL, p->h, p->mlp_padded, m->mlp, rows, NULL);
    linear(me, &block->mlp_c_proj, &in, rows, x, p->padded, 1, NULL);
    trace_hidden_state(p, me, 2 * layer + 2, x);
  }
  Rows in = prepare_rows(p, me, &m->head, &m->ln_f, x, p->padded, m->width, rows, y);
  const int64_t given = p->scores ? p->scores->first : rows;
  multiply(me, &m->head, &in, given, &(Result){p->logits, m->vocabulary, 1, 0, NULL, NULL});
  if (p->scores) score_rows(p->scores, &p->score_work, me, &m->head, &in, rows - given);
}

static void run_member(void *pass, Member *me) { run_pass(pass, me); }

static int64_t round_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

static int64_t max_of(int64_t x, int64_t y) { return x > y ? x : y; }

/* Of all matrices, which may be rounded up by their groups. */
static int64_t max_inputs(const Model *model) {
  int64_t max = model->head.inputs;
  for (int64_t layer = 0; layer < model->layers; layer++) {
    const Block *block = model->blocks + layer;
    max = max_of(max, max_of(block->c_attn.weight.inputs, block->attn_c_proj.weight.inputs));
    max = max_of(max, max_of(block->c_fc.weight.inputs, block->mlp_c_proj.weight.inputs));
  }
  return max;
}

/* Append the tokens to the cache and compute the logits that are asked for, or, with `scores`, what they say of the
   tokens that follow. 0, or -1 without memory for that: then nothing was written. */
EXPORT int gpt2core_forward(Team *team, const Model *model, const Cache *cache, const int32_t *tokens,
                            int64_t tokens_count, const Piece *pieces, int64_t pieces_count, const int32_t *logits_at,
                            int64_t logits_count, float *logits, const Trace *trace, const Scores *scores) {
  const int64_t width = model->width, rows = max_of(logits_count, tokens_count);
  Pass pass = {.model = model, .cache = cache, .tokens = tokens, .pieces = pieces, .logits_at = logits_at,
               .tokens_count = tokens_count, .pieces_count = pieces_count, .logits_count = logits_count,
               .logits = logits, .trace = trace, .scores = scores};
  pass.shape = (Shape){model->bfloat16_cache, width / model->heads, round_up(width / model->heads, LOGICAL_LANES),
                       cache->capacity};
  pass.padded = round_up(width, WIDE);
  pass.mlp_padded = round_up(model->mlp, WIDE);
  pass.qkv_padded = round_up(3 * width, WIDE);
  const int64_t scored = scores ? logits_count - scores->first : 0, threads = team->requested_threads;
  const int64_t rounded = rows * max_inputs(model); /* numbers; their groups have 8 or more, or all of a row */
  const struct {
    void *place;
    int64_t floats;
  } parts[] = {
      {&pass.x, rows * pass.padded},
      {&pass.y, rows * pass.padded},
      {&pass.h, rows * pass.mlp_padded},
      {&pass.qkv, tokens_count * pass.qkv_padded},
      {&pass.last_x, logits_count * pass.padded},
      {&pass.last_y, logits_count * pass.padded},
      {&pass.attention_scores, threads * QUERIES * cache->capacity},
      {&pass.rounded, rounded / 4},
      {&pass.round_scale, rounded / 8 + rows},
      {&pass.round_sum, rounded / 8 + rows},
      {&pass.score_work.targets, scored},
      {&pass.score_work.blocks, scored ? threads * GROUP_ROWS * SCORE_BLOCK : 0},
      {&pass.score_work.sums, scored * score_blocks(model->vocabulary) * (int64_t)(sizeof(BlockSums) / sizeof(float))},
      {&pass.score_work.candidates, scores ? threads * scored * scores->top * 2 : 0},
  };
  const int count = sizeof parts / sizeof *parts;
  const int64_t unit = LINE_NBYTES / sizeof(float); /* every part on lines of its own */
  int64_t floats = 0;
  for (int i = 0; i < count; i++) floats += round_up(parts[i].floats + 1, unit);
  float *arena = allocate_lines(floats * (int64_t)sizeof(float));
  if (!arena) return -1;
  float *next = arena;
  for (int i = 0; i < count; i++) {
    memcpy(parts[i].place, &next, sizeof next);
    next += round_up(parts[i].floats + 1, unit);
  }
  if (team->process != getpid()) team_start(team);
  team_run(team, run_member, &pass);
  free_lines(arena);
  return 0;
}

#include "self_test.h"
