"""The reference: DEQDet's decoder written operator for operator as the papers state it, on the weights of ours.

Four `grid_sample`s on channels-first features, one after the other; an explicit softmax; training as the plain sum, every refinement-aware gradient through autograd's own graph."""
import math
import torch
import torch.nn.functional as F
from torch import nn
from deqdet.decoder import Pred, State
from deqdet.model import Detector


def corners(p):
    "(B,N,4) positions to corners"
    size, ratio = 2**p[..., 2:3], 2**(p[..., 3:]/2)
    half = torch.cat([size/ratio, size*ratio], -1)/2
    return torch.cat([p[..., :2] - half, p[..., :2] + half], -1)


def overlap(b):
    "(B,N,N) intersection of boxes i and j over the area of i"
    low, high = torch.max(b[:, :, None, :2], b[:, None, :, :2]), torch.min(b[:, :, None, 2:], b[:, None, :, 2:])
    both = (high - low).clamp(min=0).prod(-1)
    return both/((b[..., 2] - b[..., 0])*(b[..., 3] - b[..., 1])).clamp(min=1e-6)[..., None]


def embedding(p, width):
    "Sines and cosines of the four numbers"
    p = p/p.new_tensor([1000, 1000, 1, 1])
    i = torch.arange(width//4, device=p.device, dtype=p.dtype)
    angle = p[..., None]/10000**(2*(i//2)/(width//4))
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], -1).flatten(-2).flatten(-2)


def linear(layers, x):
    "PyTorch's own product for every linear layer, one or in a row with others"
    for m in layers if isinstance(layers, nn.Sequential) else [layers]:
        x = F.linear(x, m.weight, m.bias) if isinstance(m, nn.Linear) else m(x)
    return x


def attention(attn, x, bias):
    "Multi-head attention with a bias on the scaled logits"
    q, k, v = linear(attn.qkv, x).chunk(3, -1)
    q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v))
    weight = (q @ k.transpose(-1, -2)/math.sqrt(q.shape[-1]) + bias).softmax(-1)
    return linear(attn.out, (weight @ v).transpose(1, 2).flatten(2))


def sample(feats, points, strides, groups):
    "(B,N,G,P,C): one `grid_sample` for each level"
    xy, z = points[..., :2], points[..., 2:]
    octaves = torch.tensor([math.log2(s) for s in strides], dtype=z.dtype, device=z.device)
    weights, out = (-(z - octaves)**2/2).softmax(-1), 0
    for i, (f, s) in enumerate(zip(feats, strides)):
        B, D, H, W = f.shape
        grid = 2*xy/(s*xy.new_tensor([W, H])) - 1
        read = F.grid_sample(f.reshape(B*groups, D//groups, H, W), grid.transpose(1, 2).flatten(0, 1).to(f.dtype), align_corners=False)
        read = read.view(B, groups, D//groups, *read.shape[-2:]).permute(0, 3, 1, 4, 2)
        out = out + read*weights[..., i:i + 1]
    return out


def mix(mixing, q, x):
    "Adaptive mixing over channels, then over points"
    G, C, P, O = mixing.sizes
    params = linear(mixing.params, q).unflatten(-1, (G, -1))
    M, S = params[..., :C*C].unflatten(-1, (C, C)), params[..., C*C:].unflatten(-1, (O, P))
    x = F.relu(F.layer_norm(x @ M, (P, C)))
    x = F.relu(F.layer_norm(S @ x, (O, C)))
    return linear(mixing.out, x.flatten(2))


class Step(nn.Module):
    "The formula of a `MixerStep`, on its weights"
    def __init__(self, step):
        super().__init__()
        self.of = step

    def forward(self, state, feats):
        f, p = self.of, state.xyzr.detach()
        b = state.boxes.detach() # of a noisy state: as the noise left them
        x = state.content + embedding(p, state.content.shape[-1])
        q = f.attn_norm(x + attention(f.attn, x, f.tau[:, None, None]*(overlap(b) + 1e-7).log()[:, None]))
        d = linear(f.sampler.offsets, q).unflatten(-1, (f.sampler.groups, -1, 3))
        w, h = 2**(p[..., 2] - p[..., 3]/2), 2**(p[..., 2] + p[..., 3]/2)
        x, y = p[..., 0, None, None] + d[..., 0]*w[..., None, None], p[..., 1, None, None] + d[..., 1]*h[..., None, None]
        points = torch.stack([x, y, p[..., 2, None, None] + d[..., 2]], -1)
        q = f.mix_norm(q + mix(f.mixing, q, sample(feats, points, f.sampler.strides, f.sampler.groups)))
        q = f.ffn_norm(q + linear(f.ffn, q))
        d = linear(f.reg, q)
        p = torch.cat([p[..., :2] + d[..., :2]*2**p[..., 2:3], p[..., 2:] + d[..., 2:]], -1)
        return State(q, p)

    def read(self, state): return Pred(linear(self.of.cls, state.content), corners(state.xyzr))


class Decoder(nn.Module):
    "DEQDet's decoder on the weights of an `Equilibrium`: the loops of the paper, and autograd's graph of all of them"
    def __init__(self, deq):
        super().__init__()
        self.plan, self.g, self.f = deq.plan, Step(deq.init), Step(deq.step)

    def forward(self, state, feats, steps=None):
        return self.supervised(state, feats) if self.training else [self.answer(state, feats, steps)]

    def answer(self, state, feats, steps=None):
        z = self.g(state, feats)
        for _ in range((self.plan.steps if steps is None else steps) + self.plan.extra): z = self.f(z, feats)
        return self.f.read(z)

    def supervised(self, state, feats):
        z = self.g(state, feats)
        preds, z0 = [self.g.read(z)], State(*[t.detach() for t in z])
        for _ in range(self.plan.init_steps):
            z = self.f(z, feats)
            preds.append(self.f.read(z))
        for i in range(1, self.plan.steps + 1):
            with torch.no_grad(): z0 = self.f(z0 if self.plan.perturb is None else self.plan.perturb(z0), feats)
            if i in self.plan.supervise:
                z = z0
                for _ in range(self.plan.grad.k): z = self.f(z, feats)
                preds.append(self.f.read(z))
        return preds


def plain(model):
    "A `Detector` with features as its pyramid makes them, channels first, and the plain decoder, on the same weights"
    return Detector(model.pyramid, model.queries, Decoder(model.decoder), layout=torch.contiguous_format)
