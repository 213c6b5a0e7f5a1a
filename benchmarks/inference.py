"""From an image to boxes at 800x1333, random weights, ResNet-50: ours, the plain formula, other families, other libraries

`--trained FOLDER --data FOLDER` adds a detector written by `save_pretrained` on its validation set: AP and time of stopping
by tolerance, against the plain formula at the full number of steps."""
from dataclasses import replace
from functools import partial
import torch
from deqdet.zoo import create_detector
from common import CLOCKS, alternate, parser, report
from plain import plain


def other_libraries(n):
    "Detectors of other libraries, each on a batch of float images (n,3,800,1344)"
    from torchvision.models.detection import fasterrcnn_resnet50_fpn
    rcnn = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).eval()
    fns = {'torchvision Faster R-CNN': lambda x: rcnn(list(x))}
    try: from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, RTDetrConfig, RTDetrForObjectDetection
    except ImportError: return fns # the bench extra brings it
    deformable = DeformableDetrForObjectDetection(DeformableDetrConfig(use_pretrained_backbone=False)).eval()
    rt = RTDetrForObjectDetection(RTDetrConfig(anchor_image_size=None)).eval()
    return fns | {'transformers Deformable DETR': lambda x: deformable(x), 'transformers RT-DETR': lambda x: rt(x)}


def made(name):
    "A detector with random weights whose queries differ in sampling points and mixing, as in a trained one"
    model = create_detector(name, **({} if name.startswith('deformable') else dict(grid=(10, 10, .3)))).eval()
    for k, m in model.decoder.named_modules():
        if k.endswith(('sampler.offsets', 'mixing.params')): torch.nn.init.normal_(m.weight, std=.02)
    return model


def ours(bs):
    "Detectors of this package, each on a uint8 batch"
    deq = made('deqdet_r50_1x')
    one, sizes = plain(deq).eval(), torch.tensor([[800, 1333]]*bs)
    fns = {'plain formula, T=20': lambda x: one(x, sizes), 'DEQDet, T=20': lambda x: deq(x, sizes), 'DEQDet, T=6': lambda x: deq(x, sizes, steps=6),
           'DEQDet, T=20, bf16': half(lambda x: deq(x, sizes)),
           'DEQDet, pyramid alone': lambda x: deq.start(x, sizes)}
    for k, name in STACKS.items():
        fns[k] = lambda x, m=made(name): m(x, sizes)
    return fns


STACKS = {'AdaMixer, six stages': 'adamixer_r50_1x', 'Sparse R-CNN, six stages': 'sparse_rcnn_r50_100', 'Deformable DETR': 'deformable_detr_r50'}


def decoders(rounds, clock):
    "Decoders on computed features of one image; `T=11` is twelve applications, about as many as a tolerance needs"
    x, sizes = torch.randint(0, 256, (1, 3, 800, 1344), dtype=torch.uint8), torch.tensor([[800, 1333]])
    deq = made('deqdet_r50_1x')
    one, start = plain(deq).eval(), deq.start(x, sizes)
    first = one.start(x, sizes)
    fns = {'plain formula, T=20': lambda: one.decoder(*first), **{f'DEQDet, T={t}': (lambda t=t: deq.decoder(*start, steps=t)) for t in (20, 11, 6)},
           **{f'DEQDet, T={t}, bf16': (lambda t=t: half(lambda s: deq.decoder(*s, steps=t))(start)) for t in (20, 11, 6)}}
    for k, name in STACKS.items():
        m = made(name)
        fns[k] = lambda m=m, s=m.start(x, sizes): m.decoder(*s)
    return rows(alternate(fns, rounds, clock=clock))


def rows(times): return {k: dict(seconds=v['median'], over_plain=v['ratio']) for k, v in times.items()}


def half(f):
    def go(x):
        with torch.autocast('cpu', torch.bfloat16): return f(x)
    return go


def compare(bs, rounds, others, clock):
    x = torch.randint(0, 256, (bs, 3, 800, 1344), dtype=torch.uint8)
    pixels = x.float()/255
    fns = {k: (lambda f=f: f(x)) for k, f in ours(bs).items()}
    if others: fns |= {k: (lambda f=f: f(pixels)) for k, f in other_libraries(bs).items()}
    return rows(alternate(fns, rounds, warmup=int(bs==1), clock=clock))


def trained(folder, data, size, steps, tols, rounds, clock):
    "A trained detector: AP, and time of the whole and of the decoder alone, fixed and stopped by tolerance, as it is and compiled"
    from deqdet.data import det_dls
    from deqdet.evaluate import evaluate
    from deqdet.model import Detector
    model, fast = Detector.from_pretrained(folder), Detector.from_pretrained(folder).compile()
    for m in (model, fast): m.decoder.plan = replace(m.decoder.plan, steps=steps)
    dls = det_dls(data, bs=1, size=size, num_workers=0)
    batches, one = [b[:2] for b in dls.valid][:12], plain(model).eval()
    ways = {'plain formula, fixed': (one, {}), 'ours, fixed': (model, {}), **{f'ours, tol={t}': (model, dict(tol=t)) for t in tols},
            **{f'compiled, tol={t}': (fast, dict(tol=t)) for t in tols}}
    whole = {k: (lambda m=m, kw=kw: [m(*b, **kw) for b in batches]) for k, (m, kw) in ways.items()}
    alone = {k: (lambda m=m, kw=kw, starts=[m.start(*b) for b in batches]: [m.decoder(*s, **kw) for s in starts]) for k, (m, kw) in ways.items()}
    t, d = (alternate(f, rounds, clock=clock) for f in (whole, alone))
    steps = lambda m, kw: torch.cat([m.decoder.solve(*m.start(*b), **kw).n for b in batches]).float().mean().item()
    return {k: dict(AP=evaluate(m, dls.valid, **kw)['AP'], steps=model.decoder.length() if m is one else steps(m, kw), seconds=t[k]['median'],
                    over_plain=t[k]['ratio'], decoder_seconds=d[k]['median'], decoder_over_plain=d[k]['ratio']) for k, (m, kw) in ways.items()}


@torch.no_grad()
def main():
    args = parser(__doc__.splitlines()[0], rounds=5, batches='1,4', others=1, trained='', data='', size=128, T=20, tols='.1,.07,.05,.03', clock='wall').parse_args()
    torch.set_num_threads(args.threads); torch.manual_seed(0)
    clock = CLOCKS[args.clock]
    result = dict(decoder=decoders(args.rounds, clock)) if args.batches else {}
    for n in args.batches.split(','): # several images: two rounds, without other libraries
        if n: result[f'batch of {n}'] = compare(int(n), args.rounds if n=='1' else 2, args.others and n=='1', clock)
    if args.trained: result['trained'] = trained(args.trained, args.data, args.size, args.T, [float(t) for t in args.tols.split(',')], args.rounds, clock)
    report(result, args.out, size=[800, 1333], clock=args.clock)


if __name__ == '__main__': main()
