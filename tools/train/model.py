"""TransNormerLLM (v2) in PyTorch, written for training.

D width, L layers, h heads of e = D / h features (hidden_dim = D), G the GLU's width, V pieces. B streams are trained
side by side, T tokens a step; the recurrent state of every stream is handed from one step to the next, so a stream has
no length. Every layer:

    q, k, v, u = Wqkvu norm(x)          q, k = silu(q), silu(k), and LRPE where the layer has it
    o_t = sum_{j<=t} exp(-s (t-j)) (q_t . k_j) v_j
    x += Wo (u * norm(o));  y = norm(x);  x += W3 (W1 y * W2 y)

(TransNormerLLM, arXiv 2307.14995; the intra/inter block form is Lightning Attention-2, arXiv 2401.04658; slopes and
scaling are those of the released code, not of the papers, where the two differ.)
"""
import json
import math
import os

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn


def head_slopes(h):
    """ALiBi slopes: the largest power of two p <= h gives the first p, the odd ones of 2p follow unsorted."""
    p = 1 << (h.bit_length() - 1)
    return [2 ** (-8 * (i + 1) / p) if i < p else 2 ** (-4 * (2 * (i - p) + 1) / p) for i in range(h)]


def layer_slopes(h, layer, n_layers):
    """-> f64 [h]; formed in f32 as the released models do. The last layer hardly decays at all."""
    factor = torch.tensor(1 - layer / (n_layers - 1) + 1e-5, dtype=torch.float32)
    return (torch.tensor(head_slopes(h), dtype=torch.float32) * factor).double()


def decays(s, block):
    """Decay factors of one block of m tokens from the slopes s [h], i and j counted from 0; every exponent is <= 0.
    -> intra [h,1,m,m] exp(-s (i-j)) below the diagonal, query [h,1,m,1] exp(-s (i+1)), key [h,1,m,1] exp(-s (m-1-i)),
    lost [h,1,1] 1 - exp(-s m), all f32: carrying what is lost keeps the last layer's tiny decay exact in f32."""
    i = torch.arange(block, dtype=torch.float64)
    s = s.view(-1, 1, 1, 1)
    dist = i.view(-1, 1) - i
    intra = torch.where(dist >= 0, torch.exp(-s * dist.clamp(min=0)), 0)
    query = torch.exp(-s * (i + 1).view(-1, 1))
    key = torch.exp(-s * (block - 1 - i).view(-1, 1))
    lost = -torch.expm1(-s * block)[:, 0]
    return tuple(t.float() for t in (intra, query, key, lost))


def norm(x, dtype):
    """SimpleRMSNorm: no weight; computed in f32, returned as `dtype`."""
    x = x.float()
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)).to(dtype)


def round_bf16(x):
    """bf16 values in f32, with the gradient of the identity."""
    return x + (x.bfloat16().float() - x).detach()


def attention(q, k, v, S, decay):
    """q, k [B,h,T,d], v [B,h,T,e], S f32 [B,h,d,e] the state before the first token.
    -> o [B,h,T,e], the state after the last. T is a multiple of the block that `decay` is for."""
    intra, query, key, lost = decay
    B, h, T, e = v.shape
    m = intra.shape[-1]
    q, k, v = (t.reshape(B, h, T // m, m, -1) for t in (q, k, v))
    new = (k * key).to(k.dtype).transpose(-1, -2) @ v  # [B,h,T/m,d,e] what each block adds to the state
    before = []  # the state before each block
    for n in range(T // m):
        before.append(S)
        S = S + (new[:, :, n].float() - lost * S)
    o = ((q @ k.transpose(-1, -2)) * intra).to(q.dtype) @ v
    o = o + query * (q @ torch.stack(before, 2).to(q.dtype))
    return o.reshape(B, h, T, e), S


def lrpe(x, cos, sin):
    """x [B,h,T,e] -> [B,h,T,2e]: first the cosines, then the sines."""
    return torch.cat([x * cos, x * sin], -1).to(x.dtype)


def layer(x, S, keep, qkvu, out, w1, w2, w3, theta, decay, p_drop):
    """x f32 [B,T,D], S f32 [B,h,d,e], keep [B] 0 where a stream starts anew; weights in the dtype to compute in.
    -> x, S after the T tokens."""
    B, T, D = x.shape
    h, e = S.shape[1], S.shape[3]
    dt = qkvu.dtype
    S = S * keep.view(-1, 1, 1, 1)
    q, k, v, u = F.linear(norm(x, dt), qkvu).view(B, T, 4, h, e).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = F.silu(q), F.silu(k)
    if theta is None:
        o, S = attention(q, k, v, S, decay)
    else:
        # Only differences of positions matter, so every step counts from 0 and the state is turned back by T
        # afterwards: angles stay below T radians, and f32 is enough however long the stream has run.
        angle = theta * torch.arange(T, device=x.device).view(-1, 1)  # [h,T,e]
        cos, sin = angle.cos(), angle.sin()
        o, S = attention(lrpe(q, cos, sin), lrpe(k, cos, sin), v, S, decay)
        cos, sin = (f(theta * T).view(h, e, 1) for f in (torch.cos, torch.sin))
        a, b = S[:, :, :e], S[:, :, e:]
        S = torch.cat([cos * a + sin * b, cos * b - sin * a], 2)
    o = norm(o.transpose(1, 2).reshape(B, T, D), torch.float32)
    u = u.transpose(1, 2).reshape(B, T, D)
    x = x + F.dropout(F.linear((u * o).to(dt), out), p_drop).float()
    y = norm(x, dt)
    return x + F.dropout(F.linear(F.linear(y, w1) * F.linear(y, w2), w3), p_drop).float(), S


def embed(E, ids, p_drop):
    """Rows of E times sqrt(D), f32."""
    return F.dropout(F.embedding(ids, E) * math.sqrt(E.shape[1]), p_drop)


def token_loss(x, E, targets, dtype):
    """-> negative log-likelihood in nats and log-sum-exp, f32 [B,T]. The logit of the target is formed on its own, so
    the gradient of the logits is a plain softmax."""
    y = norm(x, dtype)
    logits = F.linear(y, E.to(dtype)).float()
    lse = torch.logsumexp(logits, -1)
    return lse - (y.float() * F.embedding(targets, E.to(dtype)).float()).sum(-1), lse


class TNL(nn.Module):
    """Equal matrices of all layers lie in one tensor, so that Muon can take them in one batch."""

    def __init__(self, vocab, width, layers, heads, glu):
        super().__init__()
        self.shape = dict(vocab=vocab, width=width, layers=layers, heads=heads, glu=glu)
        D, L, G, h = width, layers, glu, heads
        self.embedding = nn.Parameter(torch.randn(vocab, D) * 0.02)
        self.mixer = nn.Parameter(torch.randn(L, 5, D, D) / math.sqrt(D))  # q, k, v, u, out
        self.glu = nn.Parameter(torch.randn(L, 3, G, D) / math.sqrt(D))  # l1, l2, l3 transposed
        self.theta = nn.Parameter(10000 ** (-2 * torch.arange(D).view(h, 1, D // h) / D))  # layer 0 only
        with torch.no_grad():  # every layer begins as the identity
            self.mixer[:, 4] = 0
            self.glu[:, 2] = 0
        self.compiled = (embed, layer, token_loss)
        self.cache = {}

    def compile(self):
        """One compiled layer serves all but layer 0: less to compile than the whole model."""
        self.compiled = tuple(torch.compile(f, dynamic=False, fullgraph=True) for f in self.compiled)

    def decay(self, l, block):
        if (l, block) not in self.cache:
            s = layer_slopes(self.shape["heads"], l, self.shape["layers"])
            self.cache[l, block] = [t.to(self.embedding.device) for t in decays(s, block)]
        return self.cache[l, block]

    def new_state(self, B):
        h, D = self.shape["heads"], self.shape["width"]
        e = D // h
        return [torch.zeros(B, h, e if l else 2 * e, e, device=self.embedding.device)
                for l in range(self.shape["layers"])]

    def hidden(self, ids, state, keep=None, dtype=torch.float32, block=128, p_drop=0.0):
        """ids [B,T], state of every layer (not changed) -> x [B,T,D] before the final norm, the state afterwards."""
        B, T = ids.shape
        block = min(block, T)
        if T % block:
            raise ValueError(f"{T} tokens are no multiple of the block of {block}")
        if keep is None:
            keep = torch.ones(B, device=ids.device)
        f_embed, f_layer, _ = self.compiled
        x = f_embed(self.embedding, ids, p_drop)
        mixer, glu = self.mixer.to(dtype).unbind(0), self.glu.to(dtype).unbind(0)
        theta = round_bf16(self.theta)
        after = []
        for l in range(self.shape["layers"]):
            qkvu, out = mixer[l][:4].flatten(0, 1), mixer[l][4]
            w1, w2, w3 = glu[l].unbind(0)
            x, S = f_layer(x, state[l], keep, qkvu, out, w1, w2, w3.t(), theta if l == 0 else None,
                           self.decay(l, block), p_drop)
            after.append(S.detach())
        return x, after

    def loss(self, x, targets, dtype=torch.float32):
        return self.compiled[2](x, self.embedding, targets, dtype)

    def logits(self, x):
        return F.linear(norm(x, torch.float32), self.embedding)

    # ---- Hugging Face directory ----

    def config(self, eot):
        s = self.shape
        return {
            "architectures": ["TransnormerForCausalLM"], "model_type": "transnormer", "vocab_size": s["vocab"],
            "decoder_embed_dim": s["width"], "hidden_dim": s["width"], "decoder_layers": s["layers"],
            "decoder_attention_heads": s["heads"], "glu_dim": s["glu"], "linear_act_fun": "swish",
            "norm_type": "simplermsnorm", "linear_use_lrpe_list": [1] + [0] * (s["layers"] - 1),
            "no_scale_embedding": False, "bias": False, "tie_word_embeddings": True, "bos_token_id": eot,
            "eos_token_id": eot, "pad_token_id": 0, "add_bos_token": False, "torch_dtype": "bfloat16",
        }

    def names(self):
        """Hugging Face tensor name -> (parameter, function of it)."""
        D = self.shape["width"]
        yield "model.embed_tokens.weight", self.embedding
        yield "model.layers.0.token_mixer.lrpe.theta", self.theta
        for l in range(self.shape["layers"]):
            p = f"model.layers.{l}."
            yield p + "token_mixer.qkvu_proj.weight", self.mixer[l, :4].reshape(4 * D, D)
            yield p + "token_mixer.out_proj.weight", self.mixer[l, 4]
            yield p + "channel_mixer.l1.weight", self.glu[l, 0]
            yield p + "channel_mixer.l2.weight", self.glu[l, 1]
            yield p + "channel_mixer.l3.weight", self.glu[l, 2].t()

    @torch.no_grad()
    def save_hf(self, path, tokenizer, eot):
        os.makedirs(path, exist_ok=True)
        save_file({n: t.bfloat16().cpu().contiguous() for n, t in self.names()},
                  os.path.join(path, "model.safetensors"), metadata={"format": "pt"})
        for name, obj in (("config.json", self.config(eot)),
                          ("tokenizer_config.json", {"add_bos_token": False, "add_eos_token": False,
                                                     "clean_up_tokenization_spaces": False,
                                                     "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>",
                                                     "unk_token": "<unk>"})):
            with open(os.path.join(path, name), "w") as f:
                json.dump(obj, f, indent=2)
                f.write("\n")
        with open(tokenizer, "rb") as f, open(os.path.join(path, "tokenizer.model"), "wb") as g:
            g.write(f.read())

    @staticmethod
    def load_hf(path, device):
        """The inverse of save_hf, in f32."""
        with open(os.path.join(path, "config.json")) as f:
            c = json.load(f)
        model = TNL(c["vocab_size"], c["decoder_embed_dim"], c["decoder_layers"], c["decoder_attention_heads"],
                    c["glu_dim"])
        stored = load_file(os.path.join(path, "model.safetensors"))
        with torch.no_grad():
            for name, t in model.names():
                t.copy_(stored.pop(name))
        if stored:
            raise ValueError(f"{path}: unexpected tensors {sorted(stored)}")
        return model.to(device).eval()
