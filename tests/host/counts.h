// Counts of what a warp asks of memory: its lanes' accesses from one place of the code are
// one request. Shared memory serves a request in wavefronts, each of which takes one word
// of every bank; global memory in sectors of 32 bytes. Parameters are constant memory, which
// is not counted.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <tuple>
#include <vector>

namespace host {

// Of one block: wavefronts of reads and writes in shared memory, sectors that are read and
// written in global memory, and requests.
struct Counts {
    long shared_reads = 0, shared_writes = 0, sectors_read = 0, sectors_written = 0;
    long requests = 0;
};

struct Request {
    size_t size;
    bool writes;
    std::vector<std::pair<int, uintptr_t>> lanes;
};

using Place = std::pair<int, const void*>;  // of a thread, or of a warp
inline std::map<Place, int> occurrences;
inline std::map<std::tuple<int, const void*, int>, Request> requests;
inline std::vector<Counts> counted;  // of every block since they were forgotten

EKFAC_PLAIN bool on_stack(uintptr_t at);
EKFAC_PLAIN bool in_shared(uintptr_t at);
EKFAC_PLAIN bool is_constant(uintptr_t at);

EKFAC_PLAIN void count(const void* address, size_t size, bool writes, const void* place) {
    uintptr_t at = (uintptr_t)address;
    if (on_stack(at) || is_constant(at)) return;
    int number = occurrences[{current, place}]++;
    Request& one = requests[{current / 32, place, number}];
    one.size = size;
    one.writes = writes;
    one.lanes.push_back({current % 32, at});
}

// Lanes are served together as far as they ask for 128 bytes.
EKFAC_PLAIN long wavefronts(const Request& one) {
    int together = one.size > 8 ? 8 : one.size > 4 ? 16 : 32;
    long total = 0;
    for (int first = 0; first < 32; first += together) {
        std::set<uintptr_t> banks[32];
        for (auto [lane, at] : one.lanes)
            if (lane >= first && lane < first + together)
                for (uintptr_t word = at / 4; word <= (at + one.size - 1) / 4; word++)
                    banks[word % 32].insert(word);
        size_t most = 0;
        for (auto& words : banks) most = words.size() > most ? words.size() : most;
        total += most;
    }
    return total;
}

EKFAC_PLAIN long sectors(const Request& one) {
    std::set<uintptr_t> touched;
    for (auto [lane, at] : one.lanes)
        for (uintptr_t s = at / 32; s <= (at + one.size - 1) / 32; s++)
            touched.insert(s);
    return touched.size();
}

EKFAC_PLAIN void end_count() {
    Counts total;
    for (auto& [key, one] : requests) {
        total.requests++;
        if (in_shared(one.lanes[0].second))
            (one.writes ? total.shared_writes : total.shared_reads) += wavefronts(one);
        else
            (one.writes ? total.sectors_written : total.sectors_read) += sectors(one);
    }
    total.shared_reads += read_by_products / 128;
    read_by_products = 0;
    counted.push_back(total);
    requests.clear();
    occurrences.clear();
}

}  // namespace host

// Writes five counts of every block to `to`, and forgets them; returns how many blocks.
extern "C" inline __attribute__((used)) long host_counts(long* to, long limit) {
    using namespace host;
    long blocks = 0;
    for (const Counts& c : counted) {
        if (blocks == limit) break;
        long five[] = {c.shared_reads, c.shared_writes, c.sectors_read, c.sectors_written,
                       c.requests};
        for (int i = 0; i < 5; i++) to[5 * blocks + i] = five[i];
        blocks++;
    }
    counted.clear();
    return blocks;
}
