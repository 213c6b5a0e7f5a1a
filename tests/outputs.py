"""Do the stored text outputs of a page equal those of a fresh run?

`DEQDET_OUTPUTS=1 make test` checks the pages that it runs; `python tests/outputs.py nbs/01_boxes.ipynb ...` runs some
and prints the cells that differ. Numbers may differ by `RELATIVE`, decimal ones by one in their last digit. A cell whose output may
differ by more says why: `#| varies: "trained for seconds"`."""
import json, math, re, sys, tempfile
from pathlib import Path
from typing import NamedTuple

RELATIVE,ABSOLUTE = .05,1e-6 # by how much a number may differ
re_number = re.compile(r'[-+−]?(?:\d+\.\d*|\.\d+|\d+)(?:e[-+]?\d+)?|\b(?:nan|inf)\b', re.I)
re_varies = re.compile(r'^#\|\s*varies:\s*(.*\S)', re.M)

class Difference(NamedTuple):
    "A cell whose stored output differs from the fresh one"
    cell: int   # its place in the notebook
    stored: str
    fresh: str
    def __str__(self): return f'cell {self.cell}\n- ' + '\n- '.join(self.stored.splitlines()) + '\n+ ' + '\n+ '.join(self.fresh.splitlines())

def joined(text): return ''.join(text) if isinstance(text, list) else text

def text_of(cell):
    "What a cell prints and returns, as text; figures are left out"
    printed = ''.join(joined(o['text']) for o in cell.get('outputs', []) if o.get('name')=='stdout')
    data = [o['data'] for o in cell.get('outputs', []) if 'data' in o]
    shown = [joined(d['text/plain']) for d in data if 'text/plain' in d and not any(k.startswith('image/') for k in d)]
    return '\n'.join([printed.strip(), *shown]).strip()

def number(text): return float(text.replace('−', '-'))

def digit(text):
    "The value of one in the last digit of a number; 0 for a whole number"
    if text.lstrip('+-−').isdigit(): return 0.
    mantissa,_,exponent = text.lower().partition('e')
    return 10.**(int(exponent or 0) - len(mantissa.partition('.')[2]))

def near(a, b):
    "Are two numbers, as text, equal to the tolerance?"
    x,y = number(a),number(b)
    if not (math.isfinite(x) and math.isfinite(y)): return x==y or (math.isnan(x) and math.isnan(y))
    return abs(x - y) <= max(RELATIVE*max(abs(x), abs(y)), 1.01*max(digit(a), digit(b)), ABSOLUTE)

def same(stored, fresh):
    "Equal texts, but for spaces and numbers to the tolerance"
    words = [''.join(re_number.sub('0', t).split()) for t in (stored, fresh)]
    if words[0] != words[1]: return False
    return all(near(a, b) for a,b in zip(re_number.findall(stored), re_number.findall(fresh)))

def differences(stored, fresh):
    "The cells of two notebooks, as parsed, whose text outputs differ; those that may are left out"
    new = {c['id']: c for c in fresh['cells'] if c['cell_type']=='code'}
    found = []
    for i,c in enumerate(stored['cells']):
        if c['cell_type']!='code' or c['id'] not in new or re_varies.search(joined(c['source'])): continue
        texts = text_of(c), text_of(new[c['id']])
        if not same(*texts): found.append(Difference(i, *texts))
    return found

def main(paths):
    "Run pages, print what differs; how many pages do"
    import run
    bad = 0
    for path in map(Path, paths):
        with tempfile.TemporaryDirectory() as d:
            fresh = Path(d)/'fresh.ipynb'
            code,out,secs = run.run_notebook(run.ROOT, path.resolve(), fresh=fresh)
            found = [] if code else differences(json.loads(path.read_text()), json.loads(fresh.read_text()))
        print(f'{path}: ' + (out[-2000:] if code else f'{len(found)} cells differ ({secs:.0f} s)'), *found, sep='\n', flush=True)
        bad += bool(code or found)
    return bad

if __name__=='__main__': sys.exit(bool(main(sys.argv[1:])))
