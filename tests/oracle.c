#include "tests/oracle.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void *grab(size_t n)
{
    void *p = calloc(n ? n : 1, sizeof(double));
    if (!p) {
        fprintf(stderr, "oracle: out of memory\n");
        exit(1);
    }
    return p;
}

/* A tensor as doubles, or NULL where the checkpoint has none of that name. The caller frees it. */
static double *tensor(const struct ltn_checkpoint *ck, int layer, const char *name)
{
    char full[128];

    if (layer < 0)
        snprintf(full, sizeof full, "%s", name);
    else
        snprintf(full, sizeof full, "model.layers.%d.%s", layer, name);
    const struct ltn_st_tensor *t = ltn_st_find(&ck->file, full);
    if (!t)
        return NULL;
    size_t size = ltn_st_dtype_size(t->dtype), n = t->bytes / size;
    const uint8_t *src = ck->file.map + t->offset;
    double *out = grab(n);
    for (size_t i = 0; i < n; i++) {
        uint32_t word = 0;
        memcpy(&word, src + i * size, size);
        out[i] = t->dtype == LTN_ST_F32    ? ltn_bits_to_f32(word)
                 : t->dtype == LTN_ST_BF16 ? ltn_bf16_to_f32((uint16_t)word)
                                           : ltn_f16_to_f32((uint16_t)word);
    }
    return out;
}

/* y = x W^T + b, with the weights found by name. */
static void linear(const struct ltn_checkpoint *ck, int layer, const char *name, double *y, const double *x,
                   int n, int outputs, int inputs)
{
    char full[64];

    snprintf(full, sizeof full, "%s.weight", name);
    double *w = tensor(ck, layer, full);
    snprintf(full, sizeof full, "%s.bias", name);
    double *b = tensor(ck, layer, full);
    for (int t = 0; t < n; t++)
        for (int o = 0; o < outputs; o++) {
            double sum = b ? b[o] : 0;
            for (int i = 0; i < inputs; i++)
                sum += x[(size_t)t * inputs + i] * w[(size_t)o * inputs + i];
            y[(size_t)t * outputs + o] = sum;
        }
    free(w);
    free(b);
}

static void norm(const struct ltn_checkpoint *ck, int layer, const char *name, double *y, const double *x,
                 int n, int width)
{
    char full[64];

    snprintf(full, sizeof full, "%s.weight", name);
    double *w = tensor(ck, layer, full);
    snprintf(full, sizeof full, "%s.bias", name);
    double *b = tensor(ck, layer, full);
    for (int t = 0; t < n; t++) {
        const double *in = x + (size_t)t * width;
        double *out = y + (size_t)t * width;
        double mean = 0, square = 0;
        for (int i = 0; i < width; i++)
            mean += in[i] / width;
        if (!ck->config.layer_norm)
            mean = 0;
        for (int i = 0; i < width; i++)
            square += (in[i] - mean) * (in[i] - mean) / width;
        double scale = 1 / sqrt(square + (ck->config.layer_norm ? 1e-5 : 1e-6));
        for (int i = 0; i < width; i++)
            out[i] = (in[i] - mean) * scale * (w ? w[i] : 1) + (b ? b[i] : 0);
    }
    free(w);
    free(b);
}

static double sigmoid(double x)
{
    return 1 / (1 + exp(-x));
}

static void feature_map(enum ltn_act act, double *x, int n)
{
    double most = -INFINITY;

    for (int i = 0; i < n; i++)
        most = fmax(most, x[i]);
    for (int i = 0; i < n; i++) {
        double v = x[i], elu = v > 0 ? v : expm1(v);
        switch (act) {
        case LTN_ACT_NONE:
            break;
        case LTN_ACT_SILU:
            x[i] = v * sigmoid(v);
            break;
        case LTN_ACT_GELU:
            x[i] = v * (1 + erf(v / sqrt(2))) / 2;
            break;
        case LTN_ACT_RELU:
            x[i] = v > 0 ? v : 0;
            break;
        case LTN_ACT_ELU:
            x[i] = elu;
            break;
        case LTN_ACT_SIGMOID:
            x[i] = sigmoid(v);
            break;
        case LTN_ACT_EXP:
            x[i] = exp(v - most);
            break;
        case LTN_ACT_LEAK:
            x[i] = v > 0 ? v : 0.01 * v;
            break;
        case LTN_ACT_ELU_ADD1:
            x[i] = 1 + elu;
            break;
        case LTN_ACT_ELU_ADD2:
            x[i] = 2 + elu;
            break;
        case LTN_ACT_SINE:
            x[i] = sin(v);
            break;
        }
    }
}

/* ALiBi slopes times the layer factor, in float32 as the checkpoints' own code computes it. */
static double slope(int h, int i, int layer, int n_layers)
{
    int p = 1 << (int)floor(log2(h));
    float head = (float)pow(2, i < p ? -8.0 * (i + 1) / p : -4.0 * (2 * (i - p) + 1) / p);
    float factor = (float)(1 - (double)layer / (n_layers - 1) + 1e-5);
    return (float)(head * factor);
}

/* Head `i` of one layer: o [n, e] from q, k [n, d], v [n, e]; and the state [d, e] that is left. */
static void attention(double s, const double *q, const double *k, const double *v, int n, int d, int e,
                      double *o, double *state)
{
    for (int t = 0; t < n; t++) {
        memset(o + (size_t)t * e, 0, (size_t)e * sizeof *o);
        for (int j = 0; j <= t; j++) {
            double weight = 0;
            for (int c = 0; c < d; c++)
                weight += q[(size_t)t * d + c] * k[(size_t)j * d + c];
            weight *= exp(-s * (t - j));
            for (int c = 0; c < e; c++)
                o[(size_t)t * e + c] += weight * v[(size_t)j * e + c];
        }
    }
    for (int a = 0; state && a < d; a++)
        for (int b = 0; b < e; b++) {
            double sum = 0;
            for (int j = 0; j < n; j++)
                sum += exp(-s * (n - 1 - j)) * k[(size_t)j * d + a] * v[(size_t)j * e + b];
            state[(size_t)a * e + b] = sum;
        }
}

static void token_mixer(const struct ltn_checkpoint *ck, int layer, double *x, int n, double *state)
{
    const struct ltn_config *c = &ck->config;
    const int D = c->embed_dim, H = c->hidden_dim, h = c->n_heads, e = c->head_dim, g = c->gate_dim;
    const int width = g ? 3 * H : 4 * H, d = c->lrpe[layer] ? 2 * e : e;
    double *y = grab((size_t)n * D), *qkv = grab((size_t)n * width), *gate = grab((size_t)n * H);
    double *low = grab((size_t)n * g), *o = grab((size_t)n * H), *head = grab((size_t)n * e),
           *mixed = grab((size_t)n * D);
    double *q = grab((size_t)n * d), *k = grab((size_t)n * d), *v = grab((size_t)n * e);
    double *theta = tensor(ck, layer, "token_mixer.lrpe.theta");

    norm(ck, layer, "token_norm", y, x, n, D);
    linear(ck, layer, g ? "token_mixer.qkv_proj" : "token_mixer.qkvu_proj", qkv, y, n, width, D);
    if (g) {
        linear(ck, layer, "token_mixer.output_gate.0", low, y, n, g, D);
        linear(ck, layer, "token_mixer.output_gate.1", gate, low, n, H, g);
        for (size_t i = 0; i < (size_t)n * H; i++)
            gate[i] = sigmoid(gate[i]);
        for (int t = 0; t < n; t++)
            feature_map(c->act, qkv + (size_t)t * width, width);
    }
    for (int i = 0; i < h; i++) {
        for (int t = 0; t < n; t++) {
            double *row = qkv + (size_t)t * width;
            double *qi = row + i * e, *ki = row + H + i * e, *vi = row + 2 * H + i * e;
            if (!g) {
                feature_map(c->act, qi, e);
                feature_map(c->act, ki, e);
                memcpy(gate + (size_t)t * H + i * e, row + 3 * H + i * e, (size_t)e * sizeof *gate);
            }
            for (int f = 0; f < e; f++) {
                double angle = theta ? theta[i * e + f] * t : 0;
                q[(size_t)t * d + f] = qi[f] * cos(angle);
                k[(size_t)t * d + f] = ki[f] * cos(angle);
                v[(size_t)t * e + f] = vi[f];
                if (theta) {
                    q[(size_t)t * d + e + f] = qi[f] * sin(angle);
                    k[(size_t)t * d + e + f] = ki[f] * sin(angle);
                }
            }
        }
        attention(slope(h, i, layer, c->n_layers), q, k, v, n, d, e, head,
                  state ? state + (size_t)i * d * e : NULL);
        for (int t = 0; t < n; t++)
            memcpy(o + (size_t)t * H + i * e, head + (size_t)t * e, (size_t)e * sizeof *o);
    }
    norm(ck, layer, "token_mixer.norm", o, o, n, H);
    for (size_t i = 0; i < (size_t)n * H; i++)
        o[i] *= gate[i];
    linear(ck, layer, "token_mixer.out_proj", mixed, o, n, D, H);
    for (size_t i = 0; i < (size_t)n * D; i++)
        x[i] += mixed[i];
    double *all[] = {y, qkv, gate, low, o, head, mixed, q, k, v, theta};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
}

static void channel_mixer(const struct ltn_checkpoint *ck, int layer, double *x, int n)
{
    const int D = ck->config.embed_dim, G = ck->config.glu_dim;
    double *y = grab((size_t)n * D), *a = grab((size_t)n * G), *b = grab((size_t)n * G);

    norm(ck, layer, "channel_norm", y, x, n, D);
    linear(ck, layer, "channel_mixer.l1", a, y, n, G, D);
    linear(ck, layer, "channel_mixer.l2", b, y, n, G, D);
    for (size_t i = 0; i < (size_t)n * G; i++)
        a[i] *= b[i];
    linear(ck, layer, "channel_mixer.l3", y, a, n, D, G);
    for (size_t i = 0; i < (size_t)n * D; i++)
        x[i] += y[i];
    free(y);
    free(a);
    free(b);
}

void oracle_forward(const struct ltn_checkpoint *ck, const int32_t *ids, int n, double *logits, double *state)
{
    const struct ltn_config *c = &ck->config;
    const int D = c->embed_dim;
    double *embed = tensor(ck, -1, "model.embed_tokens.weight"), *x = grab((size_t)n * D);

    for (int t = 0; t < n; t++)
        for (int i = 0; i < D; i++)
            x[(size_t)t * D + i] = embed[(size_t)ids[t] * D + i] * (c->scale_embedding ? sqrt(D) : 1);
    for (int l = 0; l < c->n_layers; l++) {
        token_mixer(ck, l, x, n, state);
        channel_mixer(ck, l, x, n);
        if (state)
            state += (size_t)c->n_heads * c->head_dim * c->head_dim * (c->lrpe[l] ? 2 : 1);
    }
    norm(ck, -1, "model.final_norm", x, x, n, D);
    double *head = c->tied ? embed : tensor(ck, -1, "lm_head.weight");
    for (int t = 0; t < n; t++)
        for (int v = 0; v < c->vocab_size; v++) {
            double sum = 0;
            for (int i = 0; i < D; i++)
                sum += x[(size_t)t * D + i] * head[(size_t)v * D + i];
            logits[(size_t)t * c->vocab_size + v] = sum;
        }
    if (head != embed)
        free(head);
    free(embed);
    free(x);
}
