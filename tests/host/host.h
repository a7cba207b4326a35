// Words of CUDA C++ that csrc/ uses, for one CPU thread: blocks run one after the other,
// the threads of a block are fibers that take turns at barriers. They take turns forwards
// or backwards: a kernel whose result depends on it lacks a barrier.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define DEVICE inline
#define __shared__ static
#define KERNEL(name, Params, threads)                              \
    extern "C" int name##_bytes() { return (int)sizeof(Params); } \
    extern "C" void name(const Params& p)
#define SHARED_BYTES(name) unsigned char* name = host::dynamic.data()
#define __syncthreads() host::barrier()

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
inline void add_whole(i64* to, i64 value) { *to += value; }  // fibers do not interrupt
// To nearest, ties away from zero, ten bits of mantissa.
inline u32 round_to_tf32(u32 x) { return (x + 0x1000u) & 0xffffe000u; }

namespace host {

constexpr int STACK = 1 << 17;

struct Fiber {
    ucontext_t context;
    jmp_buf place;
    std::vector<char> stack = std::vector<char>(STACK);
    bool started = false, done = false;
};

struct Warp {
    int arrived = 0, round = 0;
    float* c[32];
    const u32 *a[32], *b[32];
};

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline std::vector<unsigned char> dynamic;
inline ucontext_t main_context;
inline jmp_buf scheduler;
inline int arrived, turn, current, finished;
inline bool moved;
inline void (*kernel)(const void*);
inline const void* params;

[[noreturn]] inline void die(const char* what) {
    std::fprintf(stderr, "block %d, thread %d: %s\n", blockIdx.x, current, what);
    std::abort();
}

inline void yield() {
    if (!_setjmp(fibers[current].place)) _longjmp(scheduler, 1);
}

inline void barrier() {
    if (finished) die("at a barrier that other threads left out");
    int mine = turn;
    moved = true;
    if (++arrived == blockDim.x) {
        arrived = 0;
        turn++;
        return;
    }
    while (turn == mine) yield();
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

inline void warp_product(float* c, const u32* a, const u32* b, int ms, int ns, int kind) {
    Warp& w = warps[current / 32];
    int lane = current % 32, mine = w.round;
    w.c[lane] = c;
    w.a[lane] = a;
    w.b[lane] = b;
    moved = true;
    if (++w.arrived < 32) {
        while (w.round == mine) yield();
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
}

inline void enter() {
    kernel(params);
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

extern "C" inline __attribute__((used)) void host_launch(
    void (*kernel)(const void*), const void* params, int grid, int threads, int shared,
    int backwards) {
    using namespace host;
    host::kernel = kernel;
    host::params = params;
    if ((int)fibers.size() < threads) fibers = std::vector<Fiber>(threads);
    gridDim.x = grid;
    blockDim.x = threads;
    for (int block = 0; block < grid; block++) {
        blockIdx.x = block;
        warps.assign((threads + 31) / 32, Warp());
        dynamic.assign(shared, 0xff);  // not a number, whatever it is read as
        arrived = turn = finished = 0;
        for (int t = 0; t < threads; t++) fibers[t].started = fibers[t].done = false;
        while (finished < threads) {
            moved = false;
            for (int t = 0; t < threads; t++) run(backwards ? threads - 1 - t : t);
            if (!moved) die("waits for threads that do not come");
        }
    }
}
