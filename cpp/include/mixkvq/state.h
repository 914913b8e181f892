// Packed states: what a stream of a store holds as bytes, docs/format.md, "Packed states". Knows nothing of ggml.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "mixkvq/checksum.h"
#include "mixkvq/history.h"
#include "mixkvq/page.h"

namespace mixkvq {

// Takes bytes one after the other, adds them up in a checksum, and hands them on in large pieces. Without a function it only counts them.
class StateWriter {
  public:
    using Write = std::function<bool(const void * data, size_t bytes)>;

    StateWriter() = default;
    explicit StateWriter(Write write) : write_(std::move(write)) { buffer_.reserve(kBuffer); }

    bool only_counts() const { return !write_; }
    void add(const void * data, size_t bytes);
    template <class T> void add(const T & number) { add(&number, sizeof(number)); }
    template <class T> void add_list(const std::vector<T> & list) { add(list.data(), list.size() * sizeof(T)); }
    void skip(size_t bytes) { bytes_ += bytes; }  // while it only counts
    uint64_t bytes() const { return bytes_; }
    uint64_t checksum() const { return sum_.value(); }
    // Hands on what is left. False: the function has refused something.
    bool finish();

  private:
    static constexpr size_t kBuffer = size_t(1) << 20;

    Write write_;
    std::vector<uint8_t> buffer_;
    Checksum sum_;
    uint64_t bytes_ = 0;
    bool refused_ = false;
};

// Bytes in memory, one after the other. Once something has been asked for beyond their end it is spoilt: all it gives are zeros.
class StateReader {
  public:
    StateReader(const uint8_t * data, size_t bytes) : at_(data), left_(bytes) {}

    bool ok() const { return ok_; }
    size_t left() const { return left_; }
    void spoil() { ok_ = false, left_ = 0; }
    // nullptr if there are not so many.
    const uint8_t * take(size_t bytes);
    template <class T> T get() {
        T number{};
        if (const uint8_t * at = take(sizeof(T))) std::memcpy(&number, at, sizeof(T));
        return number;
    }
    template <class T> std::vector<T> get_list(size_t n) {
        std::vector<T> list;
        const uint8_t * at = n <= left_ / sizeof(T) ? take(n * sizeof(T)) : (spoil(), nullptr);
        if (at && n) list.resize(n), std::memcpy(list.data(), at, n * sizeof(T));
        return list;
    }

  private:
    const uint8_t * at_;
    size_t left_;
    bool ok_ = true;
};

// Query statistics of a stream: sums of |q_d| and q_d^2, [head][channel], and how many vectors they are of; the same, of |q_d| only, at some marks.
struct QueryState {
    struct Mark {
        int number = 0;
        std::vector<float> abs;
        double count = 0;
    };
    std::vector<float> abs, sqr;
    double count = 0;
    std::vector<Mark> marks;
};

// A stream as it was saved. Pages point into the bytes that it was read from.
struct StreamState {
    struct Page {
        int number = 0;
        bool packed = false, coded = false;
        CellMask valid;
        uint64_t written = 0;
        const uint8_t * data = nullptr;  // the records; or the F16 rows of the valid cells, one behind the other
    };
    uint64_t clock = 0;
    int newest = -1;
    std::vector<Page> pages;  // by rising number
    HistoryState history;
    QueryState queries;       // of keys that are packed or go to a codec

    const Page * find(int number) const;
};

// Consecutive cells.
struct CellRun {
    int first, n;
};
using CellRuns = std::vector<CellRun>;

// Cells that come to another place, or to the same one.
struct CellMove {
    int from, to, n;
};

}  // namespace mixkvq
