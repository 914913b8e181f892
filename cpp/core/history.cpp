#include "mixkvq/history.h"

#include <algorithm>
#include <cmath>
#include <new>

namespace mixkvq {

namespace {

constexpr int kMostSequences = 64;

// Whether there is room for one more. Without, what this is about is only less exact.
template <class T> bool make_room(std::vector<T> & list) {
    if (list.size() < list.capacity()) return true;
    try {
        list.reserve(2 * list.size() + 2);
        return true;
    } catch (const std::bad_alloc &) {
        return false;
    }
}

}  // namespace

bool MaskView::sees(int s, int t, int cell) const {
    if (cell < 0 || cell >= n_kv) return false;
    if (!mask) return true;
    const size_t at = s * stream + t * token + cell;
    return is_half ? static_cast<const half *>(mask)[at] != 0xfc00 : !(std::isinf(static_cast<const float *>(mask)[at]));
}

History::History(int n_cells, int window, bool keeps_first) : n_cells_(n_cells), window_(window), keeps_first_(keeps_first) {
    marks_.reserve(n_marks(n_cells));
    sequences_.reserve(1);
    for (auto * runs : {&now_, &last_}) runs->reserve(8);
}

// The number of a mark: of what 128, 512, 2048, ... rows have left behind.
static int mark_of(uint64_t rows) {
    int number = -1;
    for (uint64_t n = kPageCells; n <= rows; n *= 4) ++number;
    return number;
}

int History::n_marks(int n_cells) { return mark_of(n_cells) + 1; }

void History::reserve(int n) {
    if (now_.capacity() < now_.size() + n) now_.reserve(std::max(2 * now_.size(), now_.size() + n));
}

void History::wrote(int cell, bool over) {
    marks_.erase(std::remove_if(marks_.begin(), marks_.end(), [&](const Mark & m) { return m.cell == cell; }), marks_.end());
    if (!now_.empty() && now_.back().first + now_.back().n == cell && now_.back().over == over) {
        ++now_.back().n;
    } else {
        now_.push_back({cell, 1, over});
    }
}

void History::erased(int cell, int n) {
    const auto is_gone = [&](const Mark & m) { return m.cell >= cell && m.cell < cell + n; };
    marks_.erase(std::remove_if(marks_.begin(), marks_.end(), is_gone), marks_.end());
}

void History::clear() {
    now_.clear(), last_.clear(), marks_.clear(), sequences_.clear();
    rows_ = 0;
}

// ---- states ----

HistoryState History::state() const { return {now_, last_, marks_, sequences_, rows_, looks_}; }

void History::restore(const HistoryState & state) {
    History other(n_cells_, window_, keeps_first_);
    other.now_.insert(other.now_.end(), state.now.begin(), state.now.end());
    other.last_.insert(other.last_.end(), state.last.begin(), state.last.end());
    other.sequences_ = state.sequences;
    for (const Mark & mark : state.marks) {
        if (mark.number < n_marks(n_cells_)) other.marks_.push_back(mark);
    }
    other.rows_ = state.rows, other.looks_ = state.looks;
    *this = std::move(other);
}

void History::adopt(const HistoryState::Sequence & sequence) {
    const auto is_here = [&](const Sequence & x) { return x.tip == sequence.tip; };
    if (n_sequences() == kMostSequences || std::any_of(sequences_.begin(), sequences_.end(), is_here)) return;
    sequences_.push_back(sequence);
    sequences_.back().seen = looks_;
}

// ---- sequences ----

// The sequence whose last row this token sees, -1 if there is none. Neighbours are mostly of the same one.
int History::find(const MaskView & view, int s, int t, int likely) const {
    if (likely >= 0 && view.sees(s, t, sequences_[likely].tip)) return likely;
    for (int k = 0; k < n_sequences(); ++k) {
        if (view.sees(s, t, sequences_[k].tip)) return k;
    }
    return -1;
}

// The sequence of a row that follows no other's last one. Over a token that nobody needs any more, it takes the place of the sequence that has lost it:
// one whose last row is gone, else one with recent rows in this page, else one that began in it.
int History::begin(int cell, bool over) {
    const int page = cell / kPageCells;
    if (over) {
        int best = -1, best_rank = 0;
        for (int i = 0; i < n_sequences(); ++i) {
            const Sequence & other = sequences_[i];
            if (other.seen == looks_) continue;
            const bool is_recent = std::any_of(other.recent.begin(), other.recent.end(), [&](Recent r) { return r.page == page; });
            const int rank = other.tip < 0 || n_sequences() == 1 ? 3 : is_recent ? 2 : other.first_page == page ? 1 : 0;
            if (rank > best_rank) best = i, best_rank = rank;
        }
        if (best >= 0) return best;
    }
    if (n_sequences() == kMostSequences || (!make_room(sequences_) && n_sequences() > 0)) {
        const auto oldest = std::min_element(sequences_.begin(), sequences_.end(), [](auto & a, auto & b) { return a.seen < b.seen; });
        oldest->first_page = page;
        oldest->rows = 0;
        oldest->recent.clear();
        return int(oldest - sequences_.begin());
    }
    sequences_.push_back({-1, page, 0, 0, {}});
    return n_sequences() - 1;
}

void History::append(Sequence & sequence, int cell) {
    const int page = cell / kPageCells;
    auto & recent = sequence.recent;
    const uint64_t row = ++sequence.rows;
    sequence.tip = cell;
    sequence.seen = looks_;
    if (recent.empty() || recent.back().page != page) {
        recent.erase(std::remove_if(recent.begin(), recent.end(), [&](Recent r) { return r.page == page || row - r.row > uint64_t(window_); }), recent.end());
        if (recent.empty() && recent.capacity() < most_recent()) recent.reserve(most_recent());
        if (!make_room(recent)) return;
        recent.push_back({page, row});
    }
    recent.back().row = row;
}

int History::rank(int page) const {
    int rank = kNotHeld;
    for (const Sequence & s : sequences_) {
        if (keeps_first_ && s.first_page == page) rank = 0;
        for (size_t i = s.recent.size(), later = 0; i-- > 0 && s.rows - s.recent[i].row < uint64_t(window_); ++later) {
            if (s.recent[i].page == page) rank = std::min(rank, int(later));
        }
    }
    return rank;
}

// ---- statistics ----

bool History::is_now(int cell) const {
    return std::any_of(now_.begin(), now_.end(), [&](const Run & run) { return cell >= run.first && cell < run.first + run.n; });
}

// Whether a cell still holds what it held before this batch, for somebody in it.
bool History::is_intact(const MaskView & view, int s, int cell) const {
    if (is_now(cell)) return false;
    for (int t = view.n_tokens; t-- > 0;) {
        if (view.sees(s, t, cell)) return true;
    }
    return false;
}

bool History::is_last_intact(const MaskView & view, int s) const {
    for (size_t r = last_.size(); r-- > 0;) {
        for (int i = last_[r].n; i-- > 0;) {
            if (is_intact(view, s, last_[r].first + i)) return true;
        }
    }
    return false;
}

// `tip`: the cell before the first row of the batch, -1 if it follows none.
History::Step History::step(const MaskView & view, int s, bool rewound, int tip) {
    Step step;
    if (rewound && !is_last_intact(view, s)) {
        while (!marks_.empty() && !is_intact(view, s, marks_.back().cell)) marks_.pop_back();
        step.turn = marks_.empty() ? Turn::anew : Turn::back;
        step.mark = marks_.empty() ? -1 : marks_.back().number;
        rows_ = marks_.empty() ? 0 : marks_.back().rows;
    } else if (!rewound && tip >= 0 && rows_ <= uint64_t(n_cells_)) {
        const int number = mark_of(rows_);
        if (number > (marks_.empty() ? -1 : marks_.back().number)) {
            marks_.push_back({number, tip, rows_});
            step.marked = number;
        }
    }
    return step;
}

History::Step History::look(const MaskView & view, int s) {
    if (now_.empty()) return {};
    ++looks_;
    int n_before = -view.n_tokens;  // rows that came otherwise, from a state
    for (const Run & run : now_) n_before += run.n;
    bool over_before = false, rewound = false, is_first = true;
    int t = 0, likely = -1, tip = -1;
    for (const Run & run : now_) {
        for (int i = 0; i < run.n; ++i) {
            const int cell = run.first + i;
            for (Sequence & other : sequences_) {
                if (other.tip == cell) other.tip = -1;
            }
            if (n_before > 0) {
                over_before |= run.over;
                --n_before;
                continue;
            }
            int k = find(view, s, t, likely);
            const bool over = run.over || over_before;
            if (k < 0) {
                rewound |= over && !sequences_.empty();
                k = begin(cell, over);
            } else if (is_first) {
                tip = sequences_[k].tip;
            }
            is_first = false;
            append(sequences_[k], cell);
            likely = k;
            ++t;
        }
    }
    if (n_sequences() > 1) {
        sequences_.erase(std::remove_if(sequences_.begin(), sequences_.end(), [](const Sequence & x) { return x.tip < 0; }), sequences_.end());
    }
    const Step result = step(view, s, rewound, tip);
    rows_ += view.n_tokens;
    last_.swap(now_);
    now_.clear();
    return result;
}

size_t History::bytes() const {
    size_t n = (now_.capacity() + last_.capacity()) * sizeof(Run) + marks_.capacity() * sizeof(Mark) + sequences_.capacity() * sizeof(Sequence);
    for (const Sequence & sequence : sequences_) n += sequence.recent.capacity() * sizeof(Recent);
    return n + (sequences_.empty() ? most_recent() * sizeof(Recent) : 0);  // the first one will come
}

}  // namespace mixkvq
