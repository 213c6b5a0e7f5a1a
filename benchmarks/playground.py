"""The files of the page "Playground": a detector in three parts, generated scenes, and the runtime of the browser.

`python benchmarks/playground.py nbs/playground` (`make playground`) writes them; git ignores them. The detector and the scenes come
from the package, in minutes; the runtime is fetched with npm. `python benchmarks/playground.py --ap` measures what rounding the weights
costs, and writes nothing."""
import argparse, base64, hashlib, json, shutil, subprocess, sys, tarfile, tempfile
from pathlib import Path
import numpy as np

RUNTIME = 'onnxruntime-web@1.30.0'
SHA512 = 'q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==' # of its archive
FILES = 'ort.wasm.bundle.min.mjs','ort-wasm-simd-threaded.wasm'
PARTS = 'start.onnx','step.onnx','read.onnx','about.json'
SCENES = {'scene1.png': (3, 320, 320), 'scene2.png': (10, 240, 320), 'scene3.png': (4, 384, 512)} # seed, height, width

class Missing(Exception): "Something outside of the project is not there"

def detector():
    "The detector that the package ships, for the classes of generated scenes"
    from deqdet.sets.scenes import KIND_NAMES
    from deqdet.zoo import create_detector
    return create_detector('deqdet_lite', vocab=KIND_NAMES, pretrained=True).eval().requires_grad_(False)

def write_scenes(folder):
    "Generated scenes as PNG, whose pixels every decoder reads alike"
    from PIL import Image
    from deqdet.sets.scenes import scene
    for name,(seed,h,w) in SCENES.items():
        image,_,_ = scene(np.random.default_rng((21, seed)), h, w)
        Image.fromarray(image).save(folder/name, optimize=True)

def write_parts(folder):
    "The detector in three parts"
    from deqdet.parts import export_parts
    export_parts(detector(), folder)
    about = json.loads((folder/'about.json').read_text())
    (folder/'about.json').write_text(json.dumps(about | dict(origin=origin())))

def write_runtime(folder):
    "The two files of onnxruntime-web that the page loads"
    if not shutil.which('npm'): raise Missing(f'npm is not installed, and {RUNTIME} comes by it')
    with tempfile.TemporaryDirectory() as tmp:
        res = subprocess.run(['npm','pack',RUNTIME,'--silent'], cwd=tmp, capture_output=True, text=True)
        archive = next(Path(tmp).glob('*.tgz'), None)
        if archive is None: raise Missing(f'npm could not fetch {RUNTIME}: {res.stderr.strip()[-300:]}')
        found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if found!=SHA512: raise Missing(f'{RUNTIME}: the archive has another SHA-512 than expected')
        with tarfile.open(archive) as tar:
            for name in FILES: (folder/name).write_bytes(tar.extractfile(f'package/dist/{name}').read())

def origin():
    "What the parts are made from, as a digest: when it changes, they are made again"
    import deqdet.parts as parts
    from deqdet.families.start import start_file
    sources = Path(parts.__file__), start_file('deqdet_lite')
    return hashlib.sha256(b''.join(o.read_bytes() for o in sources)).hexdigest()

def is_there(folder, names): return all((folder/o).exists() for o in names)

def parts_are_there(folder):
    "Are the parts there, and made from what the package has now?"
    return is_there(folder, PARTS) and json.loads((folder/'about.json').read_text()).get('origin')==origin()

def write_all(folder):
    "Write what a folder lacks: bytes of the detector"
    folder.mkdir(parents=True, exist_ok=True)
    if not is_there(folder, SCENES): write_scenes(folder)
    if not is_there(folder, FILES): write_runtime(folder)
    if not parts_are_there(folder): write_parts(folder)
    return sum((folder/o).stat().st_size for o in PARTS)

def ap(model, n=100, side=256):
    "AP on `n` generated scenes"
    import torch
    from deqdet.scores.ap import coco_ap
    from deqdet.sets.scenes import scene
    images,objects,found = [],[],[]
    for i in range(n):
        image,boxes,labels = scene(np.random.default_rng((77, i)), side, side)
        images.append(dict(id=i, height=side, width=side))
        for (x1,y1,x2,y2),label in zip(np.asarray(boxes, dtype=float).tolist(), labels):
            box = dict(bbox=[x1, y1, x2-x1, y2-y1], area=(x2-x1)*(y2-y1), iscrowd=0)
            objects.append(box | dict(id=len(objects) + 1, image_id=i, category_id=int(label)))
        batch = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
        found.append(model.predict(batch, steps=7)[0] | dict(image_id=i))
    names = [dict(id=k, name=v) for k,v in enumerate(model.vocab)]
    truth = dict(images=images, annotations=objects, categories=names)
    return coco_ap(found, truth, list(range(len(names))))['AP']

def cost_of_rounding(n=100):
    "AP with the weights as floats, and as the files have them"
    from deqdet.parts import round_weights
    model = detector()
    floats = ap(model, n)
    return dict(floats=floats, rounded=ap(round_weights(model), n))

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, nargs='?', help='where to write, such as nbs/playground')
    parser.add_argument('--ap', action='store_true', help='measure AP with and without rounded weights instead')
    args = parser.parse_args()
    if bool(args.folder)==args.ap: parser.error('a folder, or --ap')
    if args.ap:
        print(json.dumps(cost_of_rounding()))
        return
    try: size = write_all(args.folder)
    except Missing as e:
        print(e, file=sys.stderr)
        sys.exit(2)
    print(f'{args.folder}: the detector has {size/1e6:.1f} MB')

if __name__=='__main__': main()
