// Products of fragments on the tensor cores: 16 x 8 words times 8 words x 8 (PTX ISA,
// "Matrix Fragments for mma.m16n8k8" with .tf32 and "mma.m16n8k16" with .bf16 and .f16: in
// words of 32 bits the two have one layout).
#pragma once
#include "common.cuh"

#if INPUT != INPUT_FLOAT
#ifndef EKFAC_HOST
DEVICE void fragment_product(float* c, const u32* a, const u32* b) {
#if INPUT == INPUT_TF32
#define EKFAC_MMA "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
#elif INPUT == INPUT_BFLOAT16
#define EKFAC_MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#else
#define EKFAC_MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#endif
    asm(EKFAC_MMA "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// M x N fragments of the result.
template <int M, int N>
DEVICE void warp_product(float* c, const u32* a, const u32* b) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
            fragment_product(c + (m * N + n) * 4, a + m * 4, b + n * 2);
}
#else
// All lanes of a warp together, on the CPU.
template <int M, int N>
inline void warp_product(float* c, const u32* a, const u32* b) {
    host::warp_product(c, a, b, M, N, INPUT - INPUT_TF32);
}
#endif

#endif
