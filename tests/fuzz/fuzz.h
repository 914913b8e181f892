// What a fuzz target is: LLVMFuzzerTestOneInput, as libFuzzer calls it (`make fuzz`), and what replay.cpp needs beside it, to run the target without libFuzzer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size);
extern "C" int LLVMFuzzerInitialize(int * argc, char *** argv);

// Inputs that are as they should be: what a corpus begins with.
std::vector<std::vector<uint8_t>> good_inputs();

// A promise that a damaged input has broken.
inline void promise(bool kept, const char * what) {
    if (kept) return;
    std::fprintf(stderr, "fuzz: %s\n", what);
    std::abort();
}

// How many inputs were refused and how many taken; said when the program ends.
struct Counts {
    unsigned long long refused = 0, taken = 0;
    ~Counts() { std::fprintf(stderr, "fuzz: %llu inputs refused, %llu taken\n", refused, taken); }
    void add(bool is_taken) { ++(is_taken ? taken : refused); }
};
