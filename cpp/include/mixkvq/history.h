// What happens to the cells of one stream, as far as writes and masks tell: when it is rewound or begins anew, so that query statistics go back with
// it, and which sequences there are in it, each with a window of its own. docs/architecture.md, "What the masks tell", is the rule.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "mixkvq/kernels.h"

namespace mixkvq {

// What a batch of tokens sees, in host memory.
struct MaskView {
    const void * mask = nullptr;  // [stream][token][cell], -inf hides a cell; nullptr: every cell is seen
    bool is_half = true;          // else float
    size_t token = 0, stream = 0; // strides in elements
    int n_tokens = 0, n_streams = 1;
    int first_stream = 0;         // of the store
    int n_kv = 0;                 // cells of each stream, from the first

    // `s` is counted from the first of them.
    bool sees(int s, int t, int cell) const;
};

class History {
  public:
    // `n_cells` of the stream; `window` rows of each sequence are recent; keeps_first: so is the page of a sequence's first row.
    History(int n_cells, int window, bool keeps_first);

    // How many marks there may be.
    static int n_marks(int n_cells);

    // Comes before rows are written, after which `wrote` throws nothing: n times one of them does not follow the one before, or not in being `over`.
    void reserve(int n);
    // In the order of the rows. over: the cell held a token before.
    void wrote(int cell, bool over);
    void erased(int cell, int n);
    void clear();

    enum class Turn { on, back, anew };
    struct Step {
        Turn turn = Turn::on;  // of the statistics before this batch is counted: they stay, are what they were at a mark, or begin anew
        int mark = -1;         // Turn::back: which one
        int marked = -1;       // Turn::on: they are to be remembered under this number, as of before this batch
    };
    // The batch whose rows have been written last, before its attention.
    Step look(const MaskView & view, int s);

    int n_sequences() const { return int(sequences_.size()); }
    // How many pages of a sequence's window came after this one; 0 for that of its first row. kNotHeld: it is in no sequence's window.
    int rank(int page) const;
    static constexpr int kNotHeld = 1 << 30;
    size_t bytes() const;

  private:
    struct Run {
        int first, n;
        bool over;
    };
    struct Mark {
        int number, cell;
        uint64_t rows;
    };
    struct Recent {
        int page;
        uint64_t row;  // of the sequence, the last one in the page
    };
    struct Sequence {
        int tip;          // its last cell; -1: that has been written over
        int first_page;
        uint64_t rows = 0, seen = 0;
        std::vector<Recent> recent;
    };

    size_t most_recent() const { return window_ / kPageCells + 3; }  // pages of a sequence that is alone
    int find(const MaskView & view, int s, int t, int likely) const;
    int begin(int cell, bool over);
    void append(Sequence & sequence, int cell);
    bool is_now(int cell) const;
    bool is_intact(const MaskView & view, int s, int cell) const;
    bool is_last_intact(const MaskView & view, int s) const;
    Step step(const MaskView & view, int s, bool rewound, int tip);

    int n_cells_, window_;
    bool keeps_first_;
    std::vector<Run> now_, last_;  // written since the last look, and what was new then
    std::vector<Mark> marks_;      // by rising rows
    uint64_t rows_ = 0;            // that the statistics come from
    uint64_t looks_ = 0;
    std::vector<Sequence> sequences_;
};

}  // namespace mixkvq
