"The film of the home page is an SVG that a browser can play, and small"
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'benchmarks'))
import film

SVG = '{http://www.w3.org/2000/svg}'
T = len(film.STEPS)

def moving(root): return list(root.iter(f'{SVG}animate'))

def small():
    "A film of two grey scenes: one query that is found, two that are not"
    boxes = np.random.default_rng(0).uniform(.1, .4, (T,2,3,4))
    boxes[..., 2:] += .4
    scores = np.zeros((T,2,3))
    scores[-1, :, 0] = .9
    return ET.fromstring(film.film([np.full((64,64,3), 128, np.uint8)]*2, boxes, scores, np.zeros((2,3), int)))

def test_film_has_the_found_last_and_coloured():
    scene = small().find(f'{SVG}svg')
    strokes = [r.get('stroke') for r in scene.iter(f'{SVG}rect')]
    assert strokes==['white','white','white',film.COLOURS[0]] # two that are lost, the rim of the found one, itself

def test_every_motion_has_a_value_for_each_time():
    for a in moving(small()):
        times = [float(t) for t in a.get('keyTimes').split(';')]
        assert len(times)==len(a.get('values').split(';'))==2*T + 1
        assert times[0]==0 and times[-1]==1 and all(np.diff(times) > 0)

def test_a_reader_without_motion_sees_the_end():
    first = next(r for r in small().iter(f'{SVG}rect') if r.get('stroke')==film.COLOURS[0])
    x = next(a for a in first if a.get('attributeName')=='x').get('values').split(';')
    assert abs(float(first.get('x')) - float(x[-2])) < .1

@pytest.mark.skipif(not (ROOT/'nbs/images/settling.svg').exists(), reason='python benchmarks/film.py nbs/images/settling.svg makes it')
def test_the_film_of_the_home_page():
    file = ROOT/'nbs/images/settling.svg'
    root = ET.parse(file).getroot()
    assert file.stat().st_size < 1.5e6 and int(root.get('width')) >= 1200
    assert len(root.findall(f'{SVG}svg'))==3 and len(moving(root)) > 100
