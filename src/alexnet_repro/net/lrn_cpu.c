/* Normalisation across maps and within a map, and their gradients, each in one pass. See lrn.py for the formulas.

   Arrays are channels-last. beta is fixed at 0.75: s^-0.75 = r sqrt(r) with r = s^-1/2. All arithmetic is in float.
   Functions return 0, or 1 if there is no memory for their buffers. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* lrn_cpu.py defines two macros. WIDEST: maximum number of maps in a tower. REACH: maximum number of maps on either
   side of a window's centre. */
#define INLINE static inline __attribute__((always_inline))

INLINE void load_bf16(const uint16_t *restrict from, float *restrict to, int count) {
    uint32_t *bits = (uint32_t *)to;
    for (int c = 0; c < count; c++) bits[c] = (uint32_t)from[c] << 16;
}

INLINE void store_bf16(const float *restrict from, uint16_t *restrict to, int count) {
    const uint32_t *bits = (const uint32_t *)from; /* round to nearest, ties to even */
    for (int c = 0; c < count; c++) to[c] = (uint16_t)((bits[c] + 0x7fff + ((bits[c] >> 16) & 1)) >> 16);
}

INLINE void load_fp32(const float *restrict from, float *restrict to, int count) {
    for (int c = 0; c < count; c++) to[c] = from[c];
}

INLINE void store_fp32(const float *restrict from, float *restrict to, int count) {
    for (int c = 0; c < count; c++) to[c] = from[c];
}

/* Across maps. Each row holds the `maps` values of one tower at one position. */

/* Set sum[c] to the sum of the n values centred on x[REACH + c]. x is zero-padded by REACH on both sides. */
INLINE void window_sum(const float *restrict x, float *restrict sum, int maps, const int n) {
    const float *first = x + REACH - n / 2;
    for (int c = 0; c < maps; c++) {
        float total = first[c];
        for (int d = 1; d < n; d++) total += first[c + d];
        sum[c] = total;
    }
}

#define LRN(NAME, T)                                                                                                  \
    INLINE void forward_rows_##NAME(const T *restrict a, T *restrict b, long rows, const int maps, const int n,       \
                                    float alpha, float k) {                                                           \
        float x[WIDEST], squares[WIDEST + 2 * REACH] = {0}, s[WIDEST];                                                \
        for (; rows > 0; rows--, a += maps, b += maps) {                                                              \
            load_##NAME(a, x, maps);                                                                                  \
            for (int c = 0; c < maps; c++) squares[REACH + c] = x[c] * x[c];                                          \
            window_sum(squares, s, maps, n);                                                                          \
            for (int c = 0; c < maps; c++) {                                                                          \
                float r = 1 / sqrtf(k + alpha * s[c]);                                                                \
                s[c] = x[c] * r * sqrtf(r);                                                                           \
            }                                                                                                         \
            store_##NAME(s, b, maps);                                                                                 \
        }                                                                                                             \
    }                                                                                                                 \
    INLINE void backward_rows_##NAME(const T *restrict a, const T *restrict db, T *restrict da, long rows,            \
                                     const int maps, const int n, float alpha, float k) {                             \
        float x[WIDEST], squares[WIDEST + 2 * REACH] = {0}, s[WIDEST];                                                \
        float direct[WIDEST], through[WIDEST + 2 * REACH] = {0};                                                      \
        const float scale = -1.5f * alpha; /* -2 alpha beta */                                                        \
        for (; rows > 0; rows--, a += maps, db += maps, da += maps) {                                                 \
            load_##NAME(a, x, maps);                                                                                  \
            load_##NAME(db, direct, maps);                                                                            \
            for (int c = 0; c < maps; c++) squares[REACH + c] = x[c] * x[c];                                          \
            window_sum(squares, s, maps, n);                                                                          \
            for (int c = 0; c < maps; c++) {                                                                          \
                float r = 1 / sqrtf(k + alpha * s[c]);                                                                \
                direct[c] *= r * sqrtf(r);                                                                            \
                through[REACH + c] = direct[c] * x[c] * (r * r);                                                      \
            }                                                                                                         \
            window_sum(through, s, maps, n);                                                                          \
            for (int c = 0; c < maps; c++) s[c] = direct[c] + scale * x[c] * s[c];                                    \
            store_##NAME(s, da, maps);                                                                                \
        }                                                                                                             \
    }                                                                                                                 \
    /* Constant loop lengths for the paper's networks let the compiler vectorise without remainder loops. */          \
    int forward_##NAME(const T *a, T *b, long rows, int maps, int n, float alpha, float k) {                          \
        if (n == 5 && maps == 48) forward_rows_##NAME(a, b, rows, 48, 5, alpha, k);                                   \
        else if (n == 5 && maps == 128) forward_rows_##NAME(a, b, rows, 128, 5, alpha, k);                            \
        else if (n == 5) forward_rows_##NAME(a, b, rows, maps, 5, alpha, k);                                          \
        else if (n == 9 && maps == 64) forward_rows_##NAME(a, b, rows, 64, 9, alpha, k);                              \
        else forward_rows_##NAME(a, b, rows, maps, n, alpha, k);                                                      \
        return 0;                                                                                                     \
    }                                                                                                                 \
    int backward_##NAME(const T *a, const T *db, T *da, long rows, int maps, int n, float alpha, float k) {           \
        if (n == 5 && maps == 48) backward_rows_##NAME(a, db, da, rows, 48, 5, alpha, k);                             \
        else if (n == 5 && maps == 128) backward_rows_##NAME(a, db, da, rows, 128, 5, alpha, k);                      \
        else if (n == 5) backward_rows_##NAME(a, db, da, rows, maps, 5, alpha, k);                                    \
        else if (n == 9 && maps == 64) backward_rows_##NAME(a, db, da, rows, 64, 9, alpha, k);                        \
        else backward_rows_##NAME(a, db, da, rows, maps, n, alpha, k);                                                \
        return 0;                                                                                                     \
    }

LRN(bf16, uint16_t)
LRN(fp32, float)

/* Within a map. An image is (height, width, maps). LANES maps are processed at a time, row by row, in buffers of a few
   rows that stay in cache. Rows and columns outside the image are zero, so that every window has n x n values. */
#define LANES 32
/* A loop over i whose arrays do not overlap. */
#define EACH(i, count) _Pragma("GCC ivdep") for (long i = 0; i < count; i++)

/* Set sums[i] to the sum of n values that are LANES apart, for the `row` values of one row of positions. */
INLINE void row_sum(const float *restrict padded, float *restrict sums, long row, const int n) {
    for (long i = 0; i < row; i++) {
        float total = padded[i];
        for (int d = 1; d < n; d++) total += padded[i + d * LANES];
        sums[i] = total;
    }
}

/* Return the sum of value i over n rows. */
INLINE float column_sum(const float *restrict rows, long row, long i, const int n) {
    float total = rows[i];
    for (int d = 1; d < n; d++) total += rows[d * row + i];
    return total;
}

#define SAME_MAP(NAME, T)                                                                                             \
    INLINE void load_row_##NAME(const T *restrict from, float *restrict to, int width, int maps, int lanes) {         \
        for (int x = 0; x < width; x++, from += maps, to += LANES) {                                                  \
            if (lanes == LANES) load_##NAME(from, to, LANES);                                                         \
            else load_##NAME(from, to, lanes);                                                                        \
        }                                                                                                             \
    }                                                                                                                 \
    INLINE void store_row_##NAME(const float *restrict from, T *restrict to, int width, int maps, int lanes) {        \
        for (int x = 0; x < width; x++, from += LANES, to += maps) {                                                  \
            if (lanes == LANES) store_##NAME(from, to, LANES);                                                        \
            else store_##NAME(from, to, lanes);                                                                       \
        }                                                                                                             \
    }                                                                                                                 \
    INLINE int same_map_forward_n_##NAME(const T *a, T *b, long images, int height, int width, int maps,              \
                                         const int n, float alpha, float k) {                                         \
        const int reach = n / 2;                                                                                      \
        const long row = (long)width * LANES, step = (long)width * maps;                                              \
        float *memory = calloc((n + 2) * row + 2 * reach * LANES, sizeof(float));                                     \
        if (!memory) return 1;                                                                                        \
        float *sums = memory, *x = sums + n * row, *padded = x + row, *inside = padded + reach * LANES;               \
        for (; images > 0; images--, a += height * step, b += height * step)                                          \
            for (int first = 0; first < maps; first += LANES) {                                                       \
                const int lanes = maps - first < LANES ? maps - first : LANES;                                        \
                memset(sums, 0, n * row * sizeof(float));                                                             \
                for (int y = 0; y < height + reach; y++) {                                                            \
                    if (y < height) {                                                                                 \
                        load_row_##NAME(a + first + y * step, inside, width, maps, lanes);                            \
                        EACH(i, row) inside[i] *= inside[i];                                                          \
                        row_sum(padded, sums + y % n * row, row, n);                                                  \
                    } else memset(sums + y % n * row, 0, row * sizeof(float));                                        \
                    if (y < reach) continue;                                                                          \
                    load_row_##NAME(a + first + (y - reach) * step, x, width, maps, lanes);                           \
                    EACH(i, row) {                                                                                    \
                        float r = 1 / sqrtf(k + alpha * column_sum(sums, row, i, n));                                 \
                        x[i] *= r * sqrtf(r);                                                                         \
                    }                                                                                                 \
                    store_row_##NAME(x, b + first + (y - reach) * step, width, maps, lanes);                          \
                }                                                                                                     \
            }                                                                                                         \
        free(memory);                                                                                                 \
        return 0;                                                                                                     \
    }                                                                                                                 \
    INLINE int same_map_backward_n_##NAME(const T *a, const T *db, T *da, long images, int height, int width,         \
                                          int maps, const int n, float alpha, float k) {                              \
        const int reach = n / 2;                                                                                      \
        const long row = (long)width * LANES, step = (long)width * maps;                                              \
        const float scale = -1.5f * alpha; /* -2 alpha beta */                                                        \
        float *memory = calloc((3 * n + 2) * row + 2 * reach * LANES, sizeof(float));                                 \
        if (!memory) return 1;                                                                                        \
        float *squares = memory, *through = squares + n * row, *direct = through + n * row;                           \
        float *x = direct + n * row, *padded = x + row, *inside = padded + reach * LANES;                             \
        for (; images > 0; images--, a += height * step, db += height * step, da += height * step)                    \
            for (int first = 0; first < maps; first += LANES) {                                                       \
                const int lanes = maps - first < LANES ? maps - first : LANES;                                        \
                memset(squares, 0, 2 * n * row * sizeof(float)); /* and through */                                    \
                for (int y = 0; y < height + 2 * reach; y++) {                                                        \
                    if (y < height) {                                                                                 \
                        load_row_##NAME(a + first + y * step, inside, width, maps, lanes);                            \
                        EACH(i, row) inside[i] *= inside[i];                                                          \
                        row_sum(padded, squares + y % n * row, row, n);                                               \
                    } else memset(squares + y % n * row, 0, row * sizeof(float));                                     \
                    const int middle = y - reach; /* the row whose squares are now summed */                          \
                    if (middle < 0) continue;                                                                         \
                    if (middle < height) {                                                                            \
                        float *g = direct + middle % n * row;                                                         \
                        load_row_##NAME(a + first + middle * step, x, width, maps, lanes);                            \
                        load_row_##NAME(db + first + middle * step, g, width, maps, lanes);                           \
                        EACH(i, row) {                                                                                \
                            float r = 1 / sqrtf(k + alpha * column_sum(squares, row, i, n));                          \
                            g[i] *= r * sqrtf(r);                                                                     \
                            inside[i] = g[i] * x[i] * (r * r);                                                        \
                        }                                                                                             \
                        row_sum(padded, through + middle % n * row, row, n);                                          \
                    } else memset(through + middle % n * row, 0, row * sizeof(float));                                \
                    const int last = middle - reach; /* the row whose gradient is now complete */                     \
                    if (last < 0) continue;                                                                           \
                    const float *g = direct + last % n * row;                                                         \
                    load_row_##NAME(a + first + last * step, x, width, maps, lanes);                                  \
                    EACH(i, row) x[i] = g[i] + scale * x[i] * column_sum(through, row, i, n);                         \
                    store_row_##NAME(x, da + first + last * step, width, maps, lanes);                                \
                }                                                                                                     \
            }                                                                                                         \
        free(memory);                                                                                                 \
        return 0;                                                                                                     \
    }                                                                                                                 \
    /* Constant n for the 2012 networks, as above. */                                                                 \
    int same_map_forward_##NAME(const T *a, T *b, long images, int height, int width, int maps, int n,                \
                                float alpha, float k) {                                                               \
        if (n == 5) return same_map_forward_n_##NAME(a, b, images, height, width, maps, 5, alpha, k);                 \
        if (n == 3) return same_map_forward_n_##NAME(a, b, images, height, width, maps, 3, alpha, k);                 \
        return same_map_forward_n_##NAME(a, b, images, height, width, maps, n, alpha, k);                             \
    }                                                                                                                 \
    int same_map_backward_##NAME(const T *a, const T *db, T *da, long images, int height, int width, int maps,        \
                                 int n, float alpha, float k) {                                                       \
        if (n == 5) return same_map_backward_n_##NAME(a, db, da, images, height, width, maps, 5, alpha, k);           \
        if (n == 3) return same_map_backward_n_##NAME(a, db, da, images, height, width, maps, 3, alpha, k);           \
        return same_map_backward_n_##NAME(a, db, da, images, height, width, maps, n, alpha, k);                       \
    }

SAME_MAP(bf16, uint16_t)
SAME_MAP(fp32, float)
