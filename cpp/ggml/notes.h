// llama.cpp's own states hold rows and nothing else. What else there was to know of a stream when its rows were read, its query statistics and windows,
// is remembered here under a checksum of the rows, and comes back when the same rows are written: a server's prompt cache and its slots go on as if the
// context had not been used otherwise meanwhile.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>

#include "abi.h"
#include "mixkvq/cache.h"
#include "mixkvq/checksum.h"

namespace mixkvq::MIXKVQ_GLUE {

struct CacheTensor;

class Notes {
  public:
    // Rows that llama.cpp has read. What it reads of a stream without reading elsewhere in between is one state.
    void read(const CacheTensor & tensor, int stream, int first, int n, const void * rows);
    // Rows that it writes, before and after. Where they take the place of all that is known of a stream, that is forgotten.
    void before_write(CacheTensor & tensor, int stream, int first, int n);
    void written(CacheTensor & tensor, int stream, int first, int n, const void * rows);

    void clear();
    size_t bytes() const { return bytes_; }

  private:
    static constexpr size_t kMostBytes = size_t(32) << 20;

    // Pieces of a stream, one after another.
    struct Chain {
        const CacheTensor * tensor = nullptr;
        int stream = 0;
        bool alone = false;  // nothing else in the stream is needed
        Checksum sum;
        CellRuns runs;

        bool goes_on(const CacheTensor & t, int s) const { return tensor == &t && stream == s; }
        void add(const CacheTensor & t, int first, int n, const void * rows);
    };
    struct Note {
        const CacheTensor * tensor;
        uint64_t sum;
        CellRuns runs;
        StreamNotes notes;
        size_t bytes = 0;
    };

    std::list<Note>::iterator find(const CacheTensor & tensor, uint64_t sum);
    void drop(std::list<Note>::iterator note);

    Chain reading_, writing_;
    std::list<Note> list_;  // the latest first
    size_t bytes_ = 0;
};

}  // namespace mixkvq::MIXKVQ_GLUE
