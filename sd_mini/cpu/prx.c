/* What a PRX block does between its matrix products, each in one pass over memory. One thread; the caller shares out.

   Compiled for one shape: H heads of D columns, L picture and T prompt tokens. D is a multiple of 16. Within a head the
   columns of queries and keys are put into another order, first halves of the rotated pairs and then second ones,
   which no product of two of them notices. All matrices are row by row, and P, what the products take and give, is
   float32, or with HALF bfloat16: whatever is summed up is float32. */
#include <math.h>
#include <string.h>

#define W (H * D)
#define S (T + L)
#define LP ((L + 15) / 16 * 16)
#define SP ((S + 3) / 4 * 4)
#define EPS 1e-6f

#ifdef HALF
typedef unsigned short P;

static inline float wide(P x) {
    unsigned bits = (unsigned)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

static inline P narrow(float x) { /* to the nearest, of two as near to the even one; NaN stays NaN */
    unsigned bits;
    memcpy(&bits, &x, 4);
    unsigned rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return x == x ? rounded : 0x7fc0;
}
#else
typedef float P;

static inline float wide(P x) { return x; }
static inline P narrow(float x) { return x; }
#endif

static inline void widen(const P *x, float *y) {
    for (int j = 0; j < D; j++) y[j] = wide(x[j]);
}

static inline void narrowed(const float *x, P *y) {
    for (int j = 0; j < D; j++) y[j] = narrow(x[j]);
}

typedef float V __attribute__((vector_size(64), aligned(4), may_alias));

static inline V load(const float *x) { return *(const V *)x; }
static inline void store(float *x, V v) { *(V *)x = v; }

/* e^x, relative error 2e-7; below -87 it stays at e^-87. Cephes, expf.c */
static inline float power(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504088896341f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int bits = ((int)n + 127) << 23;
    float two;
    memcpy(&two, &bits, 4);
    return p * two;
}

/* C (m, 16 v) = A (m, k) B (k, 16 v); A's element (i, j) is at i rows + j columns; m is rounded up to a multiple of 4 */
static inline __attribute__((always_inline)) void product(
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

/* x (D) to root mean square 1; the factor */
static inline float unit(const P *x, float *y) {
    float squares = 0;
    widen(x, y);
    for (int j = 0; j < D; j++) squares += y[j] * y[j];
    float factor = 1 / sqrtf(squares / D + EPS);
    for (int j = 0; j < D; j++) y[j] *= factor;
    return factor;
}

/* unit row times its weight, rotated by each pair's cos and sin where there are any, times scale */
static inline void turned(const float *x, const float *w, const float *cs, const float *sn, float scale, float *y) {
    for (int i = 0; i < D / 2; i++) {
        float a = scale * x[2 * i] * w[2 * i], b = scale * x[2 * i + 1] * w[2 * i + 1];
        y[i] = cs ? a * cs[i] - b * sn[i] : a;
        y[i + D / 2] = cs ? a * sn[i] + b * cs[i] : b;
    }
}

/* the gradient dy of what `turned` and `unit` gave => that of x, and of the weight, which is added */
static inline void turned_back(
    const float *dy, const float *x, float factor, const float *w, const float *cs, const float *sn, float scale,
    float *dw, P *dx) {
    float d[D], along = 0;
    for (int i = 0; i < D / 2; i++) {
        float a = scale * dy[i], b = scale * dy[i + D / 2];
        d[2 * i] = cs ? a * cs[i] + b * sn[i] : a;
        d[2 * i + 1] = cs ? b * cs[i] - a * sn[i] : b;
    }
    for (int j = 0; j < D; j++) {
        dw[j] += d[j] * x[j];
        along += d[j] * x[j] * w[j];
    }
    for (int j = 0; j < D; j++) dx[j] = narrow(factor * (d[j] * w[j] - x[j] * (along / D)));
}

typedef struct {
    float q[LP * D], k[SP * D], v[SP * D], qx[LP * D], kx[SP * D], qf[LP], kf[SP];
    int count; /* of keys: the prompt's that are seen, and all of the picture */
} Head;

/* queries, keys and values of head h of one sample; qkv (L, 3, W), kv (words, 2, W), w: the three norms' weights (3, D) */
static void read_head(
    Head *a, int h, const P *qkv, const P *kv, const float *w, const float *cs, const float *sn,
    int words) {
    const float scale = 1 / sqrtf((float)D);
    int m = 0;
    for (; m < words; m++) {
        a->kf[m] = unit(kv + m * 2 * W + h * D, a->kx + m * D);
        turned(a->kx + m * D, w + 2 * D, 0, 0, 1, a->k + m * D);
        widen(kv + m * 2 * W + W + h * D, a->v + m * D);
    }
    for (int l = 0; l < L; l++, m++) {
        const P *x = qkv + l * 3 * W + h * D;
        a->qf[l] = unit(x, a->qx + l * D);
        turned(a->qx + l * D, w, cs + l * D / 2, sn + l * D / 2, scale, a->q + l * D);
        a->kf[m] = unit(x + W, a->kx + m * D);
        turned(a->kx + m * D, w + D, cs + l * D / 2, sn + l * D / 2, 1, a->k + m * D);
        widen(x + 2 * W, a->v + m * D);
    }
    a->count = m;
    memset(a->q + L * D, 0, (LP - L) * D * sizeof(float));
    memset(a->k + m * D, 0, (SP - m) * D * sizeof(float));
    memset(a->v + m * D, 0, (SP - m) * D * sizeof(float));
}

static void across(const float *x, float *y) { /* (LP, D) => (D, LP) */
    for (int j = 0; j < D; j++)
        for (int l = 0; l < LP; l++) y[j * LP + l] = x[l * D + j];
}

/* qkv (n, L, 3, W), kv (R, 2, W), of which sample s has the rows from first[s] to first[s + 1], at most T => out
   (n, L, W); probs (n, H, SP, LP) is for the way back */
void attend(
    long n, const P *qkv, const P *kv, const float *w, const float *cs, const float *sn, const long long *first,
    float *probs, P *out) {
    Head a;
    float qt[D * LP], y[LP * D];
    for (long s = 0; s < n; s++)
        for (int h = 0; h < H; h++) {
            float *p = probs + (s * H + h) * SP * LP;
            read_head(&a, h, qkv + s * L * 3 * W, kv + first[s] * 2 * W, w, cs, sn, first[s + 1] - first[s]);
            across(a.q, qt);
            product(a.count, D, LP / 16, a.k, D, 1, qt, p);
            float most[LP], sum[LP];
            for (int l = 0; l < LP; l++) most[l] = p[l], sum[l] = 0;
            for (int m = 1; m < a.count; m++)
                for (int l = 0; l < LP; l++) most[l] = p[m * LP + l] > most[l] ? p[m * LP + l] : most[l];
            for (int m = 0; m < a.count; m++)
                for (int l = 0; l < LP; l++) sum[l] += p[m * LP + l] = power(p[m * LP + l] - most[l]);
            for (int l = 0; l < LP; l++) sum[l] = 1 / sum[l];
            for (int m = 0; m < a.count; m++)
                for (int l = 0; l < LP; l++) p[m * LP + l] *= sum[l];
            product(L, a.count, D / 16, p, 1, LP, a.v, y);
            for (int l = 0; l < L; l++) narrowed(y + l * D, out + (s * L + l) * W + h * D);
        }
}

/* dout (n, L, W) => dqkv (n, L, 3, W), dkv (R, 2, W), dw (3, D) */
void attend_back(
    long n, const P *qkv, const P *kv, const float *w, const float *cs, const float *sn, const long long *first,
    const float *probs, const P *dout, P *dqkv, P *dkv, float *dw) {
    Head a;
    const float scale = 1 / sqrtf((float)D);
    float d[LP * D], dt[D * LP], ds[SP * LP], dv[SP * D], dq[LP * D], dk[SP * D];
    memset(dw, 0, 3 * D * sizeof(float));
    memset(d, 0, sizeof d);
    for (long s = 0; s < n; s++)
        for (int h = 0; h < H; h++) {
            const float *p = probs + (s * H + h) * SP * LP;
            P *back = dqkv + s * L * 3 * W + h * D, *text = dkv + first[s] * 2 * W + h * D;
            read_head(&a, h, qkv + s * L * 3 * W, kv + first[s] * 2 * W, w, cs, sn, first[s + 1] - first[s]);
            for (int l = 0; l < L; l++) widen(dout + (s * L + l) * W + h * D, d + l * D);
            across(d, dt);
            product(a.count, D, LP / 16, a.v, D, 1, dt, ds);
            float along[LP];
            memset(along, 0, sizeof along);
            for (int m = 0; m < a.count; m++)
                for (int l = 0; l < LP; l++) along[l] += p[m * LP + l] * ds[m * LP + l];
            for (int m = 0; m < a.count; m++)
                for (int l = 0; l < LP; l++) ds[m * LP + l] = p[m * LP + l] * (ds[m * LP + l] - along[l]);
            product(a.count, L, D / 16, p, LP, 1, d, dv);
            product(a.count, L, D / 16, ds, LP, 1, a.q, dk);
            product(L, a.count, D / 16, ds, 1, LP, a.k, dq);
            for (int l = 0; l < L; l++) {
                const float *c = cs + l * D / 2, *e = sn + l * D / 2;
                int m = a.count - L + l;
                turned_back(dq + l * D, a.qx + l * D, a.qf[l], w, c, e, scale, dw, back + l * 3 * W);
                turned_back(dk + m * D, a.kx + m * D, a.kf[m], w + D, c, e, 1, dw + D, back + l * 3 * W + W);
                narrowed(dv + m * D, back + l * 3 * W + 2 * W);
            }
            for (int m = 0; m < a.count - L; m++) {
                P *to = text + m * 2 * W;
                turned_back(dk + m * D, a.kx + m * D, a.kf[m], w + 2 * D, 0, 0, 1, dw + 2 * D, to);
                narrowed(dv + m * D, to + W);
            }
        }
}

/* GELU by its tanh formula: x sigmoid(2 c (x + 0.044715 x^3)), c = sqrt(2 / pi) */
#define LINEAR 1.5957691216057308f
#define CUBIC 0.0713548162726009f

void activate(long count, const P *restrict inner, const P *restrict up, P *restrict y) {
    for (long i = 0; i < count; i++) {
        float x = wide(inner[i]);
        y[i] = narrow(x * wide(up[i]) / (1 + power(-x * (LINEAR + CUBIC * x * x))));
    }
}

void activate_back(
    long count, const P *restrict inner, const P *restrict up, const P *restrict dy, P *restrict dinner,
    P *restrict dup) {
    for (long i = 0; i < count; i++) {
        float x = wide(inner[i]), d = wide(dy[i]);
        float square = x * x, share = 1 / (1 + power(-x * (LINEAR + CUBIC * square)));
        dup[i] = narrow(d * x * share);
        dinner[i] = narrow(d * wide(up[i]) * share * (1 + x * (1 - share) * (LINEAR + 3 * CUBIC * square)));
    }
}

/* layer norm of x (n, L, W), then y = norm * (1 + scale) + shift; both (n, W) with `step` floats from row to row;
   stats (n, L, 2): mean and 1 / deviation */
void modulate(long n, const float *x, const float *shift, const float *scale, long step, float *stats, P *y) {
    for (long s = 0; s < n; s++, shift += step, scale += step)
        for (int l = 0; l < L; l++, x += W, y += W, stats += 2) {
            float mean = 0, spread = 0;
            for (int j = 0; j < W; j++) mean += x[j];
            mean /= W;
            for (int j = 0; j < W; j++) spread += (x[j] - mean) * (x[j] - mean);
            spread = 1 / sqrtf(spread / W + EPS);
            for (int j = 0; j < W; j++) y[j] = narrow((x[j] - mean) * spread * (1 + scale[j]) + shift[j]);
            stats[0] = mean;
            stats[1] = spread;
        }
}

/* dy (n, L, W) => what x gets is added to dx; dshift, dscale are written, `step` floats from row to row */
void modulate_back(
    long n, const float *x, const float *stats, const float *scale, long step, const P *dy, float *dx,
    float *dshift, float *dscale) {
    for (long s = 0; s < n; s++, scale += step, dshift += step, dscale += step) {
        float sum[W], along[W];
        memset(sum, 0, sizeof sum);
        memset(along, 0, sizeof along);
        for (int l = 0; l < L; l++, x += W, dy += W, dx += W, stats += 2) {
            float norm[W], d[W], mean = 0, slope = 0;
            for (int j = 0; j < W; j++) {
                float own = wide(dy[j]);
                norm[j] = (x[j] - stats[0]) * stats[1];
                d[j] = own * (1 + scale[j]);
                sum[j] += own;
                along[j] += own * norm[j];
                mean += d[j];
                slope += d[j] * norm[j];
            }
            for (int j = 0; j < W; j++) dx[j] += stats[1] * (d[j] - mean / W - norm[j] * (slope / W));
        }
        memcpy(dshift, sum, sizeof sum);
        memcpy(dscale, along, sizeof along);
    }
}

/* y = x + gate * made, all (n, L, W), gate (n, W) with `step` floats from row to row */
void gated(long n, const float *x, const float *gate, long step, const P *made, float *y) {
    for (long s = 0; s < n; s++, gate += step)
        for (int l = 0; l < L; l++, x += W, made += W, y += W)
            for (int j = 0; j < W; j++) y[j] = x[j] + gate[j] * wide(made[j]);
}

void gated_back(
    long n, const float *dy, const float *gate, long step, const P *made, P *dmade, float *dgate) {
    for (long s = 0; s < n; s++, gate += step, dgate += step) {
        float sum[W];
        memset(sum, 0, sizeof sum);
        for (int l = 0; l < L; l++, dy += W, made += W, dmade += W)
            for (int j = 0; j < W; j++) {
                dmade[j] = narrow(dy[j] * gate[j]);
                sum[j] += dy[j] * wide(made[j]);
            }
        memcpy(dgate, sum, sizeof sum);
    }
}
