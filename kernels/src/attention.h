// Decode attention: one new token of every sequence over its cache of keys and values.
//
// The cache of a head is a stream of blocks of 32 tokens and, behind it, the recent tokens as they came. A
// block is tiles as in `packed.h`: keys as two times 16 tokens by all dimensions, then values as all
// dimensions, 16 at a time, by 32 tokens. All query heads that share a key head pass over it together,
// softmax runs along in float32. Threads take pieces of heads, whose results are merged at the end.
#pragma once
#include <algorithm>
#include <cmath>

#include "attention_tiles.h"
#include "exponentials.h"
#include "threads.h"
#if EFFC_TILES
#include "amx.h"
#endif

struct AttentionCall {
  const void* q;                 // [heads, group, d] contiguous; heads counts key heads of all sequences
  const uint8_t* stream;         // [heads, capacity]
  const int64_t* offsets;        // [heads, offsets_stride]: where a block begins, and the end of the last
  const uint16_t *keys, *values; // [heads, recent_stride, d]: tokens that are in no block yet
  void* out;                     // as q
  int64_t heads, group, d, blocks, recent, capacity, offsets_stride, recent_stride;
  float scale;
  int32_t q_float, threads;
};

namespace {

constexpr int64_t kTokens = 32;    // of a block
constexpr int64_t kPiece = 16;     // blocks of one piece of work
constexpr int64_t kSlack = 2048;   // bytes behind the last block: a tile is read before its end is looked at

// Chains for so many rows: a sum is ready for its next product only after several others.
constexpr int chains_of(int rows) {
  int chains = 1;
  while (chains < 8 && 2 * chains * rows <= kSums) chains *= 2;
  return chains;
}

// What a piece of a head's tokens comes to: running maximum, sum of exponentials, weighted values.
template <int M>
struct Running {
  float most[M], sum[M];   // sum: after `close`
  float* values;           // [ceil(d / 16)][M][16]
  int64_t lanes;           // ceil(d / 16)

  Running(float* memory, int64_t lanes) : values(memory), lanes(lanes) {
    for (int m = 0; m < M; ++m) most[m] = -INFINITY, sums[m] = no_floats();
    std::memset(values, 0, lanes * M * 64);
  }

  // Takes 32 scores of each row; `scores` become their weights.
  void take(Floats (&scores)[2][M]) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      Floats row[2] = {scores[0][m], scores[1][m]};
      take_row(m, row);
      for (int half = 0; half < 2; ++half) scores[half][m] = row[half];
    }
  }

  // Takes 16 scores of one row times N; they become their weights. Scores of minus infinity change no sum.
  template <int N>
  void take_row(int m, Floats (&scores)[N]) {
    Floats highest = scores[0];
    for (int n = 1; n < N; ++n) highest = greater(highest, scores[n]);
    if (any_above(highest, most[m])) raise(m, top(highest));  // seldom, after the first blocks
    const Floats base = all(most[m] == -INFINITY ? 0.0f : -most[m]);
    for (int n = 0; n < N; ++n) scores[n] = exponentials(plus(scores[n], base));
    for (int n = 0; n < N; n += 2) sums[m] = plus(sums[m], plus(scores[n], scores[n + 1]));
  }

  void close() {
    for (int m = 0; m < M; ++m) sum[m] = total(sums[m]);
  }

 private:
  Floats sums[M];

  void raise(int m, float highest) {
    const Floats shrink = all(most[m] == -INFINITY ? 0.0f : std::exp(most[m] - highest));
    for (int64_t lane = 0; lane < lanes; ++lane) {
      float* own = values + (lane * M + m) * 16;
      store(own, times(load_floats(own), shrink));
    }
    sums[m] = times(sums[m], shrink);
    most[m] = highest;
  }
};

template <class Tiles, int M>
struct Attention {
  const AttentionCall& call;
  const uint32_t* words;   // [heads][tiles of d][M][16]
  float* partial;          // [pieces][lanes * M * 16 + 2 * M]
  int32_t* status;         // [parts]

  int64_t key_tiles() const { return (call.d + 31) / 32; }
  int64_t lanes() const { return (call.d + 15) / 16; }
  int64_t pieces() const {
    return (call.blocks + kPiece - 1) / kPiece + 1;
  }  // of a head; the last is what is recent
  int64_t result_floats() const { return lanes() * M * 16 + 2 * M; }

  bool block(int64_t head, int64_t index, Running<M>& running) const {
    const int64_t* offsets = call.offsets + head * call.offsets_stride;
    const int64_t from = offsets[index], to = offsets[index + 1];
    if (from < 0 || to < from || to > call.capacity - kSlack) return false;
    const uint8_t* base = call.stream + head * call.capacity;
    Tiles tiles(base + from, base + to, 2 * key_tiles() + lanes());
    Floats scores[2][M];
    if (!score(tiles, base + to, words + head * key_tiles() * 16 * M, key_tiles(), scores)) return false;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half)
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) scores[half][m] = times(scores[half][m], all(call.scale));
    running.take(scores);
    return add_values(scores, tiles, base + to, running);
  }

  // The products of 32 keys with the queries, 16 words of each row a tile; false where they pass the end.
  static bool score(Tiles& tiles, const uint8_t* end, const uint32_t* queries, int64_t key_tiles,
                    Floats (&scores)[2][M]) {
#if EFFC_TILES
    alignas(64) float found[M][16];
    for (int half = 0; half < 2; ++half) {
      TILE_ZERO(0);
      for (int64_t tile = 0; tile < key_tiles; ++tile) {
        TILE_LOAD(4, queries + tile * 16 * M, 64);
        TILE_LOAD(6, tiles.tile(), 64);
        TILE_BF16(0, 4, 6);
        if (tiles.at > end) return false;
      }
      TILE_STORE(0, found, 64);
      for (int m = 0; m < M; ++m) scores[half][m] = load_floats(found[m]);
    }
#else
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half)
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) scores[half][m] = no_floats();
    for (int half = 0; half < 2; ++half)
      for (int64_t tile = 0; tile < key_tiles; ++tile) {
        product(tiles, queries + tile * 16 * M, scores[half]);
        if (tiles.at > end) return false;
      }
#endif
    return true;
  }

  // sums += a tile times its 16 words of each row, [M][16].
  static void product(Tiles& tiles, const uint32_t* own, Floats (&sums)[M]) {
    constexpr int kChains = chains_of(M);
    Floats chains[kChains][M];
#pragma GCC unroll 8
    for (int c = 0; c < kChains; ++c)
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) chains[c][m] = c ? no_floats() : sums[m];
    tiles.begin();
    for (int row = 0; row < 16; row += kChains)
#pragma GCC unroll 8
      for (int c = 0; c < kChains; ++c) {
        const Vec w = tiles.next(row + c);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) dot2(chains[c][m], w, own[m * 16 + row + c]);
      }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      sums[m] = chains[0][m];
#pragma GCC unroll 8
      for (int c = 1; c < kChains; ++c) sums[m] = plus(sums[m], chains[c][m]);
    }
  }

  bool add_values(const Floats (&weights)[2][M], Tiles& tiles, const uint8_t* end,
                  Running<M>& running) const {
    alignas(64) uint32_t pairs[M * 16];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      auto* halves = reinterpret_cast<uint16_t*>(pairs + 16 * m);
      store_halves(halves, weights[0][m]);
      store_halves(halves + 16, weights[1][m]);
    }
#if EFFC_TILES
    TILE_LOAD(5, pairs, 64);
#endif
    for (int64_t lane = 0; lane < lanes(); ++lane) {
      float* values = running.values + lane * M * 16;
#if EFFC_TILES
      TILE_LOAD(1, values, 64);
      TILE_LOAD(6, tiles.tile(), 64);
      TILE_BF16(1, 5, 6);
      TILE_STORE(1, values, 64);
#else
      Floats sums[M];
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) sums[m] = load_floats(values + 16 * m);
      product(tiles, pairs, sums);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) store(values + 16 * m, sums[m]);
#endif
      if (tiles.at > end) return false;
    }
    return true;
  }

  // The row of a recent token as 16 numbers at a time, zeros past d.
  struct Row {
    alignas(64) uint16_t halves[1024 + 16] = {};
    int64_t d;
    explicit Row(int64_t d) : d(d) {}
    void read(const uint16_t* at) { std::memcpy(halves, at, 2 * d); }
    Floats lane(int64_t i) const { return load_halves(halves + 16 * i); }
  };

  // The query rows of a head as numbers, [M][16 * lanes].
  void query(int64_t head, float* rows) const {
    const uint32_t* q = words + head * key_tiles() * 16 * M;
    for (int64_t i = 0; i < 8 * lanes(); ++i)
      for (int m = 0; m < M; ++m) {
        const uint32_t pair = q[(i / 16 * M + m) * 16 + i % 16];
        rows[m * 16 * lanes() + 2 * i] = from_bf16(static_cast<uint16_t>(pair));
        rows[m * 16 * lanes() + 2 * i + 1] = from_bf16(static_cast<uint16_t>(pair >> 16));
      }
  }

  // Up to 32 recent tokens, as they came: [tokens][d].
  void recent(int64_t head, int64_t from, const float* rows, Running<M>& running) const {
    const int64_t count = std::min(kTokens, call.recent - from);
    const int64_t start = (head * call.recent_stride + from) * call.d;
    for (int64_t at = 0; at < count * call.d; at += 32) {  // one miss after the other, else
      ahead(reinterpret_cast<const uint8_t*>(call.keys + start + at));
      ahead(reinterpret_cast<const uint8_t*>(call.values + start + at));
    }
    Row row(call.d);
    alignas(64) float scores[M][kTokens];
    for (int64_t token = 0; token < kTokens; ++token) {
      if (token < count) row.read(call.keys + start + token * call.d);
      for (int m = 0; m < M; ++m) {
        Floats products = no_floats();
        for (int64_t i = 0; i < lanes(); ++i)
          products = plus(products, times(row.lane(i), load_floats(rows + (m * lanes() + i) * 16)));
        scores[m][token] = token < count ? total(products) * call.scale : -INFINITY;
      }
    }
    Floats weights[2][M];
    for (int half = 0; half < 2; ++half)
      for (int m = 0; m < M; ++m) weights[half][m] = load_floats(scores[m] + 16 * half);
    running.take(weights);
    for (int half = 0; half < 2; ++half)
      for (int m = 0; m < M; ++m) store(scores[m] + 16 * half, weights[half][m]);
    for (int64_t token = 0; token < count; ++token) {
      row.read(call.values + start + token * call.d);
      for (int64_t i = 0; i < lanes(); ++i)
        for (int m = 0; m < M; ++m) {
          float* values = running.values + (i * M + m) * 16;
          store(values, plus(load_floats(values), times(row.lane(i), all(scores[m][token]))));
        }
    }
  }

  bool piece(int64_t index) const {
    const int64_t head = index / pieces(), part = index % pieces();
    float* memory = partial + index * result_floats();
    Running<M> running(memory + 2 * M, lanes());
    bool sound = true;
    if (part + 1 == pieces()) {
      alignas(64) float rows[M * 1024];
      query(head, rows);
      for (int64_t from = 0; from < call.recent; from += kTokens) recent(head, from, rows, running);
    } else {
      for (int64_t b = part * kPiece; sound && b < std::min(call.blocks, (part + 1) * kPiece); ++b)
        sound = block(head, b, running);
    }
    running.close();
    std::memcpy(memory, running.most, sizeof running.most);
    std::memcpy(memory + M, running.sum, sizeof running.sum);
    return sound;
  }

  static void part(int part, int parts, void* context) {
    const Attention& job = *static_cast<const Attention*>(context);
#if EFFC_TILES
    const TileUse use;
    shape_tiles(M, M);
#endif
    const int64_t all = job.call.heads * job.pieces();
    for (int64_t i = all * part / parts; i < all * (part + 1) / parts; ++i)
      if (!job.piece(i)) job.status[part] = kOffsets;
  }

  void merge(int64_t head, int64_t first_row) const {
    const int64_t rows = std::min<int64_t>(M, call.group - first_row);
    const float* all_pieces = partial + head * pieces() * result_floats();
    for (int64_t m = 0; m < rows; ++m) {
      float top = -INFINITY, sum = 0;
      for (int64_t p = 0; p < pieces(); ++p) top = std::max(top, all_pieces[p * result_floats() + m]);
      alignas(64) float out[1024] = {};
      for (int64_t p = 0; p < pieces(); ++p) {
        const float* piece = all_pieces + p * result_floats();
        const float share = piece[m] == -INFINITY ? 0.0f : std::exp(piece[m] - top);
        sum += piece[M + m] * share;
        for (int64_t lane = 0; lane < lanes(); ++lane)
          for (int i = 0; i < 16; ++i) out[16 * lane + i] += piece[2 * M + (lane * M + m) * 16 + i] * share;
      }
      const int64_t at = (head * call.group + first_row + m) * call.d;
      for (int64_t i = 0; i < call.d; ++i)
        if (call.q_float)
          static_cast<float*>(call.out)[at + i] = out[i] / sum;
        else
          static_cast<uint16_t*>(call.out)[at + i] = to_bf16(out[i] / sum);
    }
  }
};

template <class Tiles, int M>
int32_t attend(const AttentionCall& call) {
  Attention<Tiles, M> job{call, nullptr, nullptr, nullptr};
  const int64_t row_bytes = job.key_tiles() * 64;
  auto* words = static_cast<uint32_t*>(effc_scratch(0, call.heads * M * row_bytes));
  auto* row = static_cast<uint8_t*>(effc_scratch(2, row_bytes));
  auto* partial = static_cast<float*>(effc_scratch(3, call.heads * job.pieces() * job.result_floats() * 4));
  if (!words || !row || !partial) return kNoMemory;
  int32_t status[64] = {};
  const int parts = std::max(1, std::min({call.threads, 64, static_cast<int>(call.heads * job.pieces())}));
  for (int64_t first = 0; first < call.group; first += M) {
    const int64_t count = std::min<int64_t>(M, call.group - first);
    for (int64_t head = 0; head < call.heads; ++head) {
      for (int64_t m = 0; m < M; ++m) {
        if (m < count)
          Bf16::prepare(call.q, call.q_float, (head * call.group + first + m) * call.d, call.d, row,
                        row_bytes);
        else
          std::memset(row, 0, row_bytes);
        for (int64_t tile = 0; tile < job.key_tiles(); ++tile)
          std::memcpy(words + ((head * job.key_tiles() + tile) * M + m) * 16, row + 64 * tile, 64);
      }
    }
    Attention<Tiles, M> own{call, words, partial, status};
    effc_parallel(parts, Attention<Tiles, M>::part, &own);
    for (int32_t s : status)
      if (s != kOk) return s;
    for (int64_t head = 0; head < call.heads; ++head) own.merge(head, first);
  }
  return kOk;
}

template <class Tiles>
int32_t attention(const AttentionCall& call) {
  if (call.group == 1) return attend<Tiles, 1>(call);
  if (call.group <= 2) return attend<Tiles, 2>(call);
  if (call.group == 3) return attend<Tiles, 3>(call);
  if (call.group == 4) return attend<Tiles, 4>(call);
  return attend<Tiles, 8>(call);
}

}  // namespace

#define EFFC_ATTENTION(name)                                                                                \
  EFFC_TABLE(name, AttentionCall)                                                                           \
  EFFC_API int32_t effc_##name(int32_t level, const void* q, const uint8_t* stream, const int64_t* offsets, \
                               const uint16_t* keys, const uint16_t* values, void* out, int64_t heads,      \
                               int64_t group, int64_t d, int64_t blocks, int64_t recent, int64_t capacity,  \
                               int64_t offsets_stride, int64_t recent_stride, float scale, int32_t q_float, \
                               int32_t threads) {                                                           \
    const auto body = name##_at(level);                                                                     \
    if (!body || group < 1 || d < 1 || d > 1024 || blocks < 0 || blocks >= offsets_stride || recent < 0 ||  \
        recent > recent_stride || blocks + recent < 1)                                                      \
      return kArguments;                                                                                    \
    return body(AttentionCall{q, stream, offsets, keys, values, out, heads, group, d, blocks, recent,       \
                              capacity, offsets_stride, recent_stride, scale, q_float, threads});           \
  }
