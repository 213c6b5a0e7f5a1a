"""Start of `det_dls` on a generated set of COCO's size: processor seconds, peak and kept memory of fresh processes

    python benchmarks/coco_size.py --out benchmarks/results/coco_size.json
    python benchmarks/coco_size.py --images 170000 --boxes 2500000 --classes 365 --points 0 --ways first,second --rounds 1 \
        --out benchmarks/results/objects365_tenth.json

The second command writes a tenth of Objects365's size. With `--tail 1` the classes' counts fall as 1/rank."""
import gc, json, os, resource, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np, torch
from PIL import Image
from common import _line, parser, report

SIZES = np.array([(640, 480)]*5 + [(480, 640)]*2 + [(640, 427)]*2 + [(500, 375)]) # width, height: about COCO's mixture
LINKS = 30_000 # to one file; file systems allow a limited number


def categories(rng, n, classes, tail):
    "(n,) category ids, the one of rank r drawn with a chance of 1/r**tail"
    chance = 1/np.arange(1, classes + 1)**tail
    return rng.choice(classes, n, p=chance/chance.sum()) + 1


def objects(rng, sizes, n, points, classes, tail):
    "Annotations as JSON, one by one: boxes inside their images, polygons of `points` points"
    image = np.sort(rng.integers(0, len(sizes), n))
    frame = sizes[image].repeat(2, 0).reshape(n, 2, 2)[:, 0]
    wh = np.maximum(1, rng.beta(.6, 2, (n, 2))*frame)
    xy = rng.random((n, 2))*(frame - wh)
    xywh = np.concatenate([xy, wh], 1).round(2)
    category,crowd = categories(rng, n, classes, tail), rng.random(n) < .012
    rows = zip(xywh.tolist(), (wh.prod(1)*.6).round(4).tolist(), crowd.astype(int).tolist(), (image + 1).tolist(), category.tolist())
    for i,(box,area,of_many,where,kind) in enumerate(rows):
        outline = f'"segmentation": {[(xy[i] + rng.random((points, 2))*wh[i]).round(2).ravel().tolist()]}, ' if points else ''
        yield (f'{{{outline}"area": {area}, "iscrowd": {of_many}, "image_id": {where}, "bbox": {box}, '
               f'"category_id": {kind}, "id": {i + 1}}}')


def pictures(rng, n, split):
    "Entries of images with the fields that COCO has, and their sizes"
    sizes = SIZES[rng.integers(0, len(SIZES), n)]
    url = 'http://example.org/pictures'
    return [dict(license=3, file_name=f'{i:012}.jpg', coco_url=f'{url}/{split}/{i:012}.jpg', height=int(h), width=int(w),
                 date_captured='2013-11-14 11:18:45', flickr_url=f'{url}/{i:08}_{i*7919 % 10**10:010}_z.jpg', id=i)
            for i,(w,h) in enumerate(sizes, 1)], sizes


def write_split(path, split, n, boxes, points, classes, tail, seed):
    "An annotation file, and a link for each image"
    rng = np.random.default_rng(seed)
    images,sizes = pictures(rng, n, split)
    folder = path/'images'/split
    folder.mkdir(parents=True)
    for i,o in enumerate(images):
        if i % LINKS==0: Image.new('RGB', (64, 48), (90, 140, 60)).save(first := folder/o['file_name'])
        else: os.link(first, folder/o['file_name'])
    named = [dict(supercategory='thing', id=i, name=f'class {i}') for i in range(1, classes + 1)]
    with (path/f'annotations/instances_{split}.json').open('w') as f:
        f.write('{"info": {"description": "generated"}, "licenses": [], "images": ' + json.dumps(images) + ', "annotations": [')
        for i,text in enumerate(objects(rng, sizes, boxes, points, classes, tail)): f.write(', '*(i > 0) + text)
        f.write('], "categories": ' + json.dumps(named) + '}')


def write(path, args):
    "The set, once: a training split, and a validation split of a 24th of it"
    if (path/'written').exists(): return
    (path/'annotations').mkdir(parents=True)
    common = args.points, args.classes, args.tail
    write_split(path, 'train2017', args.images, args.boxes, *common, seed=0)
    write_split(path, 'val2017', args.images//24, args.boxes//24, *common, seed=1)
    (path/'written').touch()


def resident(): return int(Path('/proc/self/statm').read_text().split()[1])*resource.getpagesize()
def peak(): return int(_line('/proc/self/status', 'VmHWM').split()[0])*1024


def start(path, way):
    "One start, in this process: what it takes beyond the imports"
    from deqdet.data import DetDataset, det_dls, read_coco
    torch.set_num_threads(1)
    gc.collect()
    before,began,wall = resident(), time.process_time(), time.perf_counter()
    if way=='entries': kept = [DetDataset(read_coco(path, o)) for o in ('train', 'valid')]
    else: kept = det_dls(path, bs=4, size=640, num_workers=0, device='cpu')
    seconds,wall = time.process_time() - began, time.perf_counter() - wall
    gc.collect()
    return dict(seconds=seconds, wall=wall, peak_mb=(peak() - before)/1e6, kept_mb=(resident() - before)/1e6, parts=len(kept))


def fresh(path, way):
    "The same in a fresh process"
    command = [sys.executable, '-W', 'ignore', __file__, '--start', way, '--folder', str(path)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measured(path, rounds, ways):
    "Rounds of some of: all entries as dictionaries (the old way), a first start, a second start"
    res = {o: [] for o in ways.split(',')}
    for _ in range(rounds):
        for o in path.glob('annotations/.*.cache'): o.unlink()
        for way in res: res[way].append(fresh(path, way))
    best = {k: min(v, key=lambda o: o['seconds']) for k,v in res.items()}
    return best | dict(seconds={k: [o['seconds'] for o in v] for k,v in res.items()})


def main():
    p = parser(__doc__, images=118_287, boxes=860_001, points=9, classes=80, tail=0., folder='', start='', ways='entries,first,second', rounds=3)
    args = p.parse_args()
    if args.start: return print(json.dumps(start(Path(args.folder), args.start)))
    path = Path(args.folder or Path(tempfile.gettempdir())/f'coco_size_{args.images}_{args.boxes}_{args.points}_{args.classes}_{args.tail}')
    write(path, args)
    files = {o.name: o.stat().st_size/1e6 for o in sorted(path.glob('annotations/*.json'))}
    result = measured(path, args.rounds, args.ways)
    report(result, args.out, json_mb=files, images=args.images, boxes=args.boxes, classes=args.classes,
           clock='CPU time of one process, beyond the imports; the round that took least')


if __name__ == '__main__': main()
