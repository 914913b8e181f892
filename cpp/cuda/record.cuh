// Where the sections of records begin, as numbers that stay in registers; mixkvq/page.h says where.
#pragma once

#include "mixkvq/page.h"

namespace mixkvq::cuda {

struct KeyPlaces {
    int q16, q8, q4, q3, q2;  // quads of channels
    uint32_t at8, at4, at3, at2, scale, min, order, bytes;
    int groups;

    __device__ explicit KeyPlaces(const KeyFormat & f)
        : q16(quads(f.n16)), q8(quads(f.n8)), q4(quads(f.n4)), q3(quads(f.n3)), q2(quads(f.n2)), at8(f.offset8()), at4(f.offset4()),
          at3(f.offset3()), at2(f.offset2()), scale(f.offset_scale()), min(f.offset_min()), order(f.offset_order()), bytes(f.record_bytes()),
          groups(f.n_groups()) {}
    __device__ int coded() const { return q8 + q4 + q3 + q2; }

  private:
    __device__ static int quads(unsigned channels) { return channels / 4; }
};

struct ValuePlaces {
    uint32_t high, scale, mean, min, bytes;
    int groups;

    __device__ explicit ValuePlaces(const ValueFormat & f)
        : high(f.offset_high()), scale(f.offset_scale()), mean(f.offset_mean()), min(f.offset_min()), bytes(f.record_bytes()), groups(f.n_groups()) {}
};

}  // namespace mixkvq::cuda
