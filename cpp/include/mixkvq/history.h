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

// What there is to know of a stream, as a state keeps it. A sequence's last cell is -1 where that has been written over.
struct HistoryState {
    struct Run {
        int32_t first, n, over;
    };
    struct Mark {
        int32_t number, cell;
        uint64_t rows;
    };
    struct Recent {
        int32_t page;
        uint64_t row;  // of the sequence, the last one in the page
    };
    struct Sequence {
        int32_t tip, first_page;
        uint64_t rows, seen;
        std::vector<Recent> recent;
    };
    std::vector<Run> now, last;
    std::vector<Mark> marks;
    std::vector<Sequence> sequences;
    uint64_t rows = 0, looks = 0;
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

    HistoryState state() const;
    // Is what the state says; marks beyond those that this stream may have are left out. Throws std::bad_alloc, and is then as it was.
    void restore(const HistoryState & state);
    // A sequence of another stream, whose last cell is here now.
    void adopt(const HistoryState::Sequence & sequence);

    int n_sequences() const { return int(sequences_.size()); }
    // How many pages of a sequence's window came after this one; 0 for that of its first row. kNotHeld: it is in no sequence's window.
    int rank(int page) const;
    static constexpr int kNotHeld = 1 << 30;
    size_t bytes() const;

  private:
    using Run = HistoryState::Run;
    using Mark = HistoryState::Mark;
    using Recent = HistoryState::Recent;
    using Sequence = HistoryState::Sequence;

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
