/* The loops over contributions in C: means, checks, codecs. kernels.py says what each function does and which module it
 * takes; pure_kernels.py does the same with numpy, with the same bits.
 *
 * Rules that make the bits agree everywhere: one IEEE float32 operation after the other (a product is rounded before it
 * is added: -ffp-contract=off), round to nearest even, flush-to-zero as the caller set it on this thread, comparisons of
 * magnitudes on the bits of the floats. No loop depends on the order of a float reduction, so a compiler may use
 * vectors of any length. The GIL is released; buffers stay locked by their Py_buffer.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <float.h>
#include <stdint.h>
#include <string.h>

#if defined(FLT_EVAL_METHOD) && FLT_EVAL_METHOD != 0
#error "floats are computed with excess precision here (x87): the pure path is used"
#endif
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the wire is little-endian: the pure path is used"
#endif

#if defined(_MSC_VER) && !defined(__clang__)
#define INLINE static __forceinline
#define RESTRICT __restrict
#else
#define INLINE static inline __attribute__((always_inline))
#define RESTRICT restrict
#endif

#if (defined(__x86_64__) || defined(__amd64__)) && (defined(__GNUC__) || defined(__clang__))
#define HAVE_AVX2 1
#include <immintrin.h>
#else
#define HAVE_AVX2 0
#endif

enum { REVISION = 3 };                   /* of what the functions do; kernels.py expects the same */
enum { BLOCK = 1024 };                   /* elements under one scale; 4 KiB of floats stay in the first cache */
static const int32_t LEAST = 0x0d800000; /* bits of 2^-100: smaller blocks are coded as zeros */
static const int32_t INFINITE = 0x7f800000;
static const int32_t MAGNITUDE = 0x7fffffff;

/* Lines of the next block on their way while this one is worked on. */
#if defined(__GNUC__) || defined(__clang__)
#define PREFETCH(at) __builtin_prefetch(at)
#else
#define PREFETCH(at) ((void)0)
#endif

INLINE int32_t bits_of(float value)
{
    int32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE float float_of(int32_t bits)
{
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE float load_float(const uint8_t *at)
{
    float value;
    memcpy(&value, at, 4);
    return value;
}

INLINE int32_t load_half(const uint8_t *at)
{
    uint16_t value;
    memcpy(&value, at, 2);
    return value;
}

/* The largest magnitude as bits; NaN and infinities are larger than any finite number. */
INLINE int32_t largest(const float *x, size_t n)
{
    int32_t most = 0;
    for (size_t i = 0; i < n; i++) {
        int32_t bits = bits_of(x[i]) & MAGNITUDE;
        most = bits > most ? bits : most;
    }
    return most;
}

INLINE int finite_body(const float *x, size_t n)
{
    for (size_t start = 0; start < n; start += BLOCK) {
        size_t length = n - start < BLOCK ? n - start : BLOCK;
        if (largest(x + start, length) >= INFINITE)
            return 0;
    }
    return 1;
}

/* sum = c0 x0, or sum += c0 x0; sum += c1 x1; … of `rows` vectors, a constant where it is called. */
INLINE void add_rows(float *RESTRICT sum, const float *const *x, const float *c, size_t rows, int first, size_t start,
                     size_t n, size_t ahead)
{
    const float *row[4];
    float factor[4];
    for (size_t r = 0; r < rows; r++) {
        row[r] = x[r] + start;
        factor[r] = c[r];
        for (size_t i = n; i < n + ahead; i += 16)
            PREFETCH(row[r] + i);
    }
    for (size_t i = 0; i < n; i++) {
        float t = factor[0] * row[0][i];
        if (!first)
            t = sum[i] + t;
        for (size_t r = 1; r < rows; r++)
            t += factor[r] * row[r][i];
        sum[i] = t;
    }
}

INLINE void mean_block(float *RESTRICT sum, const float *const *x, const float *c, size_t m, size_t start, size_t n,
                       size_t ahead)
{
    size_t k = m % 4;
    if (k == 0)
        add_rows(sum, x, c, k = 4, 1, start, n, ahead);
    else if (k == 1)
        add_rows(sum, x, c, 1, 1, start, n, ahead);
    else if (k == 2)
        add_rows(sum, x, c, 2, 1, start, n, ahead);
    else
        add_rows(sum, x, c, 3, 1, start, n, ahead);
    for (; k < m; k += 4)
        add_rows(sum, x + k, c + k, 4, 0, start, n, ahead);
}

/* out = c0 x0; out += c1 x1; … block by block. Memory is what this waits for: of four vectors at a time 512 bytes each come
 * fastest, the next 512 asked for while these are added. */
INLINE void mean_body(float *out, const float *const *x, const float *c, size_t m, size_t n)
{
    enum { SWEEP = 128 };
    float sum[SWEEP]; /* apart, because out may be one of the inputs */
    size_t start = 0;
    for (; n - start >= SWEEP; start += SWEEP) {
        size_t ahead = n - start - SWEEP < SWEEP ? n - start - SWEEP : SWEEP;
        mean_block(sum, x, c, m, start, SWEEP, ahead);
        memcpy(out + start, sum, SWEEP * sizeof(float));
    }
    if (start < n) {
        mean_block(sum, x, c, m, start, n - start, 0);
        memcpy(out + start, sum, (n - start) * sizeof(float));
    }
}

/* --- what is common to the ways of adding a decoded value: decode, first contribution, further ones ----------------- */

enum how { DECODE, FIRST, FURTHER };

INLINE void put(float *out, float value, float c, enum how how)
{
    if (how == DECODE) {
        *out = value;
    } else {
        float product = c * value;
        *out = how == FIRST ? product : *out + product;
    }
}

/* --- fp32, bf16 ------------------------------------------------------------------------------------------------------ */

INLINE void fp32_body(const uint8_t *RESTRICT data, float c, float *RESTRICT out, size_t n, enum how how)
{
    for (size_t i = 0; i < n; i++)
        put(&out[i], load_float(data + 4 * i), c, how);
}

INLINE void bf16_body(const uint8_t *RESTRICT data, float c, float *RESTRICT out, size_t n, enum how how)
{
    for (size_t i = 0; i < n; i++)
        put(&out[i], float_of((int32_t)((uint32_t)load_half(data + 2 * i) << 16)), c, how);
}

INLINE void bf16_encode_body(const float *RESTRICT x, uint8_t *RESTRICT out, size_t n)
{
    const int32_t most = 0x7f7f7fff; /* rounds to the largest finite bf16; what is larger saturates */
    for (size_t i = 0; i < n; i++) {
        int32_t bits = bits_of(x[i]), size = bits & MAGNITUDE;
        size = size < most ? size : most;
        size = (size + 0x7fff + ((size >> 16) & 1)) >> 16;
        uint16_t code = (uint16_t)(size | (int32_t)(((uint32_t)bits >> 16) & 0x8000u));
        memcpy(out + 2 * i, &code, 2);
    }
}

/* --- int8 and e3m0: blocks of a float32 scale and the codes ---------------------------------------------------------- */

enum kind { INT8, E3M0 };

INLINE size_t codes_of(enum kind kind, size_t n) { return kind == INT8 ? n : (n + 1) / 2; }

INLINE void int8_pack(const float *RESTRICT y, size_t n, float inverse, uint8_t *RESTRICT codes)
{
    /* 1.5 * 2^23 + t rounds t to the nearest integer, ties to even, and holds it in its low bits. |t| is at most 127. */
    for (size_t i = 0; i < n; i++) {
        float t = y[i] * inverse;
        t += 12582912.0f;
        codes[i] = (uint8_t)(bits_of(t) & 0xff);
    }
}

INLINE float int8_value(const uint8_t *codes, size_t i) { return (float)(int8_t)codes[i]; }

/* 8 |y| / scale as a code: 7 for 8, 6 for 4, … 1 for 1/8, 0 for nothing; halfway goes up. Bit 3 is the sign. */
INLINE int32_t e3m0_code(float y, float inverse)
{
    int32_t bits = bits_of(y * inverse), size = bits & MAGNITUDE;
    int32_t code = ((size + 0x00400000) >> 23) - 123, least = size >= 0x3d800000 ? 1 : 0;
    code = code > least ? code : least;
    return code | (int32_t)(((uint32_t)bits >> 28) & 8u);
}

INLINE void e3m0_pack(const float *RESTRICT y, size_t n, float inverse, uint8_t *RESTRICT codes)
{
    size_t half = (n + 1) / 2;
    for (size_t i = 0; i < n - half; i++)
        codes[i] = (uint8_t)(e3m0_code(y[i], inverse) | (e3m0_code(y[half + i], inverse) << 4));
    if (n % 2)
        codes[half - 1] = (uint8_t)e3m0_code(y[half - 1], inverse);
}

INLINE float e3m0_value(int32_t code)
{
    int32_t level = code & 7;
    int32_t bits = level ? (level + 120) << 23 : 0;
    return float_of(bits | (int32_t)((uint32_t)(code & 8) << 28));
}

INLINE void block_put(enum kind kind, const uint8_t *RESTRICT codes, float scale, float c, float *RESTRICT out,
                      size_t n, enum how how)
{
    if (kind == INT8) {
        for (size_t i = 0; i < n; i++)
            put(&out[i], scale * int8_value(codes, i), c, how);
    } else {
        size_t half = (n + 1) / 2;
        for (size_t i = 0; i < half; i++)
            put(&out[i], scale * e3m0_value(codes[i] & 15), c, how);
        for (size_t i = 0; i < n - half; i++)
            put(&out[half + i], scale * e3m0_value(codes[i] >> 4), c, how);
    }
}

/* Returns 0 when a value is not finite. */
INLINE int block_encode(enum kind kind, const float *x, const float *residual, float *rest, uint8_t *data, size_t n)
{
    float sum[BLOCK], back[BLOCK];
    const float *y = x;
    if (residual) {
        for (size_t i = 0; i < n; i++)
            sum[i] = x[i] + residual[i];
        y = sum;
    }
    int32_t most = largest(y, n);
    if (most >= INFINITE)
        return 0;
    float scale = 0.0f;
    if (most >= LEAST) {
        float top = float_of(most);
        scale = kind == INT8 ? top / 127.0f : top;
        if (kind == INT8)
            int8_pack(y, n, 127.0f / top, data + 4);
        else
            e3m0_pack(y, n, 8.0f / top, data + 4);
    } else {
        memset(data + 4, 0, codes_of(kind, n));
    }
    memcpy(data, &scale, 4);
    if (rest) {
        block_put(kind, data + 4, scale, 1.0f, back, n, DECODE);
        for (size_t i = 0; i < n; i++)
            rest[i] = y[i] - back[i];
    }
    return 1;
}

/* Index of the first block with a value that is not finite, or -1. */
INLINE Py_ssize_t encode_body(enum kind kind, const float *x, const float *residual, float *rest, uint8_t *data, size_t n)
{
    size_t start = 0;
    for (; n - start >= BLOCK; start += BLOCK, data += 4 + codes_of(kind, BLOCK))
        if (!block_encode(kind, x + start, residual ? residual + start : NULL, rest ? rest + start : NULL, data, BLOCK))
            return (Py_ssize_t)(start / BLOCK);
    if (start < n)
        if (!block_encode(kind, x + start, residual ? residual + start : NULL, rest ? rest + start : NULL, data, n - start))
            return (Py_ssize_t)(start / BLOCK);
    return -1;
}

INLINE void put_body(enum kind kind, const uint8_t *data, float c, float *out, size_t n, enum how how)
{
    size_t start = 0;
    for (; n - start >= BLOCK; start += BLOCK, data += 4 + codes_of(kind, BLOCK))
        block_put(kind, data + 4, load_float(data), c, out + start, BLOCK, how);
    if (start < n)
        block_put(kind, data + 4, load_float(data), c, out + start, n - start, how);
}

/* Whether any code is -128, which no encoder makes. */
INLINE int int8_wrong_body(const uint8_t *data, size_t n)
{
    for (size_t start = 0; start < n; start += BLOCK, data += 4 + BLOCK) {
        size_t length = n - start < BLOCK ? n - start : BLOCK;
        uint8_t wrong = 0;
        for (size_t i = 0; i < length; i++)
            wrong |= (uint8_t)(data[4 + i] == 0x80);
        if (wrong)
            return 1;
    }
    return 0;
}

/* --- top-k ------------------------------------------------------------------------------------------------------------ */

enum { GROUP = 16 }; /* elements looked at together: few groups hold one of the largest */

/* Whether a magnitude is within least … least + span. */
INLINE int any_within(const float *x, size_t n, uint32_t least, uint32_t span)
{
    uint32_t any = 0;
    if (n == GROUP) {
        for (size_t i = 0; i < GROUP; i++)
            any |= (uint32_t)(((uint32_t)bits_of(x[i]) & (uint32_t)MAGNITUDE) - least <= span);
        return any != 0;
    }
    return 1;
}

/* Of the largest k magnitudes (ties: the first ones) the positions, ascending. 0 < k <= n. The k-th magnitude is found
 * digit by digit: 12, 12 and 7 bits. */
INLINE void topk_body(const float *x, size_t n, size_t k, uint32_t *positions)
{
    static const int shifts[3] = {19, 7, 0}, widths[3] = {12, 12, 7};
    uint32_t prefix = 0;
    size_t left = k; /* how many of those that share the prefix are taken */
    int above = 31;  /* bits to the right of the prefix */
    for (int step = 0; step < 3; step++) {
        int shift = shifts[step];
        uint32_t mask = (1u << widths[step]) - 1;
        uint32_t counts[2][4096] = {{0}}; /* two, so that neighbours of one size do not wait for each other */
        for (size_t start = 0; start < n; start += GROUP) {
            size_t end = n - start < GROUP ? n : start + GROUP;
            if (step > 0 && !any_within(x + start, end - start, prefix << above, (1u << above) - 1))
                continue;
            for (size_t i = start; i < end; i++) {
                uint32_t size = (uint32_t)bits_of(x[i]) & (uint32_t)MAGNITUDE;
                if (step == 0 || size >> above == prefix)
                    counts[i & 1][(size >> shift) & mask]++;
            }
        }
        uint32_t digit = mask;
        for (;; digit--) {
            size_t count = (size_t)counts[0][digit] + counts[1][digit];
            if (count >= left || digit == 0)
                break;
            left -= count;
        }
        prefix = (prefix << widths[step]) | digit;
        above = shift;
    }
    size_t found = 0;
    for (size_t start = 0; start < n && found < k; start += GROUP) {
        size_t end = n - start < GROUP ? n : start + GROUP;
        if (!any_within(x + start, end - start, prefix, UINT32_MAX - prefix))
            continue;
        for (size_t i = start; i < end && found < k; i++) {
            uint32_t size = (uint32_t)bits_of(x[i]) & (uint32_t)MAGNITUDE;
            if (size > prefix) {
                positions[found++] = (uint32_t)i;
            } else if (size == prefix && left > 0) {
                left--;
                positions[found++] = (uint32_t)i;
            }
        }
    }
}

/* --- order statistics of a column: median, trimmed mean, mean around the median ------------------------------------- */

enum { WIDTH = 128 }; /* columns sorted together: 8 KiB of 16 rows, which stay in the first cache */
enum middle { MEDIAN, TRIMMED, AROUND };

/* The smaller to a, the larger to b. Neither is NaN or -0. */
INLINE void compare(float *RESTRICT a, float *RESTRICT b, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        float low = a[i] < b[i] ? a[i] : b[i], high = a[i] < b[i] ? b[i] : a[i];
        a[i] = low;
        b[i] = high;
    }
}

INLINE void median_of(float *RESTRICT out, const float *rows, size_t m, size_t n)
{
    const float *a = rows + (m - 1) / 2 * WIDTH, *b = rows + m / 2 * WIDTH;
    if (m % 2)
        memcpy(out, a, n * sizeof(float));
    else
        for (size_t i = 0; i < n; i++) {
            float t = 0.5f * a[i];
            t += 0.5f * b[i];
            out[i] = t;
        }
}

INLINE void add_row(float *RESTRICT sum, const float *RESTRICT row, float c, size_t n, int first)
{
    if (first)
        for (size_t i = 0; i < n; i++)
            sum[i] = c * row[i];
    else
        for (size_t i = 0; i < n; i++)
            sum[i] += c * row[i];
}

/* Returns the largest magnitude as bits, as `largest`. */
INLINE int32_t middle_block(float *RESTRICT out, const float *const *x, size_t m, size_t start, size_t n,
                            size_t ahead, const uint16_t *pairs, size_t count, enum middle kind, size_t f, float c,
                            float *rows)
{
    int32_t most = 0;
    for (size_t r = 0; r < m; r++) {
        const float *row = x[r] + start;
        for (size_t i = 0; i < n; i++) {
            int32_t bits = bits_of(row[i]) & MAGNITUDE;
            most = bits > most ? bits : most;
            rows[r * WIDTH + i] = row[i] + 0.0f; /* -0 becomes 0, denormals what the thread makes of them */
        }
        for (size_t i = n; i < n + ahead; i += 16)
            PREFETCH(row + i);
    }
    for (size_t k = 0; k < count; k++)
        compare(rows + pairs[2 * k] * (size_t)WIDTH, rows + pairs[2 * k + 1] * (size_t)WIDTH, n);
    if (kind == MEDIAN) {
        median_of(out, rows, m, n);
    } else if (kind == TRIMMED) {
        for (size_t r = f; r < m - f; r++)
            add_row(out, rows + r * WIDTH, c, n, r == f);
    } else { /* the window of m - f sorted values that are nearest to the median: row r + m - f or row r, for each r < f */
        float median[WIDTH], nearer[WIDTH];
        median_of(median, rows, m, n);
        for (size_t r = 0; r < f; r++) {
            const float *low = rows + r * WIDTH, *high = rows + (r + m - f) * WIDTH;
            for (size_t i = 0; i < n; i++)
                nearer[i] = high[i] - median[i] < median[i] - low[i] ? high[i] : low[i];
            add_row(out, nearer, c, n, r == 0);
        }
        for (size_t r = f; r < m - f; r++)
            add_row(out, rows + r * WIDTH, c, n, r == 0);
    }
    return most;
}

/* Whether all values are finite; if not, out is anything. */
INLINE int middle_body(float *out, const float *const *x, size_t m, size_t n, const uint16_t *pairs, size_t count,
                       enum middle kind, size_t f, float c, float *rows)
{
    size_t start = 0;
    int32_t most = 0;
    for (; n - start >= WIDTH; start += WIDTH) {
        size_t ahead = n - start - WIDTH < WIDTH ? n - start - WIDTH : WIDTH;
        int32_t bits = middle_block(out + start, x, m, start, WIDTH, ahead, pairs, count, kind, f, c, rows);
        most = bits > most ? bits : most;
    }
    if (start < n) {
        int32_t bits = middle_block(out + start, x, m, start, n - start, 0, pairs, count, kind, f, c, rows);
        most = bits > most ? bits : most;
    }
    return most < INFINITE;
}

/* --- inner products: float64 sums of products of float32, which are exact ---------------------------------------------- */

enum { PANEL = 128, COLUMNS = 4 }; /* elements converted at a time (16 KiB of 16 rows); columns of a tile */
enum { PANELS = 64 }; /* panels before sums of lanes are added up: short sums round less */

/* Sums of `rows` x COLUMNS pairs, `lanes` of each, over one panel. A product of two float32 is exact in float64, so a fused
 * multiply-add gives the bits of the two operations. */
#define TILE(tag, attribute, vector, rows, multiply_add)                                                                \
    attribute static void tile_##tag(const double *a, const double *b, double *sums)                                    \
    {                                                                                                                   \
        enum { LANES = sizeof(vector) / sizeof(double) };                                                               \
        vector s[rows][COLUMNS];                                                                                        \
        for (int i = 0; i < rows; i++)                                                                                  \
            for (int j = 0; j < COLUMNS; j++)                                                                           \
                s[i][j] = ((const vector *)sums)[i * COLUMNS + j];                                                      \
        for (size_t k = 0; k < PANEL; k += LANES) {                                                                     \
            vector y[COLUMNS];                                                                                          \
            for (int j = 0; j < COLUMNS; j++)                                                                           \
                y[j] = *(const vector *)(b + j * PANEL + k);                                                            \
            for (int i = 0; i < rows; i++) {                                                                            \
                vector x = *(const vector *)(a + i * PANEL + k);                                                        \
                for (int j = 0; j < COLUMNS; j++)                                                                       \
                    s[i][j] = multiply_add(x, y[j], s[i][j]);                                                           \
            }                                                                                                           \
        }                                                                                                               \
        for (int i = 0; i < rows; i++)                                                                                  \
            for (int j = 0; j < COLUMNS; j++)                                                                           \
                ((vector *)sums)[i * COLUMNS + j] = s[i][j];                                                            \
    }

INLINE void convert_body(double *RESTRICT panel, const float *const *x, size_t m, size_t start, size_t n)
{
    for (size_t r = 0; r < m; r++) {
        const float *row = x[r] + start;
        for (size_t i = 0; i < n; i++)
            panel[r * PANEL + i] = (double)row[i];
        memset(panel + r * PANEL + n, 0, (PANEL - n) * sizeof(double));
    }
}

/* Adds what the lanes of each tile hold to the upper triangle of out (m, m), and empties them. */
INLINE void collect(double *RESTRICT out, double *RESTRICT sums, size_t m, size_t rows, size_t lanes)
{
    size_t padded = (m + COLUMNS - 1) / COLUMNS * COLUMNS;
    for (size_t j = 0; j < padded; j += COLUMNS)
        for (size_t i = 0; i < j + COLUMNS; i += rows)
            for (size_t a = i; a < i + rows; a++)
                for (size_t b = j; b < j + COLUMNS; b++) {
                    double total = 0.0;
                    for (size_t l = 0; l < lanes; l++, sums++) {
                        total += *sums;
                        *sums = 0.0;
                    }
                    if (a <= b && b < m)
                        out[a * m + b] += total;
                }
}

/* `panel`: (m rounded up to COLUMNS) x PANEL zeros; `sums`: zeros, rows * COLUMNS * lanes for each tile. */
INLINE void gram_body(double *out, const float *const *x, size_t m, size_t n, double *panel, double *sums, size_t rows,
                      size_t lanes, void (*tile)(const double *, const double *, double *))
{
    size_t padded = (m + COLUMNS - 1) / COLUMNS * COLUMNS, each = rows * COLUMNS * lanes, done = 0;
    memset(out, 0, m * m * sizeof(double));
    for (size_t start = 0; start < n; start += PANEL) {
        double *at = sums;
        if (n - start >= PANEL)
            convert_body(panel, x, m, start, PANEL);
        else
            convert_body(panel, x, m, start, n - start);
        size_t ahead = n - start > PANEL ? (n - start - PANEL < PANEL ? n - start - PANEL : PANEL) : 0;
        for (size_t r = 0; r < m; r++)
            for (size_t k = 0; k < ahead; k += 16)
                PREFETCH(x[r] + start + PANEL + k);
        for (size_t j = 0; j < padded; j += COLUMNS)
            for (size_t i = 0; i < j + COLUMNS; i += rows, at += each)
                tile(panel + i * PANEL, panel + j * PANEL, at);
        if (++done % PANELS == 0)
            collect(out, sums, m, rows, lanes);
    }
    collect(out, sums, m, rows, lanes);
    for (size_t a = 0; a < m; a++)
        for (size_t b = 0; b < a; b++)
            out[a * m + b] = out[b * m + a];
}

/* Products of one vector with COLUMNS others, and the squares of those: sums of lanes over one panel, in the order of TILE.
 * Memory is what this waits for, so the others are converted on their way instead of to a panel. */
#define ROW(tag, attribute, vector, widen, multiply_add)                                                                \
    attribute static void row_##tag(const double *pivot, const float *const *x, double *sums)                           \
    {                                                                                                                   \
        enum { LANES = sizeof(vector) / sizeof(double) };                                                               \
        vector s[COLUMNS][2];                                                                                           \
        for (int j = 0; j < COLUMNS; j++)                                                                               \
            for (int i = 0; i < 2; i++)                                                                                 \
                s[j][i] = ((const vector *)sums)[2 * j + i];                                                            \
        for (size_t k = 0; k < PANEL; k += LANES) {                                                                     \
            vector p = *(const vector *)(pivot + k);                                                                    \
            for (int j = 0; j < COLUMNS; j++) {                                                                         \
                vector y = widen(x[j] + k);                                                                             \
                s[j][0] = multiply_add(p, y, s[j][0]);                                                                  \
                s[j][1] = multiply_add(y, y, s[j][1]);                                                                  \
            }                                                                                                           \
        }                                                                                                               \
        for (int j = 0; j < COLUMNS; j++)                                                                               \
            for (int i = 0; i < 2; i++)                                                                                 \
                ((vector *)sums)[2 * j + i] = s[j][i];                                                                  \
    }

/* Adds what the lanes of each row hold to out (2, m), and empties them. */
INLINE void collect_row(double *RESTRICT out, double *RESTRICT sums, size_t m, size_t lanes)
{
    for (size_t j = 0; j < m; j++)
        for (size_t i = 0; i < 2; i++) {
            double total = 0.0;
            for (size_t l = 0; l < lanes; l++, sums++) {
                total += *sums;
                *sums = 0.0;
            }
            out[i * m + j] += total;
        }
}

/* The bits of gram_body, but only of one row and of the diagonal. `panel`: PANEL doubles; `sums`: zeros, 2 * lanes for each
 * of m rounded up to COLUMNS. */
INLINE void gram_row_body(double *out, const float *const *x, size_t m, size_t pivot, size_t n, double *panel, double *sums,
                          size_t lanes, void (*row)(const double *, const float *const *, double *))
{
    float tail[COLUMNS][PANEL];
    size_t done = 0;
    memset(out, 0, 2 * m * sizeof(double));
    for (size_t start = 0; start < n; start += PANEL) {
        size_t length = n - start < PANEL ? n - start : PANEL;
        size_t ahead = n - start - length < PANEL ? n - start - length : PANEL;
        convert_body(panel, x + pivot, 1, start, length);
        for (size_t j = 0; j < m; j += COLUMNS) {
            const float *rows[COLUMNS];
            for (size_t r = 0; r < COLUMNS; r++) {
                rows[r] = x[j + r < m ? j + r : m - 1] + start; /* sums of those beyond m are looked at by nobody */
                for (size_t k = 0; k < ahead; k += 16)
                    PREFETCH(rows[r] + PANEL + k);
                if (length < PANEL) {
                    memcpy(tail[r], rows[r], length * sizeof(float));
                    memset(tail[r] + length, 0, (PANEL - length) * sizeof(float));
                    rows[r] = tail[r];
                }
            }
            row(panel, rows, sums + j * 2 * lanes);
        }
        if (++done % PANELS == 0)
            collect_row(out, sums, m, lanes);
    }
    collect_row(out, sums, m, lanes);
}

/* What gram_row_body needs for any level, in doubles: 8 lanes at most. */
static size_t row_sums(size_t m) { return (m + COLUMNS - 1) / COLUMNS * COLUMNS * 2 * 8; }

/* What gram_body needs for any level, in doubles: 8 lanes, 4 rows at most. */
static size_t gram_panel(size_t m) { return (m + COLUMNS - 1) / COLUMNS * COLUMNS * PANEL; }
static size_t gram_sums(size_t m)
{
    size_t tiles = (m + COLUMNS - 1) / COLUMNS;
    return tiles * (tiles + 1) / 2 * (COLUMNS * COLUMNS * 8);
}

#if defined(__GNUC__) || defined(__clang__)
typedef double two_doubles __attribute__((vector_size(16), may_alias));
#define WIDEN(at) ((two_doubles){(at)[0], (at)[1]})
#else
typedef double two_doubles;
#define WIDEN(at) (*(at))
#endif
#define MULTIPLY_ADD(a, b, c) ((c) + (a) * (b))
TILE(portable, , two_doubles, 2, MULTIPLY_ADD)
ROW(portable, , two_doubles, WIDEN, MULTIPLY_ADD)
#if HAVE_AVX2
TILE(avx2, __attribute__((target("avx2,fma"))), __m256d, 2, _mm256_fmadd_pd)
#define WIDEN_AVX2(at) _mm256_cvtps_pd(_mm_loadu_ps(at))
ROW(avx2, __attribute__((target("avx2,fma"))), __m256d, WIDEN_AVX2, _mm256_fmadd_pd)
TILE(avx512, __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))), __m512d, 4, _mm512_fmadd_pd)
#define WIDEN_AVX512(at) _mm512_cvtps_pd(_mm256_loadu_ps(at))
ROW(avx512, __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))), __m512d, WIDEN_AVX512, _mm512_fmadd_pd)
#endif

/* --- the same for each set of instructions ----------------------------------------------------------------------------- */

struct level {
    const char *name;
    int (*finite)(const float *, size_t);
    void (*mean)(float *, const float *const *, const float *, size_t, size_t);
    void (*fp32)(const uint8_t *, float, float *, size_t, enum how);
    void (*bf16)(const uint8_t *, float, float *, size_t, enum how);
    void (*bf16_encode)(const float *, uint8_t *, size_t);
    Py_ssize_t (*encode)(enum kind, const float *, const float *, float *, uint8_t *, size_t);
    void (*block)(enum kind, const uint8_t *, float, float *, size_t, enum how);
    int (*int8_wrong)(const uint8_t *, size_t);
    void (*topk)(const float *, size_t, size_t, uint32_t *);
    int (*middle)(float *, const float *const *, size_t, size_t, const uint16_t *, size_t, enum middle, size_t, float,
                  float *);
    void (*gram)(double *, const float *const *, size_t, size_t, double *, double *);
    void (*gram_row)(double *, const float *const *, size_t, size_t, size_t, double *, double *);
};

/* The bodies are inlined with constants for `kind` and `how`, so that each case is a loop of its own. */
#define EACH_HOW(call)                                                                                                  \
    switch (how) {                                                                                                      \
    case DECODE: { enum { HOW = DECODE }; call; break; }                                                                \
    case FIRST: { enum { HOW = FIRST }; call; break; }                                                                  \
    case FURTHER: { enum { HOW = FURTHER }; call; break; }                                                              \
    }

#define ORDER(tag, attribute, rows, vector)                                                                             \
    attribute static int middle_##tag(float *out, const float *const *x, size_t m, size_t n, const uint16_t *pairs,     \
                                      size_t count, enum middle kind, size_t f, float c, float *rows_)                  \
    {                                                                                                                   \
        return middle_body(out, x, m, n, pairs, count, kind, f, c, rows_);                                              \
    }                                                                                                                   \
    attribute static void gram_##tag(double *out, const float *const *x, size_t m, size_t n, double *panel,             \
                                     double *sums)                                                                      \
    {                                                                                                                   \
        gram_body(out, x, m, n, panel, sums, rows, sizeof(vector) / sizeof(double), tile_##tag);                        \
    }                                                                                                                   \
    attribute static void gram_row_##tag(double *out, const float *const *x, size_t m, size_t pivot, size_t n,          \
                                         double *panel, double *sums)                                                   \
    {                                                                                                                   \
        gram_row_body(out, x, m, pivot, n, panel, sums, sizeof(vector) / sizeof(double), row_##tag);                    \
    }

#define LEVEL(tag, attribute)                                                                                           \
    attribute static int finite_##tag(const float *x, size_t n) { return finite_body(x, n); }                           \
    attribute static void mean_##tag(float *out, const float *const *x, const float *c, size_t m, size_t n)             \
    {                                                                                                                   \
        mean_body(out, x, c, m, n);                                                                                     \
    }                                                                                                                   \
    attribute static void fp32_##tag(const uint8_t *data, float c, float *out, size_t n, enum how how)                  \
    {                                                                                                                   \
        EACH_HOW(fp32_body(data, c, out, n, (enum how)HOW))                                                             \
    }                                                                                                                   \
    attribute static void bf16_##tag(const uint8_t *data, float c, float *out, size_t n, enum how how)                  \
    {                                                                                                                   \
        EACH_HOW(bf16_body(data, c, out, n, (enum how)HOW))                                                             \
    }                                                                                                                   \
    attribute static void bf16_encode_##tag(const float *x, uint8_t *out, size_t n) { bf16_encode_body(x, out, n); }    \
    attribute static Py_ssize_t encode_##tag(enum kind kind, const float *x, const float *residual, float *rest,        \
                                             uint8_t *data, size_t n)                                                   \
    {                                                                                                                   \
        if (kind == INT8)                                                                                               \
            return residual || rest ? encode_body(INT8, x, residual, rest, data, n)                                     \
                                    : encode_body(INT8, x, NULL, NULL, data, n);                                        \
        return residual || rest ? encode_body(E3M0, x, residual, rest, data, n)                                         \
                                : encode_body(E3M0, x, NULL, NULL, data, n);                                            \
    }                                                                                                                   \
    attribute static void block_##tag(enum kind kind, const uint8_t *data, float c, float *out, size_t n, enum how how) \
    {                                                                                                                   \
        if (kind == INT8) {                                                                                             \
            EACH_HOW(put_body(INT8, data, c, out, n, (enum how)HOW))                                                    \
        } else {                                                                                                        \
            EACH_HOW(put_body(E3M0, data, c, out, n, (enum how)HOW))                                                    \
        }                                                                                                               \
    }                                                                                                                   \
    attribute static int int8_wrong_##tag(const uint8_t *data, size_t n) { return int8_wrong_body(data, n); }           \
    attribute static void topk_##tag(const float *x, size_t n, size_t k, uint32_t *positions)                           \
    {                                                                                                                   \
        topk_body(x, n, k, positions);                                                                                  \
    }                                                                                                                   \
    static const struct level level_##tag = {                                                                           \
        #tag, finite_##tag, mean_##tag, fp32_##tag, bf16_##tag, bf16_encode_##tag,                                      \
        encode_##tag, block_##tag, int8_wrong_##tag, topk_##tag, middle_##tag, gram_##tag, gram_row_##tag,              \
    };

ORDER(portable, , 2, two_doubles)
LEVEL(portable, )
#if HAVE_AVX2
ORDER(avx2, __attribute__((target("avx2,fma"))), 2, __m256d)
LEVEL(avx2, __attribute__((target("avx2"))))
/* The loops that wait for memory gain nothing from longer vectors. */
#if defined(__clang__)
#define WIDE __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#else /* gcc takes vectors of half the length where it is not told */
#define WIDE __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")))
#endif
ORDER(avx512, WIDE, 4, __m512d)
static const struct level level_avx512 = {
    "avx512", finite_avx2, mean_avx2, fp32_avx2, bf16_avx2, bf16_encode_avx2,
    encode_avx2, block_avx2, int8_wrong_avx2, topk_avx2, middle_avx512, gram_avx512, gram_row_avx512,
};
#endif

static const struct level *active = &level_portable;

static int has_avx2(void)
{
#if HAVE_AVX2
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return 0;
#endif
}

static int has_avx512(void)
{
#if HAVE_AVX2
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
    return 0;
#endif
}

/* --- Python ------------------------------------------------------------------------------------------------------------ */

static size_t wire_size(enum kind kind, size_t n)
{
    size_t tail = n % BLOCK;
    return n / BLOCK * (4 + codes_of(kind, BLOCK)) + (tail ? 4 + codes_of(kind, tail) : 0);
}

/* A buffer of whole, aligned floats. */
static int floats(const Py_buffer *view, const char *what)
{
    if (view->len % 4 || (uintptr_t)view->buf % 4) {
        PyErr_Format(PyExc_ValueError, "%s: %zd bytes are not whole, aligned float32", what, view->len);
        return 0;
    }
    return 1;
}

static int size_is(const Py_buffer *view, size_t expected, const char *what)
{
    if ((size_t)view->len != expected) {
        PyErr_Format(PyExc_ValueError, "%s: %zd bytes, not %zu", what, view->len, expected);
        return 0;
    }
    return 1;
}

static PyObject *py_finite(PyObject *self, PyObject *args)
{
    Py_buffer x;
    int good;
    PyObject *result = NULL;
    if (!PyArg_ParseTuple(args, "y*", &x))
        return NULL;
    if (floats(&x, "vector")) {
        Py_BEGIN_ALLOW_THREADS
        good = active->finite(x.buf, (size_t)x.len / 4);
        Py_END_ALLOW_THREADS
        result = PyBool_FromLong(good);
    }
    PyBuffer_Release(&x);
    return result;
}

/* The vectors of a tuple, all of `bytes` bytes, held until let_go. */
struct vectors {
    Py_ssize_t count, held;
    Py_buffer *views;
    const float **x;
};

static int hold(struct vectors *all, PyObject *tuple, Py_ssize_t bytes)
{
    Py_ssize_t count = PyTuple_Size(tuple);
    if (count < 0)
        return 0;
    all->views = PyMem_Malloc((size_t)(count ? count : 1) * sizeof *all->views);
    all->x = PyMem_Malloc((size_t)(count ? count : 1) * sizeof *all->x);
    if (!all->views || !all->x) {
        PyErr_NoMemory();
        return 0;
    }
    all->count = count;
    for (Py_ssize_t i = 0; i < count; i++) {
        if (PyObject_GetBuffer(PyTuple_GetItem(tuple, i), &all->views[i], PyBUF_SIMPLE) < 0)
            return 0;
        all->held++;
        all->x[i] = all->views[i].buf;
        if (!size_is(&all->views[i], (size_t)bytes, "vector") || !floats(&all->views[i], "vector"))
            return 0;
    }
    return 1;
}

static void let_go(struct vectors *all)
{
    while (all->held > 0)
        PyBuffer_Release(&all->views[--all->held]);
    PyMem_Free(all->views);
    PyMem_Free(all->x);
}

static PyObject *py_mean(PyObject *self, PyObject *args)
{
    PyObject *inputs, *result = NULL;
    Py_buffer out, c;
    struct vectors all = {0};
    if (!PyArg_ParseTuple(args, "O!y*w*", &PyTuple_Type, &inputs, &c, &out))
        return NULL;
    if (!floats(&out, "result") || !floats(&c, "factors") || !hold(&all, inputs, out.len))
        goto end;
    if (all.count == 0 || c.len != 4 * all.count) {
        PyErr_Format(PyExc_ValueError, "%zd vectors with %zd bytes of factors", all.count, c.len);
        goto end;
    }
    Py_BEGIN_ALLOW_THREADS
    active->mean(out.buf, all.x, c.buf, (size_t)all.count, (size_t)out.len / 4);
    Py_END_ALLOW_THREADS
    result = Py_NewRef(Py_None);
end:
    let_go(&all);
    PyBuffer_Release(&c);
    PyBuffer_Release(&out);
    return result;
}

/* Whether `pairs` are places of two different rows of m. */
static int network(const Py_buffer *pairs, size_t m)
{
    const uint16_t *at = pairs->buf;
    if (pairs->len % 4 || (uintptr_t)pairs->buf % 2) {
        PyErr_Format(PyExc_ValueError, "network: %zd bytes are no pairs of uint16", pairs->len);
        return 0;
    }
    for (Py_ssize_t k = 0; k < pairs->len / 4; k++)
        if (at[2 * k] >= at[2 * k + 1] || at[2 * k + 1] >= m) {
            PyErr_Format(PyExc_ValueError, "network: %d, %d is no pair of %zu rows", at[2 * k], at[2 * k + 1], m);
            return 0;
        }
    return 1;
}

static PyObject *py_middle(PyObject *self, PyObject *args)
{
    PyObject *inputs, *result = NULL;
    Py_buffer out, pairs;
    struct vectors all = {0};
    int kind, good;
    Py_ssize_t f;
    float c, *rows = NULL;
    if (!PyArg_ParseTuple(args, "O!y*infw*", &PyTuple_Type, &inputs, &pairs, &kind, &f, &c, &out))
        return NULL;
    if (!floats(&out, "result") || !hold(&all, inputs, out.len) || !network(&pairs, (size_t)all.count))
        goto end;
    if (kind < MEDIAN || kind > AROUND || f < 0 || all.count <= f || all.count - f <= f) {
        PyErr_Format(PyExc_ValueError, "kind %d, %zd rows, f = %zd", kind, all.count, f);
        goto end;
    }
    rows = PyMem_Malloc((size_t)all.count * WIDTH * sizeof *rows);
    if (!rows) {
        PyErr_NoMemory();
        goto end;
    }
    Py_BEGIN_ALLOW_THREADS
    good = active->middle(out.buf, all.x, (size_t)all.count, (size_t)out.len / 4, pairs.buf, (size_t)pairs.len / 4,
                          (enum middle)kind, (size_t)f, c, rows);
    Py_END_ALLOW_THREADS
    result = PyBool_FromLong(good);
end:
    PyMem_Free(rows);
    let_go(&all);
    PyBuffer_Release(&pairs);
    PyBuffer_Release(&out);
    return result;
}

/* Room of zeros for `doubles` at an address that any level takes; *memory is what is to be freed. NULL: an exception. */
static double *room(char **memory, size_t doubles)
{
    size_t size = doubles * sizeof(double) + 64;
    *memory = PyMem_Malloc(size);
    if (!*memory) {
        PyErr_NoMemory();
        return NULL;
    }
    memset(*memory, 0, size);
    return (double *)(((uintptr_t)*memory + 63) / 64 * 64);
}

/* Whether `out` has room for so many float64. */
static int doubles(const Py_buffer *out, size_t count)
{
    if (!size_is(out, count * 8, "inner products"))
        return 0;
    if ((uintptr_t)out->buf % 8)
        PyErr_SetString(PyExc_ValueError, "inner products: not aligned");
    return (uintptr_t)out->buf % 8 == 0;
}

static PyObject *py_gram(PyObject *self, PyObject *args)
{
    PyObject *inputs, *result = NULL;
    Py_buffer out;
    Py_ssize_t n;
    struct vectors all = {0};
    char *memory = NULL;
    if (!PyArg_ParseTuple(args, "O!nw*", &PyTuple_Type, &inputs, &n, &out))
        return NULL;
    if (n < 0 || n > PY_SSIZE_T_MAX / 4 || PyTuple_Size(inputs) < 1) {
        PyErr_Format(PyExc_ValueError, "%zd vectors of %zd elements", PyTuple_Size(inputs), n);
        goto end;
    }
    if (!hold(&all, inputs, 4 * n) || !doubles(&out, (size_t)(all.count * all.count)))
        goto end;
    size_t panel = gram_panel((size_t)all.count);
    double *at = room(&memory, panel + gram_sums((size_t)all.count));
    if (!at)
        goto end;
    Py_BEGIN_ALLOW_THREADS
    active->gram(out.buf, all.x, (size_t)all.count, (size_t)n, at, at + panel);
    Py_END_ALLOW_THREADS
    result = Py_NewRef(Py_None);
end:
    PyMem_Free(memory);
    let_go(&all);
    PyBuffer_Release(&out);
    return result;
}

static PyObject *py_gram_row(PyObject *self, PyObject *args)
{
    PyObject *inputs, *result = NULL;
    Py_buffer out;
    Py_ssize_t pivot, n;
    struct vectors all = {0};
    char *memory = NULL;
    if (!PyArg_ParseTuple(args, "O!nnw*", &PyTuple_Type, &inputs, &pivot, &n, &out))
        return NULL;
    if (n < 0 || n > PY_SSIZE_T_MAX / 4 || pivot < 0 || pivot >= PyTuple_Size(inputs)) {
        PyErr_Format(PyExc_ValueError, "%zd vectors of %zd elements, pivot %zd", PyTuple_Size(inputs), n, pivot);
        goto end;
    }
    if (!hold(&all, inputs, 4 * n) || !doubles(&out, 2 * (size_t)all.count))
        goto end;
    double *at = room(&memory, PANEL + row_sums((size_t)all.count));
    if (!at)
        goto end;
    Py_BEGIN_ALLOW_THREADS
    active->gram_row(out.buf, all.x, (size_t)all.count, (size_t)pivot, (size_t)n, at, at + PANEL);
    Py_END_ALLOW_THREADS
    result = Py_NewRef(Py_None);
end:
    PyMem_Free(memory);
    let_go(&all);
    PyBuffer_Release(&out);
    return result;
}

static PyObject *py_put(PyObject *args, size_t width, void (*const *which)(const uint8_t *, float, float *, size_t, enum how))
{
    Py_buffer data, out;
    float c;
    int how;
    PyObject *result = NULL;
    if (!PyArg_ParseTuple(args, "y*fw*i", &data, &c, &out, &how))
        return NULL;
    if (how < DECODE || how > FURTHER)
        PyErr_SetString(PyExc_ValueError, "how is 0, 1 or 2");
    else if (floats(&out, "result") && size_is(&data, (size_t)out.len / 4 * width, "code")) {
        Py_BEGIN_ALLOW_THREADS
        (*which)(data.buf, c, out.buf, (size_t)out.len / 4, (enum how)how);
        Py_END_ALLOW_THREADS
        result = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&data);
    PyBuffer_Release(&out);
    return result;
}

static PyObject *py_fp32(PyObject *self, PyObject *args) { return py_put(args, 4, &active->fp32); }
static PyObject *py_bf16(PyObject *self, PyObject *args) { return py_put(args, 2, &active->bf16); }

static PyObject *py_bf16_encode(PyObject *self, PyObject *args)
{
    Py_buffer x, out;
    PyObject *result = NULL;
    if (!PyArg_ParseTuple(args, "y*w*", &x, &out))
        return NULL;
    if (floats(&x, "vector") && size_is(&out, (size_t)x.len / 2, "code")) {
        Py_BEGIN_ALLOW_THREADS
        active->bf16_encode(x.buf, out.buf, (size_t)x.len / 4);
        Py_END_ALLOW_THREADS
        result = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&x);
    PyBuffer_Release(&out);
    return result;
}

static int kind_is_known(int kind)
{
    if (kind == INT8 || kind == E3M0)
        return 1;
    PyErr_SetString(PyExc_ValueError, "kind is 0 (int8) or 1 (e3m0)");
    return 0;
}

static PyObject *py_block_encode(PyObject *self, PyObject *args)
{
    Py_buffer x, out, residual = {0}, rest = {0};
    PyObject *from, *to, *result = NULL;
    int kind;
    Py_ssize_t wrong;
    if (!PyArg_ParseTuple(args, "iy*w*OO", &kind, &x, &out, &from, &to))
        return NULL;
    if (!kind_is_known(kind) || !floats(&x, "vector") ||
        !size_is(&out, wire_size((enum kind)kind, (size_t)x.len / 4), "code"))
        goto end;
    if (from != Py_None && (PyObject_GetBuffer(from, &residual, PyBUF_SIMPLE) < 0 || !floats(&residual, "residual") ||
                            !size_is(&residual, (size_t)x.len, "residual")))
        goto end;
    if (to != Py_None && (PyObject_GetBuffer(to, &rest, PyBUF_WRITABLE) < 0 || !floats(&rest, "new residual") ||
                          !size_is(&rest, (size_t)x.len, "new residual")))
        goto end;
    Py_BEGIN_ALLOW_THREADS
    wrong = active->encode((enum kind)kind, x.buf, residual.buf, rest.buf, out.buf, (size_t)x.len / 4);
    Py_END_ALLOW_THREADS
    result = PyLong_FromSsize_t(wrong);
end:
    if (residual.obj)
        PyBuffer_Release(&residual);
    if (rest.obj)
        PyBuffer_Release(&rest);
    PyBuffer_Release(&x);
    PyBuffer_Release(&out);
    return result;
}

static PyObject *py_block_put(PyObject *self, PyObject *args)
{
    Py_buffer data, out;
    float c;
    int kind, how;
    PyObject *result = NULL;
    if (!PyArg_ParseTuple(args, "iy*fw*i", &kind, &data, &c, &out, &how))
        return NULL;
    if (how < DECODE || how > FURTHER)
        PyErr_SetString(PyExc_ValueError, "how is 0, 1 or 2");
    else if (kind_is_known(kind) && floats(&out, "result") &&
             size_is(&data, wire_size((enum kind)kind, (size_t)out.len / 4), "code")) {
        Py_BEGIN_ALLOW_THREADS
        active->block((enum kind)kind, data.buf, c, out.buf, (size_t)out.len / 4, (enum how)how);
        Py_END_ALLOW_THREADS
        result = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&data);
    PyBuffer_Release(&out);
    return result;
}

static PyObject *py_int8_wrong(PyObject *self, PyObject *args)
{
    Py_buffer data;
    Py_ssize_t n;
    int wrong;
    PyObject *result = NULL;
    if (!PyArg_ParseTuple(args, "y*n", &data, &n))
        return NULL;
    if (n < 0)
        PyErr_SetString(PyExc_ValueError, "a negative number of elements");
    else if (size_is(&data, wire_size(INT8, (size_t)n), "code")) {
        Py_BEGIN_ALLOW_THREADS
        wrong = active->int8_wrong(data.buf, (size_t)n);
        Py_END_ALLOW_THREADS
        result = PyBool_FromLong(wrong);
    }
    PyBuffer_Release(&data);
    return result;
}

static PyObject *py_topk(PyObject *self, PyObject *args)
{
    Py_buffer x, positions;
    PyObject *result = NULL;
    if (!PyArg_ParseTuple(args, "y*w*", &x, &positions))
        return NULL;
    if (floats(&x, "vector") && floats(&positions, "positions")) {
        if (positions.len > x.len || x.len / 4 > (Py_ssize_t)UINT32_MAX) {
            PyErr_Format(PyExc_ValueError, "%zd positions of %zd elements", positions.len / 4, x.len / 4);
        } else {
            if (positions.len) {
                Py_BEGIN_ALLOW_THREADS
                active->topk(x.buf, (size_t)x.len / 4, (size_t)positions.len / 4, positions.buf);
                Py_END_ALLOW_THREADS
            }
            result = Py_NewRef(Py_None);
        }
    }
    PyBuffer_Release(&x);
    PyBuffer_Release(&positions);
    return result;
}

static PyObject *py_levels(PyObject *self, PyObject *unused)
{
    if (has_avx512())
        return Py_BuildValue("(sss)", "portable", "avx2", "avx512");
    return has_avx2() ? Py_BuildValue("(ss)", "portable", "avx2") : Py_BuildValue("(s)", "portable");
}

static PyObject *py_use(PyObject *self, PyObject *args)
{
    const char *name;
    if (!PyArg_ParseTuple(args, "s", &name))
        return NULL;
    if (strcmp(name, "portable") == 0)
        active = &level_portable;
#if HAVE_AVX2
    else if (strcmp(name, "avx2") == 0 && has_avx2())
        active = &level_avx2;
    else if (strcmp(name, "avx512") == 0 && has_avx512())
        active = &level_avx512;
#endif
    else
        return PyErr_Format(PyExc_ValueError, "no instructions named %s here", name);
    return Py_NewRef(Py_None);
}

static PyObject *py_level(PyObject *self, PyObject *unused) { return PyUnicode_FromString(active->name); }

static PyMethodDef methods[] = {
    {"finite", py_finite, METH_VARARGS, "finite(vector)"},
    {"mean", py_mean, METH_VARARGS, "mean(vectors, factors, out)"},
    {"fp32_put", py_fp32, METH_VARARGS, "fp32_put(data, factor, out, how)"},
    {"bf16_put", py_bf16, METH_VARARGS, "bf16_put(data, factor, out, how)"},
    {"bf16_encode", py_bf16_encode, METH_VARARGS, "bf16_encode(vector, out)"},
    {"block_encode", py_block_encode, METH_VARARGS, "block_encode(kind, vector, out, residual, new_residual)"},
    {"block_put", py_block_put, METH_VARARGS, "block_put(kind, data, factor, out, how)"},
    {"int8_wrong", py_int8_wrong, METH_VARARGS, "int8_wrong(data, n)"},
    {"topk", py_topk, METH_VARARGS, "topk(vector, positions)"},
    {"middle", py_middle, METH_VARARGS, "middle(vectors, network, kind, f, factor, out)"},
    {"gram", py_gram, METH_VARARGS, "gram(vectors, n, out)"},
    {"gram_row", py_gram_row, METH_VARARGS, "gram_row(vectors, pivot, n, out)"},
    {"levels", py_levels, METH_NOARGS, "the sets of instructions that this machine can run"},
    {"level", py_level, METH_NOARGS, "the set of instructions in use"},
    {"use", py_use, METH_VARARGS, "use(level): for tests and benchmarks"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_kernels", "The loops over contributions in C; see kernels.py.", -1, methods, NULL, NULL,
    NULL, NULL,
};

PyMODINIT_FUNC PyInit__kernels(void)
{
#if HAVE_AVX2
    if (has_avx512())
        active = &level_avx512;
    else if (has_avx2())
        active = &level_avx2;
#endif
    PyObject *made = PyModule_Create(&module);
    if (made && PyModule_AddIntConstant(made, "REVISION", REVISION) < 0) {
        Py_DECREF(made);
        return NULL;
    }
    return made;
}
