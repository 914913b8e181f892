// Edges of a graph that follow from others, against the paths without them; and that a long graph takes no more steps for its length.
#include <algorithm>
#include <random>

#include "../../cpp/cuda/implied_edges.h"
#include "check.h"

using mixkvq::cuda::Edge;
using mixkvq::cuda::implied_edges;

namespace {

// Whether `to` can be reached without the edge of number `without`.
bool is_reached(int n_nodes, const std::vector<Edge> & edges, size_t without) {
    std::vector<char> reached(n_nodes);
    reached[edges[without].first] = 1;
    for (bool changed = true; changed;) {
        changed = false;
        for (size_t i = 0; i < edges.size(); ++i) {
            if (i == without || !reached[edges[i].first] || reached[edges[i].second]) continue;
            reached[edges[i].second] = 1;
            changed = true;
        }
    }
    return reached[edges[without].second];
}

}  // namespace

int main() {
    std::mt19937 rng(1);
    size_t n_implied = 0;
    for (int round = 0; round < 500; ++round) {
        const int n = 2 + int(rng() % 12);
        std::vector<int> name(n);  // nodes in no order
        for (int i = 0; i < n; ++i) name[i] = i;
        std::shuffle(name.begin(), name.end(), rng);
        std::vector<Edge> edges;
        for (int a = 0; a < n; ++a) {
            for (int b = a + 1; b < n; ++b) {
                if (rng() % 4 == 0) edges.push_back({name[a], name[b]});
            }
        }
        std::shuffle(edges.begin(), edges.end(), rng);
        std::vector<size_t> found = implied_edges(n, edges);
        std::sort(found.begin(), found.end());
        for (size_t i = 0; i < edges.size(); ++i) {
            const bool implied = std::binary_search(found.begin(), found.end(), i);
            CHECK(implied == is_reached(n, edges, i), "round %d: edge %d -> %d of %d nodes", round, edges[i].first, edges[i].second, n);
        }
        n_implied += found.size();
    }
    CHECK(n_implied > 500, "%zu", n_implied);

    // A model's graph: a chain, and in every layer the kernel of ours waits for that of the layer before, too.
    std::vector<Edge> chain;
    const int n_layers = 20000, per_layer = 17;
    for (int i = 1; i < n_layers * per_layer; ++i) chain.push_back({i - 1, i});
    for (int layer = 1; layer < n_layers; ++layer) chain.push_back({(layer - 1) * per_layer + 9, layer * per_layer + 9});
    const std::vector<size_t> found = implied_edges(n_layers * per_layer, chain);
    CHECK(found.size() == size_t(n_layers - 1), "%zu", found.size());  // in no time; step by step from the beginning it would be hours
    for (const size_t i : found) CHECK(i >= size_t(n_layers * per_layer - 1), "%zu", i);
    return check_result();
}
