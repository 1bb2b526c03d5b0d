// Attention of new tokens over the cache, at the level of this compilation.
//
// An item is up to 8 query rows of one run and one key head, on AMX up to 16: a row is a token and a query head of the
// group. Items are cut into blocks of 32 tokens, and every thread takes as many blocks as the others; what several
// threads have of one item, the last of them to finish puts together, in the order of the threads.
#include "int8_attention.h"

#include "steps.h"

namespace {

using engine::AttendCall;
using engine::Run;

constexpr int64_t kItemRows = 8, kFewRows = 4;
constexpr int64_t kKeyTokens = 16;  // of a tile of keys

// Whether items meet tiles of keys and values, two blocks at a time.
bool on_tiles(const AttendCall& call) { return EFFC_TILES && call.numbers != kKvInt8; }

int64_t most_rows(const AttendCall& call) { return on_tiles(call) ? engine::kMostItemRows : kItemRows; }

struct Item {
  const Run* run;
  int64_t head, first, count;  // key head; rows of the run's count * group
  int64_t from, until;         // blocks that any of its rows sees
};

// The tokens low..high-1 that a token of a run sees: those before it, or all of its text, within the window;
// or all of the source that an encoder has read.
struct Seen {
  int64_t low = 0, high;
  Seen(const Step& step, const Run& run, int64_t index) {
    const int64_t position = run.position + index, end = run.position + run.count;
    high = step.op == kRecall ? run.source : step.count ? end : position + 1;
    if (!step.window) return;
    low = std::max<int64_t>(0, position - step.window + 1);
    high = std::min(high, position + step.window);
  }
};

// One after another all items of a call: each(item, number of its first block among the blocks of all).
template <class Each>
int64_t items(const AttendCall& call, Each each) {
  const Step& step = *call.step;
  const int64_t group = step.heads / step.kv_heads, most = most_rows(call);
  int64_t before = 0;
  for (int64_t r = 0; r < call.run_count; ++r) {
    const Run& run = call.runs[r];
    for (int64_t head = 0; head < step.kv_heads; ++head)
      for (int64_t first = 0; first < run.count * group; first += most) {
        const int64_t count = std::min(most, run.count * group - first);
        const Seen oldest(step, run, first / group), newest(step, run, (first + count - 1) / group);
        const Item item{&run, head, first, count, oldest.low / kTokens, (newest.high - 1) / kTokens + 1};
        each(item, before);
        before += item.until - item.from;
      }
  }
  return before;
}

template <int M>
struct Attend {
  static constexpr bool kTiles = M == engine::kMostItemRows;  // and as many rows as the item has
  struct Nothing {
    Nothing(int64_t, int64_t) {}
  };
  const AttendCall& call;
  const Item& item;
  int64_t group, d, value_lanes, key_tiles;
  uint32_t words[16 * M * (engine::kMostHead / 32)];  // [tile][M][pair]
  int64_t low[M], high[M];                            // tokens that a row sees: low..high-1
  float slope[M];                                     // what a token of distance adds to its score: no text
                                                      // that is seen whole has one
  const float* near[M];                               // what a score gains at each distance from a row
  int64_t zero[M];                                    // the token of the first of them
  std::conditional_t<kTiles, Nothing, engine::Int8Attention<M>> int8;
  alignas(64) float values[M * engine::kMostHead];

  Attend(const AttendCall& call, const Item& item)
      : call(call), item(item), group(call.step->heads / call.step->kv_heads), d(call.step->head_dim),
        value_lanes((call.step->value_dim + 15) / 16), key_tiles((call.step->head_dim + 31) / 32),
        int8(call.step->head_dim, call.step->value_dim) {
    alignas(64) uint8_t halves[64 * (engine::kMostHead / 32)];
    for (int64_t m = 0; m < (kTiles ? item.count : M); ++m) {
      const int64_t own = std::min(item.first + m, item.first + item.count - 1);
      const Seen seen(*call.step, *item.run, own / group);
      low[m] = seen.low;
      high[m] = seen.high;
      const int64_t row = item.run->first + own / group, head = item.head * group + own % group;
      slope[m] = call.slopes ? call.slopes[head] : 0.0f;
      near[m] = call.distances ? call.distances + head * call.distance_count : nullptr;
      const int64_t before = call.step->count ? call.distance_count / 2 : call.distance_count - 1;
      zero[m] = item.run->position + own / group - before;
      if constexpr (!kTiles)
        if (call.numbers == kKvInt8) {
          int8.take_query(m, call.q + row * call.q_stride + head * d, d);
          continue;
        }
      Bf16::prepare(call.q, 1, row * call.q_stride + head * d, d, halves, 64 * key_tiles);
      for (int64_t tile = 0; tile < key_tiles; ++tile)
        std::memcpy(words + (tile * M + m) * 16, halves + 64 * tile, 64);
    }
  }

  // A row's scores of 16 tokens from `first` on: scaled, capped, and -inf where it does not see the token.
  Floats finished(int64_t m, int64_t first, Floats score) const {
    const float cap = call.step->softcap;
    score = times(score, all(call.step->scale));
    if (cap == 0 && !call.slopes && !call.distances && first >= low[m] && first + 16 <= high[m]) return score;
    float own[16];
    store(own, score);
    for (int i = 0; i < 16; ++i) {
      if (cap != 0) own[i] = cap * std::tanh(own[i] / cap);
      own[i] += slope[m] * static_cast<float>(first + i - high[m] + 1);
      if (near[m]) own[i] += near[m][std::clamp<int64_t>(first + i - zero[m], 0, call.distance_count - 1)];
      if (first + i < low[m] || first + i >= high[m]) own[i] = -INFINITY;
    }
    return load_floats(own);
  }

  void finish(int64_t token, Floats (&scores)[2][M]) const {
    for (int half = 0; half < 2; ++half)
      for (int m = 0; m < M; ++m) scores[half][m] = finished(m, token + 16 * half, scores[half][m]);
  }

#if EFFC_TILES
  // An even block and the next at once, so that few products wait for one before them. A row's sums depend neither on
  // the rows beside it nor on blocks that it does not see.
  void tile_blocks(int64_t from, int64_t until, Running<M>& running) const {
    const uint8_t* room = call.rooms[item.run->sequence] + item.head * call.head_bytes;
    shape_tiles(static_cast<int>(item.count), static_cast<int>(item.count));
    for (int64_t block = from; block < until;) {
      if (block % 2 == 0 && block + 1 < until)
        tile_block<2>(room + block * call.block_bytes, block * kTokens, running), block += 2;
      else
        tile_block<1>(room + block * call.block_bytes, block * kTokens, running), block += 1;
    }
  }

  template <int N>
  void tile_block(const uint8_t* keys, int64_t token, Running<M>& running) const {
    alignas(64) float scores[2 * N][M][16];
    alignas(64) uint16_t weights[N][M][kTokens];
    const int64_t bytes = key_tiles * 1024;  // of 16 keys
    TILE_ZERO(0);
    TILE_ZERO(1);
    if (N > 1) TILE_ZERO(2);
    if (N > 1) TILE_ZERO(3);
    for (int64_t tile = 0; tile < key_tiles; ++tile) {
      const uint8_t *first = keys + tile * 1024, *second = first + call.block_bytes;
      TILE_LOAD(4, words + tile * 16 * M, 64);
      TILE_LOAD(6, first, 64);
      TILE_BF16(0, 4, 6);
      TILE_LOAD(7, first + bytes, 64);
      TILE_BF16(1, 4, 7);
      if (N > 1) {
        TILE_LOAD(6, second, 64);
        TILE_BF16(2, 4, 6);
        TILE_LOAD(7, second + bytes, 64);
        TILE_BF16(3, 4, 7);
      }
    }
    TILE_STORE(0, scores[0], 64);
    TILE_STORE(1, scores[1], 64);
    if (N > 1) TILE_STORE(2, scores[2 * N - 2], 64);
    if (N > 1) TILE_STORE(3, scores[2 * N - 1], 64);
    for (int m = 0; m < item.count; ++m) {
      Floats row[2 * N];
      for (int n = 0; n < 2 * N; ++n) row[n] = finished(m, token + 16 * n, load_floats(scores[n][m]));
      running.take_row(m, row);
      for (int n = 0; n < N; ++n) store_normal_halves(weights[n][m], row[2 * n], row[2 * n + 1]);
    }
    TILE_LOAD(4, weights[0], 64);
    if (N > 1) TILE_LOAD(5, weights[N - 1], 64);
    const uint8_t* first = keys + 2 * bytes;
    for (int64_t lane = 0; lane < value_lanes; ++lane, first += 1024) {
      float* sums = running.values + lane * M * 16;
      TILE_LOAD(0, sums, 64);
      TILE_LOAD(6, first, 64);
      TILE_BF16(0, 4, 6);
      if (N > 1) {
        TILE_LOAD(7, first + call.block_bytes, 64);
        TILE_BF16(0, 5, 7);
      }
      TILE_STORE(0, sums, 64);
    }
  }
#endif

  void blocks(int64_t from, int64_t until, Running<M>& running) const {
    AttentionCall shape{};
    shape.d = call.step->value_dim;
    const Attention<DenseTiles, M> body{shape, nullptr, nullptr, nullptr};
    const uint8_t* room = call.rooms[item.run->sequence] + item.head * call.head_bytes;
    for (int64_t block = from; block < until; ++block) {
      Floats scores[2][M];
      if (call.numbers == kKvInt8) {
        const uint8_t* at = room + block * call.block_bytes;
        int8.score(at, scores);
        finish(block * kTokens, scores);
        running.take(scores);
        int8.add_values(scores, at, running);
        continue;
      }
      const uint8_t* end = room + (block + 1) * call.block_bytes;
      DenseTiles tiles(room + block * call.block_bytes, end, 0);
      Attention<DenseTiles, M>::score(tiles, end, words, key_tiles, scores);
      finish(block * kTokens, scores);
      running.take(scores);
      body.add_values(scores, tiles, end, running);
    }
  }

  void write(const float* most, const float* sums, const float* sum) const {
    const Step& step = *call.step;
    for (int64_t m = 0; m < item.count; ++m) {
      const int64_t own = item.first + m, head = item.head * group + own % group;
      float share = 1.0f / sums[m];
      if (call.sinks) {  // one more logit, whose value is zero
        const float sink = call.sinks[head], top = std::max(most[m], sink);
        share = std::exp(most[m] - top) / (sums[m] * std::exp(most[m] - top) + std::exp(sink - top));
      }
      float* to = call.to + (item.run->first + own / group) * call.to_stride + head * step.value_dim;
      for (int64_t i = 0; i < step.value_dim; i += 16)
        for (int64_t n = 0; n < std::min<int64_t>(16, step.value_dim - i); ++n)
          to[i + n] = sum[(i / 16 * M + m) * 16 + n] * share;
    }
  }

  float* piece(int64_t part, int slot) const {
    return call.pieces.memory + (2 * part + slot) * engine::kPieceFloats;
  }

  // Blocks of the item that this part has, of which parts first..last all have some.
  void run(int64_t from, int64_t until, int64_t first, int64_t last) {
    Running<M> running(values, value_lanes);
#if EFFC_TILES
    const TileUse use;
    if constexpr (kTiles)
      tile_blocks(from, until, running);
    else
      shape_tiles(M, M), blocks(from, until, running);
#else
    blocks(from, until, running);
#endif
    running.close();
    if (first == last) return write(running.most, running.sum, values);
    float* own = piece(call.part, call.part == first);
    std::copy(running.most, running.most + M, own);
    std::copy(running.sum, running.sum + M, own + M);
    std::copy(values, values + value_lanes * M * 16, own + 2 * M);
    int32_t* done = &call.pieces.counts[first].done;
    if (__atomic_add_fetch(done, 1, __ATOMIC_ACQ_REL) <= last - first) return;
    __atomic_store_n(done, 0, __ATOMIC_RELAXED);
    merge(first, last);
  }

  void merge(int64_t first, int64_t last) {
    float most[M], sums[M] = {};
    std::fill(most, most + M, -INFINITY);
    std::fill(values, values + value_lanes * M * 16, 0.0f);
    for (int64_t part = first; part <= last; ++part)
      for (int m = 0; m < M; ++m) most[m] = std::max(most[m], piece(part, part == first)[m]);
    for (int64_t part = first; part <= last; ++part) {
      const float* own = piece(part, part == first);
      for (int m = 0; m < M; ++m) {
        const float share = own[m] == -INFINITY ? 0.0f : std::exp(own[m] - most[m]);
        sums[m] += own[M + m] * share;
        for (int64_t lane = 0; lane < value_lanes; ++lane)
          for (int i = 0; i < 16; ++i)
            values[(lane * M + m) * 16 + i] += own[2 * M + (lane * M + m) * 16 + i] * share;
      }
    }
    write(most, sums, values);
  }
};

struct Cut {
  int64_t blocks, parts;
  int64_t start(int64_t part) const { return blocks * part / parts; }
  int64_t of(int64_t block) const {  // the part that has it
    int64_t part = block * parts / blocks;
    while (start(part + 1) <= block) ++part;
    while (start(part) > block) --part;
    return part;
  }
};

void attend_item(const AttendCall& call, const Item& item, int64_t from, int64_t until,
                 const int64_t (&parts)[2]) {
  // The number of rows decides in how many chains a sum runs: of a prompt's last item it is that of the items before it.
  const bool follows = item.first > 0 && item.run->count > 1;
  const int64_t rows = call.batch_invariant || follows ? kItemRows : item.count;
#if EFFC_TILES
  if (on_tiles(call) && rows > kFewRows)
    return Attend<engine::kMostItemRows>(call, item).run(from, until, parts[0], parts[1]);
#endif
  if (rows == 1) return Attend<1>(call, item).run(from, until, parts[0], parts[1]);
  if (rows == 2) return Attend<2>(call, item).run(from, until, parts[0], parts[1]);
  if (rows == 3) return Attend<3>(call, item).run(from, until, parts[0], parts[1]);
  if (rows == 4) return Attend<4>(call, item).run(from, until, parts[0], parts[1]);
  Attend<kItemRows>(call, item).run(from, until, parts[0], parts[1]);
}

void attend(const AttendCall& call) {
  const int64_t all = items(call, [](const Item&, int64_t) {});
  const Cut cut{all, std::min<int64_t>(call.parts, all)};
  if (call.part >= cut.parts) return;
  const int64_t from = cut.start(call.part), until = cut.start(call.part + 1);
  items(call, [&](const Item& item, int64_t before) {
    const int64_t end = before + item.until - item.from;
    if (end <= from || before >= until) return;
    if (call.batch_invariant) {  // whole items, to the part that has the first block
      if (before >= from) attend_item(call, item, item.from, item.until, {0, 0});
      return;
    }
    const int64_t first = item.from + std::max(from, before) - before;
    const int64_t last = item.from + std::min(until, end) - before;
    attend_item(call, item, first, last, {cut.of(before), cut.of(end - 1)});
  });
}

inline void to_halves(const float* from, int64_t count, uint16_t* into) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store_halves(into + i, load_floats(from + i));
  for (; i < count; ++i) into[i] = to_bf16(from[i]);
}

// Values of two tokens, or of one at an even or odd position, as words of a line of each tile of values.
inline void put_values(const uint16_t* first, const uint16_t* second, int64_t count, uint8_t* line, int64_t odd) {
  for (int64_t from = 0; from < count; from += 16, line += 1024)
    for (int64_t i = from; i < std::min(from + 16, count); ++i) {
      const uint32_t both = first[i] | static_cast<uint32_t>(second ? second[i] : 0) << 16;
      if (second)
        std::memcpy(line + 4 * (i - from), &both, 4);
      else
        std::memcpy(line + 4 * (i - from) + 2 * odd, &first[i], 2);
    }
}

// Tokens of one head that share a tile of keys, as `pack_tokens.cc` places them.
void append(const AttendCall& call, const Run& run, int64_t index, int64_t count, int64_t head) {
  const Step& step = *call.step;
  const int64_t row = run.first + index, position = run.position + index, own = position % kTokens;
  const int64_t key_tiles = (step.head_dim + 31) / 32, pairs = (step.head_dim + 1) / 2;
  uint8_t* block = call.rooms[run.sequence] + head * call.head_bytes + position / kTokens * call.block_bytes;
  const float* k = call.k + row * call.k_stride + head * step.head_dim;
  const float* v = call.v + row * call.v_stride + head * step.value_dim;
  if (call.numbers == kKvInt8) {
    const engine::Int8Block lies(step.head_dim, step.value_dim);
    for (int64_t i = 0; i < count; ++i)
      engine::append_int8(lies, k + i * call.k_stride, step.head_dim, v + i * call.v_stride, step.value_dim, own + i, block);
    return;
  }
  uint32_t words[kKeyTokens][engine::kMostHead / 2];
  uint16_t halves[kKeyTokens][engine::kMostHead];
  for (int64_t token = 0; token < count; ++token) {
    to_halves(k + token * call.k_stride, step.head_dim, halves[token]);
    if (step.head_dim % 2) halves[token][step.head_dim] = 0;
    std::memcpy(words[token], halves[token], 4 * pairs);
  }
  uint8_t* const keys = block + own / kKeyTokens * key_tiles * 1024 + own % kKeyTokens * 4;
  for (int64_t pair = 0; pair < pairs; ++pair)
    for (int64_t token = 0; token < count; ++token) std::memcpy(keys + 64 * pair + 4 * token, &words[token][pair], 4);
  for (int64_t token = 0; token < count; ++token) to_halves(v + token * call.v_stride, step.value_dim, halves[token]);
  uint8_t* const values = block + 2 * key_tiles * 1024;
  for (int64_t token = 0, next; token < count; token = next) {
    const int64_t at = own + token;
    const bool two = at % 2 == 0 && token + 1 < count;
    next = token + 1 + two;
    put_values(halves[token], two ? halves[token + 1] : nullptr, step.value_dim, values + at / 2 * 64, at % 2);
  }
}

// Tokens of a run whose keys share lines of memory go to one thread: two would take the lines from each other.
void append_part(const AttendCall& call) {
  int64_t number = 0;
  for (int64_t r = 0; r < call.run_count; ++r) {
    const Run& run = call.runs[r];
    for (int64_t index = 0, count; index < run.count; index += count) {
      count = std::min(run.count - index, kKeyTokens - (run.position + index) % kKeyTokens);
      for (int64_t head = 0; head < call.step->kv_heads; ++head, ++number)
        if (number % call.parts == call.part) append(call, run, index, count, head);
    }
  }
}

}  // namespace

int32_t EFFC_AT_LEVEL(engine_attend)(const EngineAttend& call) {
  if (call.append)
    append_part(call);
  else
    attend(call);
  return kOk;
}
