/* The element-wise work of a PRX block between its matrix products, forward and backward, one pass over memory each.

   Each function runs in one thread on a part of the batch; the caller distributes parts over threads. Compiled for H
   heads of D columns, D a multiple of 16; L picture tokens and T prompt tokens a sample are arguments. All matrices are
   row-major. P is the type that the matrix products read and write: float32, or with -DHALF bfloat16 in its bits; sums
   are float32 in both. Reference: diffusers/models/transformers/transformer_prx.py, named at each function. */
#include <math.h>
#include <string.h>

#define W (H * D)                     /* width of a token: hidden_size */
#define EPS 1e-6f                     /* of every norm in PRX */
#define PAD(x, n) (((x) + (n) - 1) / (n) * (n))
#define LP PAD(L, 16)                 /* queries, padded to whole vectors */
#define SP PAD(T + L, 4)              /* keys, padded to the rows that `matmul` computes at once */

#ifdef HALF
typedef unsigned short P;

static inline float widen(P x) {
    unsigned bits = (unsigned)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

/* round to nearest even, as torch's float => bfloat16; NaN stays NaN */
static inline P narrow(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    unsigned rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return x == x ? rounded : 0x7fc0;
}
#else
typedef float P;

static inline float widen(P x) { return x; }
static inline P narrow(float x) { return x; }
#endif

static inline void widen_row(const P *x, float *y) {
    for (int j = 0; j < D; j++) y[j] = widen(x[j]);
}

static inline void narrow_row(const float *x, P *y) {
    for (int j = 0; j < D; j++) y[j] = narrow(x[j]);
}

typedef float V __attribute__((vector_size(64), aligned(4), may_alias));

static inline V load(const float *x) { return *(const V *)x; }
static inline void store(float *x, V v) { *(V *)x = v; }

/* e^x, relative error 2e-7, clamped to [-87, 88] (no infinity, no denormals). Cephes, expf.c; libm's does not inline */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504088896341f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f; /* x - n ln 2, in two parts */
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int bits = ((int)n + 127) << 23; /* 2^n */
    float two;
    memcpy(&two, &bits, 4);
    return p * two;
}

/* C (m, 16 v) = A (m, k) B (k, 16 v). Element (i, j) of A is a[i * rows + j * columns], so that A may be a transpose.
   Computes whole groups of 4 rows: A and C need room up to a multiple of 4. */
static inline __attribute__((always_inline)) void matmul(
    int m, int k, int v, const float *a, int rows, int columns, const float *b, float *c) {
    for (int i = 0; i < m; i += 4)
        for (int q = 0; q < v; q++) {
            V sum[4] = {{0}, {0}, {0}, {0}};
            for (int j = 0; j < k; j++) {
                V row = load(b + j * 16 * v + 16 * q);
                for (int u = 0; u < 4; u++) sum[u] += a[(i + u) * rows + j * columns] * row;
            }
            for (int u = 0; u < 4; u++) store(c + (i + u) * 16 * v + 16 * q, sum[u]);
        }
}

static void transpose(int L_padded, const float *x, float *y) { /* (LP, D) => (D, LP) */
    for (int j = 0; j < D; j++)
        for (int l = 0; l < L_padded; l++) y[j * L_padded + l] = x[l * D + j];
}

/* RMS norm without weight: x / sqrt(mean(x^2) + eps), diffusers' RMSNorm.forward; returns the factor on x */
static inline float rms_norm(const P *x, float *y) {
    float squares = 0;
    widen_row(x, y);
    for (int j = 0; j < D; j++) squares += y[j] * y[j];
    float factor = 1 / sqrtf(squares / D + EPS);
    for (int j = 0; j < D; j++) y[j] *= factor;
    return factor;
}

/* The norm's weight, then rotary embedding (Su et al. 2021; `apply_rope`) by each pair's cos and sin, no rotation where
   `cos` is null; times `scale`. Pairs are de-interleaved: first halves in y[0, D/2), second in y[D/2, D). Queries and
   keys have the same order of columns, so their dot products are unchanged. */
static inline void rotate(const float *x, const float *w, const float *cos, const float *sin, float scale, float *y) {
    for (int i = 0; i < D / 2; i++) {
        float a = scale * x[2 * i] * w[2 * i], b = scale * x[2 * i + 1] * w[2 * i + 1];
        y[i] = cos ? a * cos[i] - b * sin[i] : a;
        y[i + D / 2] = cos ? a * sin[i] + b * cos[i] : b;
    }
}

/* Backward of `rms_norm` and `rotate`: dy => dx, and dw accumulated. x: the normed row */
static inline void rotate_backward(
    const float *dy, const float *x, float factor, const float *w, const float *cos, const float *sin, float scale,
    float *dw, P *dx) {
    float d[D], along = 0;
    for (int i = 0; i < D / 2; i++) { /* the inverse rotation */
        float a = scale * dy[i], b = scale * dy[i + D / 2];
        d[2 * i] = cos ? a * cos[i] + b * sin[i] : a;
        d[2 * i + 1] = cos ? b * cos[i] - a * sin[i] : b;
    }
    for (int j = 0; j < D; j++) {
        dw[j] += d[j] * x[j];
        along += d[j] * x[j] * w[j];
    }
    for (int j = 0; j < D; j++) dx[j] = narrow(factor * (d[j] * w[j] - x[j] * (along / D)));
}

/* One head of one sample, in scratch memory */
typedef struct {
    float *q, *k, *v;           /* queries (LP, D), keys and values (SP, D), prompt tokens first */
    float *q_normed, *k_normed; /* before weight and rotation, which the backward pass needs */
    float *q_factor, *k_factor;
    int keys;                   /* the sample's unmasked prompt tokens + L */
} Head;

/* Floats of scratch memory that `attend` and `attend_backward` need */
long scratch_size(long L, long T) { return D * (5 * LP + 6 * SP) + LP + SP + SP * LP; }

static float *take(float **scratch, long count) {
    float *start = *scratch;
    *scratch += count;
    return start;
}

static Head allocate_head(float **scratch, long L, long T) {
    Head a = {take(scratch, LP * D), take(scratch, SP * D), take(scratch, SP * D), take(scratch, LP * D),
              take(scratch, SP * D), take(scratch, LP),     take(scratch, SP),     0};
    return a;
}

/* PRXAttnProcessor2_0 up to the attention itself: queries, keys and values of head h. qkv (L, 3, W) of the picture, kv
   (words, 2, W) of the prompt, w (3, D): weights of norm_q, norm_k and norm_added_k. Queries carry the scale D^-1/2. */
static void load_head(
    Head *a, int h, long L, long T, int words, const P *qkv, const P *kv, const float *w, const float *cos,
    const float *sin) {
    const float scale = 1 / sqrtf((float)D);
    int m = 0;
    for (; m < words; m++) {
        a->k_factor[m] = rms_norm(kv + m * 2 * W + h * D, a->k_normed + m * D);
        rotate(a->k_normed + m * D, w + 2 * D, 0, 0, 1, a->k + m * D);
        widen_row(kv + m * 2 * W + W + h * D, a->v + m * D);
    }
    for (int l = 0; l < L; l++, m++) {
        const P *x = qkv + l * 3 * W + h * D;
        a->q_factor[l] = rms_norm(x, a->q_normed + l * D);
        rotate(a->q_normed + l * D, w, cos + l * D / 2, sin + l * D / 2, scale, a->q + l * D);
        a->k_factor[m] = rms_norm(x + W, a->k_normed + m * D);
        rotate(a->k_normed + m * D, w + D, cos + l * D / 2, sin + l * D / 2, 1, a->k + m * D);
        widen_row(x + 2 * W, a->v + m * D);
    }
    a->keys = m;
    /* `matmul` reads the padding rows: zeros there, no NaN */
    memset(a->q + L * D, 0, (LP - L) * D * sizeof(float));
    memset(a->k + m * D, 0, (SP - m) * D * sizeof(float));
    memset(a->v + m * D, 0, (SP - m) * D * sizeof(float));
}

/* PRXAttnProcessor2_0 between the projections: softmax(Q K^T / sqrt(D)) V. qkv (n, L, 3, W); kv (R, 2, W): unmasked
   prompt tokens, those of sample s in rows first[s] to first[s + 1] => out (n, L, W), and the attention weights,
   transposed, probs (n, H, SP, LP), for the backward pass. */
void attend(
    long n, long L, long T, const P *qkv, const P *kv, const float *w, const float *cos, const float *sin,
    const long long *first, float *scratch, float *probs, P *out) {
    Head a = allocate_head(&scratch, L, T);
    float *q_transposed = take(&scratch, D * LP), *y = take(&scratch, LP * D);
    float max[LP], sum[LP];
    for (long s = 0; s < n; s++)
        for (int h = 0; h < H; h++) {
            float *p = probs + (s * H + h) * SP * LP;
            load_head(&a, h, L, T, first[s + 1] - first[s], qkv + s * L * 3 * W, kv + first[s] * 2 * W, w, cos, sin);
            transpose(LP, a.q, q_transposed);
            matmul(a.keys, D, LP / 16, a.k, D, 1, q_transposed, p); /* scores, keys x queries */
            /* softmax over the keys, stable: the maximum is subtracted */
            for (int l = 0; l < LP; l++) max[l] = p[l], sum[l] = 0;
            for (int m = 1; m < a.keys; m++)
                for (int l = 0; l < LP; l++) max[l] = p[m * LP + l] > max[l] ? p[m * LP + l] : max[l];
            for (int m = 0; m < a.keys; m++)
                for (int l = 0; l < LP; l++) sum[l] += p[m * LP + l] = exponential(p[m * LP + l] - max[l]);
            for (int l = 0; l < LP; l++) sum[l] = 1 / sum[l];
            for (int m = 0; m < a.keys; m++)
                for (int l = 0; l < LP; l++) p[m * LP + l] *= sum[l];
            matmul(L, a.keys, D / 16, p, 1, LP, a.v, y);
            for (int l = 0; l < L; l++) narrow_row(y + l * D, out + (s * L + l) * W + h * D);
        }
}

/* Backward of `attend`: dout (n, L, W) => dqkv (n, L, 3, W), dkv (R, 2, W), dw (3, D) */
void attend_backward(
    long n, long L, long T, const P *qkv, const P *kv, const float *w, const float *cos, const float *sin,
    const long long *first, float *scratch, const float *probs, const P *dout, P *dqkv, P *dkv, float *dw) {
    Head a = allocate_head(&scratch, L, T);
    const float scale = 1 / sqrtf((float)D);
    float *d = take(&scratch, LP * D), *d_transposed = take(&scratch, D * LP), *dq = take(&scratch, LP * D);
    float *dv = take(&scratch, SP * D), *dk = take(&scratch, SP * D), *ds = take(&scratch, SP * LP);
    float along[LP];
    memset(dw, 0, 3 * D * sizeof(float));
    memset(d, 0, LP * D * sizeof(float));
    for (long s = 0; s < n; s++)
        for (int h = 0; h < H; h++) {
            const float *p = probs + (s * H + h) * SP * LP;
            P *picture = dqkv + s * L * 3 * W + h * D, *prompt = dkv + first[s] * 2 * W + h * D;
            load_head(&a, h, L, T, first[s + 1] - first[s], qkv + s * L * 3 * W, kv + first[s] * 2 * W, w, cos, sin);
            for (int l = 0; l < L; l++) widen_row(dout + (s * L + l) * W + h * D, d + l * D);
            transpose(LP, d, d_transposed);
            matmul(a.keys, D, LP / 16, a.v, D, 1, d_transposed, ds); /* gradient of the attention weights */
            /* softmax: ds = p (dp - sum_m p dp) */
            memset(along, 0, sizeof along);
            for (int m = 0; m < a.keys; m++)
                for (int l = 0; l < LP; l++) along[l] += p[m * LP + l] * ds[m * LP + l];
            for (int m = 0; m < a.keys; m++)
                for (int l = 0; l < LP; l++) ds[m * LP + l] = p[m * LP + l] * (ds[m * LP + l] - along[l]);
            matmul(a.keys, L, D / 16, p, LP, 1, d, dv);
            matmul(a.keys, L, D / 16, ds, LP, 1, a.q, dk);
            matmul(L, a.keys, D / 16, ds, 1, LP, a.k, dq);
            for (int l = 0; l < L; l++) {
                const float *c = cos + l * D / 2, *e = sin + l * D / 2;
                int m = a.keys - L + l;
                P *to = picture + l * 3 * W;
                rotate_backward(dq + l * D, a.q_normed + l * D, a.q_factor[l], w, c, e, scale, dw, to);
                rotate_backward(dk + m * D, a.k_normed + m * D, a.k_factor[m], w + D, c, e, 1, dw + D, to + W);
                narrow_row(dv + m * D, to + 2 * W);
            }
            for (int m = 0; m < a.keys - L; m++) {
                P *to = prompt + m * 2 * W;
                const float *normed = a.k_normed + m * D;
                rotate_backward(dk + m * D, normed, a.k_factor[m], w + 2 * D, 0, 0, 1, dw + 2 * D, to);
                narrow_row(dv + m * D, to + W);
            }
        }
}

/* PRXBlock's gated MLP between its projections, y = gelu(gate) * up, torch's GELU(approximate="tanh"). By
   (1 + tanh(z)) / 2 = sigmoid(2 z): gelu(x) = x sigmoid(2 c (x + 0.044715 x^3)), c = sqrt(2 / pi). */
#define LINEAR 1.5957691216057308f /* 2 c */
#define CUBIC 0.0713548162726009f  /* 2 c 0.044715 */

void gelu_times(long count, const P *restrict gate, const P *restrict up, P *restrict y) {
    for (long i = 0; i < count; i++) {
        float x = widen(gate[i]);
        y[i] = narrow(x * widen(up[i]) / (1 + exponential(-x * (LINEAR + CUBIC * x * x))));
    }
}

void gelu_times_backward(
    long count, const P *restrict gate, const P *restrict up, const P *restrict dy, P *restrict dgate,
    P *restrict dup) {
    for (long i = 0; i < count; i++) {
        float x = widen(gate[i]), d = widen(dy[i]);
        float square = x * x, sigmoid = 1 / (1 + exponential(-x * (LINEAR + CUBIC * square)));
        dup[i] = narrow(d * x * sigmoid);
        dgate[i] = narrow(d * widen(up[i]) * sigmoid * (1 + x * (1 - sigmoid) * (LINEAR + 3 * CUBIC * square)));
    }
}

/* PRXBlock's and FinalLayer's `(1 + scale) * norm(x) + shift`, LayerNorm without weights. x (n, L, W); shift and scale
   (n, W), `step` floats from row to row, as they are chunks of one matrix => y; stats (n, L, 2): mean, 1 / std */
void modulate(
    long n, long L, const float *x, const float *shift, const float *scale, long step, float *stats, P *y) {
    for (long s = 0; s < n; s++, shift += step, scale += step)
        for (int l = 0; l < L; l++, x += W, y += W, stats += 2) {
            float mean = 0, variance = 0;
            for (int j = 0; j < W; j++) mean += x[j];
            mean /= W;
            for (int j = 0; j < W; j++) variance += (x[j] - mean) * (x[j] - mean);
            float inverse = 1 / sqrtf(variance / W + EPS);
            for (int j = 0; j < W; j++) y[j] = narrow((x[j] - mean) * inverse * (1 + scale[j]) + shift[j]);
            stats[0] = mean;
            stats[1] = inverse;
        }
}

/* Backward of `modulate`: dy (n, L, W) => the gradient of x is added to dx; dshift and dscale are written */
void modulate_backward(
    long n, long L, const float *x, const float *stats, const float *scale, long step, const P *dy, float *dx,
    float *dshift, float *dscale) {
    for (long s = 0; s < n; s++, scale += step, dshift += step, dscale += step) {
        float sum[W], along[W];
        memset(sum, 0, sizeof sum);
        memset(along, 0, sizeof along);
        for (int l = 0; l < L; l++, x += W, dy += W, dx += W, stats += 2) {
            float norm[W], d[W], mean = 0, slope = 0;
            for (int j = 0; j < W; j++) {
                float grad = widen(dy[j]);
                norm[j] = (x[j] - stats[0]) * stats[1];
                d[j] = grad * (1 + scale[j]);
                sum[j] += grad;
                along[j] += grad * norm[j];
                mean += d[j];
                slope += d[j] * norm[j];
            }
            for (int j = 0; j < W; j++) dx[j] += stats[1] * (d[j] - mean / W - norm[j] * (slope / W));
        }
        memcpy(dshift, sum, sizeof sum);
        memcpy(dscale, along, sizeof along);
    }
}

/* PRXBlock's residuals, `y = x + gate * branch`. x, branch (n, L, W); gate (n, W), `step` floats from row to row */
void add_gated(long n, long L, const float *x, const float *gate, long step, const P *branch, float *y) {
    for (long s = 0; s < n; s++, gate += step)
        for (int l = 0; l < L; l++, x += W, branch += W, y += W)
            for (int j = 0; j < W; j++) y[j] = x[j] + gate[j] * widen(branch[j]);
}

/* Backward of `add_gated`: dy => dbranch, dgate; the gradient of x is dy itself */
void add_gated_backward(
    long n, long L, const float *dy, const float *gate, long step, const P *branch, P *dbranch, float *dgate) {
    for (long s = 0; s < n; s++, gate += step, dgate += step) {
        float sum[W];
        memset(sum, 0, sizeof sum);
        for (int l = 0; l < L; l++, dy += W, branch += W, dbranch += W)
            for (int j = 0; j < W; j++) {
                dbranch[j] = narrow(dy[j] * gate[j]);
                sum[j] += dy[j] * widen(branch[j]);
            }
        memcpy(dgate, sum, sizeof sum);
    }
}
