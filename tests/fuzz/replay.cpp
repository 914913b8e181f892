// A fuzz target without libFuzzer, the same in every run: all files of a corpus, then mutations of them. What fails is the process.
//
//   fuzz_TARGET FOLDER [MUTATIONS]     FOLDER/--make: writes the inputs that are as they should be into the folder
#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>

#include "fuzz.h"

namespace {

using Bytes = std::vector<uint8_t>;

// One to four changes: a byte, a number where numbers are, a piece that is left out, doubled or moved, the end.
Bytes mutated(Bytes x, std::mt19937 & random) {
    const auto below = [&](size_t n) { return n ? size_t(random() % n) : 0; };
    const uint32_t numbers[] = {0, 1, 2, 3, 4, 31, 127, 128, 255, 256, 1000, 0x7fff, 0xffff, 0x10000, 0x7fffffff, 0x80000000, 0xfffffffe, 0xffffffff, 0x7f800000, 0x7fc00000};
    for (size_t n = 1 + below(4); n > 0 && !x.empty(); --n) {
        const size_t head = below(4) ? std::min<size_t>(x.size(), 400) : x.size();  // what counts is at the beginning
        const size_t at = below(head);
        switch (below(7)) {
            case 0: x[at] ^= uint8_t(1 + below(255)); break;
            case 1: x[at] = uint8_t(random()); break;
            case 2:
            case 3: {
                const uint32_t number = numbers[below(sizeof(numbers) / sizeof(numbers[0]))];
                const size_t place = below(2) ? at / 4 * 4 : at;
                std::memcpy(&x[place], &number, std::min<size_t>(sizeof(number), x.size() - place));
                break;
            }
            case 4: x.erase(x.begin() + at, x.begin() + std::min(x.size(), at + 1 + below(64))); break;
            case 5: {
                const Bytes piece(x.begin() + at, x.begin() + std::min(x.size(), at + 1 + below(64)));
                x.insert(x.begin() + below(x.size()), piece.begin(), piece.end());
                break;
            }
            default: x.resize(below(x.size() + 1)); break;
        }
    }
    return x;
}

void run(const Bytes & x) {
    const Bytes exact(x);  // without room behind it
    LLVMFuzzerTestOneInput(exact.data(), exact.size());
}

}  // namespace

int main(int argc, char ** argv) {
    if (argc < 2) return std::fprintf(stderr, "usage: %s FOLDER [MUTATIONS | --make]\n", argv[0]), 2;
    const std::filesystem::path folder = argv[1];
    LLVMFuzzerInitialize(&argc, &argv);
    if (argc > 2 && std::string(argv[2]) == "--make") {
        int number = 0;
        for (const Bytes & x : good_inputs()) {
            std::ofstream out(folder / ("good-" + std::to_string(number++)), std::ios::binary);
            out.write(reinterpret_cast<const char *>(x.data()), std::streamsize(x.size()));
        }
        return 0;
    }
    std::vector<std::filesystem::path> paths;
    for (const auto & entry : std::filesystem::directory_iterator(folder)) paths.push_back(entry.path());
    std::sort(paths.begin(), paths.end());
    std::vector<Bytes> corpus;
    for (const auto & path : paths) {
        std::ifstream in(path, std::ios::binary);
        corpus.emplace_back(std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>());
        run(corpus.back());
    }
    promise(!corpus.empty(), "the corpus is empty");
    std::mt19937 random(1);
    for (int n = argc > 2 ? std::atoi(argv[2]) : 4000; n > 0; --n) run(mutated(corpus[random() % corpus.size()], random));
    return 0;
}
