// out <- beta out + alpha sum_k w_k [index_k = v] for every v, for many layers at once:
// how often each token occurs. Weights are added as whole multiples of 2^-32 of the
// largest of their layer, and whole numbers add up to the same in whatever order threads
// come: atomics that repeat bit by bit.
#include "common.cuh"

constexpr int THREADS = 256;
constexpr int SHARE = 1024;  // indices, or bins, of a piece of work
constexpr float UNIT = 4294967296.0f;

struct Problem {
    const i64* index;
    const float* weight;     // [N, S] or null
    const float* scale;      // what weights were divided by, or null
    float* out;              // [size]
    i64 stride_n, stride_s;  // in elements
    i64 bins;                // where this problem's bins begin
    int positions, rows, size;  // S, N S, and how many values there are
    int first, first_tile;      // its first piece of indices, its first piece of bins
    float alpha, beta;
};

struct Params {
    int count, padding;
    i64* parts;  // bins, zero before the launch
    Problem problem[PROBLEMS];
};
static_assert(sizeof(Params) <= PARAMETER_BYTES, "does not fit into a launch");

KERNEL(counts, Params, THREADS) {
    int item = blockIdx.x;
    const Problem& q = p.problem[problem_of(p, item)];
    int begin = (item - q.first) * SHARE, end = begin + SHARE;
    if (end > q.rows) end = q.rows;
    for (int k = begin + threadIdx.x; k < end; k += THREADS) {
        int n = k / q.positions, s = k - n * q.positions;
        i64 value = q.index[n * q.stride_n + s * q.stride_s];
        if (value < 0 || value >= q.size) continue;
        float weight = q.weight ? q.weight[k] : 1.0f;
        add_whole(p.parts + q.bins + value, (i64)(weight * UNIT));
    }
}

// Turns the bins into what they stand for.
KERNEL(counts_finish, Params, THREADS) {
    int index = 0, tile = blockIdx.x;
    while (index + 1 < p.count && p.problem[index + 1].first_tile <= tile) index++;
    const Problem& q = p.problem[index];
    int begin = (tile - q.first_tile) * SHARE, end = begin + SHARE;
    if (end > q.size) end = q.size;
    for (int v = begin + threadIdx.x; v < end; v += THREADS) {
        float sum = (float)p.parts[q.bins + v] / UNIT * (q.scale ? *q.scale : 1.0f);
        q.out[v] = updated(q.out + v, q.beta, q.alpha * sum);
    }
}
