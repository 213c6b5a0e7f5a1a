"""From a picture to boxes at 800x1333, random weights, ResNet-50: ours, the plain formula, other families, other libraries

`--trained FOLDER --data FOLDER` adds a detector written by `save_pretrained` on its validation set: AP and time of stopping
by tolerance, against the plain formula at the full number of steps."""
from dataclasses import replace
import torch
from deqdet.zoo import create_detector
from common import alternate, parser, report
from plain import plain


def other_libraries(n):
    "Callables of what else can be installed, each on a float picture batch (n,3,800,1344)"
    from torchvision.models.detection import fasterrcnn_resnet50_fpn
    rcnn = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).eval()
    fns = {'torchvision Faster R-CNN': lambda x: rcnn(list(x))}
    try: from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, RTDetrConfig, RTDetrForObjectDetection
    except ImportError: return fns # the bench extra brings it
    deformable = DeformableDetrForObjectDetection(DeformableDetrConfig(use_pretrained_backbone=False)).eval()
    rt = RTDetrForObjectDetection(RTDetrConfig(anchor_image_size=None)).eval()
    return fns | {'transformers Deformable DETR': lambda x: deformable(x), 'transformers RT-DETR': lambda x: rt(x)}


def ours(bs):
    "Detectors of this package, each on a uint8 batch"
    deq = create_detector('deqdet_r50_1x').eval()
    one, sizes = plain(deq).eval(), torch.tensor([[800, 1333]]*bs)
    fns = {'plain formula, T=20': lambda x: one(x, sizes), 'DEQDet, T=20': lambda x: deq(x, sizes), 'DEQDet, T=6': lambda x: deq(x, sizes, steps=6),
           'DEQDet, T=20, bf16': half(lambda x: deq(x, sizes)),
           'DEQDet, pyramid alone': lambda x: deq.start(x, sizes)}
    more = {'AdaMixer, six stages': 'adamixer_r50_1x', 'Sparse R-CNN, six stages': 'sparse_rcnn_r50_100', 'Deformable DETR': 'deformable_detr_r50'}
    for k, name in more.items():
        try: model = create_detector(name).eval()
        except KeyError: continue
        fns[k] = lambda x, m=model: m(x, sizes)
    return fns


def half(f):
    def go(x):
        with torch.autocast('cpu', torch.bfloat16): return f(x)
    return go


def compare(bs, rounds, others):
    x = torch.randint(0, 256, (bs, 3, 800, 1344), dtype=torch.uint8)
    pixels = x.float()/255
    fns = {k: (lambda f=f: f(x)) for k, f in ours(bs).items()}
    if others: fns |= {k: (lambda f=f: f(pixels)) for k, f in other_libraries(bs).items()}
    t = alternate(fns, rounds)
    return {k: dict(seconds=v['median'], over_plain=v['ratio']) for k, v in t.items()}


def trained(folder, data, size, steps, tols, rounds):
    "A trained detector: AP and time, fixed and stopped by tolerance"
    from deqdet.data import det_dls
    from deqdet.evaluate import evaluate
    from deqdet.model import Detector
    model = Detector.from_pretrained(folder)
    model.decoder.plan = replace(model.decoder.plan, steps=steps)
    dls = det_dls(data, bs=1, size=size, num_workers=0)
    batches, one = [b[:2] for b in dls.valid][:12], plain(model).eval()
    ways = {'plain formula, fixed': lambda b: one(*b), 'ours, fixed': lambda b: model(*b),
            **{f'ours, tol={t}': lambda b, t=t: model(*b, tol=t) for t in tols}}
    t = alternate({k: (lambda f=f: [f(b) for b in batches]) for k, f in ways.items()}, rounds)
    count = lambda tol: torch.cat([model.decoder.solve(*model.start(*b), tol=tol).n for b in batches]).float().mean().item()
    start = alternate(dict(start=lambda: [model.start(*b) for b in batches]), rounds)['start']['median']
    ap = {k: evaluate(one if k.startswith('plain') else model, dls.valid, **({'tol': float(k.split('=')[1])} if 'tol' in k else {}))['AP'] for k in ways}
    return dict(pyramid_seconds=start, **{k: dict(AP=ap[k], seconds=v['median'], over_plain=v['ratio'],
                steps=count(float(k.split('=')[1])) if 'tol' in k else model.decoder.length()) for k, v in t.items()})


@torch.no_grad()
def main():
    args = parser(__doc__.splitlines()[0], rounds=5, batches='1', others=1, trained='', data='', size=128, T=20, tols='.1,.05,.03').parse_args()
    torch.set_num_threads(args.threads); torch.manual_seed(0)
    result = {f'batch of {n}': compare(int(n), args.rounds, args.others) for n in args.batches.split(',') if n}
    if args.trained: result['trained'] = trained(args.trained, args.data, args.size, args.T, [float(t) for t in args.tols.split(',')], args.rounds)
    report(result, args.out, size=[800, 1333])


if __name__ == '__main__': main()
