"""A set in which some classes are rare: of the training images that show them, few remain.

    python benchmarks/thin.py $DEQDET_DATA/cards $DEQDET_DATA/thin_cards --rare king,queen
    python benchmarks/own_data.py --set thin_cards --kind deqdet_lite --minutes 4 --rare .3 --out nbs/results/own_data_rare.json

With `--images 16`, sixteen training images remain. Validation images are all there. Images are linked, not copied."""
import argparse, json, random, warnings
from pathlib import Path
from deqdet.sets.formats import read_data


def thinned(coco, names, keep, seed=0):
    "A COCO dict in which, of the images with one of these classes, `keep` of each class remain"
    number = {o['name']: o['id'] for o in coco['categories']}
    classes = {} # image -> its classes
    for o in coco['annotations']: classes.setdefault(o['image_id'], set()).add(o['category_id'])
    order = [o['id'] for o in coco['images']]
    random.Random(seed).shuffle(order)
    left = {number[k]: keep for k in names}
    kept = set()
    for i in order:
        rare = [k for k in classes.get(i, ()) if k in left]
        if any(left[k] <= 0 for k in rare): continue
        for k in rare: left[k] -= 1
        kept.add(i)
    return part(coco, kept)


def few(coco, n, seed=0):
    "A COCO dict with `n` of the images"
    return part(coco, random.Random(seed).sample([o['id'] for o in coco['images']], n))


def part(coco, ids):
    "A COCO dict with these images alone"
    kept = set(ids)
    images = [o for o in coco['images'] if o['id'] in kept]
    objects = [o for o in coco['annotations'] if o['image_id'] in kept]
    return dict(coco, images=images, annotations=objects)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('source')
    p.add_argument('out')
    p.add_argument('--rare', default='', help='names of classes')
    p.add_argument('--images', type=int, default=0, help='training images that remain; 0: all')
    p.add_argument('--keep', type=int, default=8, help='images that show each of them')
    args = p.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # boxes without width
        train,valid = read_data(args.source)
    out = Path(args.out)
    (out/'annotations').mkdir(parents=True)
    (out/'images').symlink_to(train.folder.resolve())
    coco = few(train.coco, args.images) if args.images else train.coco
    rare = args.rare.split(',') if args.rare else []
    parts = dict(train=thinned(coco, rare, args.keep), valid=valid.coco)
    for name,coco in parts.items():
        (out/f'annotations/instances_{name}.json').write_text(json.dumps(coco))
        print(f"{name}: {len(coco['images'])} images")


if __name__=='__main__': main()
