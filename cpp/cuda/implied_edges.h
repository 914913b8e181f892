// Which edges of a graph follow from others. Free of CUDA's headers.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

namespace mixkvq::cuda {

using Edge = std::pair<int, int>;  // from, to

// Numbers of the edges from `a` to a node that has another edge from some `b` which comes after `a`. Nodes are numbers below `n_nodes`, edges make no
// circle. The search back from `b` stops at what lies before `a`: a long chain with short detours takes time in proportion to its length.
inline std::vector<size_t> implied_edges(int n_nodes, const std::vector<Edge> & edges) {
    std::vector<std::vector<int>> before(n_nodes), after(n_nodes);
    std::vector<int> n_open(n_nodes), rank(n_nodes), order;
    for (const auto & [from, to] : edges) before[to].push_back(from), after[from].push_back(to), ++n_open[to];
    for (int node = 0; node < n_nodes; ++node) {
        if (n_open[node] == 0) order.push_back(node);
    }
    for (size_t i = 0; i < order.size(); ++i) {
        rank[order[i]] = int(i);
        for (const int node : after[order[i]]) {
            if (--n_open[node] == 0) order.push_back(node);
        }
    }

    std::vector<int> seen(n_nodes, -1);
    int n_searches = 0;
    const auto comes_after = [&](int b, int a) {
        std::vector<int> open = {b};
        for (++n_searches; !open.empty();) {
            const int node = open.back();
            open.pop_back();
            if (node == a) return true;
            if (rank[node] < rank[a] || seen[node] == n_searches) continue;
            seen[node] = n_searches;
            open.insert(open.end(), before[node].begin(), before[node].end());
        }
        return false;
    };
    std::vector<size_t> implied;
    for (size_t i = 0; i < edges.size(); ++i) {
        const auto & [a, node] = edges[i];
        for (const int b : before[node]) {
            if (rank[b] <= rank[a] || !comes_after(b, a)) continue;
            implied.push_back(i);
            break;
        }
    }
    return implied;
}

}  // namespace mixkvq::cuda
