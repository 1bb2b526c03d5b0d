// Upper bytes of inputs of 16 bits, nearly all of which are zero, on AMX: of up to 32 rows only the columns where one of
// them has others meet their weights, gathered into tiles of their own.
//
// A word of a tile of weights holds four columns of one output. A gathered word keeps each column in the byte that it had,
// so that it is put together from four words by masks: the columns of each residue modulo four are listed apart.
#pragma once
#include <algorithm>
#include <cstring>

#include "amx.h"

namespace {

constexpr int64_t kUpperRows = 2 * kTileRows;

// Rows in blocks of up to 32, of at least 16 where there are more than 16.
struct TileBlocks {
  int64_t rows, count;
  explicit TileBlocks(int64_t rows) : rows(rows), count((rows + kUpperRows - 1) / kUpperRows) {}
  int64_t start(int64_t i) const { return rows * i / count; }
};

// The columns of a block of rows that are multiplied, by depth of a panel. Fours are those of the gathered tiles.
struct UpperColumns {
  struct Entry {
    int32_t column;
    uint8_t row, code;
  };
  struct Depth {
    int32_t fours, inputs_at;
  };
  static constexpr int64_t kLists = 3;  // lines of memory that the lists take; entries lie behind them

  uint8_t* at;       // the lists and the entries
  uint8_t* inputs;   // by depth: tiles of the first 16 rows, tiles of the others
  int64_t tiles, depth, rows;

  int64_t line() const { return 64 * tiles; }
  uint8_t* positions() const { return at; }  // of each column among those of its residue in its depth
  uint8_t* sources(int64_t d) const { return at + line() + 64 * depth * d; }  // [four][residue] a four of the depth
  Depth* depths() const { return reinterpret_cast<Depth*>(at + 2 * line()); }
  Entry* entries() const { return reinterpret_cast<Entry*>(at + kLists * line()); }
  int64_t tiles_of(int64_t d) const { return (depths()[d].fours + 15) / 16; }
  int64_t first_rows() const { return std::min(rows, kTileRows); }

  void begin() const { std::memset(positions(), 0, line()); }

  // Notes those of a row's codes + kZeroByte that are not zero, behind `known` entries. Returns how many there are then.
  int64_t note(uint8_t* codes, int64_t row, int64_t known) const {
    for (int64_t i = 0; i < line(); ++i) codes[i] ^= kZeroByte;
    for (int64_t first = 0; first < line(); first += 64)
      for (uint64_t left = nonzero4(load(codes + first)); left; left &= left - 1) {
        const int64_t column = first + __builtin_ctzll(left);
        positions()[column] = 1;
        entries()[known++] = {static_cast<int32_t>(column), static_cast<uint8_t>(row), codes[column]};
      }
    return known;
  }

  // Lists the columns that were noted, and lays their codes in tiles.
  void lay(int64_t known) const {
    int32_t all = 0;
    for (int64_t d = 0; 64 * depth * d < line(); ++d) {
      depths()[d] = {list(d), all};
      all += static_cast<int32_t>(64 * rows * tiles_of(d));
    }
    std::memset(inputs, 0, all);
    for (int64_t i = 0; i < known; ++i) {
      const Entry own = entries()[i];
      const int64_t d = own.column / (64 * depth), position = positions()[own.column];
      const int64_t last = own.row / kTileRows, height = last ? rows - kTileRows : first_rows();
      const int64_t tile = depths()[d].inputs_at + 64 * (last * kTileRows * tiles_of(d) + position / 16 * height);
      inputs[tile + 64 * (own.row % kTileRows) + 4 * (position % 16) + own.column % 4] = own.code;
    }
  }

  // Columns of each residue in turn get positions; a residue with fewer columns than another meets zeros behind them.
  int32_t list(int64_t d) const {
    int32_t counts[4] = {0, 0, 0, 0};
    uint8_t* const from = sources(d);
    const int64_t begin = 64 * depth * d, end = std::min(begin + 64 * depth, line());
    for (int64_t first = begin; first < end; first += 64)
      for (uint64_t left = nonzero4(load(positions() + first)); left; left &= left - 1) {
        const int64_t column = first + __builtin_ctzll(left), residue = column % 4;
        from[4 * counts[residue] + residue] = static_cast<uint8_t>((column - begin) / 4);
        positions()[column] = static_cast<uint8_t>(counts[residue]++);
      }
    const int32_t most = *std::max_element(counts, counts + 4);
    for (int residue = 0; residue < 4; ++residue)
      for (int32_t four = counts[residue]; four < most; ++four) from[4 * four + residue] = 0;
    return most;
  }

  const uint8_t* inputs_of(int64_t d) const { return inputs + depths()[d].inputs_at; }

  // The weights of one block of outputs that meet the columns of a depth, as tiles. Those behind the last meet zeros.
  const uint8_t* gather(int64_t d, const uint8_t* weights, uint8_t* const into) const {
    const uint8_t* from = sources(d);
    for (int32_t four = 0; four < depths()[d].fours; ++four, from += 4) {
      uint32_t words[4][16];
      for (int residue = 0; residue < 4; ++residue) std::memcpy(words[residue], weights + 64 * from[residue], 64);
      for (int i = 0; i < 16; ++i)
        words[0][i] = (words[0][i] & 0xffu) | (words[1][i] & 0xff00u) | (words[2][i] & 0xff0000u) | (words[3][i] & 0xff000000u);
      std::memcpy(into + 64 * four, words[0], 64);
    }
    return into;
  }
};

}  // namespace
