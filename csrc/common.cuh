// What every kernel starts from. No header of PyTorch, CUDA or C++ is included, so that
// NVRTC compiles the files as they are; with EKFAC_HOST they are compiled for the CPU,
// where host.h stands in for the language's own words (tests/host).
#pragma once

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;

#ifdef EKFAC_HOST
#include "host.h"
#else
#define DEVICE __device__ __forceinline__
// A kernel takes one struct by value: nothing has to be copied to the device before the
// launch, and a CUDA graph keeps its own copy.
#define KERNEL(name, Params, threads) \
    extern "C" __global__ void __launch_bounds__(threads) \
        name(const __grid_constant__ Params p)
#define SHARED_BYTES(name) extern __shared__ __align__(1024) unsigned char name[]
DEVICE u32 shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }
DEVICE u32 bits(float x) { return __float_as_uint(x); }
DEVICE float from_bits(u32 x) { return __uint_as_float(x); }
DEVICE float half_to_float(u16 x) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x));
    return result;
}
// To nearest: ties to even are one instruction from sm_90 on, ties away from zero are three
// (and take fewer registers where elements are rounded on their way to shared memory).
DEVICE u32 round_to_tf32(u32 x) {
    u32 result;
#if __CUDA_ARCH__ >= 900 && PIPELINE
    asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(result) : "f"(from_bits(x)));
#else
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(from_bits(x)));
#endif
    return result;
}
// Keeps a number in its register: the compiler would find it again at every step.
DEVICE void keep(int& x) { asm volatile("" : "+r"(x)); }
DEVICE void add_whole(i64* to, i64 value) {
    atomicAdd(reinterpret_cast<unsigned long long*>(to), (unsigned long long)value);
}
#endif

// Words read or written by one instruction.
template <int COUNT>
struct alignas(4 * COUNT) Words {
    u32 v[COUNT];
};
typedef Words<2> Words2;
typedef Words<4> Words4;

template <class Several>
DEVICE Several read_words(const void* from) {
#ifdef EKFAC_HOST
    Several words;
    host::read_words(&words, from, sizeof words);
    return words;
#else
    return *static_cast<const Several*>(from);
#endif
}

DEVICE void write_words(void* to, const Words4& words) {
#ifdef EKFAC_HOST
    host::write_words(to, &words, sizeof(Words4));
#else
    *static_cast<Words4*>(to) = words;
#endif
}

// The type of the inputs, and of the products made of them.
#define INPUT_FLOAT 0     // float32, multiplied as such
#define INPUT_TF32 1      // float32, rounded to TF32 for the tensor cores
#define INPUT_BFLOAT16 2  // both half types: products on the tensor cores,
#define INPUT_HALF 3      // sums in float32
#ifndef INPUT
#define INPUT INPUT_FLOAT
#endif

#if INPUT >= INPUT_BFLOAT16
typedef u16 Element;
#else
typedef float Element;
#endif

// Layers of one launch: as many as the 4 KiB of parameters hold that every driver takes,
// or the 32 KiB of newer ones.
#ifndef PROBLEMS
#define PROBLEMS 16
#endif
constexpr int PARAMETER_BYTES = PROBLEMS <= 16 ? 4096 : 32764;

DEVICE float to_float(float x) { return x; }

DEVICE float to_float(u16 x) {
#if INPUT == INPUT_HALF
    return half_to_float(x);
#else
    return from_bits((u32)x << 16);
#endif
}

// The problem that a piece of work belongs to: the last whose `first` is not above it.
template <class Params>
DEVICE int problem_of(const Params& p, int item) {
    int index = 0;
    while (index + 1 < p.count && p.problem[index + 1].first <= item) index++;
    return index;
}

DEVICE float updated(const float* old, float beta, float update) {
    // The old value is not even read where it does not count: it may be anything.
    return beta == 0.0f ? update : beta * *old + update;
}

// The sum of everybody's value, the same in whatever order threads arrive.
template <int SIZE>
DEVICE float block_sum(float value, float* shared) {
    __syncthreads();
    shared[threadIdx.x] = value;
    for (int half = SIZE / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    }
    __syncthreads();
    return shared[0];
}

// The sums of a layer's pieces: COUNT numbers of each, next to each other.
template <int COUNT, int SIZE, class Params>
DEVICE void sum_pieces(const Params& p, float* shared) {
    const auto& q = p.problem[blockIdx.x];
    for (int i = 0; i < COUNT; i++) {
        float sum = 0;
        for (int piece = threadIdx.x; piece < q.pieces; piece += SIZE)
            sum += p.parts[COUNT * (i64)(q.first + piece) + i];
        sum = block_sum<SIZE>(sum, shared);
        if (threadIdx.x == 0) q.sums[i] = sum;
    }
}
