// Words of CUDA C++ that csrc/ uses, for one CPU thread: blocks run one after the other,
// the threads of a block are fibers that take turns at barriers. They take turns forwards
// or backwards: a kernel whose result depends on it lacks a barrier. With EKFAC_CHECKED
// every access to memory is checked, see checks.h. What is wrong ends the launch, which
// returns words.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define DEVICE inline
// What is not instrumented itself.
#define EKFAC_PLAIN inline __attribute__((used, no_sanitize_thread))
#define __shared__ static __attribute__((section("ekfac_shared"), aligned(64)))
#define KERNEL(name, Params, threads)                              \
    extern "C" int name##_bytes() { return (int)sizeof(Params); } \
    extern "C" void name(const Params& p)
#define SHARED_BYTES(name) unsigned char* name = host::dynamic_begin
#define __syncthreads() host::barrier(__LINE__)

struct Index {
    int x;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

inline u32 bits(float x) {
    u32 result;
    std::memcpy(&result, &x, 4);
    return result;
}
inline float from_bits(u32 x) {
    float result;
    std::memcpy(&result, &x, 4);
    return result;
}
inline float half_to_float(u16 x) {
    _Float16 half;
    std::memcpy(&half, &x, 2);
    return (float)half;
}
inline void keep(int&) {}
namespace host {
inline void changed();
}
// To nearest, ties away from zero, ten bits of mantissa; what is no number stays none.
inline u32 round_to_tf32(u32 x) {
    host::changed();
    if ((x & 0x7fffffffu) > 0x7f800000u) return 0x7fffffffu;
    return (x + 0x1000u) & 0xffffe000u;
}

namespace host {

constexpr int STACK = 1 << 17;

// An asynchronous copy that nobody has waited for yet.
struct Copy {
    void* to;
    const void* from;
    int bytes, group;
};

// A product of the thread's warpgroup that it has not waited for yet.
struct Pending {
    float* c;
    size_t number;
    int group;
    const u32* a;  // its part of the left operand, or null
    u32 copy[4];   // and what it was when the product began
};

// Sums that products are still to be added to, and what they are until then.
struct Sums {
    float* c;
    int products = 0;
    std::vector<float> values;
};

struct Fiber {
    std::vector<Copy> copies;
    int group = 0;  // of the next copy
    std::vector<Pending> products;
    std::vector<Sums> sums;      // of these
    size_t begun = 0;            // products since the block's beginning
    int product_group = 0;       // of the next product
    bool sums_fenced = false;    // registers, since products were waited for
    std::vector<int> fences;     // of writes: the turn of each
    ucontext_t context;
    jmp_buf place;
    std::vector<char> stack = std::vector<char>(STACK);
    bool started = false, done = false;
};

struct Warp {
    int arrived = 0, round = 0;
    const char* what = "";
    float* c[32];
    const u32 *a[32], *b[32];
    u32* to[32];
    const void* row[32];
};

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline std::vector<unsigned char> dynamic;
inline unsigned char* dynamic_begin;  // at a multiple of 1024 bytes
inline long dynamic_size;
inline long read_by_products;  // bytes of shared memory, by tensor cores themselves
inline ucontext_t main_context;
inline jmp_buf scheduler;
inline int arrived, turn, current, finished, place;
inline bool moved;
inline void (*kernel)(const void*);
inline const void* params;

inline char failure[300];

}  // namespace host

#ifdef EKFAC_CHECKED
#ifdef EKFAC_COUNTED
#include "counts.h"
#else
namespace host {
EKFAC_PLAIN void count(const void*, size_t, bool, const void*) {}
}  // namespace host
#endif
#include "checks.h"
#else
namespace host {
inline bool watching;
}
#endif

namespace host {

EKFAC_PLAIN void fail(const char* what) {
    std::snprintf(failure, sizeof failure, "block %d, thread %d: %s", blockIdx.x, current,
                  what);
}

[[noreturn]] EKFAC_PLAIN void die(const char* what) {
    watching = false;
    fail(what);
    _longjmp(scheduler, 1);
}

#ifdef EKFAC_CHECKED
EKFAC_PLAIN bool on_stack(uintptr_t at) {
    uintptr_t begin = (uintptr_t)fibers[current].stack.data();
    return at >= begin && at < begin + STACK;
}
#endif

EKFAC_PLAIN void yield() {
    if (!_setjmp(fibers[current].place)) _longjmp(scheduler, 1);
}

// What is rounded, or made of two words, may be an operand in registers, which a fence has to
// show to products.
EKFAC_PLAIN void changed() { fibers[current].sums_fenced = false; }

EKFAC_PLAIN void barrier(int line) {
    bool before = watching;
    watching = false;
    if (finished) die("at a barrier that other threads left out");
    if (arrived && line != place) die("at another barrier than the others");
    place = line;
    int mine = turn;
    moved = true;
    if (++arrived == blockDim.x) {
        arrived = 0;
        turn++;
    }
    while (turn == mine) yield();
    watching = before;
}

EKFAC_PLAIN void add_whole_(i64* to, i64 value) {
    bool before = watching;
    watching = false;
#ifdef EKFAC_CHECKED
    access(to, 8, true, true, true);
#endif
    *to += value;  // fibers do not interrupt
    watching = before;
}

#ifdef EKFAC_CHECKED
#define EKFAC_HERE __builtin_return_address(0)
__attribute__((noinline)) EKFAC_PLAIN void touch(const void* at, int size, bool writes,
                                                 const void* place) {
    bool before = watching;
    watching = false;
    access(at, size, writes, true);
    count(at, size, writes, place);
    watching = before;
}
#endif

__attribute__((noinline)) EKFAC_PLAIN void read_words(void* to, const void* from,
                                                      int size) {
#ifdef EKFAC_CHECKED
    touch(from, size, false, EKFAC_HERE);
#endif
    std::memcpy(to, from, size);
}

__attribute__((noinline)) EKFAC_PLAIN void write_words(void* to, const void* from,
                                                       int size) {
#ifdef EKFAC_CHECKED
    touch(to, size, true, EKFAC_HERE);
#endif
    std::memcpy(to, from, size);
}

// Copies are done when they are waited for, as late as can be: who reads before gets what
// was there. What comes too early (somebody reads what is being overwritten) is for the
// checks to see.
__attribute__((noinline)) EKFAC_PLAIN void copy_async(void* to, const void* from, int bytes) {
    bool before = watching;
    watching = false;
    if (bytes < 0 || bytes > 16) die("copies other than 0 to 16 bytes");
#ifdef EKFAC_CHECKED
    if ((uintptr_t)from % 16) die("copies from an address that is not aligned");
    if (bytes) access(from, bytes, false, false);
    start_copy(to);
    if (bytes) count(from, bytes, false, EKFAC_HERE);
    count(to, 16, true, (const char*)EKFAC_HERE + 1);
#endif
    fibers[current].copies.push_back({to, from, bytes, fibers[current].group});
    watching = before;
}

EKFAC_PLAIN void commit_copies() { fibers[current].group++; }

EKFAC_PLAIN void wait_for_copies(int later) {
    bool before = watching;
    watching = false;
    Fiber& fiber = fibers[current];
    std::vector<Copy> rest;
    for (const Copy& one : fiber.copies) {
        if (one.group >= fiber.group - later) {
            rest.push_back(one);
            continue;
        }
#ifdef EKFAC_CHECKED
        finish_copy(one.to);
#endif
        std::memset(one.to, 0, 16);
        std::memcpy(one.to, one.from, one.bytes);
    }
    fiber.copies.swap(rest);
    watching = before;
}

// A lane comes to an instruction of its whole warp; returns whether it is the last.
EKFAC_PLAIN bool meets(Warp& w, const char* what) {
    if (w.arrived && std::strcmp(w.what, what))
        die("at another instruction than the rest of its warp");
    w.what = what;
    moved = true;
    return ++w.arrived == 32;
}

// ldmatrix.x4.trans: lane 8 j + i points to row i of matrix j, and gets of every matrix
// the elements of rows 2 (lane % 4) and the next in column lane / 4.
__attribute__((noinline)) EKFAC_PLAIN void load_matrices(u32* to, const void* row) {
    bool before = watching;
    watching = false;
    Warp& w = warps[current / 32];
    int lane = current % 32, mine = w.round;
#ifdef EKFAC_CHECKED
    if (!region_of((uintptr_t)row)) die("reads where nothing is");
    access(row, 16, false, true);
    count(row, 16, false, EKFAC_HERE);
#endif
    w.to[lane] = to;
    w.row[lane] = row;
    if (!meets(w, "load of matrices")) {
        while (w.round == mine) yield();
        watching = before;
        return;
    }
    for (int l = 0; l < 32; l++)
        for (int j = 0; j < 4; j++) {
            u16 low, high;
            int i = 8 * j + l % 4 * 2, column = l / 4;
            std::memcpy(&low, (const u16*)w.row[i] + column, 2);
            std::memcpy(&high, (const u16*)w.row[i + 1] + column, 2);
            w.to[l][j] = low | (u32)high << 16;
        }
    w.arrived = 0;
    w.round++;
    watching = before;
}

// Element k of row i of a 16 x 8 (words) operand, or column j of the other, in the
// registers of the lanes: PTX ISA, fragments of mma.m16n8k8 (.tf32).
inline u32 left_word(const Warp& w, int m, int i, int k) {
    return w.a[i % 8 * 4 + k % 4][m * 4 + i / 8 + k / 4 * 2];
}
inline u32 right_word(const Warp& w, int n, int k, int j) {
    return w.b[j * 4 + k % 4][n * 2 + k / 4];
}

inline float part(u32 word, int kind, int half) {
    if (kind == 0) return from_bits(word & 0xffffe000u);
    u16 x = (u16)(half ? word >> 16 : word & 0xffffu);
    return kind == 1 ? from_bits((u32)x << 16) : half_to_float(x);
}

EKFAC_PLAIN void warp_product(float* c, const u32* a, const u32* b, int ms, int ns, int kind) {
    bool before = watching;
    watching = false;
    Warp& w = warps[current / 32];
    int lane = current % 32, mine = w.round;
    w.c[lane] = c;
    w.a[lane] = a;
    w.b[lane] = b;
    if (!meets(w, "product")) {
        while (w.round == mine) yield();
        watching = before;
        return;
    }
    int halves = kind == 0 ? 1 : 2;
    static float left[16][16], right[16][8];
    for (int m = 0; m < ms; m++) {
        for (int i = 0; i < 16; i++)
            for (int k = 0; k < 8 * halves; k++)
                left[i][k] = part(left_word(w, m, i, k / halves), kind, k % halves);
        for (int n = 0; n < ns; n++) {
            for (int k = 0; k < 8 * halves; k++)
                for (int j = 0; j < 8; j++)
                    right[k][j] = part(right_word(w, n, k / halves, j), kind, k % halves);
            for (int i = 0; i < 16; i++)
                for (int j = 0; j < 8; j++) {
                    float sum = 0;
                    for (int k = 0; k < 8 * halves; k++) sum += left[i][k] * right[k][j];
                    w.c[i % 8 * 4 + j / 2][(m * ns + n) * 4 + i / 8 * 2 + j % 2] += sum;
                }
        }
    }
    w.arrived = 0;
    w.round++;
    watching = before;
}

}  // namespace host

#if WARPGROUP
#include "warpgroup.h"
#else
namespace host {
EKFAC_PLAIN void begin_products(int) {}
EKFAC_PLAIN void end_products(int) {}
}  // namespace host
#endif

namespace host {

EKFAC_PLAIN void enter() {
#ifdef EKFAC_CHECKED
    watching = true;
#endif
    kernel(params);
    watching = false;
    if (arrived) fail("left while others are at a barrier");
    if (!fibers[current].copies.empty()) fail("left with copies on their way");
    if (!fibers[current].products.empty()) fail("left with products on their way");
    fibers[current].done = true;
    moved = true;
    finished++;
    _longjmp(scheduler, 1);
}

inline void run(int thread) {
    current = threadIdx.x = thread;
    Fiber& fiber = fibers[thread];
    if (fiber.done || _setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = &main_context;
    makecontext(&fiber.context, enter, 0);
    setcontext(&fiber.context);
}

}  // namespace host

inline void add_whole(i64* to, i64 value) { host::add_whole_(to, value); }

// Returns what is wrong, or null.
extern "C" inline __attribute__((used)) const char* host_launch(
    void (*kernel)(const void*), const void* params, int bytes, int grid, int threads,
    int shared, int backwards) {
    using namespace host;
    host::kernel = kernel;
    host::params = params;
    if ((int)fibers.size() < threads) fibers = std::vector<Fiber>(threads);
    gridDim.x = grid;
    blockDim.x = threads;
    failure[0] = 0;
#ifdef EKFAC_CHECKED
    for (Region& one : buffers) one.cells.assign(one.cells.size(), Cell());
    buffers.emplace_back("parameters", params, bytes, false, true);
#endif
    for (int block = 0; block < grid && !failure[0]; block++) {
        blockIdx.x = block;
        warps.assign((threads + 31) / 32, Warp());
        dynamic.assign(shared + 1024, 0xff);  // not a number, whatever it is read as
        dynamic_begin = (unsigned char*)(((uintptr_t)dynamic.data() + 1023) / 1024 * 1024);
        dynamic_size = shared;
        arrived = turn = finished = 0;
#ifdef EKFAC_CHECKED
        size_t own = shared_regions.size();
        for (Region& one : shared_regions) {
            one.written.assign(one.written.size(), 0);
            one.cells.assign(one.cells.size(), Cell());
        }
        shared_regions.emplace_back("dynamic shared memory", dynamic_begin, shared, true,
                                    false);
#endif
        for (int t = 0; t < threads; t++) {
            fibers[t].started = fibers[t].done = false;
            fibers[t].copies.clear();
            fibers[t].group = 0;
        }
        begin_products(threads);
        while (finished < threads && !failure[0]) {
            moved = false;
            for (int t = 0; t < threads && !failure[0]; t++)
                run(backwards ? threads - 1 - t : t);
            if (!moved && !failure[0]) fail("waits for threads that do not come");
        }
        if (!failure[0]) end_products(threads);
#ifdef EKFAC_COUNTED
        end_count();
#endif
#ifdef EKFAC_CHECKED
        while (shared_regions.size() > own) shared_regions.pop_back();
#endif
    }
#ifdef EKFAC_CHECKED
    buffers.pop_back();
#endif
    return failure[0] ? failure : nullptr;
}
