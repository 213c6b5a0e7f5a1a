"""A training step of DEQDet's decoder (T=20, nine losses): time and peak memory, ours against the plain sum

The plain sum is the formula's decoder with every application on autograd's graph. Each peak is measured in its own
process, above the memory held before; glibc returns freed blocks, so that the peak is that of the tensors."""
import contextlib, json, os, resource, subprocess, sys
import torch
from deqdet.decoder import Queries
from deqdet.mixer import MixerStep
from deqdet.equilibrium import Equilibrium
from common import alternate, parser, report
from plain import Decoder

KINDS = {'plain sum': {}, 'ours': {}, 'ours, nothing recomputed': dict(recompute=False), 'plain sum, bf16': {}, 'ours, bf16': {}}
MORE = {'ours, one state supervised': dict(supervise=(20,), init_steps=0), 'ours, T=40': dict(steps=40, supervise=(1,3,6,9,12,40))}


def update(kind, args):
    "A callable: one forward and backward pass"
    torch.manual_seed(0)
    deq = Equilibrium(*[MixerStep(80, args.width, args.width, points=args.points) for _ in range(2)], **(KINDS | MORE)[kind])
    model, plain = (Decoder(deq), True) if kind.startswith('plain') else (deq, False)
    layout = torch.contiguous_format if plain else torch.channels_last
    feats = [torch.randn(1, args.width, args.height//s, args.across//s).to(memory_format=layout).requires_grad_() for s in (4,8,16,32)]
    queries, size = Queries(args.queries, args.width), torch.tensor([[args.height, args.across]])
    half = torch.autocast('cpu', torch.bfloat16) if kind.endswith('bf16') else contextlib.nullcontext()
    def go():
        for p in (*deq.parameters(), *feats): p.grad = torch.zeros_like(p)
        torch.manual_seed(1)
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with half: preds = model(queries(size), feats)
        sum(p.logits.float().square().mean() + p.boxes.mean() for p in preds).backward()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)/1024
    return go


def peak(kind, args):
    "MiB of a training step in a fresh process"
    env = os.environ | dict(MALLOC_MMAP_THRESHOLD_='65536', MALLOC_TRIM_THRESHOLD_='65536')
    flags = [f'--{k}={getattr(args, k)}' for k in ('height', 'across', 'queries', 'width', 'points', 'threads')]
    r = subprocess.run([sys.executable, '-W', 'ignore', __file__, f'--peak={kind}', *flags], capture_output=True, text=True, env=env)
    if r.returncode: raise RuntimeError(r.stderr)
    return json.loads(r.stdout.splitlines()[-1])


def main():
    args = parser(__doc__.splitlines()[0], rounds=5, height=800, across=1216, queries=100, width=256, points=64, peak='').parse_args()
    torch.set_num_threads(args.threads)
    if args.peak: return print(json.dumps(update(args.peak, args)()))
    memory = {k: peak(k, args) for k in KINDS | MORE}
    times = alternate({k: update(k, args) for k in KINDS}, args.rounds)
    report({k: dict(peak_mib=m, memory_over_plain=m/memory['plain sum'],
                    **(dict(seconds=times[k]['median'], time_over_plain=times[k]['ratio']) if k in times else {})) for k, m in memory.items()},
           args.out, size=[args.height, args.across], queries=args.queries, width=args.width, points=args.points)


if __name__ == '__main__': main()
