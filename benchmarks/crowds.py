"""A set of sheets: nine images of a VOC or COCO set in one, three by three. It is crowded, and its objects are small.

    python benchmarks/crowds.py $DEQDET_DATA/bccd $DEQDET_DATA/crowd
    python benchmarks/own_data.py --set crowd --kind deqdet_lite --minutes 4 --out nbs/results/own_data_crowd.json

150 sheets to train on and 40 for validation, with over a hundred blood cells each, where `deqdet_lite` has 100 queries.
Nine circuit boards of 640 pixels on a sheet have defects of 5 to 8 pixels when the sheet is fed with 320:

    python benchmarks/crowds.py $DEQDET_DATA/deeppcb $DEQDET_DATA/sheets --cell 640x640 --n 300,60"""
import argparse, json, random, warnings
from pathlib import Path
from PIL import Image
from deqdet.data import det_dls

COLS = 3


def nine(ds, cell, rng):
    "An image of nine, and its rows (class, box)"
    w, h = cell
    big = Image.new('RGB', (COLS*w, COLS*h))
    rows = []
    for k,j in enumerate(rng.sample(range(len(ds)), COLS*COLS)):
        x,y = w*(k%COLS), h*(k//COLS)
        img = Image.open(ds.folder/ds.images[j]['file_name']).convert('RGB')
        big.paste(img.resize((w, h)), (x, y))
        rows += placed(ds, j, x, y, w/img.width, h/img.height)
    return big, rows


def placed(ds, j, x, y, across, down):
    "Class and box (x, y, width, height) of each object of an image that lies at x, y"
    part = slice(ds.ends[j], ds.ends[j+1])
    for (x0,y0,x1,y1),label in zip(ds.boxes[part].tolist(), ds.labels[part].tolist()):
        box = [x + x0*across, y + y0*down, (x1-x0)*across, (y1-y0)*down]
        if min(box[2:]) > 0: yield label, box


def split(ds, n, folder, vocab, cell, rng):
    "Write one split as COCO"
    folder.mkdir(parents=True, exist_ok=True)
    images, objects = [], []
    for i in range(n):
        big, rows = nine(ds, cell, rng)
        big.save(folder/f'{i}.jpg', quality=92)
        images.append(dict(id=i, file_name=f'{i}.jpg', width=big.width, height=big.height))
        for label,box in rows:
            objects.append(dict(id=len(objects)+1, image_id=i, category_id=label+1, bbox=box, area=box[2]*box[3], iscrowd=0))
    categories = [dict(id=i+1, name=c) for i,c in enumerate(vocab)]
    (folder/'_annotations.coco.json').write_text(json.dumps(dict(images=images, annotations=objects, categories=categories)))
    print(f'{folder}: {n} images, {len(objects)/n:.0f} objects in each')


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('source')
    p.add_argument('out')
    p.add_argument('--cell', default='480x360', help='width and height of an image on a sheet')
    p.add_argument('--n', default='150,40', help='sheets to train on and for validation')
    args = p.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # boxes without width
        dls = det_dls(args.source, bs=1, num_workers=0)
    rng = random.Random(0)
    cell = tuple(map(int, args.cell.split('x')))
    n_train,n_valid = map(int, args.n.split(','))
    split(dls.train_ds, n_train, Path(args.out)/'train', dls.vocab, cell, rng)
    split(dls.valid_ds, n_valid, Path(args.out)/'valid', dls.vocab, cell, rng)


if __name__=='__main__': main()
