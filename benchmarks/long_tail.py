"""A set as LVIS is: 1203 classes whose counts fall as 1/rank, images checked for a part of them. Start, training and evaluation measured

    python benchmarks/long_tail.py --out benchmarks/results/long_tail.json

Annotations have the size of LVIS's (100,170 images to train on, 5,000 to validate on, twelve boxes each), images are links to one file. Each row is
a fresh process: seconds of the processor and megabytes beyond the imports. The training step is `deqdet_lite`'s at 320 pixels,
four images and twelve objects each, with 80 and with 1203 classes in turns."""
import gc, json, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np, torch
from coco_size import peak, resident, write_split
from common import alternate, parser, report

CLASSES = 1203


def kinds(counts): return ['r' if n <= 10 else 'c' if n <= 100 else 'f' for n in counts]


def federate(file, frequency, seed=0):
    "Write the lists of each image, and the frequency of each class"
    rng = np.random.default_rng(seed)
    coco = json.loads(file.read_text())
    shown = {o['id']: set() for o in coco['images']}
    for a in coco['annotations']: shown[a['image_id']].add(a['category_id'])
    for o in coco['images']:
        mine = shown[o['id']]
        o['neg_category_ids'] = sorted({*rng.integers(1, CLASSES + 1, 12).tolist()} - mine)
        o['not_exhaustive_category_ids'] = [c for c in sorted(mine) if rng.random() < .1]
    for o,k in zip(coco['categories'], frequency): o['frequency'] = k
    file.write_text(json.dumps(coco))


def write(path, args):
    "Both splits, once"
    if (path/'written').exists(): return
    (path/'annotations').mkdir(parents=True)
    for split,n,seed in (('train2017', args.images, 0), ('val2017', args.valid, 1)):
        write_split(path, split, n, 12*n, 0, CLASSES, 1., seed)
    coco = json.loads((path/'annotations/instances_train2017.json').read_text())
    pairs = np.unique([(a['category_id'], a['image_id']) for a in coco['annotations']], axis=0) # classes and the images that show them
    frequency = kinds(np.bincount(pairs[:, 0], minlength=CLASSES + 1)[1:])
    federate(path/'annotations/instances_val2017.json', frequency)
    (path/'written').write_text(json.dumps({k: frequency.count(k) for k in 'rcf'}))


def loaders(path, rare=None):
    from deqdet.data import det_dls
    return det_dls(path, bs=4, size=320, num_workers=0, device='cpu', rare=rare)


def predictions(truth, per_image, seed=0):
    "For each image its objects, moved a little, and other boxes of classes drawn like the set's"
    rng = np.random.default_rng(seed)
    chance = 1/np.arange(1, CLASSES + 1)
    chance /= chance.sum()
    objects = {o['id']: [] for o in truth['images']}
    for a in truth['annotations']: objects[a['image_id']].append((a['category_id'] - 1, *a['bbox']))
    for i,some in objects.items():
        n = per_image - len(some)
        corner = rng.random((n, 2))*400
        other = np.column_stack([rng.choice(CLASSES, n, p=chance), corner, rng.random((n, 2))*200 + 4])
        rows = np.concatenate([np.array(some).reshape(-1, 5), other])
        xywh = rows[:, 1:]*rng.normal(1, .03, (len(rows), 4))
        boxes = torch.from_numpy(np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1))
        yield dict(image_id=i, boxes=boxes, scores=torch.from_numpy(rng.random(len(rows))), labels=torch.from_numpy(rows[:, 0]).long())


def judge(path, per_image):
    "`lvis_ap` on the validation split"
    from deqdet.scores.federated import lvis_ap
    file = path/'annotations/instances_val2017.json'
    preds = list(predictions(json.loads(file.read_text()), per_image))
    return lambda: lvis_ap(preds, file)


def updates(args):
    "Seconds of a training step with 80 and with 1203 classes, in turns"
    from deqdet.loss import SetLoss
    from deqdet.zoo import create_detector
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 320, 320), dtype=torch.uint8, generator=g)
    sizes = torch.full((4, 2), 320)
    corner = torch.rand(4, 12, 2, generator=g)*200
    boxes = torch.cat([corner, corner + 20 + 90*torch.rand(4, 12, 2, generator=g)], -1)
    from deqdet.sets.images import Target
    def step(k):
        model = create_detector('deqdet_lite', n_classes=k, start=False).train()
        opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        labels = torch.randint(0, k, (4, 12), generator=g)
        target,loss = Target(boxes, labels, sizes, torch.arange(4)), SetLoss()
        def go():
            opt.zero_grad()
            loss(model(images, sizes), target).backward()
            opt.step()
        return go
    chosen = [int(k) for k in args.of.split(',')]
    before = resident()
    t = alternate({k: step(k) for k in chosen}, args.rounds, clock=time.process_time)
    return dict(peak_mb=(peak() - before)/1e6, **{f'{k} classes': dict(ms=1000*v['median'], ratio=v['ratio']) for k,v in t.items()})


def part(path, args):
    "One row, in this process"
    torch.set_num_threads(1)
    if args.part=='updates': return updates(args)
    go = judge(path, args.per_image) if args.part=='lvis_ap' else lambda: loaders(path, .001 if args.part=='rare' else None)
    import deqdet.data # as any user has done before
    gc.collect()
    before,began = resident(), time.process_time()
    kept = go()
    seconds = time.process_time() - began
    found = dict(seconds=seconds, peak_mb=(peak() - before)/1e6)
    if args.part=='lvis_ap': found |= {k: kept[k] for k in ('AP', 'APr', 'APc', 'APf')} | kept.counts
    if args.part=='rare': found |= dict(images=len(kept.train.dataset), chosen=len(kept.train.chosen))
    return found


def fresh(path, name, args, of='80,1203'):
    "A row, in a fresh process"
    command = [sys.executable, '-W', 'ignore', __file__, '--part', name, '--folder', str(path), '--of', of]
    command += ['--per-image', str(args.per_image), '--rounds', str(args.rounds)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main():
    args = parser(__doc__, images=100_170, valid=5_000, per_image=300, folder='', part='', of='80,1203', rounds=5).parse_args()
    path = Path(args.folder or Path(tempfile.gettempdir())/f'lvis_{args.images}_{args.valid}')
    if args.part: return print(json.dumps(part(path, args)))
    write(path, args)
    result = {k: fresh(path, name, args) for k,name in (('first start', 'start'), ('second start', 'start'), ('with repeats', 'rare'),
                                                        ('lvis_ap', 'lvis_ap'), ('training step', 'updates'))}
    result['peak of a training step'] = {k: fresh(path, 'updates', args, k)['peak_mb'] for k in ('80', '1203')}
    report(result, args.out, images=args.images, valid=args.valid, per_image=args.per_image, frequency=json.loads((path/'written').read_text()))


if __name__ == '__main__': main()
