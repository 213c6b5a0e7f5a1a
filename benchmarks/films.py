"""Films: warm-started tracks against ByteTrack on cold detections of the same detector.

    python benchmarks/films.py make set            # frames of films as a COCO set
    deqdet_train set --minutes 10 --size 256 --out det
    python benchmarks/films.py measure det --out nbs/results/films.json

What training on pairs of frames gives; both go on for one epoch:

    python benchmarks/films.py tune set --detector det --to plain
    python benchmarks/films.py tune set --detector det --to pairs --pairs

On a map that contracts, with rows that stop by a tolerance, at most 5 applications of f in a frame:

    python benchmarks/films.py tune set --detector det --to contract --contract
    python benchmarks/films.py measure contract --cold 2 3 5 5@.1 --warm 2:3 5:3@.1

Memory over a film of many frames:

    python benchmarks/films.py long folder --detector det --frames 10000 --size 64

needs `pip install trackers` (ByteTrack, HOTA, CLEAR and identity metrics). The films of `measure` have seeds that `make` has not."""
import argparse, contextlib, io, json, os, time, warnings
from pathlib import Path
from typing import NamedTuple
import numpy as np, torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torchvision.ops import batched_nms
from common import report
from deqdet.data import det_dls
from deqdet.decoder import prepared
from deqdet.evaluate import APCallback
from deqdet.learner import det_learner
from deqdet.model import Feed, evaluating
from deqdet.predict import load_detector
from deqdet.sets.augment import recipe_1x, recipe_small
from deqdet.sets.films import Film
from deqdet.sets.scenes import KIND_NAMES
from deqdet.solver import solve
from deqdet.training.contraction import Contract, RandomSteps
from deqdet.training.pairs import Pairs
from deqdet.using.frames import FilmWriter
from deqdet.using.held import Follower, Hold
import deqdet.using.video # gives detectors `predict_film`

TRAIN,VALID = range(1000, 1120),range(2000, 2012) # seeds of `make`
CLASSES = 12
FAR = 20 # applications of f, after which a state counts as settled

class Rule(NamedTuple):
    "How many applications of f a frame gets"
    steps: int     # at most
    refresh: int=0 # frames between fresh starts of queries without an object; 0: cold, all start fresh
    tol: float=0.  # largest residual at which a frame ends early; 0: never

    @classmethod
    def read(cls, text):
        "Of `STEPS`, `STEPS:REFRESH`, and either with `@TOLERANCE`"
        counts,_,tol = text.partition('@')
        return cls(*map(int, counts.split(':')), tol=float(tol or 0))

def make(folder, each=5, **kwargs):
    "Write `each` frames of many films as a COCO set"
    folder = Path(folder)
    for o in ('images','annotations'): (folder/o).mkdir(parents=True, exist_ok=True)
    categories = [dict(id=k+1, name=KIND_NAMES[k]) for k in range(CLASSES)]
    for split,seeds in (('train', TRAIN), ('valid', VALID)):
        images,anns = [],[]
        for seed in seeds:
            film = Film(seed=seed, **kwargs)
            for t in np.linspace(5, film.n-5, each).astype(int).tolist():
                name = f'{split}_{seed}_{t}.jpg'
                Image.fromarray(film[t].image).save(folder/'images'/name, quality=95)
                images.append(dict(id=len(images)+1, file_name=name, width=film.size, height=film.size))
                anns += annotations(film[t], len(images), len(anns))
        coco = dict(images=images, annotations=anns, categories=categories)
        (folder/f'annotations/instances_{split}.json').write_text(json.dumps(coco))

def xywh(b): return [b[0], b[1], b[2]-b[0], b[3]-b[1]]

def annotations(frame, image, before=0):
    "COCO's entries for the truth of a frame"
    rows = zip(frame.boxes.tolist(), frame.labels.tolist())
    return [dict(id=before+i, image_id=image, category_id=k+1, bbox=xywh(b), area=(b[2]-b[0])*(b[3]-b[1]), iscrowd=0)
            for i,(b,k) in enumerate(rows, 1)]

def average_precision(frames, dets):
    "COCO's AP and AP50 over all frames"
    anns,rows = [],[]
    for i,(frame,d) in enumerate(zip(frames, dets), 1):
        anns += annotations(frame, i, len(anns))
        rows += [dict(image_id=i, category_id=k+1, bbox=xywh(b), score=s)
                 for b,k,s in zip(d['boxes'].tolist(), d['labels'].tolist(), d['scores'].tolist())]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = dict(images=[dict(id=i+1) for i in range(len(frames))], annotations=anns,
                             categories=[dict(id=k+1) for k in range(CLASSES)])
        truth.createIndex()
        e = COCOeval(truth, truth.loadRes(rows), 'bbox')
        e.evaluate()
        e.accumulate()
        e.summarize()
    return dict(AP=e.stats[0], AP50=e.stats[1])

def matched(frames, tracks):
    "Numbers of true objects, numbers of tracks, and IoU, of each frame; a track is boxes (n,4) and numbers (n,)"
    from trackers.eval import box_iou
    true,mine = {},{}
    numbers = lambda ids, known: np.array([known.setdefault(int(i), len(known)) for i in ids], int)
    a = [numbers(f.ids, true) for f in frames]
    b = [numbers(ids, mine) for _,ids in tracks]
    near = [box_iou(f.boxes.astype(float), boxes.astype(float)) if len(ids) and len(f.ids) else np.zeros((len(f.ids), len(ids)))
            for f,(boxes,ids) in zip(frames, tracks)]
    return a, b, near

def idf1(frames, tracks):
    from trackers.eval import compute_identity_metrics
    return compute_identity_metrics(*matched(frames, tracks))['IDF1']

def tracking(frames, tracks):
    "HOTA, IDF1, MOTA and identity switches of one film"
    from trackers.eval import compute_clear_metrics, compute_hota_metrics, compute_identity_metrics
    given = matched(frames, tracks)
    hota,clear,identity = (m(*given) for m in (compute_hota_metrics, compute_clear_metrics, compute_identity_metrics))
    return dict(HOTA=hota['HOTA'], IDF1=identity['IDF1'], MOTA=clear['MOTA'], IDSW=int(clear['IDSW']))

class Timed:
    "CPU milliseconds by name"
    def __init__(self): self.ms = {}
    @contextlib.contextmanager
    def __call__(self, name):
        start = time.process_time()
        yield
        self.ms[name] = self.ms.get(name, 0) + 1000*(time.process_time() - start)

def seen(step, z, n=100):
    "Detections of the only image as `decode` has them; `best`: is it the best class of its query?"
    pred = step.read(z)
    each = pred.logits[0].sigmoid() # (N,K)
    scores,at = each.flatten().topk(min(n, each.numel()))
    query,labels = at // each.shape[1], at % each.shape[1]
    best = labels==each.argmax(-1)[query]
    return dict(boxes=pred.boxes[0][query], scores=scores, labels=labels, best=best)

def cold(model, feats, first, steps):
    "{steps: detections} of one frame, every query from g"
    d = model.decoder
    feats = prepared(d.step, feats)
    kept = solve(d.step, d.init(first, feats), (feats,), max_iter=max(steps), keep=steps).kept
    return {n: seen(d.step, kept[n]) for n in steps}

def cold_until(model, feats, first, rule):
    "Detections of one frame, every query from g, until the tolerance; applications of g and f"
    sol = model.decoder.solve(first, feats, max_iter=rule.steps, tol=rule.tol)
    return seen(model.decoder.step, sol.z), 1 + int(sol.n)

class Started(nn.Module):
    "A detector whose features of the frame have been computed already"
    def __init__(self, model):
        super().__init__()
        self.decoder = model.decoder
        self.now = None
    def start(self, images, sizes): return self.now

# settings of ByteTrack; each row of the table takes the best of them
BYTE = [dict(track_activation_threshold=a, high_conf_det_threshold=h, minimum_consecutive_frames=m)
        for a,h,m in ((.7, .6, 2), (.3, .3, 1), (.4, .4, 1), (.5, .5, 1), (.5, .3, 2), (.5, .5, 3))]

def without_doubles(d):
    "Detections after non-maximum suppression within each class"
    kept = batched_nms(d['boxes'], d['scores'], d['labels'], .6)
    return {k: v[kept] for k,v in d.items()}

def byte_track(dets, rate=24., **kwargs):
    "Tracks of one film by ByteTrack"
    import supervision
    from trackers import ByteTrackTracker
    tracker = ByteTrackTracker(frame_rate=rate, **kwargs)
    tracks = []
    for d in dets:
        sure = (d['scores'] >= .1) & d['best'] # a query is one object
        d = {k: v[sure].numpy() for k,v in d.items()}
        found = tracker.update(supervision.Detections(d['boxes'], confidence=d['scores'], class_id=d['labels']))
        known = found.tracker_id >= 0
        tracks.append((found.xyxy[known], found.tracker_id[known]))
    return tracks

def held(d):
    "Boxes and numbers of what queries hold"
    live = d['ids'] >= 0
    return d['boxes'][live].numpy(), d['ids'][live].numpy()

def one_film(model, film, rules, take, clock):
    "Frames, {rule: detections}, {rule: applications of g and f in each frame}"
    frames,found,applied = [],{r: [] for r in rules},{r: [] for r in rules}
    fixed = [r for r in rules if not r.refresh and not r.tol]
    until = [r for r in rules if not r.refresh and r.tol]
    started = Started(model)
    follow = {r: Follower(started, r.steps, Hold(take=take, refresh=r.refresh), tol=r.tol) for r in rules if r.refresh}
    def note(rule, dets, n):
        found[rule].append(dets)
        applied[rule].append(n)
    with evaluating(model):
        for frame in film:
            frames.append(frame)
            image = torch.from_numpy(frame.image).permute(2, 0, 1)[None]
            with clock('features'): started.now = first,feats = model.start(image)
            with clock('cold'): at = cold(model, feats, first, [r.steps for r in fixed])
            for r in fixed: note(r, at[r.steps], 1 + r.steps)
            for r in until:
                with clock(r): last = cold_until(model, feats, first, r)
                note(r, *last)
            for r,f in follow.items():
                before = f.applications
                with clock(r): dets = f(image)[0]
                note(r, dets, f.applications - before)
    return frames, found, applied

def moves(decoder, states, which):
    "Residuals of some queries (N,) along a path"
    some = [type(z)(*[t[:, which] for t in z]) for z in states]
    return [decoder.measure(a, b).rel.max().item() for a,b in zip(some, some[1:])]

def path(decoder, z, feats, take=.5):
    "Residual after each application: of all queries, of those that see an object at last, of the rest; the last state"
    sol = solve(decoder.step, z, (feats,), max_iter=FAR, keep=range(FAR+1))
    live = decoder.step.read(sol.z).logits[0].sigmoid().amax(-1) >= take # (N,)
    sets = dict(residual=live | True, live=live, rest=~live)
    return {k: moves(decoder, list(sol.kept.values()), o) for k,o in sets.items()}, sol.z

def settling(model, film, each=5):
    "For some frames of a film: the paths of all queries from g, and from where they settled in the frame before"
    rows,d = dict(cold=[], warm=[]),model.decoder
    with evaluating(model):
        for t in range(each, len(film), each):
            settled = []
            for frame in (film[t-1], film[t]):
                first,feats = model.start(torch.from_numpy(frame.image).permute(2, 0, 1)[None])
                feats = prepared(d.step, feats)
                row,z = path(d, d.init(first, feats), feats)
                settled.append(z)
            rows['cold'].append(row)
            rows['warm'].append(path(d, settled[0], feats)[0])
    return rows

def typical(rows):
    "Medians over frames, and applications until the residual is below a tolerance; FAR+1: never"
    rel = np.array([r['residual'] for r in rows]) # (frames,FAR)
    few = {tol: float(((rel > tol).cumprod(1).sum(1) + 1).mean()) for tol in (.2, .1, .05)}
    medians = {k: np.median([r[k] for r in rows], 0).tolist() for k in rows[0]}
    return medians | dict(applications_to=few)

def spread(rows):
    "Mean and standard deviation over films"
    return {k: [float(np.mean([r[k] for r in rows])), float(np.std([r[k] for r in rows], ddof=1))] for k in rows[0]}

def strip(frames, tracks, at):
    "Boxes and numbers in some frames, for a figure"
    return [dict(frame=t, boxes=tracks[t][0].round(1).tolist(), ids=tracks[t][1].tolist()) for t in at if t < len(frames)]

def best_cold(films, colds, clock):
    "The best AP and the best tracks of cold detections, over NMS and the settings of ByteTrack; rows of each film"
    aps,options = [],[]
    for clean in (False, True):
        dets = [[without_doubles(d) for d in o] if clean else o for o in colds]
        aps.append([average_precision(f, d) for f,d in zip(films, dets)])
        for setting in BYTE:
            with clock('ByteTrack'): tracks = [byte_track(d, **setting) for d in dets]
            options.append((dict(nms=clean, **setting), np.mean([idf1(f, t) for f,t in zip(films, tracks)]), tracks))
    setting,_,tracks = max(options, key=lambda o: o[1])
    ap = max(aps, key=lambda rows: np.mean([r['AP'] for r in rows]))
    return [a | tracking(f, t) for a,f,t in zip(ap, films, tracks)], setting, tracks

def parts_of(rules, found):
    "{rule: list, one entry a film} of a list of {rule: entry}"
    return {r: [o[r] for o in found] for r in rules}

def measure(folder, seeds, n, size, rules, take, at=(20, 32, 44, 56, 68), settle=False):
    "All numbers"
    model = load_detector(folder, device='cpu')
    clock = Timed()
    films,found,applied,paths = [],[],[],dict(cold=[], warm=[])
    for seed in seeds:
        film = Film(seed=seed, n=n, size=size)
        for known,new in zip((films, found, applied), one_film(model, film, rules, take, clock)): known.append(new)
        if settle:
            for k,v in settling(model, film).items(): paths[k] += v
        print(f'film {seed} of {seeds}', flush=True)
    found,applied = parts_of(rules, found),parts_of(rules, applied)
    total = len(seeds)*n
    each = clock.ms.pop('cold')/total/(1 + max(r.steps for r in rules if not r.refresh and not r.tol))
    result = []
    for r in rules:
        counts = np.concatenate(applied[r])
        ms = clock.ms[r]/total if r in clock.ms else each*(1+r.steps)
        row = dict(start='warm' if r.refresh else 'cold', **r._asdict(), applications=counts.mean(), ms=ms,
                   applications_of_films=[float(np.mean(o)) for o in applied[r]],
                   frames_with={int(k): int((counts==k).sum()) for k in np.unique(counts)})
        if r.refresh:
            tracks = [[held(d) for d in o] for o in found[r]]
            rows = [average_precision(f, d) | tracking(f, t) for f,d,t in zip(films, found[r], tracks)]
        else: rows,row['byte_track'],tracks = best_cold(films, found[r], clock)
        result.append(dict(**row, films=rows, **spread(rows), strip=strip(films[0], tracks[0], at)))
        print({m: v for m,v in result[-1].items() if m not in ('films', 'strip')}, flush=True)
    tracker = clock.ms['ByteTrack']/total/sum(not r.refresh for r in rules)/2/len(BYTE)
    settled = dict(settling={k: typical(v) for k,v in paths.items()}) if settle else {}
    return dict(rows=result, ms_features=clock.ms['features']/total, ms_byte_track=tracker, **settled)

def extras(pairs, contract):
    "Callbacks of a training"
    return [Pairs()]*pairs + [Contract(every=2), RandomSteps()]*contract

def tune(folder, detector, out, cbs, lr, size, epochs=1, seed=0):
    "Go on with the training of a detector, with these callbacks; the processor's seconds of an update"
    torch.manual_seed(seed)
    dls = det_dls(folder, bs=4, tfms=(recipe_small(size), recipe_1x(False, size, size)), num_workers=0, seed=seed, device='cpu')
    learn = det_learner(dls, load_detector(detector), 'finetune', lr=lr, cbs=cbs)
    learn.remove_cb(APCallback)
    begun = time.process_time()
    with learn.quiet(): learn.fit_published(epochs=epochs)
    updates = epochs*len(dls.train)
    learn.model.save_pretrained(out)
    print(f'{out}: {updates} updates, {(time.process_time() - begun)/updates:.2f} s each')

def resident():
    "Megabytes of memory that this process has"
    return int(Path('/proc/self/statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE')/2**20

def long_film(folder, detector, n, size):
    "Memory while a film of many frames is read, detected in and written; slope of a line through the second half"
    every = max(1, n//40)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = load_detector(detector, device='cpu')
    model.feed = Feed(size, size)
    shots = [f.image for f in Film(seed=11, n=100, size=size, shake=.5, speed=1.)]
    with FilmWriter(folder/'film.mp4') as film:
        for t in range(n): film.add(shots[min(t % 200, 199 - t % 200)]) # forth and back
    seen = []
    def count(*_):
        if count.n % every==0: seen.append((count.n, resident()))
        count.n += 1
    count.n = 0
    model.pyramid.register_forward_hook(count)
    begun = time.process_time()
    result = model.predict_film(folder/'film.mp4', folder/'found.mp4', min_score=.1)
    frames,mb = np.array(seen[len(seen)//2:]).T
    slope = np.polyfit(frames, mb, 1)[0]
    return dict(frames=result.frames, objects=sum(result.objects.values()), fault=result.fault, seconds=time.process_time()-begun, seen=seen,
                mb_of_1000_frames=1000*slope, most=max(m for _,m in seen), first=seen[0][1])

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', choices=('make', 'measure', 'tune', 'long'))
    p.add_argument('folder', help='of the set to write, or of the detector')
    p.add_argument('--seeds', type=int, nargs='+', default=[11, 12, 13, 14])
    p.add_argument('--frames', type=int, default=75)
    p.add_argument('--size', type=int, default=256)
    p.add_argument('--cold', nargs='+', default=['1', '2', '3', '5'], help='applications of f, or at most @ tolerance')
    p.add_argument('--warm', nargs='+', default=['2:1', '2:3', '3:3'], help='as in --cold, with `:frames to a fresh start` before the @')
    p.add_argument('--settle', action='store_true', help='measure also how soon the map settles')
    p.add_argument('--take', type=float, default=.5, help='score from which a query takes an object')
    p.add_argument('--out')
    p.add_argument('--detector', help='that goes on')
    p.add_argument('--to', help='folder of the new detector')
    p.add_argument('--pairs', action='store_true', help='train on pairs of frames too')
    p.add_argument('--contract', action='store_true', help='train with a penalty on the next move and random path lengths')
    p.add_argument('--epochs', type=int, default=1)
    p.add_argument('--lr', type=float, default=5e-4)
    o = p.parse_args()
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    if o.what=='make': return make(o.folder, size=o.size)
    if o.what=='tune': return tune(o.folder, o.detector, o.to, extras(o.pairs, o.contract), o.lr, o.size, o.epochs)
    if o.what=='long': return report(long_film(o.folder, o.detector, o.frames, o.size), o.out)
    rules = [Rule.read(text) for text in o.cold + o.warm]
    result = measure(o.folder, o.seeds, o.frames, o.size, rules, o.take, settle=o.settle)
    report(result, o.out, seeds=o.seeds, frames=o.frames, size=o.size, take=o.take)

if __name__=='__main__': main()
