"""How time and memory grow with the work: a small DEQDet, one thing changed at a time, the exponent fitted

A training step (forward, loss, backward) and an inference, each setting in a process of its own. `exponent` is the
slope of log(seconds) over log(value) between the two largest values: 1 is proportional, 2 quadratic, 0 constant."""
import json, math, multiprocessing as mp, os, resource, sys, time
from dataclasses import replace
from statistics import median
import torch
from deqdet.data import Target
from deqdet.equilibrium import Settled
from deqdet.loss import SetLoss
from deqdet.families.adamixer import AdaMixer
from common import parser, report

BASE = dict(queries=100, points=16, size=256, batch=1, T=6, classes=20, objects=10)
VALUES = dict(queries=(50,100,200,400,900), points=(4,16,36,64), size=(128,256,512,1024), batch=(1,2,4,8),
              T=(6,12,25,50), classes=(5,20,80,320,1200), objects=(1,10,50,200,500))


def made(queries, points, size, batch, T, classes, objects):
    "A detector and a batch"
    hyper = AdaMixer(n_classes=classes, body='tiny', frozen_stages=-1, feat_width=64, norm_groups=16, width=64,
                     heads=4, hidden=256, n_queries=queries, points=(points,), out_points=2*points,
                     strategy=Settled(steps=T, supervise=(1,3,6)))
    xy = torch.rand(batch, objects, 2)*size*.7
    wh = 5 + torch.rand(batch, objects, 2)*size*.25
    boxes = torch.cat([xy, xy+wh], -1)
    sizes = torch.full((batch, 2), size)
    target = Target(boxes, torch.randint(classes, (batch, objects)), sizes, torch.arange(batch), sizes)
    model = hyper.build()
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    return model, images, sizes, target


def timed(f, n):
    "Peak MiB that the first call adds, and the median seconds of the others"
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    f()
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)/1024
    for _ in range(n):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return dict(seconds=median(times), peak_mib=peak)


def measure(queue, what, setting, rounds, threads):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, images, sizes, target = made(**setting)
    loss = SetLoss()
    def train():
        model.zero_grad()
        loss(model.train()(images, sizes), target).backward()
    @torch.no_grad()
    def infer(): return model.eval().predict(images, sizes)
    queue.put(timed(dict(train=train, infer=infer)[what], rounds))


def one(what, setting, args):
    "`measure` in a fresh process"
    queue = mp.get_context('fork').Queue()
    p = mp.get_context('fork').Process(target=measure, args=(queue, what, setting, args.rounds, args.threads))
    p.start()
    out = queue.get()
    p.join()
    return out


def exponent(xs, ys): return math.log(ys[-1]/ys[-2])/math.log(xs[-1]/xs[-2]) if min(ys[-2:]) > 0 else None


def main():
    if 'MALLOC_MMAP_THRESHOLD_' not in os.environ: # else glibc keeps what was freed, and a peak says little
        fixed = dict(MALLOC_MMAP_THRESHOLD_='65536', MALLOC_TRIM_THRESHOLD_='65536')
        os.execve(sys.executable, [sys.executable, '-W', 'ignore', *sys.argv], os.environ | fixed)
    args = parser(__doc__.splitlines()[0], rounds=2).parse_args()
    result = {}
    for name, values in VALUES.items():
        for what in ('train', 'infer'):
            if what == 'infer' and name == 'objects': continue
            rows = [one(what, BASE | {name: v}, args) for v in values]
            seconds = [r['seconds'] for r in rows]
            peak = [r['peak_mib'] for r in rows]
            found = dict(seconds=seconds, peak_mib=peak, exponent=exponent(values, seconds),
                         memory_exponent=exponent(values, peak))
            result.setdefault(name, dict(values=values))[what] = found
    report(result, args.out, base=BASE)


if __name__ == '__main__': main()
