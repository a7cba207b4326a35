// s <- keep s + rate u^2 of projected gradients u, for many layers at once, with the sum
// of each layer's new s in the same pass: the running average of the scalings, and what a
// damping relative to their mean asks for. A rate of zero does not read u.
#include "common.cuh"

constexpr int THREADS = 256;
constexpr int SHARE = 4096;  // elements of a piece of work

struct Problem {
    float* s;            // [blocks, d_out, d_in]
    const float* u;      // the same shape
    const float* scale;  // keep and rate
    float* sums;         // one number
    i64 s_block, s_row, u_block, u_row;
    int rows, columns;  // d_out, d_in
    int elements;       // blocks d_out d_in
    int first, pieces;
};

struct Params {
    int count, padding;
    float* parts;  // a number for each piece
    Problem problem[PROBLEMS];
};
static_assert(sizeof(Params) <= PARAMETER_BYTES, "does not fit into a launch");

KERNEL(squares, Params, THREADS) {
    __shared__ float shared[THREADS];
    int item = blockIdx.x;
    const Problem& q = p.problem[problem_of(p, item)];
    float keep = q.scale[0], rate = q.scale[1], sum = 0;
    int begin = (item - q.first) * SHARE, end = begin + SHARE;
    if (end > q.elements) end = q.elements;
    for (int e = begin + threadIdx.x; e < end; e += THREADS) {
        int column = e % q.columns, row = e / q.columns;
        int block = row / q.rows;
        row %= q.rows;
        float* to = q.s + block * q.s_block + row * q.s_row + column;
        float s = keep * *to;
        if (rate != 0.0f) {
            float u = q.u[block * q.u_block + row * q.u_row + column];
            s += rate * u * u;
        }
        *to = s;
        sum += s;
    }
    sum = block_sum<THREADS>(sum, shared);
    if (threadIdx.x == 0) p.parts[item] = sum;
}

// Sums the pieces of one layer.
KERNEL(squares_finish, Params, THREADS) {
    __shared__ float shared[THREADS];
    sum_pieces<1, THREADS>(p, shared);
}
