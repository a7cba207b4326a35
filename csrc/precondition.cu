// u <- u (s + damping)^power of projected gradients u, for many layers at once, with
// sum u_new^2 (s + damping) and sum u_new^2 of each layer in the same pass: what a bound
// on the step in the metric, and grafting, ask for.
#include "common.cuh"

constexpr int THREADS = 256;
constexpr int SHARE = 4096;  // elements of a piece of work

struct Problem {
    float* u;              // [blocks, d_out, d_in]
    const float* s;        // the same shape
    const float* damping;  // one number
    float* sums;           // two numbers
    i64 u_block, u_row, s_block, s_row;
    int rows, columns;  // d_out, d_in
    int elements;       // blocks d_out d_in
    int first, pieces;
};

struct Params {
    int count, padding;
    float power;
    int unused;
    float* parts;  // two numbers for each piece
    Problem problem[PROBLEMS];
};
static_assert(sizeof(Params) <= PARAMETER_BYTES, "does not fit into a launch");

KERNEL(precondition, Params, THREADS) {
    __shared__ float shared[THREADS];
    int item = blockIdx.x;
    const Problem& q = p.problem[problem_of(p, item)];
    float damping = *q.damping, form = 0, norm = 0;
    int begin = (item - q.first) * SHARE, end = begin + SHARE;
    if (end > q.elements) end = q.elements;
    for (int e = begin + threadIdx.x; e < end; e += THREADS) {
        int column = e % q.columns, row = e / q.columns;
        int block = row / q.rows;
        row %= q.rows;
        float* u = q.u + block * q.u_block + row * q.u_row + column;
        float s = q.s[block * q.s_block + row * q.s_row + column] + damping;
        float result = 0;  // where there is no curvature at all: the pseudo-inverse
        if (!(s <= 0)) result = p.power == -1.0f ? *u / s : *u * powf(s, p.power);
        *u = result;
        norm += result * result;
        form += result * result * s;
    }
    form = block_sum<THREADS>(form, shared);
    norm = block_sum<THREADS>(norm, shared);
    if (threadIdx.x == 0) {
        p.parts[2 * (i64)item] = form;
        p.parts[2 * (i64)item + 1] = norm;
    }
}

// Sums the pieces of one layer.
KERNEL(precondition_finish, Params, THREADS) {
    __shared__ float shared[THREADS];
    sum_pieces<2, THREADS>(p, shared);
}
