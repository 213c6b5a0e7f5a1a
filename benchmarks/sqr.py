"Recollection: all groups of a stage in one batch, against the loop; time, and memory that the backward pass needs"
import copy
import torch
from torch import nn
from deqdet.decoder import Queries, Stacked, prepared
from deqdet.mixer import MixerStep
from deqdet.sqr import Recollected, windows
from common import alternate, parser, report


def loop(steps, starts, ends, state, feats):
    "Recollection in a loop: one call for each new state"
    states, preds = [state], []
    for step, a, b in zip(steps, starts, ends):
        for z in states[a:b]:
            states.append(step(z, feats))
            preds.append(step.read(states[-1]))
    return preds


def saved_bytes(fn):
    "Bytes that autograd keeps for the backward pass, each storage once"
    seen = {}
    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): out = fn()
    return sum(seen.values()) if out else 0


def step(args):
    s = MixerStep(80, args.width, args.width, 4, args.points, args.out_points, hidden=args.hidden)
    for p in (s.reg[-1].weight, s.mixing.params.weight, s.sampler.offsets.weight): nn.init.normal_(p, std=.02)
    return s


def main():
    args = parser(__doc__, rounds=5, stages=6, queries=100, width=256, points=32, out_points=128, hidden=2048, pictures=2,
                  side=256).parse_args()
    torch.set_num_threads(args.threads); torch.manual_seed(0)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    steps = nn.ModuleList(step(args) for _ in range(args.stages)).to(device)
    copying = copy.deepcopy(steps)
    for s in copying: s.shares_features = False
    shape = [(args.pictures, args.width, args.side//s, args.side//s) for s in (4, 8, 16, 32)]
    rows = lambda f: f.contiguous(memory_format=torch.channels_last).requires_grad_()
    feats = tuple(rows(torch.randn(s, device=device)) for s in shape)
    z = Queries(args.queries, args.width).to(device)(torch.tensor([[args.side]*2]*args.pictures, device=device))
    z = type(z)(*[t.detach() for t in z])
    plan = windows(args.stages)
    forward = {'loop': lambda: loop(steps, *plan, z, prepared(steps[0], feats)), 'one batch': lambda: Recollected(*plan)(steps)(z, feats),
               'one batch, features copied': lambda: Recollected(*plan)(copying)(z, feats),
               'one batch, recomputed': lambda: Recollected(*plan, recompute=True)(steps)(z, feats),
               'stack': lambda: Stacked(args.stages)(steps)(z, feats)}
    def update(f):
        for p in (*steps.parameters(), *copying.parameters(), *feats): p.grad = None
        sum(p.logits.mean() + p.boxes.mean() for p in f()).backward()
    def peak(f):
        torch.cuda.reset_peak_memory_stats(); update(f)
        return torch.cuda.max_memory_allocated()/2**20
    kept = {k: saved_bytes(f)/2**20 for k, f in forward.items()}
    times = alternate({k: lambda f=f: update(f) for k, f in forward.items()}, args.rounds)
    result = {k: dict(kept_mib=kept[k], kept_ratio=kept[k]/kept['loop'], seconds=times[k]['median'],
                      time_ratio=times[k]['ratio']) for k in forward}
    if device == 'cuda':
        for k, f in forward.items(): result[k]['peak_mib'] = peak(f)
    about = {k: v for k, v in vars(args).items() if k not in ('out', 'rounds', 'threads')}
    report(result, args.out, losses=sum(b - a for a, b in zip(*plan)), **about)


if __name__ == '__main__': main()
