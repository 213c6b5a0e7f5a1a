"""Weights of linear layers packed once, by oneDNN and by MKL: products alone, and a whole step with all its layers packed

    python benchmarks/packing.py --rounds 5 --out benchmarks/results/packing.json

Ratios are to the layers as they are (`ours`), in turns. Packing itself is not counted: a solve would pay it once."""
import time, torch
import torch.nn.functional as F
from torch import nn
from common import alternate, parser, report
from deqdet.decoder import prepared
from deqdet.ops.linear import Linear, by_onednn, product
from step import made

SHAPES = (100, 128, 6144), (100, 4096, 128), (300, 256, 49152), (300, 32768, 256) # rows, in, out of the largest layers of `deqdet_lite` and of the published step


def onednn(w, b, n):
    packed = torch.ops.mkldnn._reorder_linear_weight(w, n)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, b, 'none', [], '')


def mkl(w, b, n):
    packed = torch.ops.mkl._mkl_reorder_linear_weight(w, n)
    return lambda x: torch.ops.mkl._mkl_linear(x, packed, w, b, n)


def ours(x, w, b): return product(x, w, b) if by_onednn(x, w) else F.linear(x, w, b)


class Packed(nn.Module):
    "A linear layer for a known number of rows"
    def __init__(self, layer, pack, n):
        super().__init__()
        self.run = pack(layer.weight.detach(), layer.bias.detach(), n)
        self.out_features = layer.out_features

    def forward(self, x): return self.run(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def packed_step(make, pack, n):
    "The step with all layers packed"
    step = make()
    for module in list(step.modules()):
        for name,child in module.named_children():
            if isinstance(child, Linear): setattr(module, name, Packed(child, pack, n))
    return step


def ratios(fns, rounds):
    t = alternate(fns, rounds, clock=time.process_time)
    return {k: dict(ms=1e3*v['median'], over_ours=v['ratio']) for k,v in t.items()}


def layer(n, k, m, rounds):
    "One product in each way"
    x,w,b = torch.randn(n, k), torch.randn(m, k), torch.randn(m)
    a,c = onednn(w, b, n), mkl(w, b, n)
    for f in (a, c): torch.testing.assert_close(f(x), ours(x, w, b), atol=1e-2, rtol=1e-4)
    return ratios({'ours': lambda: ours(x, w, b), 'PyTorch': lambda: F.linear(x, w, b), 'oneDNN, packed': lambda: a(x), 'MKL, packed': lambda: c(x)}, rounds)


def step(n, size, rounds, **sizes):
    "A step in each way"
    def make():
        torch.manual_seed(0)
        return made(n, size, **sizes)
    s,levels,z = make()
    feats = prepared(s, levels)
    ways = dict(ours=s) | {f'{k}, packed': packed_step(lambda: make()[0], f, n) for k,f in (('oneDNN', onednn), ('MKL', mkl))}
    want = s(z, feats).content
    for f in ways.values(): torch.testing.assert_close(f(z, feats).content, want, atol=1e-4, rtol=1e-4)
    return ratios({k: (lambda f=f: f(z, feats)) for k,f in ways.items()}, rounds)


@torch.no_grad()
def main():
    args = parser(__doc__.splitlines()[0], rounds=5).parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    result = {f'{n}x{k} by {k}x{m}': layer(n, k, m, args.rounds) for n,k,m in SHAPES}
    result['a step of width 128, 100 queries'] = step(100, (320, 320), args.rounds, width=128, points=16)
    result['a published step, 300 queries'] = step(300, (800, 1216), args.rounds)
    report(result, args.out, clock='CPU time of one process')


if __name__ == '__main__': main()
