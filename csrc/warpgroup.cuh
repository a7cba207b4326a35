// Products of a warpgroup, four warps, on the tensor cores of Hopper (compute capability
// 9.0 and no other): 64 rows of a tile times all its columns, read from shared memory by
// the tensor cores themselves (PTX ISA, "wgmma.mma_async"). First their instructions, then
// the loop of both half types, whose words lie in shared memory as in global memory: rows of
// a stage are what is summed over, so that both operands are "MN-major": blocks of 64
// features, in which a row has 128 bytes and chunk c of row k is at c ^ k % 8, the 128-byte
// swizzle. That of a left operand in registers is in left.cuh.
#pragma once
#include "operands.cuh"

typedef unsigned long long u64;

#ifndef EKFAC_HOST
#define EKFAC_SUMS(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define EKFAC_MORE_SUMS(i) \
    EKFAC_SUMS(i), EKFAC_SUMS(i + 4), EKFAC_SUMS(i + 8), EKFAC_SUMS(i + 12)
#define EKFAC_ALL_SUMS                                                               \
    EKFAC_MORE_SUMS(0), EKFAC_MORE_SUMS(16), EKFAC_MORE_SUMS(32), EKFAC_MORE_SUMS(48), \
        EKFAC_MORE_SUMS(64), EKFAC_MORE_SUMS(80)
#define EKFAC_NARROW_SUMS                                     \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "     \
    "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31}, "
#define EKFAC_WIDE_SUMS                                       \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "     \
    "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, " \
    "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, " \
    "%60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, " \
    "%72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, " \
    "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "
#if INPUT == INPUT_TF32
#define EKFAC_TYPES "k8.f32.tf32.tf32 "
#elif INPUT == INPUT_BFLOAT16
#define EKFAC_TYPES "k16.f32.bf16.bf16 "
#else
#define EKFAC_TYPES "k16.f32.f16.f16 "
#endif
#if TRANSPOSED
#define EKFAC_SIGNS "p, 1, 1; }"
#elif LEFT_IN_REGISTERS
#define EKFAC_SIGNS "p, 1, 1, 1; }"
#else
#define EKFAC_SIGNS "p, 1, 1, 1, 1; }"
#endif
// The last numbers: nothing is negated, and what a half type has in shared memory is as
// described above. Without `p` the sums are not read but begun.
#if TWO_SUMS
// The left operand is in registers: a thread's rows lane / 4 and eight more, words lane % 4
// and four more of what is summed over.
DEVICE void start_product(float* c, const u32* a, u64 b, bool add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.s32 p, %37, 0; "
        "wgmma.mma_async.sync.aligned.m64n64" EKFAC_TYPES EKFAC_NARROW_SUMS
        "{%32, %33, %34, %35}, %36, " EKFAC_SIGNS
        : EKFAC_MORE_SUMS(0), EKFAC_MORE_SUMS(16)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add)
        : "memory");
}
#elif TRANSPOSED
DEVICE void start_product(float (&c)[96], const u32* a, u64 b) {
    asm volatile(
        "{ .reg .pred p; setp.eq.u32 p, 0, 0; "
        "wgmma.mma_async.sync.aligned.m64n192" EKFAC_TYPES EKFAC_WIDE_SUMS
        "{%96, %97, %98, %99}, %100, " EKFAC_SIGNS
        : EKFAC_ALL_SUMS
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
        : "memory");
}
#else
DEVICE void start_product(float (&c)[96], u64 a, u64 b) {
    asm volatile(
        "{ .reg .pred p; setp.eq.u32 p, 0, 0; "
        "wgmma.mma_async.sync.aligned.m64n192" EKFAC_TYPES EKFAC_WIDE_SUMS
        "%96, %97, " EKFAC_SIGNS
        : EKFAC_ALL_SUMS
        : "l"(a), "l"(b)
        : "memory");
}
DEVICE void start_product(float (&c)[4], u64 a, u64 b) {
    asm volatile(
        "{ .reg .pred p; setp.eq.u32 p, 0, 0; "
        "wgmma.mma_async.sync.aligned.m64n8" EKFAC_TYPES
        "{%0, %1, %2, %3}, %4, %5, " EKFAC_SIGNS
        : EKFAC_SUMS(0)
        : "l"(a), "l"(b)
        : "memory");
}
#endif
// Before products: what this thread has done to their registers is seen by them.
DEVICE void fence_sums() { asm volatile("wgmma.fence.sync.aligned;" : : : "memory"); }
DEVICE void commit_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
}
// Waits for this warpgroup's groups of products, but for the last LATER ones.
template <int LATER>
DEVICE void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(LATER) : "memory");
}
// What this thread has written, or copied and waited for, is seen by tensor cores that
// read shared memory: they are another proxy.
DEVICE void fence_writes() { asm volatile("fence.proxy.async.shared::cta;" : : : "memory"); }
// The sums are in their registers from here on, and a left operand was until here.
DEVICE void settle(float& c) { asm volatile("" : "+f"(c) : : "memory"); }
template <int SIZE>
DEVICE void settle(float (&c)[SIZE]) {
#pragma unroll
    for (int i = 0; i < SIZE; i++) settle(c[i]);
}
template <int SIZE>
DEVICE void settle(u32 (&a)[SIZE]) {
#pragma unroll
    for (int i = 0; i < SIZE; i++) asm volatile("" : "+r"(a[i]) : : "memory");
}
#else
inline u32 shared_address(const void* at) { return host::shared_address(at); }
#if TWO_SUMS
inline void start_product(float* c, const u32* a, u64 b, bool add) {
    host::start_product(c, a, b, 64, INPUT - INPUT_TF32, add);
}
#elif TRANSPOSED
inline void start_product(float (&c)[96], const u32* a, u64 b) {
    host::start_product(c, a, b, 192, 0, true);
}
#else
template <int SIZE>
inline void start_product(float (&c)[SIZE], u64 a, u64 b) {
    host::start_product(c, a, b, SIZE * 2, INPUT - INPUT_TF32);
}
#endif
inline void fence_sums() { host::fence_sums(); }
inline void commit_products() { host::commit_products(); }
template <int LATER>
inline void wait_for_products() {
    host::wait_for_products(LATER);
}
inline void fence_writes() { host::fence_writes(); }
template <class Registers>
inline void settle(Registers&) {}
#endif

// Of a matrix in shared memory: where it begins, how far the next 64 features are (without
// a swizzle, the next eight rows) and the next eight rows (the next eight features), in
// units of 16 bytes, and its swizzle. What lies further is a sum: addresses are its lowest bits.
constexpr u64 SWIZZLED = 1, SWIZZLED_64 = 2, PLAIN_ROWS = 0;
DEVICE u64 descriptor(const void* at, int blocks, int rows, u64 swizzle) {
    return (shared_address(at) & 0x3ffff) >> 4 | (u64)blocks << 16 | (u64)rows << 32 |
           swizzle << 62;
}

DEVICE int warp_row() { return threadIdx.x / 32 * 16; }

#if !TRANSPOSED  // the rest of pipeline.cuh

static_assert(ROWS % 16 == 0 && TILE % 64 == 0, "whole products");
static_assert(sizeof(Stage) % 1024 == 0, "a swizzled block begins at 1024 bytes");

// 64 features of 16 rows.
DEVICE u64 operand_descriptor(const Words4* tile, int block, int row) {
    return descriptor(tile + block * (ROWS * 8) + row * 8, ROWS * 8, 8 * 8, SWIZZLED);
}

// Of the first of all stages; further columns of further ones, in two products of 16 rows.
DEVICE u64 first_descriptor(const Stage* stages) {
    return operand_descriptor(stages->right, 0, 0);
}
constexpr int COLUMN_CHUNKS = ROWS * 8 / 64, HALF_CHUNKS = 16 * 8;

#if !LEFT_IN_REGISTERS

// As in pipeline.cuh; but a step's products are still under way when the next one's begin,
// so that copies are one stage less ahead.
template <class Rows, class Copy, class Multiply>
DEVICE void pipelined(int steps, Rows rows, Copy copy, Multiply multiply) {
    constexpr int AHEAD = STAGES - 2;
    for (int s = 0; s <= AHEAD; s++) rows(s);
    __syncthreads();
    for (int s = 0; s < AHEAD; s++) {
        if (s < steps) copy(s);
        commit_copies();
    }
    for (int step = 0; step < steps; step++) {
        wait_for_copies<AHEAD - 1>();
        fence_writes();
        __syncthreads();
        multiply(step);
        commit_products();
        int ahead = step + AHEAD;
        if (ahead < steps) copy(ahead);
        commit_copies();
        rows(ahead + 1);
        wait_for_products<1>();
    }
    wait_for_products<0>();
}

// Start the products of one step.
DEVICE void multiply(float (&sum)[COUNT], const Words4* left, const Words4* right) {
    fence_sums();
#pragma unroll
    for (int row = 0; row < ROWS; row += 16)
        start_product(sum, operand_descriptor(left, threadIdx.x / 128, row),
                      operand_descriptor(right, 0, row));
}

// And those of the sums over its rows of the warpgroup's features: a product with ones, all
// of whose columns are the same.
DEVICE void add_sums(float (&sum)[4], const Words4* left, const Words4* ones) {
    fence_sums();
#pragma unroll
    for (int row = 0; row < ROWS; row += 16)
        start_product(sum, operand_descriptor(left, threadIdx.x / 128, row),
                      descriptor(ones, 8, 8, PLAIN_ROWS));
}

DEVICE int feature_of_row(int, int upper) { return threadIdx.x % 32 / 4 + upper * 8; }

// Element i of a thread's part of the tile: a warp has 16 rows.
DEVICE int row_of(int i) { return warp_row() + feature_of_row(0, i % 4 / 2); }
DEVICE int column_of(int i) { return i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2; }

#endif
#endif
