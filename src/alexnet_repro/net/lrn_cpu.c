/* Local response normalisation and its gradient, each in one pass. See lrn.py for the formulas.

   Arrays are channels-last: each row holds the `maps` values of one tower at one position. beta is fixed at 0.75:
   s^-0.75 = r sqrt(r) with r = s^-1/2. All arithmetic is in float. */

#include <math.h>
#include <stdint.h>

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

/* Set sum[c] to the sum of the n values centred on x[REACH + c]. x is zero-padded by REACH on both sides. */
INLINE void window_sum(const float *restrict x, float *restrict sum, int maps, const int n) {
    const float *first = x + REACH - n / 2;
    for (int c = 0; c < maps; c++) {
        float total = first[c];
        for (int d = 1; d < n; d++) total += first[c + d];
        sum[c] = total;
    }
}

#define LRN(NAME, T)                                                                                               \
    INLINE void forward_rows_##NAME(const T *restrict a, T *restrict b, long rows, const int maps, const int n,    \
                                    float alpha, float k) {                                                        \
        float x[WIDEST], squares[WIDEST + 2 * REACH] = {0}, s[WIDEST];                                             \
        for (; rows > 0; rows--, a += maps, b += maps) {                                                           \
            load_##NAME(a, x, maps);                                                                               \
            for (int c = 0; c < maps; c++) squares[REACH + c] = x[c] * x[c];                                       \
            window_sum(squares, s, maps, n);                                                                       \
            for (int c = 0; c < maps; c++) {                                                                       \
                float r = 1 / sqrtf(k + alpha * s[c]);                                                             \
                s[c] = x[c] * r * sqrtf(r);                                                                        \
            }                                                                                                      \
            store_##NAME(s, b, maps);                                                                              \
        }                                                                                                          \
    }                                                                                                              \
    INLINE void backward_rows_##NAME(const T *restrict a, const T *restrict db, T *restrict da, long rows,         \
                                     const int maps, const int n, float alpha, float k) {                          \
        float x[WIDEST], squares[WIDEST + 2 * REACH] = {0}, s[WIDEST];                                             \
        float direct[WIDEST], through[WIDEST + 2 * REACH] = {0};                                                   \
        const float scale = -1.5f * alpha; /* -2 alpha beta */                                                     \
        for (; rows > 0; rows--, a += maps, db += maps, da += maps) {                                              \
            load_##NAME(a, x, maps);                                                                               \
            load_##NAME(db, direct, maps);                                                                         \
            for (int c = 0; c < maps; c++) squares[REACH + c] = x[c] * x[c];                                       \
            window_sum(squares, s, maps, n);                                                                       \
            for (int c = 0; c < maps; c++) {                                                                       \
                float r = 1 / sqrtf(k + alpha * s[c]);                                                             \
                direct[c] *= r * sqrtf(r);                                                                         \
                through[REACH + c] = direct[c] * x[c] * (r * r);                                                   \
            }                                                                                                      \
            window_sum(through, s, maps, n);                                                                       \
            for (int c = 0; c < maps; c++) s[c] = direct[c] + scale * x[c] * s[c];                                 \
            store_##NAME(s, da, maps);                                                                             \
        }                                                                                                          \
    }                                                                                                              \
    /* Constant loop lengths for the paper's networks let the compiler vectorise without remainder loops. */       \
    void forward_##NAME(const T *a, T *b, long rows, int maps, int n, float alpha, float k) {                      \
        if (n == 5 && maps == 48) forward_rows_##NAME(a, b, rows, 48, 5, alpha, k);                                \
        else if (n == 5 && maps == 128) forward_rows_##NAME(a, b, rows, 128, 5, alpha, k);                         \
        else if (n == 5) forward_rows_##NAME(a, b, rows, maps, 5, alpha, k);                                       \
        else if (n == 9 && maps == 64) forward_rows_##NAME(a, b, rows, 64, 9, alpha, k);                           \
        else forward_rows_##NAME(a, b, rows, maps, n, alpha, k);                                                   \
    }                                                                                                              \
    void backward_##NAME(const T *a, const T *db, T *da, long rows, int maps, int n, float alpha, float k) {       \
        if (n == 5 && maps == 48) backward_rows_##NAME(a, db, da, rows, 48, 5, alpha, k);                          \
        else if (n == 5 && maps == 128) backward_rows_##NAME(a, db, da, rows, 128, 5, alpha, k);                   \
        else if (n == 5) backward_rows_##NAME(a, db, da, rows, maps, 5, alpha, k);                                 \
        else if (n == 9 && maps == 64) backward_rows_##NAME(a, db, da, rows, 64, 9, alpha, k);                     \
        else backward_rows_##NAME(a, db, da, rows, maps, n, alpha, k);                                             \
    }

LRN(bf16, uint16_t)
LRN(fp32, float)
