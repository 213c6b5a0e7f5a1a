"""One refinement step at the published R50 width, ours against the plain formula on the same weights

Inference, without gradient, in runs of several steps, as a solve makes them: autocast then casts each weight once a run.
`--clock processor` takes the time of the processor, where other work shares the cores."""
import torch
import torch.nn.functional as F
from torch import nn
from deqdet import mixing
from deqdet.ops import linear
from deqdet.decoder import State, prepared
from deqdet.mixer import MixerStep
from deqdet.ops.linear import by_onednn, product as onednn
from common import CLOCKS, alternate, parser, report
from plain import Step


def made(n, size, width=256, points=64, classes=80, images=1, device='cpu'):
    "A step whose generators are not constant, features, and a state of boxes spread over the image"
    step = MixerStep(classes, width, width, points=points).eval()
    for p in (step.reg[-1].weight, step.sampler.offsets.weight, step.mixing.params.weight): nn.init.normal_(p, std=.02)
    feats = tuple(torch.randn(images, width, size[0]//s, size[1]//s) for s in (4, 8, 16, 32))
    xy, z = torch.rand(images, n, 2)*torch.tensor(size[::-1]), torch.rand(images, n, 1)*4 + 4
    state = State(F.layer_norm(torch.randn(images, n, width), (width,)), torch.cat([xy, z, torch.randn(images, n, 1)*.3], -1))
    return step.to(device), tuple(f.to(device) for f in feats), State(*[t.to(device) for t in state])


def run(step, z, feats, steps, device, half=False):
    "A callable that applies `step` so many times"
    def go():
        with torch.autocast(device, torch.bfloat16, enabled=half):
            for _ in range(steps): step(z, feats)
    return go


def without(module, name, go):
    "The same without oneDNN's matmuls, or without blocks"
    def slower():
        kept = getattr(module, name)
        setattr(module, name, 1 << 60)
        go()
        setattr(module, name, kept)
    return slower


def fast(a, b): return onednn(a, b) if by_onednn(a, b) else F.linear(a, b)


def products(step, z, half):
    "Only the matmuls of linear layers and mixing, each by the faster library"
    kind = torch.bfloat16 if half else torch.float32
    G, C, P, O = step.mixing.sizes
    n = z.content.shape[0]*z.content.shape[1]
    rand = lambda *s: torch.randn(*s, dtype=kind, device=z.content.device)
    pairs = [(rand(n, m.in_features), m.weight.detach().to(kind)) for k, m in step.named_modules()
             if isinstance(m, nn.Linear) and not k.startswith('cls')]
    more = [(rand(n*G, P, C), rand(n*G, C, C)), (rand(n*G, O, P), rand(n*G, P, C))]
    flops = sum(2*a.numel()*len(b) for a, b in pairs) + sum(2*a.numel()*b.shape[-1] for a, b in more)
    product = F.linear if half else fast
    return (lambda: [product(a, b) for a, b in pairs] + [a @ b for a, b in more]), flops


def libraries(step, z, rounds, clock):
    "GFLOP/s of the largest product, which generates the weights of mixing, by PyTorch's own library and by oneDNN"
    x, w = z.content.flatten(0, 1), step.mixing.params.weight.detach()
    if not by_onednn(x, w): return {}
    t = alternate(dict(pytorch=lambda: F.linear(x, w), onednn=lambda: onednn(x, w)), rounds, clock=clock)
    return {f'gflops_{k}': 2*x.numel()*len(w)/v['median']/1e9 for k, v in t.items()}


def compare(n, args, device):
    "Times of a step, and its difference to the formula"
    step, levels, z = made(n, (args.height, args.width), device=device)
    ours, plain = prepared(step, levels), Step(step)
    half = lambda feats: feats._replace(table=feats.table.bfloat16())
    go = lambda f, feats, h=False: run(f, z, feats, args.steps, device, h)
    fns = dict(plain=go(plain, levels), ours=go(step, ours), plain_bf16=go(plain, tuple(f.bfloat16() for f in levels), True),
               ours_bf16=go(step, half(ours), True))
    fns |= dict(ours_by_pytorchs_products=without(linear, 'LARGE', fns['ours']), ours_mixed_at_once=without(mixing, 'CACHED', fns['ours']))
    if args.compile: fns['ours_compiled'] = go(torch.compile(step), ours)
    for h in (False, True):
        f, flops = products(step, z, h)
        fns['products' + '_bf16'*h] = lambda f=f: [f() for _ in range(args.steps)]
    t = alternate(fns, args.rounds, clock=CLOCKS[args.clock])
    a, b = step(z, ours), plain(z, levels)
    return dict(content_error=(a.content - b.content).abs().max().item(), box_error=(a.boxes - b.boxes).abs().max().item(),
                gflop_products=flops/1e9, **libraries(step, z, args.rounds, CLOCKS[args.clock]),
                **{k: dict(ms=1e3*v['median']/args.steps, over_plain=v['ratio']) for k, v in t.items()})


@torch.no_grad()
def main():
    args = parser(__doc__.splitlines()[0], queries='100,300', steps=5, height=800, width=1216, compile=0, clock='wall').parse_args()
    torch.set_num_threads(args.threads); torch.manual_seed(0)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    result = {f'{n} queries': compare(int(n), args, device) for n in args.queries.split(',')}
    report(result, args.out, size=[args.height, args.width], steps=args.steps, device=device, clock=args.clock)


if __name__ == '__main__': main()
