// Checks at every access of a kernel to memory: bounds, alignment, initialisation, races
// between barriers and between blocks, asynchronous copies that are not waited for. The compiler's own instrumentation for data races
// (-fsanitize=thread) calls the functions at the end of this file, in place of its library.
#pragma once
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

namespace host {

// What was done last to four bytes.
struct Cell {
    int writer = -1, write_block = -1, write_turn = -1;
    int reader = -1, read_block = -1, read_turn = -1;
    bool readers = false, read_blocks = false, atomic = false;
    bool coming = false;  // a copy is on its way here
    int products = 0;     // of warpgroups, that are on their way and read this
    size_t fences = 0;    // that the writer had made before
};

// Memory that a kernel may touch.
struct Region {
    std::string name;
    uintptr_t begin, end;
    bool writable;
    std::vector<unsigned char> inside;   // for each byte: it is an element
    std::vector<unsigned char> written;  // for each byte: it has a value
    std::vector<Cell> cells;

    Region(const char* name, const void* at, size_t bytes, bool writable, bool filled)
        : name(name),
          begin((uintptr_t)at),
          end(begin + bytes),
          writable(writable),
          inside(bytes, 1),
          written(bytes, filled),
          cells(bytes / 4 + 2) {}

    EKFAC_PLAIN bool has(uintptr_t at, size_t size) const {
        if (at < begin || at + size > end) return false;
        for (size_t i = 0; i < size; i++)
            if (!inside.data()[at - begin + i]) return false;
        return true;
    }
};

inline std::vector<Region> buffers, shared_regions;
inline bool watching = false;  // kernel code runs, not this file's or host.h's

extern "C" char __ehdr_start[] __attribute__((visibility("hidden")));
extern "C" char _end[] __attribute__((visibility("hidden")));

[[noreturn]] void die(const char* what);

EKFAC_PLAIN Region* region_of(uintptr_t at, size_t size = 1) {
    static size_t last = 0;
    for (Region& one : shared_regions)
        if (at >= one.begin && at < one.end) return &one;
    // Views of one tensor overlap: the one that all bytes are elements of.
    if (last < buffers.size() && buffers[last].has(at, size)) return &buffers[last];
    Region* around = nullptr;
    for (size_t i = 0; i < buffers.size(); i++) {
        if (buffers[i].has(at, size)) {
            last = i;
            return &buffers[i];
        }
        if (at >= buffers[i].begin && at < buffers[i].end) around = &buffers[i];
    }
    return around;
}

EKFAC_PLAIN bool in_shared(uintptr_t at) {
    for (Region& one : shared_regions)
        if (at >= one.begin && at < one.end) return true;
    return false;
}

EKFAC_PLAIN bool is_constant(uintptr_t at) {
    Region* one = region_of(at);
    return one == nullptr || !one->writable;
}

[[noreturn]] inline void die_at(const Region& one, uintptr_t at, const char* what) {
    static char words[200];
    std::snprintf(words, sizeof words, "%s, %s, byte %ld", what, one.name.c_str(),
                  (long)(at - one.begin));
    die(words);
}

EKFAC_PLAIN void check_race(Region& one, uintptr_t at, bool writes, bool atomic) {
    Cell& cell = one.cells[(at - one.begin) / 4];
    if (cell.coming) die_at(one, at, "where a copy is still on its way");
    if (writes && cell.products)
        die_at(one, at, "written while a product still reads it");
    int me = current, block = blockIdx.x, now = turn;
    bool both_atomic = atomic && cell.atomic;
    if (cell.write_block >= 0 && !both_atomic) {
        if (cell.write_block != block) die_at(one, at, "a race between blocks");
        if (cell.write_turn == now && cell.writer != me)
            die_at(one, at, "a race with a write since the last barrier");
    }
    if (writes && cell.read_block >= 0 && !both_atomic) {
        if (cell.read_blocks || cell.read_block != block)
            die_at(one, at, "a race between blocks");
        if (cell.read_turn == now && (cell.readers || cell.reader != me))
            die_at(one, at, "a race with a read since the last barrier");
    }
    if (writes) {
        cell.writer = me;
        cell.write_block = block;
        cell.write_turn = now;
        cell.fences = fibers[me].fences.size();
        cell.atomic = atomic;
    } else {
        bool same = cell.read_block == block && cell.read_turn == now;
        cell.readers = same && (cell.readers || cell.reader != me);
        cell.read_blocks |= cell.read_block >= 0 && cell.read_block != block;
        cell.reader = me;
        cell.read_block = block;
        cell.read_turn = now;
    }
}

EKFAC_PLAIN bool on_stack(uintptr_t at);

EKFAC_PLAIN void access(const void* address, size_t size, bool writes, bool aligned,
                   bool atomic = false) {
    uintptr_t at = (uintptr_t)address;
    if (on_stack(at)) return;
    Region* one = region_of(at, size);
    if (one == nullptr) {
        bool image = at >= (uintptr_t)__ehdr_start && at + size <= (uintptr_t)_end;
        if (image && !writes) return;  // constants, and the thread's own number
        die(writes ? "writes where nothing is" : "reads where nothing is");
    }
    if (at + size > one->end) die_at(*one, at, "beyond the end");
    if (aligned && at % size) die_at(*one, at, "not aligned");
    if (writes && !one->writable) die_at(*one, at, "writes what is constant");
    for (size_t i = 0; i < size; i++) {
        size_t byte = at - one->begin + i;
        if (!one->inside[byte]) die_at(*one, at, "between the elements");
        if (!writes && !one->written[byte]) die_at(*one, at, "reads what nobody wrote");
        if (writes) one->written[byte] = 1;
    }
    uintptr_t word = at - (at - one->begin) % 4;
    for (; word < at + size; word += 4) check_race(*one, word, writes, atomic);
}

// A copy of 16 bytes is on its way from now on, and may arrive at any time.
EKFAC_PLAIN void start_copy(const void* to) {
    uintptr_t at = (uintptr_t)to;
    Region* one = region_of(at);
    if (one == nullptr) die("copies to where nothing is");
    if (!in_shared(at)) die_at(*one, at, "copies to what is not shared memory");
    access(to, 16, true, true);
    for (size_t i = 0; i < 16; i++) one->written[at - one->begin + i] = 0;
    for (size_t i = 0; i < 4; i++) one->cells[(at - one->begin) / 4 + i].coming = true;
}

EKFAC_PLAIN void finish_copy(const void* to) {
    uintptr_t at = (uintptr_t)to;
    Region* one = region_of(at);
    for (size_t i = 0; i < 4; i++) one->cells[(at - one->begin) / 4 + i].coming = false;
    access(to, 16, true, true);
}

EKFAC_PLAIN void watch(const void* address, size_t size, bool writes, bool aligned,
                       const void* place) {
    if (!watching) return;
    watching = false;
    access(address, size, writes, aligned);
    count(address, size, writes, place);
    watching = true;
}

}  // namespace host

// A buffer of the next launch: `inside` has one byte for each byte of its extent.
extern "C" inline __attribute__((used)) void host_buffer(
    const char* name, const void* at, long bytes, const unsigned char* inside,
    int filled) {
    host::Region one(name, at, bytes, true, filled);
    one.inside.assign(inside, inside + bytes);
    host::buffers.push_back(one);
}

extern "C" inline __attribute__((used)) void host_forget() { host::buffers.clear(); }

extern "C" inline __attribute__((used)) void host_shared(long offset, long bytes) {
    const void* at = host::__ehdr_start + offset;
    host::shared_regions.emplace_back("shared memory", at, bytes, true, false);
}

extern "C" {
#define EKFAC_WATCH(size)                                                           \
    EKFAC_PLAIN void __tsan_read##size(void* at) {                 \
        host::watch(at, size, false, true, __builtin_return_address(0));                                         \
    }                                                                               \
    EKFAC_PLAIN void __tsan_write##size(void* at) {                \
        host::watch(at, size, true, true, __builtin_return_address(0));                                          \
    }                                                                               \
    EKFAC_PLAIN void __tsan_unaligned_read##size(void* at) {       \
        host::watch(at, size, false, false, __builtin_return_address(0));                                        \
    }                                                                               \
    EKFAC_PLAIN void __tsan_unaligned_write##size(void* at) {      \
        host::watch(at, size, true, false, __builtin_return_address(0));                                         \
    }
EKFAC_WATCH(1)
EKFAC_WATCH(2)
EKFAC_WATCH(4)
EKFAC_WATCH(8)
EKFAC_WATCH(16)
EKFAC_PLAIN void __tsan_read_range(void* at, size_t size) {
    host::watch(at, size, false, false, __builtin_return_address(0));
}
EKFAC_PLAIN void __tsan_write_range(void* at, size_t size) {
    host::watch(at, size, true, false, __builtin_return_address(0));
}
EKFAC_PLAIN void __tsan_init() {}
EKFAC_PLAIN void __tsan_func_entry(void*) {}
EKFAC_PLAIN void __tsan_func_exit() {}
EKFAC_PLAIN void __tsan_vptr_update(void**, void*) {}
EKFAC_PLAIN void __tsan_vptr_read(void**) {}
}
