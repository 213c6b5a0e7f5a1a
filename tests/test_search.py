"A search of the site for a name lists its entry first"
import math, re, sys
from pathlib import Path
import pytest
from docs_check import Site, Text, joined

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = dict(title=.4, section=.4, text=.2) # quarto-search.js has 20, 20, 10

def sections(page):
    "(title, section, text) as Quarto's index has them: one for the page, one for each heading of the second level"
    title,section,texts,res = '','',[],[]
    def close(): res.append(dict(title=title, section=section, text=' '.join(texts)))
    for cell in page.nb.cells:
        name = re.match(r'(?:#\|.*\n)*show_doc\(\s*([\w.]+)', cell.source) if cell.cell_type=='code' else None
        if name:
            close()
            section,texts = name[1],[]
        if cell.cell_type=='raw': title = re.search(r'^title: (.*)$', cell.source, re.M)[1] if 'title:' in cell.source else title
        parts = re.split(r'^## (.*)$', cell.source, flags=re.M) if cell.cell_type=='markdown' else [cell.source]
        texts.append(parts[0])
        for head,text in zip(parts[1::2], parts[2::2]):
            close()
            section,texts = re.sub(r'\s*\{.*?\}', '', head),[text]
    close()
    return res

def score(entry, query):
    "What fuse.js gives a field that holds the query, over all fields; lower is better, 1 is no match"
    res = 1.
    for key,weight in WEIGHTS.items():
        field = entry[key].lower()
        if query.lower() in field: res *= sys.float_info.epsilon**(weight/math.sqrt(len(field.split())))
    return res

@pytest.fixture(scope='module')
def index(): return [s for p in Site(ROOT).pages.values() if not p.path.endswith('.qmd') for s in sections(p)]

@pytest.mark.parametrize('name', ['create_detector','det_learner','coco_ap','load_detector','export_parts','Equilibrium','solve'])
def test_the_entry_comes_first(index, name):
    best = min(index, key=lambda entry: score(entry, name))
    assert best['section']==name, best['section']

def test_entries_are_headings_that_search_knows():
    from deqdet.docs import Shown
    from deqdet.zoo import create_detector
    assert '\n## create_detector {.api}\n' in Shown(create_detector)._repr_markdown_()
