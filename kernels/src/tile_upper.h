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
    int32_t column, row, code;
  };
  struct Depth {
    int32_t fours, inputs_at;
  };
  static constexpr int64_t kLists = 7;  // lines of memory that the lists take; entries lie behind them

  uint8_t* at;      // the lists and the entries
  uint8_t* inputs;  // codes of the columns, [tile][row] of 64 bytes for each depth
  int64_t tiles, depth, rows;

  int64_t line() const { return 64 * tiles; }
  uint8_t* used() const { return at; }                                        // [columns] whether one has codes
  uint8_t* sources(int64_t d) const { return at + line() + 64 * depth * d; }  // [four][residue] a four of the depth
  Depth* depths() const { return reinterpret_cast<Depth*>(at + 2 * line()); }
  int32_t* slots() const { return reinterpret_cast<int32_t*>(at + 3 * line()); }  // [columns] where the first row's code is
  Entry* entries() const { return reinterpret_cast<Entry*>(at + kLists * line()); }
  int64_t tiles_of(int64_t d) const { return (depths()[d].fours + 15) / 16; }
  const uint8_t* inputs_of(int64_t d) const { return inputs + depths()[d].inputs_at; }

  void begin() const { std::memset(used(), 0, line()); }

  void note(int64_t known, int64_t column, int64_t row, int8_t code) const {
    used()[column] = 1;
    entries()[known] = {static_cast<int32_t>(column), static_cast<int32_t>(row), code};
  }

  // Lists the columns of the entries, and lays their codes in tiles.
  void lay(int64_t known) const {
    int32_t all = 0;
    for (int64_t d = 0; 64 * depth * d < line(); ++d) {
      depths()[d] = {list(d, all), all};
      all += static_cast<int32_t>(64 * rows * tiles_of(d));
    }
    std::memset(inputs, 0, all);
    for (int64_t i = 0; i < known; ++i) {
      const Entry own = entries()[i];
      inputs[slots()[own.column] + 64 * own.row] = static_cast<uint8_t>(own.code);
    }
  }

  // Columns of each residue in turn take places; a residue with fewer columns than another meets zeros behind them.
  int32_t list(int64_t d, int32_t inputs_at) const {
    int32_t counts[4] = {0, 0, 0, 0};
    uint8_t* const from = sources(d);
    const int64_t begin = 64 * depth * d, end = std::min(begin + 64 * depth, line());
    for (int64_t first = begin; first < end; first += 64)
      for (uint64_t left = nonzero4(load(used() + first)); left; left &= left - 1) {
        const int64_t column = first + __builtin_ctzll(left), residue = column % 4;
        const int32_t four = counts[residue]++;
        from[4 * four + residue] = static_cast<uint8_t>((column - begin) / 4);
        slots()[column] = static_cast<int32_t>(inputs_at + four / 16 * 64 * rows + four % 16 * 4 + residue);
      }
    const int32_t most = *std::max_element(counts, counts + 4);
    for (int residue = 0; residue < 4; ++residue)
      for (int32_t four = counts[residue]; four < most; ++four) from[4 * four + residue] = 0;
    return most;
  }

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
