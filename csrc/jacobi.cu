// Eigenvalues and eigenvectors of many small symmetric matrices, one block of threads
// for each: Jacobi's method in shared memory (Golub & Van Loan, Matrix Computations,
// section 8.5). Rotations of disjoint pairs are done at once; a tournament's rounds bring
// every pair together once in a sweep.
#include "common.cuh"

constexpr int THREADS = 512;
constexpr int SWEEPS = 16;

struct Params {
    float* matrix;   // [count, n, n], destroyed; its diagonal becomes the eigenvalues
    float* vectors;  // [count, n, n], eigenvectors in columns
    int n, count;
};

// x <- x - s (y + tau x), y <- y + s (x - tau y) with tau = s / (1 + c): each is a small
// change of what was there, where c x - s y would round all of it again (Rutishauser
// 1966; Golub & Van Loan, section 8.5.7).
struct Rotation {
    int p, q;
    float s, tau;
};

// The pair with a given number in a round: players 1 .. m - 1 move round a circle, player
// 0 stays.
DEVICE void meet(int round, int number, int m, int& a, int& b) {
    int others = m - 1;
    a = number == 0 ? 0 : 1 + (round + number - 1) % others;
    b = 1 + (round + others - 1 - number) % others;
    if (a > b) {
        int other = a;
        a = b;
        b = other;
    }
}

DEVICE Rotation rotation_of(const float* a, int pitch, int n, int i, int j) {
    Rotation r = {i, j, 0.0f, 0.0f};
    if (j >= n) return r;
    float off = a[i * pitch + j], x = a[i * pitch + i], y = a[j * pitch + j];
    if (off == 0.0f) return r;
    // The smaller of the two angles that make the pair's element zero.
    float theta = (y - x) / (2.0f * off);
    float t = 1.0f / (fabsf(theta) + sqrtf(theta * theta + 1.0f));
    if (theta < 0) t = -t;
    float c = 1.0f / sqrtf(t * t + 1.0f);
    r.s = t * c;
    r.tau = r.s / (1.0f + c);
    return r;
}

DEVICE void turn(const Rotation& r, float& x, float& y) {
    float old = x;
    x -= r.s * (y + r.tau * x);
    y += r.s * (old - r.tau * y);
}

KERNEL(jacobi, Params, THREADS) {
    SHARED_BYTES(bytes);
    int n = p.n, pitch = n | 1, m = (n + 1) / 2 * 2, pairs = m / 2;
    float* a = reinterpret_cast<float*>(bytes);
    float* v = a + n * pitch;
    float* scratch = v + n * pitch;
    Rotation* rotations = reinterpret_cast<Rotation*>(scratch + THREADS);
    float* matrix = p.matrix + (i64)blockIdx.x * n * n;
    float* vectors = p.vectors + (i64)blockIdx.x * n * n;
    float size = 0;
    for (int e = threadIdx.x; e < n * n; e += THREADS) {
        int r = e / n, c = e % n;
        a[r * pitch + c] = matrix[e];
        v[r * pitch + c] = r == c ? 1.0f : 0.0f;
        size += matrix[e] * matrix[e];
    }
    size = block_sum<THREADS>(size, scratch);
    for (int sweep = 0; sweep < SWEEPS; sweep++) {
        float off = 0;
        for (int e = threadIdx.x; e < n * n; e += THREADS) {
            float x = a[e / n * pitch + e % n];
            if (e / n != e % n) off += x * x;
        }
        off = block_sum<THREADS>(off, scratch);
        // Rounding leaves eps / 2 in each of n^2 elements, of which each is about
        // the norm over the root of n: (eps / 2)^2 n of its square.
        if (!(off > 3.5e-15f * n * size)) break;
        for (int round = 0; round < m - 1; round++) {
            if (threadIdx.x < pairs) {
                int i, j;
                meet(round, threadIdx.x, m, i, j);
                rotations[threadIdx.x] = rotation_of(a, pitch, n, i, j);
            }
            __syncthreads();
            for (int e = threadIdx.x; e < pairs * n; e += THREADS) {
                Rotation r = rotations[e / n];
                if (r.s == 0.0f) continue;
                turn(r, a[r.p * pitch + e % n], a[r.q * pitch + e % n]);
            }
            __syncthreads();
            for (int e = threadIdx.x; e < pairs * n * 2; e += THREADS) {
                Rotation r = rotations[e / 2 / n];
                if (r.s == 0.0f) continue;
                float* of = (e % 2 ? v : a) + e / 2 % n * pitch;
                turn(r, of[r.p], of[r.q]);
            }
            __syncthreads();
            if (threadIdx.x < pairs && rotations[threadIdx.x].s != 0.0f) {
                Rotation r = rotations[threadIdx.x];
                a[r.p * pitch + r.q] = a[r.q * pitch + r.p] = 0.0f;
            }
            __syncthreads();
        }
    }
    __syncthreads();
    for (int e = threadIdx.x; e < n * n; e += THREADS) {
        matrix[e] = a[e / n * pitch + e % n];
        vectors[e] = v[e / n * pitch + e % n];
    }
}
