"""Images per second and core, at 1333x800 and at 320: deqdet's loader against torchvision's own way and against a tar read in order

    python benchmarks/loader.py --rounds 5 --out benchmarks/results/loader_sizes.json
    python benchmarks/loader.py --part draft --rounds 5 --detector runs/cards --out benchmarks/results/draft.json"""
import json, os, tarfile, tempfile, time
from contextlib import redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path
import numpy as np, torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.io import ImageReadMode, decode_image, decode_jpeg
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from deqdet.sets.augment import fit_hw, recipe_1x, recipe_2x
from deqdet.data import det_dls
from deqdet.sets.images import Target, collate, load_image
from common import alternate, parser, report

cpu = time.process_time # per core: what this process used, whatever else the machine does
SIZES = [(480, 640)]*5 + [(640, 480)]*2 + [(427, 640)]*2 + [(375, 500)] # about COCO's mixture


def picture(rng, hw):
    "An image with the detail of a photograph: clouds at several scales, and grain"
    im = sum(np.asarray(Image.fromarray(rng.integers(0, 256, (hw[0]//s + 2, hw[1]//s + 2, 3), dtype=np.uint8))
             .resize(hw[::-1], Image.BICUBIC), np.float32)*w for s,w in ((80, .55), (16, .3), (4, .15)))
    return Image.fromarray((im + rng.normal(0, 6, im.shape)).clip(0, 255).astype(np.uint8))


def write(path, n, seed=0):
    "A COCO folder of `n` JPEGs with seven boxes each"
    rng,images,anns = np.random.default_rng(seed), [], []
    for d in ('images', 'annotations'): (path/d).mkdir(parents=True, exist_ok=True)
    for i in range(n):
        h,w = SIZES[i % len(SIZES)]
        images.append(dict(id=i + 1, file_name=f'{i:05}.jpg', height=h, width=w))
        picture(rng, (h, w)).save(path/'images'/images[-1]['file_name'], quality=90)
        for _ in range(7):
            bw,bh = rng.uniform(10, w/2), rng.uniform(10, h/2)
            box = [float(o) for o in (rng.uniform(0, w - bw), rng.uniform(0, h - bh), bw, bh)]
            anns.append(dict(id=len(anns) + 1, image_id=i + 1, category_id=1, bbox=box, area=float(bw*bh), iscrowd=0))
    coco = json.dumps(dict(images=images, annotations=anns, categories=[dict(id=1, name='thing')]))
    for split in ('train', 'valid'): (path/f'annotations/instances_{split}.json').write_text(coco)


def plain(path, bs, floats_first, short=800, long=1333):
    "torchvision's own way: CocoDetection, Pillow, v2 transforms, float images, batches as lists"
    to_float = v2.ToDtype(torch.float32, scale=True)
    resize = [v2.RandomHorizontalFlip(), v2.RandomShortestSize([short], max_size=long)]
    steps = [to_float, *resize] if floats_first else [*resize, to_float]
    tfms = v2.Compose([v2.ToImage(), *steps, v2.SanitizeBoundingBoxes()])
    with redirect_stdout(StringIO()):
        ds = CocoDetection(path/'images', path/'annotations/instances_train.json', transforms=tfms)
    ds = wrap_dataset_for_transforms_v2(ds, target_keys=('boxes', 'labels'))
    return DataLoader(ds, batch_size=bs, shuffle=True, collate_fn=lambda b: tuple(zip(*b)))


def write_tar(path):
    "The images as one tar, in order"
    with tarfile.open(path/'images.tar', 'w') as t:
        for f in sorted((path/'images').glob('*.jpg')): t.add(f, f.name)


def from_tar(path, bs, tfm):
    "deqdet's decoder, recipe and batches, the bytes from a tar that is read in order"
    ds = det_dls(path, bs=bs, tfms=(None, None), num_workers=0).train.dataset
    def target(i):
        part,o = slice(ds.ends[i], ds.ends[i+1]), ds.images[i]
        return Target(ds.boxes[part], ds.labels[part], torch.tensor([o['height'], o['width']]), torch.tensor(o['id']))
    def go():
        items = []
        with tarfile.open(path/'images.tar', 'r|') as t:
            for i,member in enumerate(t):
                image = decode_image(torch.frombuffer(bytearray(t.extractfile(member).read()), dtype=torch.uint8), ImageReadMode.RGB, True)
                items.append(tfm(image, target(i)))
                if len(items) < bs: continue
                collate(items)
                items = []
    return go


def reading(path):
    "Bytes alone: a file for each image, or one tar"
    files = sorted((path/'images').glob('*.jpg'))
    def tar():
        with tarfile.open(path/'images.tar', 'r|') as t:
            for member in t: t.extractfile(member).read()
    return dict(files=lambda: [f.read_bytes() for f in files], tar=tar)


def run(loader):
    def go():
        for _ in loader: pass
    return go


def decoders(data):
    "Ways to make a uint8 (3,h,w) of a JPEG in memory; all must give the same pixels"
    buffer = lambda: torch.frombuffer(bytearray(data), dtype=torch.uint8)
    pil = lambda: Image.open(BytesIO(data)).convert('RGB')
    return {'torchvision decode_image': lambda: decode_image(buffer(), ImageReadMode.RGB, apply_exif_orientation=True),
            'torchvision decode_jpeg': lambda: decode_jpeg(buffer(), ImageReadMode.RGB),
            'Pillow np.array': lambda: torch.from_numpy(np.array(pil())).permute(2, 0, 1),
            'Pillow to_image': lambda: F.to_image(pil())}


def drafted(data, size):
    "A JPEG at the smallest scale of decoding (1, 1/2, 1/4, 1/8) that has at least this height and width"
    im = Image.open(BytesIO(data))
    im.draft('RGB', size[::-1])
    return torch.from_numpy(np.array(im.convert('RGB'))).permute(2, 0, 1)


def draft(rounds, large=((3000, 4000), (960, 1280), (480, 640)), sizes=((800, 1333), (320, 320), (128, 128))):
    "A photograph to a small input: decoding at a reduced scale (Pillow's draft) against all pixels, by `load_image`'s decoder"
    res = {}
    for hw in large:
        b = BytesIO(); picture(np.random.default_rng(1), hw).save(b, 'JPEG', quality=90)
        data = b.getvalue()
        for short,long in sizes:
            size = fit_hw(hw, short, long)
            whole = lambda: F.resize(decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB, True), size, antialias=True)
            reduced = lambda: F.resize(drafted(data, size), size, antialias=True)
            t = alternate(dict(whole=whole, draft=reduced), rounds, clock=cpu)
            diff = (reduced().int() - whole().int()).abs().float()
            res[f'{hw[1]}x{hw[0]} to {size[1]}x{size[0]}'] = dict(
                whole_ms=t['whole']['median']*1e3, draft_ms=t['draft']['median']*1e3, ratio=t['draft']['ratio'],
                mean_difference=diff.mean().item(), largest_difference=diff.max().item())
    return res


def drafted_ap(folder, path, size):
    "AP on a validation set whose images are fed small, all pixels decoded or some"
    from deqdet.evaluate import coco_ap
    from deqdet.predict import load_detector
    model = load_detector(folder, size=str(size), device='cpu')
    ds = det_dls(path, num_workers=0, device='cpu').valid_ds
    res = {}
    for way in 'whole', 'draft':
        preds = []
        for o in ds.images:
            file = ds.folder/o['file_name']
            hw = o['height'], o['width']
            image = load_image(file) if way=='whole' else drafted(file.read_bytes(), fit_hw(hw, size, size))
            d = model.predict(image, min_score=0.).dets
            scale = torch.tensor([hw[1]/image.shape[2], hw[0]/image.shape[1]]).repeat(2)
            preds.append(dict(image_id=o['id'], boxes=d['boxes']*scale, scores=d['scores'], labels=d['labels']))
        res[way] = dict(AP=float(coco_ap(preds, ds.coco, ds.cat_ids).AP))
    return res


def parts(path, rounds, n=20):
    "Milliseconds for an image in each part of this package's loader"
    files = sorted((path/'images').glob('*.jpg'))[:n]
    n = len(files)
    ds = det_dls(path, bs=4, tfms=(None, None), num_workers=0).train.dataset
    loaded,r1,r2 = [ds[i] for i in range(n)], recipe_1x(), recipe_2x()
    done = [r1(*s) for s in loaded]
    steps = {'read and decode': lambda: [load_image(f) for f in files],
             '1x recipe': lambda: [r1(*s) for s in loaded], '2x recipe': lambda: [r2(*s) for s in loaded],
             'collate, four at a time': lambda: [collate(done[i:i + 4]) for i in range(0, n, 4)]}
    t = alternate(steps, rounds, clock=cpu)
    return {k: v['median']*1e3/n for k,v in t.items()}


def speeds(path, args, *size):
    "Times of all ways at one size, in turns"
    recipe = recipe_1x(True, *size)
    loader = det_dls(path, bs=args.bs, tfms=(recipe, None), num_workers=0).train
    return alternate({'deqdet': run(loader), 'tar in order': from_tar(path, args.bs, recipe),
                      'torchvision, uint8 resize': run(plain(path, args.bs, False, *size)),
                      'torchvision, float resize': run(plain(path, args.bs, True, *size))}, args.rounds, clock=cpu)


def main():
    args = parser(__doc__, pictures=60, bs=4, part='', detector='', set='cards').parse_args()
    torch.set_num_threads(args.threads); torch.manual_seed(0)
    if args.part=='draft':
        result = dict(reduced_decode=draft(args.rounds))
        if args.detector: result |= {f'{args.set} at {k} pixels': drafted_ap(args.detector, Path(os.environ['DEQDET_DATA'])/args.set, k) for k in (160, 224)}
        return report(result, args.out, clock='CPU time of one process')
    if args.pictures % args.bs: raise SystemExit('--pictures must be a multiple of --bs')
    path = Path(tempfile.mkdtemp()); write(path, args.pictures)
    data = (path/'images/00000.jpg').read_bytes()
    write_tar(path)
    n = args.pictures
    sizes = {'1333x800': speeds(path, args), '320': speeds(path, args, 320, 320)}
    t = sizes['1333x800']
    r = alternate(reading(path), args.rounds, clock=cpu)
    d = alternate({k: lambda f=f: [f() for _ in range(20)] for k,f in decoders(data).items()}, args.rounds, clock=cpu)
    pixels = [f() for f in decoders(data).values()]
    report(dict(pictures_per_core_second={k: n/v['median'] for k,v in t.items()},
                times_as_long_as_deqdet={k: v['ratio'] for k,v in t.items()}, parts_ms=parts(path, args.rounds),
                by_size={s: {k: dict(images_per_core_second=n/v['median'], times_as_long=v['ratio']) for k,v in o.items()} for s,o in sizes.items()},
                read_ms={k: v['median']*1e3/n for k,v in r.items()},
                decode_ms={k: v['median']*50 for k,v in d.items()},
                decoders_agree=all(torch.equal(p, pixels[0]) for p in pixels), reduced_decode=draft(3)),
           args.out, jpeg_bytes=len(data), pictures=args.pictures, batch=args.bs, clock='CPU time of one process')


if __name__ == '__main__': main()
