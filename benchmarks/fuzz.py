"""Damaged and hostile files for the readers of data sets and detectors, by seeded random mutation

Each trial copies a valid set or detector, changes one file (bits, cuts, repeats, odd tokens; or one value in a JSON or
YAML), and reads it. Allowed is success, or an error of one line that names the file or its folder.

    python benchmarks/fuzz.py --minutes 10 --out fuzz.json"""
import argparse, contextlib, copy, io, json, os, random, resource, shutil, signal, sys, tempfile, time, traceback, warnings
from collections import Counter
from pathlib import Path
import torch, yaml
from deqdet.convert import load_official, to_official
from deqdet.data import DataError, det_dls, synth_coco, verify_data
from deqdet.families.adamixer import AdaMixer
from deqdet.ops.errors import CommandError
from deqdet.predict import save_detector
from deqdet.sets.check import clean
from deqdet.sets.formats import read_coco
from deqdet.using.hub import Detector
from safetensors.torch import save_file

# ---- valid files

SMALL = AdaMixer(n_classes=2, body='', channels=(8,8,8,8), frozen_stages=-1, feat_width=32, norm_groups=8, n_queries=4,
                 width=32, heads=4, groups=2, points=(4,), out_points=8, hidden=32)
KINDS = 'coco', 'voc', 'yolo', 'table', 'pretrained', 'official'


def coco(folder):
    synth_coco(folder, n_train=3, n_valid=2, size=32, seed=0)

def voc(folder):
    "The same set as VOC has it"
    coco(folder)
    (folder/'Annotations').mkdir()
    (folder/'ImageSets'/'Main').mkdir(parents=True)
    for split in 'train','valid':
        src = read_coco(folder, split)
        names = {o['id']: o['name'] for o in src.coco['categories']}
        (folder/'ImageSets'/'Main'/f'{split}.txt').write_text('\n'.join(Path(o['file_name']).stem for o in src.coco['images']))
        for o in src.coco['images']:
            objects = [voc_object(a, names) for a in src.coco['annotations'] if a['image_id']==o['id']]
            size = f"<size><width>{o['width']}</width><height>{o['height']}</height><depth>3</depth></size>"
            text = f"<annotation><filename>{o['file_name']}</filename>{size}{''.join(objects)}</annotation>"
            (folder/'Annotations'/f"{Path(o['file_name']).stem}.xml").write_text(text)
    shutil.rmtree(folder/'annotations')

def voc_object(a, names):
    x,y,w,h = a['bbox']
    sides = dict(xmin=x, ymin=y, xmax=x+w, ymax=y+h)
    box = ''.join(f'<{k}>{v}</{k}>' for k,v in sides.items())
    return f"<object><name>{names[a['category_id']]}</name><difficult>0</difficult><bndbox>{box}</bndbox></object>"

def yolo(folder):
    "The same set as YOLO has it"
    coco(folder)
    lists = {}
    (folder/'labels').mkdir()
    for split in 'train','valid':
        src = read_coco(folder, split)
        for o in src.coco['images']:
            lines = [yolo_line(a, o) for a in src.coco['annotations'] if a['image_id']==o['id']]
            (folder/'labels'/f"{Path(o['file_name']).stem}.txt").write_text('\n'.join(lines))
        (folder/f'{split}.txt').write_text('\n'.join(f"images/{o['file_name']}" for o in src.coco['images']))
        lists[split] = f'{split}.txt'
    names = [o['name'] for o in src.coco['categories']]
    (folder/'data.yaml').write_text(yaml.safe_dump(dict(path='.', **lists, names=names)))
    shutil.rmtree(folder/'annotations')

def yolo_line(a, o):
    x,y,w,h = a['bbox']
    W,H = o['width'],o['height']
    return f"{a['category_id']-1} {(x+w/2)/W} {(y+h/2)/H} {w/W} {h/H}"

def table(folder):
    "The same set as tables with a row for each object"
    coco(folder)
    for split in 'train','valid':
        src = read_coco(folder, split)
        files = {o['id']: o['file_name'] for o in src.coco['images']}
        names = {o['id']: o['name'] for o in src.coco['categories']}
        lines = ['filename,class,xmin,ymin,xmax,ymax']
        for a in src.coco['annotations']:
            x,y,w,h = a['bbox']
            lines.append(f"{files[a['image_id']]},{names[a['category_id']]},{x},{y},{x+w},{y+h}")
        (folder/f'{split}.csv').write_text('\n'.join(lines))
    shutil.rmtree(folder/'annotations')

def pretrained(folder):
    torch.manual_seed(0)
    save_detector(SMALL.build(vocab=['a','b']), folder)

def official(folder):
    folder.mkdir()
    torch.manual_seed(0)
    sd = {k: v.contiguous() for k,v in to_official(SMALL.build()).items()}
    torch.save(dict(state_dict=sd, meta=dict(epoch=1)), folder/'a.pth')
    torch.save(dict(state_dict=sd), folder/'b.pth', _use_new_zipfile_serialization=False)
    save_file(sd, folder/'c.safetensors')


# ---- reading

def read_set(folder, file):
    "Check it, load it, and use all batches"
    verify_data(folder, workers=1)
    dls = det_dls(folder, bs=2, num_workers=0, device='cpu')
    for dl in dls: list(dl)

def read_pretrained(folder, file): Detector.from_pretrained(folder)
def read_official(folder, file): load_official(file)

MAKE = dict(coco=coco, voc=voc, yolo=yolo, table=table, pretrained=pretrained, official=official)
READ = dict(coco=read_set, voc=read_set, yolo=read_set, table=read_set, pretrained=read_pretrained, official=read_official)


# ---- mutation

TOKENS = [b'', b'"', b'[', b']', b'{', b'}', b',', b':', b'null', b'true', b'-1', b'0', b'1e999', b'-1e-999', b'NaN', b'Infinity',
          b'99999999999999999999', b'\x00', b'\xff\xfe', b'\xed\xa0\x80', b'<', b'>', b'</', b'<!DOCTYPE a [<!ENTITY b "c">]>', b'&b;',
          b'&a', b'*a', b'!!python/object/apply:os.system ["true"]', b'../', b'/', b'\n', b' ', b'- ', b'[' * 5000, b'{"a":' * 5000]
VALUES = [None, True, False, -1, 0, 1, .5, -.0, 1e308, -1e308, float('nan'), float('inf'), 10**30, 2**53, '', ' ', 'x', '1', '../x', '\0',
          'a\nb', 'x'*5000, [], [[]], {}, [None], {'a': 1}, [1,2,3], [1,2,3,4], ['x']*4]

def of_bytes(data, rng):
    "Some bytes changed, cut, repeated or replaced"
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        i = rng.randrange(len(data)+1)
        j = min(len(data), i + rng.choice((1, 2, 8, 64, 1024)))
        how = rng.randrange(6)
        if how==0: data = data[:i]
        elif how==1: del data[i:j]
        elif how==2: data[i:i] = data[i:j]
        elif how==3: data[i:j] = rng.choice(TOKENS)
        elif how==4: data[i:i] = rng.choice(TOKENS)
        elif i < len(data): data[i] ^= 1 << rng.randrange(8)
    return bytes(data)

def places(x, at=()):
    "Ways to all values of nested lists and dicts"
    yield at
    items = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ()
    for k,v in items: yield from places(v, (*at, k))

def of_values(x, rng):
    "One value or field changed, or left out"
    root = x = copy.deepcopy(x)
    *way,last = rng.choice(list(places(x))[1:])
    for k in way: x = x[k]
    if rng.random() < .2: del x[last]
    elif isinstance(x, dict) and rng.random() < .1: x[rng.choice(['', 'id', 'is', 'x'])] = x.pop(last)
    else: x[last] = copy.deepcopy(rng.choice(VALUES))
    return root


FORMS = {'.json': (json.loads, json.dumps), '.yaml': (yaml.safe_load, yaml.safe_dump)}

def mutate(file, rng):
    "Change a file; a JSON or YAML by value in half of the trials"
    data = file.read_bytes()
    if file.suffix in FORMS and rng.random() < .5:
        read,write = FORMS[file.suffix]
        whole = {'': read(data)}
        file.write_text(write(of_values(whole, rng).get('')))
    else: file.write_bytes(of_bytes(data, rng))

def targets(folder, kind):
    "Files to change"
    files = sorted(p for p in folder.rglob('*') if p.is_file())
    return [p for p in files if p.parent.name!='images' or kind=='coco']


# ---- trials

class Slow(Exception): pass

def _slow(*_): raise Slow('more than 20 s of processor time')

def outcome(read, folder, file):
    "'read', 'refused', or an exception that is neither"
    signal.signal(signal.SIGPROF, _slow)
    signal.setitimer(signal.ITIMER_PROF, 20)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter('ignore')
            read(folder, file)
        return 'read'
    except (DataError, CommandError, OSError) as e: return 'refused' if is_clear(e, folder) else e
    except Exception as e: return e
    finally: signal.setitimer(signal.ITIMER_PROF, 0)

def is_clear(e, folder):
    "One line that names the file or its folder"
    text = str(e)
    return len(text.splitlines())==1 and str(folder) in text

def where(e):
    "Type and place of an exception, to count it once"
    frames = [o for o in traceback.extract_tb(e.__traceback__) if 'deqdet' in o.filename and 'benchmarks' not in o.filename]
    at = f'{Path(frames[-1].filename).name}:{frames[-1].name}' if frames else '?'
    return f"{type(e).__name__} in {at}: {' '.join(str(e).split())[:160]}"

def fuzz(kind, seconds=None, trials=None, seed=0, work=None):
    "Trials of one kind: counts of outcomes, and the first seed of each fault"
    work = Path(work or tempfile.mkdtemp(prefix='deqdet_fuzz_'))
    whole = work/'whole'
    MAKE[kind](whole)
    for file in targets(whole, kind): READ[kind](whole, file) # undamaged, each can be read
    counts = Counter()
    faults = {}
    begun = time.monotonic()
    n = 0
    while (n < trials) if trials else (time.monotonic()-begun < seconds):
        rng = random.Random(f'{kind} {seed+n}')
        folder = work/'changed'
        shutil.copytree(whole, folder)
        file = rng.choice(targets(folder, kind))
        mutate(file, rng)
        res = outcome(READ[kind], folder, file)
        counts[res if isinstance(res, str) else 'fault'] += 1
        if not isinstance(res, str): faults.setdefault(where(res), f'{seed+n} {file.name}')
        shutil.rmtree(folder)
        n += 1
    shutil.rmtree(work)
    return dict(trials=n, seconds=round(time.monotonic()-begun, 1), **counts), faults

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--minutes', type=float, default=10, help='for each kind')
    p.add_argument('--kinds', nargs='+', default=list(KINDS), choices=KINDS)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', help='write the result here as JSON')
    a = p.parse_args()
    torch.set_num_threads(1)
    used = int(Path('/proc/self/statm').read_text().split()[0])*os.sysconf('SC_PAGE_SIZE') if Path('/proc').is_dir() else 0
    if used: resource.setrlimit(resource.RLIMIT_AS, (used + (4<<30),)*2) # a huge allocation is an error, not the end of the machine
    result = {}
    for kind in a.kinds:
        counts,faults = fuzz(kind, 60*a.minutes, seed=a.seed)
        result[kind] = dict(**counts, faults=faults)
        print(kind, json.dumps(result[kind], indent=1), file=sys.stderr, flush=True)
    from common import report
    report(result, a.out)
    return int(any(o['faults'] for o in result.values()))

if __name__=='__main__': sys.exit(main())
