/* GPT-2 in C: one forward pass, taken by a team of threads. What the functions are given is described in
   `packing.py` and `session.py`; structures here and there have the same fields in the same order.

   N new tokens of a pass, B its pieces of rows, M wanted logits, D width, H heads, K head width, V vocabulary */

#include "attention.h"

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

typedef struct {
  const Model *model;
  const Cache *cache;
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
int dots_in_hardware(void) {
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
  return 1;
#else
  return 0;
#endif
}

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

/* Give `m` its rows: normalised where `norm` is given, rounded where it wants them so. Ends with a meeting
   unless nothing was to be done. `x` and `normal` have the strides given; x may be `normal`. */
static Rows prepare(Pass *p, int thread, const Matrix *m, const Norm *norm, const float *x, long stride,
                    long width, long rows, float *normal) {
  const int rounds = m->kind == INT8 || m->kind == INT4;
  const long groups = m->inputs / m->group;
  Share mine = share(p->team, thread, rows);
  for (long n = mine.first; n < mine.last && (norm || rounds); n++) {
    const float *from = x + n * stride;
    if (norm) {
      layer_norm(from, width, norm, p->model->epsilon, normal + n * stride);
      from = normal + n * stride;
    }
    if (rounds)
      round_row(from, width, m, p->rounded + n * m->inputs, p->round_scale + n * groups, p->round_sum + n * groups);
  }
  if (norm || rounds) meet(p->team);
  return (Rows){norm ? normal : x, stride, p->rounded, p->round_scale, p->round_sum};
}

static void apply(Pass *p, int thread, const Linear *l, const Rows *in, long rows, float *y, long stride, int add,
                  Activation *activation) {
  Result out = {y, stride, 0, add, l->bias, activation};
  multiply(p->team, thread, &l->weight, in, rows, &out);
  meet(p->team);
}

static void *cached(const Pass *p, void *all, long layer, long slot, long head, long width) {
  long bytes = p->shape.bfloat16 ? 2 : 4;
  return (char *)all + ((layer * p->cache->slots + slot) * p->model->heads + head) * p->cache->capacity * width * bytes;
}

static void attention(Pass *p, int thread, long layer) {
  const Model *m = p->model;
  const long heads = m->heads, width = p->shape.head_dim;
  const float scale = m->blocks[layer].attention_scale;
  Share mine = share(p->team, thread, p->tokens_count);
  for (long b = 0; b < p->pieces_count; b++) { /* write the new keys and values, and scale the queries */
    const Piece *piece = p->pieces + b;
    for (long i = 0; i < piece->count; i++) {
      long n = piece->first + i;
      if (n < mine.first || n >= mine.last) continue;
      float *q = p->qkv + n * p->qkv_padded, *k = q + m->width, *v = k + m->width;
      for (long d = 0; d < m->width; d++) q[d] *= scale;
      for (long head = 0; head < heads; head++)
        remember(&p->shape, cached(p, p->cache->keys, layer, piece->slot, head, width),
                 cached(p, p->cache->values, layer, piece->slot, head, p->shape.value_dim), piece->start + i,
                 k + head * width, v + head * width);
    }
  }
  meet(p->team);
  float *scores = p->scores + thread * QUERIES * p->cache->capacity, q[QUERIES * width];
  long item = take(p->team, 1), before = 0;
  for (long b = 0; b < p->pieces_count; b++) { /* an item: some queries of one head */
    const Piece *piece = p->pieces + b;
    long groups = (piece->count + QUERIES - 1) / QUERIES;
    for (; item < before + groups * heads; item = take(p->team, 1)) {
      long head = (item - before) % heads, i = (item - before) / heads * QUERIES;
      int rows = piece->count - i < QUERIES ? (int)(piece->count - i) : QUERIES;
      for (int r = 0; r < rows; r++)
        memcpy(q + r * width, p->qkv + (piece->first + i + r) * p->qkv_padded + head * width, 4 * width);
      (p->shape.bfloat16 ? attend_bfloat16 : attend_float32)(
          rows, &p->shape, cached(p, p->cache->keys, layer, piece->slot, head, width),
          cached(p, p->cache->values, layer, piece->slot, head, p->shape.value_dim), piece->start + i, q,
          p->y + (piece->first + i) * p->padded + head * width, p->padded, scores);
    }
    before += groups * heads;
  }
  meet(p->team);
}

static void take_part(Pass *p, int thread) {
  const Model *m = p->model;
  Team *team = p->team;
  Activation *activation = ACTIVATIONS[m->activation].function;
  long rows = p->tokens_count;
  float *x = p->x, *y = p->y;
  Share mine = share(team, thread, rows);
  for (long b = 0; b < p->pieces_count; b++)
    for (long i = 0; i < p->pieces[b].count; i++) {
      long n = p->pieces[b].first + i;
      if (n >= mine.first && n < mine.last) embed(p, n, p->pieces[b].start + i);
    }
  meet(team);
  for (long layer = 0; layer < m->layers; layer++) {
    const Block *block = m->blocks + layer;
    Rows in = prepare(p, thread, &block->c_attn.weight, &block->ln_1, x, p->padded, m->width, rows, y);
    apply(p, thread, &block->c_attn, &in, rows, p->qkv, p->qkv_padded, 0, NULL);
    attention(p, thread, layer);
    if (layer == m->layers - 1) { /* from here on only the wanted tokens matter */
      rows = p->wanted_count;
      mine = share(team, thread, rows);
      for (long n = mine.first; n < mine.last; n++) {
        memcpy(p->kept_x + n * p->padded, x + p->wanted[n] * p->padded, 4 * p->padded);
        memcpy(p->kept_y + n * p->padded, y + p->wanted[n] * p->padded, 4 * p->padded);
      }
      x = p->kept_x;
      y = p->kept_y;
      meet(team);
      if (rows == 0) return;
    }
    in = prepare(p, thread, &block->attn_c_proj.weight, NULL, y, p->padded, m->width, rows, NULL);
    apply(p, thread, &block->attn_c_proj, &in, rows, x, p->padded, 1, NULL);
    in = prepare(p, thread, &block->c_fc.weight, &block->ln_2, x, p->padded, m->width, rows, y);
    apply(p, thread, &block->c_fc, &in, rows, p->h, p->mlp_padded, 0, activation);
    in = prepare(p, thread, &block->mlp_c_proj.weight, NULL, p->h, p->mlp_padded, m->mlp, rows, NULL);
    apply(p, thread, &block->mlp_c_proj, &in, rows, x, p->padded, 1, NULL);
  }
  Rows in = prepare(p, thread, &m->head, &m->ln_f, x, p->padded, m->width, rows, y);
  Result out = {p->logits, m->vocabulary, 1, 0, NULL, NULL};
  multiply(team, thread, &m->head, &in, rows, &out);
}

static void work(void *pass, int thread) { take_part(pass, thread); }

static long whole_vectors(long count) { return (count + LANES - 1) / LANES * LANES; }
static long whole_strips(long count) { return (count + WIDE - 1) / WIDE * WIDE; }

/* Append the tokens to the cache and compute the wanted logits. 0, or -1 where memory is wanting: then
   nothing was written. */
int forward(Team *team, const Model *model, const Cache *cache, const int32_t *tokens, long tokens_count,
            const Piece *pieces, long pieces_count, const int32_t *wanted, long wanted_count, float *logits) {
  const long width = model->width;
  const long kept = wanted_count > tokens_count ? wanted_count : tokens_count;
  Pass pass = {.model = model, .cache = cache, .tokens = tokens, .pieces = pieces, .wanted = wanted,
               .tokens_count = tokens_count, .pieces_count = pieces_count, .wanted_count = wanted_count,
               .logits = logits, .team = team};
  pass.shape = (Shape){model->bfloat16_cache, width / model->heads, whole_vectors(width / model->heads),
                       cache->capacity};
  pass.padded = whole_strips(width);
  pass.mlp_padded = whole_strips(model->mlp);
  pass.qkv_padded = whole_strips(3 * width);
  long scratch = 0;
  for (long layer = 0; layer < model->layers; layer++) { /* the widest rounded rows */
    const Linear *all[] = {&model->blocks[layer].c_attn, &model->blocks[layer].attn_c_proj,
                           &model->blocks[layer].c_fc, &model->blocks[layer].mlp_c_proj};
    for (int i = 0; i < 4; i++) scratch = all[i]->weight.inputs > scratch ? all[i]->weight.inputs : scratch;
  }
  scratch = model->head.inputs > scratch ? model->head.inputs : scratch;
  long floats[] = {kept * pass.padded, tokens_count * pass.qkv_padded, kept * pass.padded,
                   kept * pass.mlp_padded, wanted_count * pass.padded, wanted_count * pass.padded,
                   team->threads * QUERIES * cache->capacity, kept * scratch / 4 + 64, kept * scratch / 8 + 64,
                   kept * scratch / 8 + 64};
  float **places[] = {&pass.x, &pass.qkv, &pass.y, &pass.h, &pass.kept_x, &pass.kept_y, &pass.scores,
                      (float **)&pass.rounded, &pass.round_scale, &pass.round_sum};
  long all = 0;
  for (int i = 0; i < 10; i++) all += whole_vectors(floats[i]) + LANES;
  float *arena = aligned_alloc(64, 4 * all);
  if (!arena) return -1;
  float *at = arena;
  for (int i = 0; i < 10; i++) {
    *places[i] = at;
    at += whole_vectors(floats[i]) + LANES;
  }
  if (team->process != getpid()) gather(team);
  call(team, work, &pass);
  free(arena);
  return 0;
}

/* ------------------------------------------------------------------------------------------------
   packing: from (inputs, outputs) with any strides to strips */

long strip_width(void) { return WIDE; }

#define PACK(name, type)                                                                                        \
  void name(const type *from, long input_stride, long output_stride, long inputs, long outputs, type *to) {     \
    for (long first = 0; first < outputs; first += WIDE, to += inputs * WIDE) {                                 \
      long count = outputs - first < WIDE ? outputs - first : WIDE;                                             \
      for (long k = 0; k < inputs; k++)                                                                         \
        for (long i = 0; i < WIDE; i++)                                                                         \
          to[k * WIDE + i] = i < count ? from[k * input_stride + (first + i) * output_stride] : (type)0;        \
    }                                                                                                           \
  }
PACK(pack_float32, float)
PACK(pack_bfloat16, uint16_t)

/* `padded` inputs, a multiple of 4; the weights become unsigned by adding 128. */
void pack_int8(const int8_t *from, long input_stride, long output_stride, long inputs, long padded, long outputs,
               uint8_t *to) {
  for (long first = 0; first < outputs; first += WIDE, to += padded * WIDE)
    for (long k = 0; k < padded; k++)
      for (long i = 0; i < WIDE; i++) {
        long inside = k < inputs && first + i < outputs;
        to[k / 4 * 4 * WIDE + i * 4 + k % 4] =
            (uint8_t)(128 + (inside ? from[k * input_stride + (first + i) * output_stride] : 0));
      }
}

/* From (outputs, inputs / 2) bytes of two neighbours, the lower half first; `inputs` is a multiple of 8. */
void pack_int4(const uint8_t *from, long inputs, long outputs, uint8_t *to) {
  for (long first = 0; first < outputs; first += WIDE, to += inputs / 2 * WIDE)
    for (long i = 0; i < WIDE; i++)
      for (long k = 0; k < inputs; k += 8)
        for (long j = 0; j < 4; j++) {
          const uint8_t *eight = from + (first + i) * (inputs / 2) + k / 2;
          uint8_t low = 0, high = 0;
          if (first + i < outputs) {
            low = eight[j / 2] >> (j % 2 * 4) & 15;
            high = eight[2 + j / 2] >> (j % 2 * 4) & 15;
          }
          to[k / 8 * 4 * WIDE + i * 4 + j] = (uint8_t)(low | high << 4);
        }
}
