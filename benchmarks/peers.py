"""AP against milliseconds for an image on a CPU: our lite at several numbers of steps, beside torchvision's FCOS on the same body, both in several forms

Both are trained by `own_data.py`'s loop for the same minutes of one core, and kept:

    export DEQDET_DATA=...   # holds cards
    python benchmarks/peers.py --train deqdet_lite --minutes 10 --save runs/cards_lite
    python benchmarks/peers.py --train fcos --minutes 10 --save runs/cards_fcos.pt
    python benchmarks/peers.py --ours runs/cards_lite --fcos runs/cards_fcos.pt --onnx runs/onnx --out nbs/results/peers.json
    python benchmarks/peers.py --measure ap --ours runs/cards_lite --fcos runs/cards_fcos.pt --onnx runs/onnx --out nbs/results/peers_ap.json

The folder `--onnx` keeps exported files, one for each detector and number of steps; what is missing there is exported first.
`--others rtdetr=runs/cards_rtdetr.pt` adds further detectors that were trained and kept so, of torchvision or, by
`transformers_peer.py`, of transformers. AP that stands in the file is not measured again. `--measure parts` tells where the time of one of our images goes,
`--measure memory` the peak of a fresh process for each way. `--untrained retinanet,faster_rcnn,ssdlite` adds torchvision's other detectors on the
same body and pyramid without training: they find nothing, so suppression of duplicates is not in their times.

AP is that of the whole validation set. Times are of the processor, one image at a time from the fed image to boxes (decoding of the file is left out),
in turns in one run: every round measures each way on the same images.

`--measure both` takes AP and milliseconds from the same calls: it goes through the validation set once, `--images` images a turn, each of them with every way."""
import argparse, copy, json, os, subprocess, sys, time, warnings
from functools import cache, partial
from pathlib import Path
from statistics import median
import torch
from fastcore.basics import chunked
from torch import nn
from deqdet.data import det_dls
from deqdet.decoder import prepared
from deqdet.evaluate import coco_ap
from deqdet.export import load_exported
from deqdet.model import Feed
from deqdet.ops.folding import fold, folded
from deqdet.predict import load_detector, save_detector
from deqdet.sets.augment import recipe_1x, recipe_small
from coco_size import peak, resident
from common import alternate, parser, report
from own_data import FPN, KINDS, Ours, Peer, ap, train
from transformers_peer import RATES

FORMS = 'bf16', 'folded', 'folded bf16', 'compiled', 'onnxruntime'
TRAINING = dict(seed=0, queries=0, opt='muon', lr=2.5e-3, body_lr=.1, updates=0, frozen=3, wd=.1, ema=.99, curve='') # as `own_data.py` has them


def loaders(args, bs):
    "The loaders of `own_data.py`"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        tfms = recipe_small(args.size), recipe_1x(False, args.size, args.size)
        return det_dls(Path(os.environ['DEQDET_DATA'])/args.set, bs=bs, tfms=tfms, val_bs=bs, num_workers=0, seed=0)


def trained(args):
    "Train one detector, and write the average of its weights"
    rates = dict(class_lr=4. if 'lite' in args.train else 1.) | RATES.get(args.train, {})
    if args.lr: rates['lr'] = args.lr
    o = argparse.Namespace(**vars(args) | TRAINING | rates)
    torch.manual_seed(o.seed)
    dls = loaders(o, 4)
    detector = KINDS[o.train](list(dls.vocab), args=o)
    n, average = train(detector, dls, o)
    average.swap()
    net = detector.net.eval()
    if not isinstance(detector, Ours): return n, torch.save(dict(weights=net.state_dict(), vocab=list(dls.vocab)), o.save)
    net.feed = Feed(o.size, o.size)
    return n, save_detector(net, o.save)


class Kept:
    "A detector of this package as it was kept, with the options of its solver"
    def __init__(self, net, **options):
        self.net = net
        self.options = options

    def detect(self, images, sizes, target): return self.net.predict(images, sizes, orig=target.orig, **self.options)


class Half:
    "A detector in bfloat16 where autocast uses it"
    def __init__(self, inner): self.inner = inner

    def detect(self, *batch):
        with torch.autocast('cpu', torch.bfloat16): return self.inner.detect(*batch)


def kept_peer(kind, file, args):
    "A peer that was kept"
    held = torch.load(file, weights_only=True)
    peer = KINDS[kind](held['vocab'], args=argparse.Namespace(size=args.size, frozen=3))
    peer.net.load_state_dict(held['weights'])
    peer.net.eval()
    return peer


def ssdlite(n_classes, size):
    "torchvision's SSDLite heads on the body and pyramid of the others"
    from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
    from torchvision.models.detection.ssd import SSD
    from torchvision.models.detection.ssdlite import SSDLiteHead
    boxes = DefaultBoxGenerator([[2, 3]]*5)
    head = SSDLiteHead([128]*5, boxes.num_anchors_per_location(), n_classes + 1, nn.BatchNorm2d)
    return SSD(FPN(3), boxes, (size, size), n_classes + 1, [.5]*3, [.5]*3, head, score_thresh=.5, _skip_resize=True) # untrained, all boxes would pass .01


def untrained(kind, vocab, args):
    "Another detector of torchvision, as it begins"
    peer = Peer('fcos' if kind=='ssdlite' else kind, vocab, argparse.Namespace(size=args.size, frozen=3))
    if kind=='ssdlite': peer.net = ssdlite(len(vocab), args.size)
    peer.net.eval()
    return peer


class Whole(nn.Module):
    "The peer as a function of one image"
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, image): return tuple(self.net([image])[0][k] for k in ('boxes', 'scores', 'labels'))


class ExportedPeer:
    "The peer in onnxruntime, an image at a time; its graph has a fixed size, so each size has a file"
    def __init__(self, peer, folder):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.source = copy.deepcopy(peer.net)
        self.source.backbone.body.level = lambda f, norm: f # its norms are identities; the transpositions around them cannot be traced
        self.sessions = {}
        self.peer = copy.copy(peer)
        self.peer.net = lambda images: [self.one(x) for x in images]

    def session(self, image):
        "The session for images of this size"
        import onnxruntime
        h,w = image.shape[-2:]
        if (h, w) in self.sessions: return self.sessions[h, w]
        file = self.folder/f'fcos_{h}x{w}.onnx'
        if not file.exists():
            torch.onnx.export(Whole(self.source), (image,), str(file), dynamo=False, opset_version=17, input_names=['image'],
                              output_names=['boxes', 'scores', 'labels'])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        return self.sessions.setdefault((h, w), onnxruntime.InferenceSession(str(file), options))

    def one(self, image):
        found = self.session(image).run(None, dict(image=image.numpy()))
        return dict(zip(('boxes', 'scores', 'labels'), map(torch.from_numpy, found)))

    def detect(self, *batch): return self.peer.detect(*batch)


def folded_peer(peer):
    "The peer with BatchNorm in the convolutions of its body"
    peer = copy.copy(peer)
    peer.net = copy.deepcopy(peer.net).eval()
    fold(peer.net.backbone.body, torch.zeros(1, 3, 64, 64))
    return peer


def compiled_peer(peer):
    "The peer with compiled body, pyramid and heads; what follows stays as it is"
    peer = copy.copy(peer)
    peer.net = copy.deepcopy(peer.net)
    peer.net.backbone.compile()
    peer.net.head.compile()
    return peer


def exported(model, folder, steps):
    "The exported detector; a file that is there is taken"
    file = Path(folder)/f'lite_{steps}.onnx'
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists(): model.export(file, steps=steps)
    return load_exported(file)


def ways(args, vocab):
    "For each way by name what makes it; the first one is the peer"
    model = cache(lambda: load_detector(args.ours, device='cpu'))
    peer = cache(lambda: kept_peer('fcos', args.fcos, args))
    small = cache(lambda: folded(model()))
    fast = cache(lambda: load_detector(args.ours, device='cpu').compile())
    theirs = {'': peer, 'bf16': lambda: Half(peer()), 'folded': lambda: folded_peer(peer()), 'folded bf16': lambda: Half(folded_peer(peer())),
              'compiled': lambda: compiled_peer(peer()), 'onnxruntime': lambda: ExportedPeer(peer(), args.onnx)}
    ours = {'': lambda t: Kept(model(), steps=t), 'bf16': lambda t: Half(Kept(model(), steps=t)), 'folded': lambda t: Kept(small(), steps=t),
            'folded bf16': lambda t: Half(Kept(small(), steps=t)), 'compiled': lambda t: Kept(fast(), steps=t),
            'onnxruntime': lambda t: Kept(exported(model(), args.onnx, t))}
    steps = {k: split(args.onnx_steps if k=='onnxruntime' else args.form_steps) for k in split(args.forms)}
    makers = {f'FCOS{", "*bool(k)}{k}': theirs[k] for k in ['', *split(args.peer_forms)]}
    makers |= {k: partial(untrained, k, vocab, args) for k in split(args.untrained)}
    for kind, file in (o.split('=') for o in split(args.others)):
        other = cache(partial(kept_peer, kind, file, args))
        makers[kind] = other
        if 'bf16' in split(args.peer_forms): makers[f'{kind}, bf16'] = lambda other=other: Half(other())
    makers |= {f'lite, T={t}': partial(ours[''], int(t)) for t in split(args.steps)}
    makers |= {f'lite, tol={t}': partial(lambda t: Kept(model(), tol=t), float(t)) for t in split(args.tols)}
    return makers | {f'lite, T={t}, {k}': partial(ours[k], int(t)) for k in steps for t in steps[k]}


def split(text): return [o for o in text.split(',') if o]


def used(name, args, vocab, batches):
    "Megabytes at the peak of this process, beyond the imports, with one way alone"
    make = ways(args, vocab)[name]
    before = resident()
    detector = make()
    for b in batches: detector.detect(*b)
    return dict(peak_mb=(peak() - before)/1e6)


def fresh(name):
    "The same, in a fresh process"
    run = subprocess.run([sys.executable, '-W', 'ignore', *sys.argv, '--only', name], capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def ms(found, batches, rounds):
    "Processor milliseconds for an image, and the ratio to the first"
    fns = {k: (lambda m=m: [m.detect(*b) for b in batches]) for k, m in found.items()}
    times = alternate(fns, rounds, clock=time.process_time)
    return {k: dict(ms=1000*v['median']/len(batches), over_fcos=v['ratio']) for k, v in times.items()}


def both(found, dls, n):
    "AP, processor milliseconds for an image and the ratio to the first, from the same calls: `n` images a turn"
    preds, times = ({k: [] for k in found} for _ in range(2))
    def turn(k, batches):
        "Seconds of one way; what it finds is kept"
        begun = time.process_time()
        dets = [found[k].detect(*b) for b in batches]
        seconds = time.process_time() - begun
        preds[k] += [dict(d, image_id=i) for b, ds in zip(batches, dets) for i, d in zip(b[2].image_id.tolist(), ds)]
        return seconds/len(batches)
    for i, batches in enumerate(chunked(dls.valid, n)):
        if i==0: [m.detect(*b) for m in found.values() for b in batches] # the first call of some ways compiles
        for k in list(found)[::-1 if i % 2 else 1]: times[k].append(turn(k, batches))
    first = next(iter(times.values()))
    over = {k: median(a/b for a, b in zip(t, first)) for k, t in times.items()}
    return {k: dict(ms=1000*median(t), over_fcos=over[k], **scores(preds[k], dls)) for k, t in times.items()}


def scores(preds, dls):
    "AP, AP50, AP75"
    result = coco_ap(preds, dls.valid.dataset)
    return {k: float(result[k]) for k in ('AP', 'AP50', 'AP75')}


def parts(model, batch, rounds):
    "Milliseconds of the parts of one image, and their share of an image with three steps"
    images, sizes, target = batch
    pyramid, step = model.pyramid, model.decoder.step
    x = pyramid.normalize(images, sizes).contiguous(memory_format=torch.channels_last)
    levels = pyramid.body(x)
    state, feats = model.start(images, sizes)
    rows = prepared(step, feats)
    z = model.decoder.init(state, rows)
    q = step.talk(z.content, z.xyzr, z.boxes)
    reads = step.sampler(q, z.xyzr, rows)
    fns = {'image, T=3': lambda: model.predict(images, sizes, orig=target.orig, steps=3),
           'normalise': lambda: pyramid.normalize(images, sizes), 'body': lambda: pyramid.body(x), 'neck': lambda: pyramid.neck(levels),
           'table of levels': lambda: prepared(step, feats), 'step': lambda: step(z, rows), 'attention': lambda: step.talk(z.content, z.xyzr, z.boxes),
           'sampling': lambda: step.sampler(q, z.xyzr, rows), 'mixing': lambda: step.mixing(q, reads), 'read': lambda: step.read(z)}
    return {k: dict(ms=1000*v['median'], share=v['ratio']) for k, v in alternate(fns, rounds, clock=time.process_time).items()}


def standing(file):
    "Rows of a result that was written before"
    return json.loads(Path(file).read_text())['result'] if file and Path(file).exists() else {}


@torch.no_grad()
def measured(args, about):
    "Milliseconds of each way in turns, or AP of each way, written one by one"
    dls = loaders(args, 1)
    vocab = list(dls.vocab)
    batches = [b for b, _ in zip(dls.valid, range(args.images))]
    if args.measure=='parts': return report(parts(load_detector(args.ours, device='cpu').eval(), batches[0], args.rounds), args.out, **about)
    if args.only: return print(json.dumps(used(args.only, args, vocab, batches)))
    makers = ways(args, vocab)
    if args.measure=='memory': return report({k: fresh(k) for k in makers}, args.out, **about)
    found = {k: make() for k, make in makers.items()}
    if args.measure=='both': return report(both(found, dls, args.images), args.out, **about)
    if args.measure=='ms': return report(ms(found, batches, args.rounds), args.out, **about)
    dls, rows = loaders(args, 8), standing(args.out)
    for k in [o for o in found if o not in rows]: report(rows := rows | {k: ap(found[k], dls)}, args.out, **about)


def main():
    args = parser(__doc__, rounds=5, set='cards', size=320, minutes=10., lr=0., measure='ms', train='', save='', ours='', fcos='', images=16, steps='1,2,3,5', tols='0.2', form_steps='2,3', onnx_steps='2,3', untrained='', others='', only='', onnx='runs/onnx', forms=','.join(FORMS), peer_forms=','.join(FORMS)).parse_args()
    torch.set_num_threads(args.threads)
    if args.train: print(f'{args.save}: {trained(args)[0]} updates')
    else: measured(args, dict(set=args.set, size=args.size, images=args.images))


if __name__ == '__main__': main()
