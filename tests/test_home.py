"What the home page shows first, and that its figure is what was measured"
import json, sys
import xml.etree.ElementTree as ET
from pathlib import Path
from fastcore.nbio import read_nb

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'benchmarks'))
import bars

RESULTS = json.loads(bars.RESULTS.read_text(encoding='utf-8'))
SVG = '{http://www.w3.org/2000/svg}'

def test_the_figure_is_drawn_from_the_results():
    assert (ROOT/'nbs/images/own_data.svg').read_text(encoding='utf-8')==bars.figure(RESULTS), 'run python benchmarks/bars.py nbs/images/own_data.svg'

def test_bars_are_as_long_as_their_numbers():
    found = [float(r.get('width')) for r in ET.fromstring(bars.figure(RESULTS)).iter(f'{SVG}rect')]
    values = [value for _,_,value,_ in bars.rows(RESULTS)]
    scale = [w/v for w,v in zip(found, values)]
    assert len(found)==2*len(bars.SETS) and max(scale) - min(scale) < .5

def test_the_order_of_the_home_page():
    "A sentence, the film, the playground, a result, three ways on; then text"
    cells = [c.source for c in read_nb(ROOT/'nbs/index.ipynb').cells]
    marks = ['settling.svg', '(playground.qmd)', 'own_data.svg', '::: {.ways}', '## Install']
    at = [next(i for i,s in enumerate(cells) if mark in s) for mark in marks]
    assert at==sorted(at) and at[3] <= 5
    assert len(cells[1].split()) <= 45
