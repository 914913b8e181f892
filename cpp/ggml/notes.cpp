#include "notes.h"

#include <algorithm>

#include "buffer.h"

namespace mixkvq::MIXKVQ_GLUE {

namespace {

// Cells of one list to those of another, in order. The lists have as many cells.
std::vector<CellMove> moves_between(const CellRuns & from, const CellRuns & to) {
    std::vector<CellMove> moves;
    size_t i = 0;
    int taken = 0;
    for (CellRun run : to) {
        while (run.n > 0) {
            const int n = std::min(run.n, from[i].n - taken);
            moves.push_back({from[i].first + taken, run.first, n});
            run.first += n, run.n -= n, taken += n;
            if (taken == from[i].n) ++i, taken = 0;
        }
    }
    return moves;
}

}  // namespace

void Notes::Chain::add(const CacheTensor & t, int first, int n, const void * rows) {
    sum.add(rows, n * t.row_bytes);
    if (!runs.empty() && runs.back().first + runs.back().n == first) {
        runs.back().n += n;
    } else {
        runs.push_back({first, n});
    }
}

std::list<Notes::Note>::iterator Notes::find(const CacheTensor & tensor, uint64_t sum) {
    return std::find_if(list_.begin(), list_.end(), [&](const Note & note) { return note.tensor == &tensor && note.sum == sum; });
}

void Notes::drop(std::list<Note>::iterator note) {
    if (note == list_.end()) return;
    bytes_ -= note->bytes;
    list_.erase(note);
}

void Notes::read(const CacheTensor & tensor, int stream, int first, int n, const void * rows) {
    if (reading_.goes_on(tensor, stream)) {
        drop(find(tensor, reading_.sum.value()));  // of the pieces so far, which are no state
    } else {
        reading_ = {&tensor, stream, false, {}, {}};
    }
    reading_.add(tensor, first, n, rows);
    const uint64_t sum = reading_.sum.value();
    drop(find(tensor, sum));
    list_.push_front({&tensor, sum, reading_.runs, tensor.store->notes(stream)});
    Note & note = list_.front();
    note.bytes = sizeof(Note) + note.runs.size() * sizeof(CellRun) + note.notes.bytes();
    bytes_ += note.bytes;
    while (bytes_ > kMostBytes && list_.size() > 1) drop(std::prev(list_.end()));
}

void Notes::before_write(CacheTensor & tensor, int stream, int first, int n) {
    if (writing_.goes_on(tensor, stream)) return;
    writing_ = {&tensor, stream, false, {}, {}};
    writing_.alone = tensor.store->forget_replaced(stream, first, n);
}

void Notes::written(CacheTensor & tensor, int stream, int first, int n, const void * rows) {
    writing_.add(tensor, first, n, rows);
    const auto note = find(tensor, writing_.sum.value());
    if (note == list_.end()) return;
    tensor.store->recall(stream, note->notes, moves_between(note->runs, writing_.runs), writing_.alone);
    list_.splice(list_.begin(), list_, note);
}

void Notes::clear() {
    reading_ = writing_ = {};
    list_.clear();
    bytes_ = 0;
}

}  // namespace mixkvq::MIXKVQ_GLUE
