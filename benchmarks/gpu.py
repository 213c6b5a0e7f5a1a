"""A step, an image and a training step on an accelerator, against the plain formula and the roofline

Also in bf16 and TF32, compiled, and as CUDA graphs, with peak memory; and a fine-tuning of some minutes.

    python benchmarks/gpu.py --out gpu.json # minutes
    python benchmarks/gpu.py --out gpu.json --parts finetune --data DATA/deeppcb --minutes 4
    python benchmarks/gpu.py --out toy.json --toy # all parts at sizes for a CPU

It runs on any device of `torch.accelerator`, or on the CPU. Each part is written as soon as it is
measured; what stands in `--out` is not measured again, so a run that was cut short goes on.
`--backend=` leaves out the compiled ways. What the device lacks is left out, and `left_out` says why.
Batches are already decoded; images start in memory of the host, pinned for a GPU."""
import copy, json, tempfile, time
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from deqdet.data import Target, synth_coco
from deqdet.decoder import prepared
from deqdet.equilibrium import Equilibrium
from deqdet.loss import decode
from deqdet.model import Detector
from deqdet.ops import linear
from deqdet.ops.devices import pick_device, synchronize
from deqdet.ops.machine import accelerators
from deqdet.zoo import create_detector
from common import alternate, parser, report
from plain import Step, plain
from step import made

FULL = dict(model='deqdet_r50_1x', height=800, across=1333, queries=100, width=256, points=64,
            batches='1,16', train_batches='2,16', plain_up_to=2, side=8192, copied_mb=1024,
            backend='inductor', rounds=10)
TOY = dict(model='deqdet_tiny', height=60, across=90, queries=6, width=64, points=4,
           batches='1', train_batches='1', side=128, copied_mb=1, backend='eager', rounds=1,
           finetuned='deqdet_tiny', size='64')


# ---- ways to run a function

def half(f, device):
    "The function under autocast in bfloat16"
    def go():
        with torch.autocast(device.type, torch.bfloat16): return f()
    return go


def tf32(f):
    "The function with float32 matmuls in TF32"
    def go():
        kept = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision('high')
        try: return f()
        finally: torch.set_float32_matmul_precision(kept)
    return go


def forms(o, name, f):
    "The function as it is, and in other precisions; TF32 would be compiled once more"
    found = {name: f, f'{name}, bf16': half(f, o.device)}
    if o.device.type=='cuda' and name!='compiled': found[f'{name}, tf32'] = tf32(f)
    return found


def compiled(o, model):
    "A compiled copy; None without a backend"
    if not o.backend: return None
    model = copy.deepcopy(model)
    model.compile(backend=o.backend, dynamic=False)
    return model


def graph(f):
    "A CUDA graph of a function, and the tensors that a replay fills"
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3): f() # libraries choose and allocate before the capture
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    found = torch.cuda.CUDAGraph()
    with torch.cuda.graph(found): out = f()
    return found, out


# ---- time, memory, operations

def counts(device):
    "True if the device counts its memory"
    return hasattr(torch.get_device_module(device), 'max_memory_allocated')


def peak(f, device):
    "What the function returns, and MB at its peak beyond those held before; None: not counted"
    if not counts(device): return f(), None
    module = torch.get_device_module(device)
    synchronize(device)
    module.reset_peak_memory_stats()
    before = module.memory_allocated()
    out = f()
    synchronize(device)
    return out, (module.max_memory_allocated() - before)/1e6


def dense(tree):
    "Tensors of a nesting that have a storage; sparse ones, of the sampler's gradient on a CPU, have none"
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor) and t.layout is torch.strided]


class Operations(TorchDispatchMode):
    "FLOPs and bytes of each operator: its inputs read once, its results written once"
    def __init__(self):
        super().__init__()
        self.seen = [] # (FLOPs, bytes)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given,new = (dense(o) for o in ((args, kwargs), out))
        held = {t.untyped_storage()._cdata for t in given}
        is_view = all(t.untyped_storage()._cdata in held for t in new)
        if is_view and not func._schema.is_mutable: return out
        count = flop_registry.get(func._overloadpacket)
        flops = count(*args, **(kwargs or {}), out_val=out) if count else 0
        self.seen.append((flops, sum(t.numel()*t.itemsize for t in given + new)))
        return out


def operations(f):
    "`Operations` of one call"
    with mock.patch.object(linear, 'LARGE', 1 << 60), Operations() as found: f()
    return found.seen


def roofline(seen, rate, bandwidth):
    "FLOPs, bytes, and the time at the device's rate or bandwidth, which caches may beat"
    floor = sum(max(flops/rate, moved/bandwidth) for flops,moved in seen)
    flops,moved = (sum(o) for o in zip(*seen))
    return dict(gflop=flops/1e9, mb=moved/1e6, operators=len(seen), roofline_ms=1e3*floor)


def row(f, device):
    "Peak memory of a way after its first call, in which it compiles; or that it does not fit"
    try:
        f()
        return dict(peak_mb=peak(f, device)[1] if counts(device) else None)
    except torch.OutOfMemoryError: return dict(out_of_memory=True)


def captured(f, device):
    "A call of the graph of a function, and its peak memory; or why it was not captured"
    stream = torch.cuda.current_stream()
    try: (found, out), mb = peak(partial(graph, f), device)
    except RuntimeError as e:
        torch.cuda.set_stream(stream)
        return None, dict(not_captured=str(e).splitlines()[0])
    def replay():
        found.replay()
        return out
    return replay, dict(peak_mb=mb)


def measured(o, ways, units=1, feed=lambda: None, graphs=True):
    "Milliseconds for each way and unit, their ratio to the first, peak memory; also of the graphs"
    rows = {k: row(f, o.device) for k,f in ways.items()}
    calls = {k: f for k,f in ways.items() if 'out_of_memory' not in rows[k]}
    if graphs and o.device.type=='cuda':
        for k,f in list(calls.items()):
            if k.startswith('plain'): continue # makes tensors on the host in each step
            replay, rows[f'{k}, graph'] = captured(f, o.device)
            if replay: calls[f'{k}, graph'] = replay
    fed = {k: (lambda f=f: (feed(), f())) for k,f in calls.items()}
    for k,t in alternate(fed, o.rounds, warmup=0).items():
        rows[k] |= dict(ms=1e3*t['median']/units, over_first=t['ratio'],
                        a_second=units/t['median'])
    return rows, calls


# ---- the parts

def ceilings(o):
    "Bytes and FLOPs in a second that the device reaches: a copy, a large product"
    a = torch.empty(o.copied_mb << 20, dtype=torch.uint8, device=o.device)
    b = torch.empty_like(a)
    x = torch.randn(o.side, o.side, device=o.device)
    y = x.bfloat16()
    fns = dict(copy=lambda: b.copy_(a), fp32=lambda: x @ x, bf16=lambda: y @ y)
    if o.device.type=='cuda': fns['tf32'] = tf32(fns['fp32'])
    t = alternate(fns, o.rounds, warmup=3)
    flops = {k: 2*o.side**3/t[k]['median'] for k in fns if k!='copy'}
    return dict(bytes_a_second=2*a.numel()/t['copy']['median'], flops_a_second=flops)


def step(o, applications=5):
    "One application, against the formula and the roofline"
    top = o.rows['ceilings']
    one, levels, z = made(o.queries, o.padded, o.width, o.points, device=o.device)
    feats, formula = prepared(one, levels), Step(one)
    fast = compiled(o, one)
    def repeated(f, feats):
        def go():
            for _ in range(applications): out = f(z, feats)
            return out
        return go
    ways = forms(o, 'plain', repeated(formula, levels)) | forms(o, 'ours', repeated(one, feats))
    if fast: ways |= forms(o, 'compiled', repeated(fast, feats))
    rows, calls = measured(o, ways, applications)
    plain_seen = operations(lambda: formula(z, levels))
    seen = operations(lambda: one(z, feats))
    half_seen = operations(half(lambda: one(z, feats), o.device))
    rates, bandwidth = top['flops_a_second'], top['bytes_a_second']
    return dict(ways=rows, apart=apart(one(z, feats).boxes, formula(z, levels).boxes),
                plain=roofline(plain_seen, rates['fp32'], bandwidth),
                ours=roofline(seen, rates['fp32'], bandwidth),
                ours_bf16=roofline(half_seen, rates['bf16'], bandwidth),
                parameters_mb=sum(p.nbytes for p in one.parameters())/1e6)


def apart(a, b): return (a - b).abs().max().item()


def detector(o, name=None):
    "A detector with random weights whose queries differ, as in a trained one"
    model = create_detector(name or o.model, **({} if o.toy else dict(grid=(10, 10, .3))))
    for k,m in model.decoder.named_modules():
        if k.endswith(('sampler.offsets', 'mixing.params')): nn.init.normal_(m.weight, std=.02)
    return model.to(o.device)


def pictures(o, n):
    "A batch as the loader makes it, in memory that the device can copy from; sizes on the device"
    images = torch.randint(0, 256, (n, *o.padded, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    sizes = torch.tensor([[o.height, o.across]]*n, device=o.device)
    return (images.pin_memory() if o.device.type in ('cuda','xpu') else images), sizes


def solve(o):
    "The decoder alone on the features of one image, all refinement steps"
    model = detector(o).eval()
    formula = plain(model).eval()
    images, sizes = pictures(o, 1)
    start, first = (m.start(images.to(o.device), sizes) for m in (model, formula))
    fast = compiled(o, model)
    ways = forms(o, 'plain', lambda: formula.decoder(*first)[-1])
    ways |= forms(o, 'ours', lambda: model.decoder(*start)[-1])
    if fast: ways |= forms(o, 'compiled', lambda: fast.decoder(*start)[-1])
    rows, calls = measured(o, ways)
    answers = {k: f().logits for k,f in calls.items()}
    return dict(ways=rows, applications=model.decoder.length() + 1,
                logits_apart={k: apart(v, answers['plain']) for k,v in answers.items()})


def image(o, n):
    "Images from the host's memory to boxes on the device"
    model = detector(o).eval()
    host, sizes = pictures(o, n)
    fed = torch.empty_like(host, device=o.device)
    def feed(): fed.copy_(host, non_blocking=True)
    feed()
    def through(m): return lambda: decode(m(fed, sizes)[-1])
    fast = compiled(o, model)
    ways = {} if n > o.plain_up_to else forms(o, 'plain', through(plain(model).eval()))
    ways |= forms(o, 'ours', through(model))
    if fast: ways |= forms(o, 'compiled', through(fast))
    rows, calls = measured(o, ways, n, feed)
    host.copy_(host.flip(-1)) # another batch: a graph must see it
    feed()
    answers = {k: f().scores for k,f in calls.items()}
    flops = sum(f for f,_ in operations(through(model)))
    again = {k: apart(v, answers['ours']) for k,v in answers.items()}
    return dict(ways=rows, gflop=flops/1e9/n, scores_apart_on_another_batch=again)


def truth(o, n, classes, objects=8):
    "Random objects"
    low = torch.rand(n, objects, 2)*torch.tensor([o.across, o.height])*.7
    sides = (torch.rand(n, objects, 2)*.25 + .02)*min(o.height, o.across)
    boxes = torch.cat([low, low + sides], -1)
    size = torch.tensor([[o.height, o.across]]*n)
    target = Target(boxes, torch.randint(classes, (n, objects)), size, torch.arange(n))
    return Target(*[t.to(o.device) for t in target])


def update(net, loss, batch, opt, device, bf16=False):
    "A callable: forward, matching, backward, and the step of the optimiser"
    images, sizes, target = batch
    def go():
        torch.manual_seed(1) # the same noise
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16): preds = net(images, sizes)
        loss(preds, target).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.)
        opt.step()
        opt.zero_grad()
    return go


def train(o, n):
    "Updates of the whole detector on a batch that is on the device"
    model = detector(o).train()
    images, sizes = pictures(o, n)
    batch = images.to(o.device), sizes, truth(o, n, model.hyper.n_classes)
    d = model.decoder
    kept = Equilibrium(d.init, d.step, plan=replace(d.plan, recompute=False))
    nets = {'plain': plain(model)} if n <= o.plain_up_to else {}
    nets |= {'ours': model, 'nothing recomputed': Detector(model.pyramid, model.queries, kept)}
    if o.backend and n==max(numbers(o.train_batches)): nets['compiled'] = compiled(o, model)
    ways = {}
    for k,net in nets.items():
        opt = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-6)
        go = partial(update, net.train(), model.hyper.loss(), batch, opt, o.device)
        ways |= forms(o, k, go()) | {f'{k}, bf16': go(bf16=True)} # backward outside autocast
    rows, _ = measured(o, ways, n, graphs=False)
    return dict(ways=rows, gflop=sum(f for f,_ in operations(ways['ours']))/1e9/n)


def finetune(o):
    "AP after some minutes by the package's own training, as `deqdet_train` runs it"
    from deqdet import runs
    begun = time.monotonic()
    options = dict(model=o.finetuned, size=o.size, device=str(o.device))
    if o.amp: options['amp'] = o.amp
    if o.workers >= 0: options['workers'] = o.workers
    length = dict(epochs=1) if o.toy else dict(minutes=o.minutes)
    with tempfile.TemporaryDirectory() as folder:
        data = o.data or synth_coco(Path(folder)/'shapes', n_train=4, n_valid=2, size=64)
        folder = Path(folder)/'run'
        options |= dict(data=str(data), **length)
        _, mb = peak(lambda: runs.train(options, folder, begun=begun), o.device)
        found = json.loads((folder/'metrics.json').read_text())
    keys = 'best', 'epochs', 'pictures_seen', 'seconds', 'curve', 'n_train', 'n_valid'
    options |= dict(data=Path(data).name)
    return dict({k: found[k] for k in keys}, peak_mb=mb, options=options,
                images_a_second=found['pictures_seen']/found['seconds'],
                whole_seconds=time.monotonic() - begun)


def numbers(text): return [int(n) for n in text.split(',') if n]


def parts(o):
    "For each part by name what measures it"
    found = dict(ceilings=ceilings, step=step, solve=solve)
    found |= {f'image, {n}': partial(image, n=n) for n in numbers(o.batches)}
    found |= {f'train, {n}': partial(train, n=n) for n in numbers(o.train_batches)}
    return found | dict(finetune=finetune)


def left_out(o):
    "What this device cannot show, in lines"
    kind = o.device.type
    lines = ['training step as a graph: matching runs on the host']
    if kind!='cuda': lines += [f'graphs and TF32: only CUDA has them here, the device is {kind}']
    if not counts(o.device): lines.append(f'peak memory: torch.{kind} does not count it')
    if not o.backend: lines.append('compiled ways: no --backend')
    return lines


def chosen(o):
    "Names of the parts to measure; fine-tuning needs a set"
    if o.parts: return [k for k in parts(o) if k.split(',')[0] in ['ceilings', *o.parts.split(',')]]
    return [k for k in parts(o) if k!='finetune' or o.data or o.toy]


def arguments():
    more = dict(parts='', device='', data='', minutes=4., size='640', finetuned='deqdet_lite',
                amp='', workers=-1)
    p = parser(__doc__, **FULL, **more)
    p.add_argument('--toy', action='store_true', help='sizes for a CPU')
    if p.parse_args().toy: p.set_defaults(**TOY)
    o = p.parse_args()
    o.device = pick_device(o.device or None)
    o.padded = tuple(-(-n//32)*32 for n in (o.height, o.across))
    return o


def standing(file):
    "Parts that were measured before"
    return json.loads(Path(file).read_text())['result'] if file and Path(file).exists() else {}


def main():
    o = arguments()
    torch.set_num_threads(o.threads)
    o.rows = standing(o.out)
    about = dict(device=str(o.device), accelerators=accelerators(), toy=o.toy, model=o.model,
                 size=[o.height, o.across], left_out=left_out(o))
    for k in [k for k in chosen(o) if k not in o.rows]:
        torch.manual_seed(0)
        begun = time.monotonic()
        learns = k.startswith(('train', 'finetune'))
        with torch.set_grad_enabled(learns): found = parts(o)[k](o)
        if counts(o.device): torch.get_device_module(o.device).empty_cache()
        o.rows[k] = dict(found, wall_seconds=time.monotonic() - begun)
        report(o.rows, o.out, **about)


if __name__ == '__main__': main()
