"""Films: warm-started tracks against ByteTrack on cold detections of the same detector.

    python benchmarks/films.py make set            # frames of films as a COCO set
    deqdet_train set --minutes 10 --size 256 --out det
    python benchmarks/films.py measure det --out nbs/results/films.json

What training on pairs of frames gives; both go on for one epoch:

    python benchmarks/films.py tune set --detector det --to plain
    python benchmarks/films.py tune set --detector det --to pairs --pairs

Memory over a film of many frames:

    python benchmarks/films.py long folder --detector det --frames 10000 --size 64

needs `pip install trackers` (ByteTrack, HOTA, CLEAR and identity metrics). The films of `measure` have seeds that `make` has not."""
import argparse, contextlib, io, json, os, time, warnings
from pathlib import Path
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
from deqdet.training.pairs import Pairs
from deqdet.using.frames import FilmWriter
from deqdet.using.held import Follower, Hold
import deqdet.using.video # gives detectors `predict_film`

TRAIN,VALID = range(1000, 1120),range(2000, 2012) # seeds of `make`
CLASSES = 12

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

def cold(model, feats, first, steps):
    "{steps: detections} of one frame, every query from g"
    d = model.decoder
    feats = prepared(d.step, feats)
    kept = solve(d.step, d.init(first, feats), (feats,), max_iter=max(steps), keep=steps).kept
    found = {}
    for n in steps:
        pred = d.step.read(kept[n])
        scores,labels = pred.logits[0].sigmoid().max(-1)
        found[n] = dict(boxes=pred.boxes[0], scores=scores, labels=labels)
    return found

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
        d = {k: v[d['scores'] >= .1].numpy() for k,v in d.items()}
        found = tracker.update(supervision.Detections(d['boxes'], confidence=d['scores'], class_id=d['labels']))
        known = found.tracker_id >= 0
        tracks.append((found.xyxy[known], found.tracker_id[known]))
    return tracks

def held(d):
    "Boxes and numbers of what queries hold"
    live = d['ids'] >= 0
    return d['boxes'][live].numpy(), d['ids'][live].numpy()

def one_film(model, film, cold_steps, warm, take, clock):
    "Frames, {steps: cold detections}, {(steps, refresh): warm detections}, applications of each of these"
    frames,colds,warms = [],{n: [] for n in cold_steps},{w: [] for w in warm}
    started = Started(model)
    follow = {w: Follower(started, w[0], Hold(take=take, refresh=w[1])) for w in warm}
    with evaluating(model):
        for frame in film:
            frames.append(frame)
            image = torch.from_numpy(frame.image).permute(2, 0, 1)[None]
            with clock('features'): started.now = first,feats = model.start(image)
            with clock('cold'): found = cold(model, feats, first, cold_steps)
            for n in cold_steps: colds[n].append(found[n])
            for w in warm:
                with clock(w): warms[w].append(follow[w](image)[0])
    return frames, colds, warms, {w: follow[w].applications/len(frames) for w in warm}

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

def measure(folder, seeds, n, size, cold_steps, warm, take, at=(20, 32, 44, 56, 68)):
    "All numbers"
    model = load_detector(folder, device='cpu')
    clock = Timed()
    films,colds,warms = [],{k: [] for k in cold_steps},{w: [] for w in warm}
    for seed in seeds:
        frames,c,w,applied = one_film(model, Film(seed=seed, n=n, size=size), cold_steps, warm, take, clock)
        films.append(frames)
        for k,v in c.items(): colds[k].append(v)
        for k,v in w.items(): warms[k].append(v)
        print(f'film {seed} of {seeds}', flush=True)
    total = len(seeds)*n
    features,each = clock.ms['features']/total, clock.ms['cold']/total/(1 + max(cold_steps))
    result = []
    for k in cold_steps:
        rows,setting,tracks = best_cold(films, colds[k], clock)
        result.append(dict(start='cold', steps=k, applications=1+k, ms=each*(1+k), byte_track=setting, films=rows, **spread(rows),
                           strip=strip(films[0], tracks[0], at)))
        print({m: v for m,v in result[-1].items() if m not in ('films', 'strip')}, flush=True)
    for w in warm:
        tracks = [[held(d) for d in o] for o in warms[w]]
        rows = [average_precision(f, d) | tracking(f, t) for f,d,t in zip(films, warms[w], tracks)]
        result.append(dict(start='warm', steps=w[0], refresh=w[1], applications=applied[w], ms=clock.ms[w]/total, films=rows, **spread(rows),
                           strip=strip(films[0], tracks[0], at)))
        print({m: v for m,v in result[-1].items() if m not in ('films', 'strip')}, flush=True)
    tracker = clock.ms['ByteTrack']/total/len(cold_steps)/2/len(BYTE)
    return dict(rows=result, ms_features=features, ms_byte_track=tracker)

def tune(folder, detector, out, pairs, lr, size, seed=0):
    "Train a detector for one more epoch, with or without pairs of frames; the processor's seconds of an update"
    torch.manual_seed(seed)
    dls = det_dls(folder, bs=4, tfms=(recipe_small(size), recipe_1x(False, size, size)), num_workers=0, seed=seed, device='cpu')
    learn = det_learner(dls, load_detector(detector), 'finetune', lr=lr, cbs=[Pairs()] if pairs else [])
    learn.remove_cb(APCallback)
    begun = time.process_time()
    with learn.quiet(): learn.fit_published(epochs=1)
    seconds = (time.process_time() - begun)/len(dls.train)
    learn.model.save_pretrained(out)
    print(f'{out}: {len(dls.train)} updates, {seconds:.2f} s each')

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
    p.add_argument('--cold', type=int, nargs='+', default=[1, 2, 3, 5])
    p.add_argument('--warm', nargs='+', default=['2:1', '2:3', '3:3'], help='applications of f : frames to a fresh start')
    p.add_argument('--take', type=float, default=.5, help='score from which a query takes an object')
    p.add_argument('--out')
    p.add_argument('--detector', help='that goes on')
    p.add_argument('--to', help='folder of the new detector')
    p.add_argument('--pairs', action='store_true', help='train on pairs of frames too')
    p.add_argument('--lr', type=float, default=5e-4)
    o = p.parse_args()
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    if o.what=='make': return make(o.folder, size=o.size)
    if o.what=='tune': return tune(o.folder, o.detector, o.to, o.pairs, o.lr, o.size)
    if o.what=='long': return report(long_film(o.folder, o.detector, o.frames, o.size), o.out)
    warm = [tuple(int(v) for v in w.split(':')) for w in o.warm]
    result = measure(o.folder, o.seeds, o.frames, o.size, o.cold, warm, o.take)
    report(result, o.out, seeds=o.seeds, frames=o.frames, size=o.size, take=o.take)

if __name__=='__main__': main()
