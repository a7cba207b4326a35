// u <- r o polar(r o u), r = (s / weight + damping)^-1/2, of projected gradients u, for many
// layers of different shape at once: scaling, all polynomials of the approximate polar
// factor (ekfac/kernels/linalg.py) and scaling back, a block of threads for each matrix,
// in shared memory. With sum u_new^2 (s / weight + damping) and sum u_new^2 of each layer.
//
// SIDE 32, 64 or 128: the shorter side of a matrix is at most that long.
#include "common.cuh"

#ifndef SIDE
#define SIDE 128
#endif
constexpr int ALONG = SIDE == 32 ? 8 : 16;  // threads along a tile of SIDE x SIDE
constexpr int THREADS = ALONG * ALONG;
constexpr int EACH = SIDE / ALONG;  // rows, and columns, of a thread
constexpr int PITCH = SIDE + 1;     // of X X^T: a column touches all banks
constexpr int MOST = 5;             // polynomials
constexpr float TINY = 1.17549435e-38f;

struct Problem {
    float* u;            // [blocks, d_out, d_in]
    const float* s;      // the same shape
    const float* scale;  // weight and damping
    float* sums;         // two numbers
    i64 u_block, u_row, s_block, s_row;
    int rows, columns;  // d_out, d_in
    int first, pieces;  // this problem's first matrix, and how many it has
};

struct Params {
    int count, padding;
    float polynomial[3 * MOST];  // a x + b x^3 + c x^5, step by step
    int steps;
    float* parts;  // two numbers for each matrix
    Problem problem[PROBLEMS];
};
static_assert(sizeof(Params) <= PARAMETER_BYTES, "does not fit into a launch");

// A matrix of a launch, its shorter side along the rows of the copy in shared memory.
struct Matrix {
    float* u;
    const float* s;
    i64 u_row, s_row;
    float weight, damping;
    int columns, elements, m, n, pitch;
    bool tall;

    DEVICE float damped(int e) const {
        return s[e / columns * s_row + e % columns] / weight + damping;
    }
    // Where element e of the layer's own order is.
    DEVICE int in_shared(int e) const {
        int row = e / columns, column = e % columns;
        return tall ? column * pitch + row : row * pitch + column;
    }
    DEVICE float& in_memory(int e) const { return u[e / columns * u_row + e % columns]; }
};

DEVICE Matrix matrix_of(const Problem& q, int block) {
    Matrix x;
    x.u = q.u + block * q.u_block;
    x.s = q.s + block * q.s_block;
    x.u_row = q.u_row;
    x.s_row = q.s_row;
    x.weight = q.scale[0];
    x.damping = q.scale[1];
    x.columns = q.columns;
    x.elements = q.rows * q.columns;
    x.tall = q.rows > q.columns;
    x.m = x.tall ? q.columns : q.rows;
    x.n = x.tall ? q.rows : q.columns;
    x.pitch = x.n | 1;
    return x;
}

// The rows or columns of a thread from `first` on. Those beyond the end are the last: what
// is made of them is thrown away.
DEVICE void places(int (&at)[EACH], int thread, int first, int end) {
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int own = first + thread + i * ALONG;
        at[i] = own < end ? own : end - 1;
    }
}

// sum_k left[row, k] right[k, column], for operands with these distances of elements.
DEVICE void multiply(float (&sum)[EACH][EACH], const float* left, const int (&row)[EACH],
                     int per_row, int left_per_k, const float* right,
                     const int (&column)[EACH], int per_column, int right_per_k,
                     int depth) {
    int l[EACH], r[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        l[i] = row[i] * per_row;
        r[i] = column[i] * per_column;
#pragma unroll
        for (int j = 0; j < EACH; j++) sum[i][j] = 0;
    }
#pragma unroll 2
    for (int k = 0; k < depth; k++, left += left_per_k, right += right_per_k) {
        float a[EACH], b[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            a[i] = left[l[i]];
            b[i] = right[r[i]];
        }
#pragma unroll
        for (int i = 0; i < EACH; i++)
#pragma unroll
            for (int j = 0; j < EACH; j++) sum[i][j] += a[i] * b[j];
    }
}

// The matrix in shared memory becomes its approximate polar factor.
DEVICE void take_polar(const Params& p, const Matrix& x, float* own, float* gram,
                       float* scratch) {
    int top = threadIdx.x / ALONG, side = threadIdx.x % ALONG, row[EACH], column[EACH];
    float sum[EACH][EACH], shrink = 1.0f;
    places(row, top, 0, x.m);
    places(column, side, 0, x.m);
    for (int step = 0; step < p.steps; step++) {
        const float* factor = p.polynomial + 3 * step;
        multiply(sum, own, row, x.pitch, 1, own, column, x.pitch, 1, x.n);
#pragma unroll
        for (int i = 0; i < EACH; i++)
#pragma unroll
            for (int j = 0; j < EACH; j++)
                if (top + i * ALONG < x.m && side + j * ALONG < x.m)
                    gram[row[i] * PITCH + column[j]] = sum[i][j];
        __syncthreads();
        multiply(sum, gram, row, 1, PITCH, gram, column, 1, PITCH, x.m);  // symmetric
        float bound = 1.0f;
        if (step == 0) {
            // The root of the norm of the fourth power: above the largest eigenvalue.
            float fourth = 0;
#pragma unroll
            for (int i = 0; i < EACH; i++)
#pragma unroll
                for (int j = 0; j < EACH; j++)
                    if (top + i * ALONG < x.m && side + j * ALONG < x.m)
                        fourth += sum[i][j] * sum[i][j];
            fourth = sqrtf(block_sum<THREADS>(fourth, scratch));
            bound = sqrtf(fourth < TINY ? TINY : fourth);
        }
        shrink = 1.0f / sqrtf(bound);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < EACH; i++)
#pragma unroll
            for (int j = 0; j < EACH; j++)
                if (top + i * ALONG < x.m && side + j * ALONG < x.m) {
                    float& g = gram[row[i] * PITCH + column[j]];
                    g = (factor[1] * g + factor[2] * (sum[i][j] / bound)) / bound;
                }
        __syncthreads();
        for (int first = 0; first < x.n; first += SIDE) {
            int at[EACH];
            places(at, side, first, x.n);
            multiply(sum, gram, row, 1, PITCH, own, at, 1, x.pitch, x.m);
            __syncthreads();
#pragma unroll
            for (int i = 0; i < EACH; i++)
#pragma unroll
                for (int j = 0; j < EACH; j++)
                    if (top + i * ALONG < x.m && first + side + j * ALONG < x.n) {
                        float& o = own[row[i] * x.pitch + at[j]];
                        o = shrink * (factor[0] * o + sum[i][j]);
                    }
        }
        __syncthreads();
    }
}

KERNEL(spectral, Params, THREADS) {
    SHARED_BYTES(bytes);
    int item = blockIdx.x;
    const Problem& q = p.problem[problem_of(p, item)];
    Matrix x = matrix_of(q, item - q.first);
    float* scratch = reinterpret_cast<float*>(bytes);
    float* gram = scratch + THREADS;
    float* own = gram + x.m * PITCH;
    float size = 0;
    for (int e = threadIdx.x; e < x.elements; e += THREADS) {
        float value = x.in_memory(e) * (1.0f / sqrtf(x.damped(e)));
        own[x.in_shared(e)] = value;
        size += value * value;
    }
    size = sqrtf(block_sum<THREADS>(size, scratch));
    float scale = 1.0f / (size < TINY ? TINY : size);
    for (int e = threadIdx.x; e < x.elements; e += THREADS) own[x.in_shared(e)] *= scale;
    __syncthreads();
    take_polar(p, x, own, gram, scratch);
    float form = 0, norm = 0;
    for (int e = threadIdx.x; e < x.elements; e += THREADS) {
        float damped = x.damped(e);
        float value = own[x.in_shared(e)] * (1.0f / sqrtf(damped));
        x.in_memory(e) = value;
        norm += value * value;
        form += value * value * damped;
    }
    form = block_sum<THREADS>(form, scratch);
    norm = block_sum<THREADS>(norm, scratch);
    if (threadIdx.x == 0) {
        p.parts[2 * (i64)item] = form;
        p.parts[2 * (i64)item + 1] = norm;
    }
}

// Sums the matrices of one layer.
KERNEL(spectral_finish, Params, THREADS) {
    SHARED_BYTES(bytes);
    sum_pieces<2, THREADS>(p, reinterpret_cast<float*>(bytes));
}
