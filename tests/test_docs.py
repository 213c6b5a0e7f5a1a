"The input of the documentation is sound, and every kind of fault is caught where there is one"
import os, re, sys, warnings
from configparser import ConfigParser
from functools import cache
from pathlib import Path
import pytest
from fastcore.nbio import mk_cell, new_nb, read_nb, write_nb
import docs_check, render
from deqdet.pages import _defined, public_names
from forks import forked
from docs_check import KINDS, Site, Text, faults, slug
from readme import as_md, readme
from run import copy_tree

ROOT = Path(__file__).resolve().parents[1]

# ---- this project

@pytest.fixture(scope='module')
def site(): return Site(ROOT)

@pytest.mark.parametrize('check', docs_check.CHECKS, ids=lambda o: o.__name__)
def test_site(site, check):
    found = list(check(site))
    assert not found, '\n'.join(map(str, found))

def test_readme_is_index():
    assert (ROOT/'README.md').read_text(encoding='utf-8')==readme(ROOT/'nbs/index.ipynb'), 'run `make readme`'

def test_index_maps_every_notebook(site):
    numbered = {p for p in site.pages if re.match(r'\d\d_', Path(p).name)}
    assert numbered <= {h for _,t in site.pages['index.ipynb'].texts for h in t.links}

def test_quarto_yml_is_linked():
    link = ROOT/'nbs/_quarto.yml'
    assert link.is_symlink() and os.readlink(link)=='../_quarto.yml'

def test_quarto_yml_repeats_settings(site):
    from nbdev.config import get_config
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini')
    about,cfg,web = ini['DEFAULT'],get_config(),site.yml['website']
    assert (web['title'], web['description'])==(about['lib_name'], about['description'])
    assert (web['repo-url'], web['site-url'], web['repo-branch'])==(cfg.git_url, cfg.doc_url, cfg.branch)
    assert site.yml['project']['output-dir']==cfg.doc_path.name

def process(folder):
    "Run all of nbdev's processors, execution included, as nbdev-docs runs them before it calls Quarto"
    from nbdev import config
    from nbdev.serve import proc_nbs
    warnings.simplefilter('ignore')
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    config._load_toml = cache(config._load_toml) # it is read twice for each cell
    proc_nbs(n_workers=0)

@pytest.fixture(scope='module')
def processed(tmp_path_factory):
    "Folder of the notebooks after all processors"
    folder = tmp_path_factory.mktemp('project')
    copy_tree(ROOT, folder)
    code,out = forked(lambda: process(folder), timeout=900)
    assert code==0, out[-3000:]
    return folder/'_proc'

def test_nbdev_renders_every_page(site, processed):
    re_record = re.compile(r'^@dataclass.*\nclass (\w+)|^class (\w+)\((?:NamedTuple|Record)\)', re.M)
    records = {a or b for f in (ROOT/'deqdet').rglob('*.py') for a,b in re_record.findall(f.read_text())}
    classes = set(re.findall(r'^class (\w+)', '\n'.join(f.read_text() for f in (ROOT/'deqdet').rglob('*.py')), re.M))
    assert {'State','Target','Pred','Source'} <= records
    for p in site.pages.values():
        if p.path.endswith('.qmd'): continue
        for c in read_nb(processed/p.path).cells:
            assert c.cell_type!='markdown' or '[[`' not in c.source, f'{p.path}: a link inside a link: {c.source[:300]}'
            mimes = [o.get('data', {}).keys() for o in c.get('outputs', [])]
            assert all('text/html' in m for m in mimes if 'image/gif' in m), f'{p.path}: a film that Quarto does not show'
            for nm in re.findall(r'^show_doc\(\s*([\w.]+)', c.source, re.M):
                shown = ''.join(docs_check.joined(o['data'].get('text/markdown', '')) for o in c.outputs)
                heads = [slug(h) for h in Text(shown).headings]
                assert slug(nm) in heads, f'{p.path}: {nm} is shown under the heading {heads}, which links miss'
                code = re.search(r'```python\n(.*?)\n```', shown, re.S)[1]
                assert '](http' not in code, f'{p.path}: {nm} has links inside code'
                assert ':NoneType' not in code, f'{p.path}: {nm} shows the type of None'
                assert nm not in classes or code.startswith('class '), f'{p.path}: the class {nm} is shown as a function'
                assert nm not in records or code.startswith(f'class {nm}'), f'{p.path}: {nm} hides its fields'
    assert (processed/'_quarto.yml').read_text()==(ROOT/'_quarto.yml').read_text()

def test_source_is_on_the_page(site, processed):
    "Every line that a page exports stands on it, private helpers included, and after the entries of its names"
    for p in site.pages.values():
        if p.path.endswith('.qmd'): continue
        cells = read_nb(processed/p.path).cells
        texts = [c.source for c in cells if c.cell_type=='markdown']
        for c in p.raw.cells:
            if not c.directives_.keys() & {'export','exporti'} or 'hide' in c.directives_: continue
            source = f'```python\n{c.source.strip()}\n```'
            assert any('<details' in t and source in t for t in texts), f'{p.path} lacks the source {c.source[:80]!r}'

def test_entries_follow_the_source(site, processed):
    "What one cell exports is shown in its order"
    for p in site.pages.values():
        if p.path.endswith('.qmd'): continue
        cells = read_nb(processed/p.path).cells
        names = [re.match(r'(?:#\|.*\n)*show_doc\(\s*([\w.]+)', c.source) if c.cell_type=='code' else None for c in cells]
        entries = [m[1] for m in names if m]
        exported = [n for c in p.raw.cells if c.directives_.keys() & {'export','exports'} for tree in c.parsed_() or [] for n in _defined(tree)]
        assert entries==[n for n in exported if n in entries], f'{p.path}: {entries}'

def test_api_index_leads_to_entries(site):
    scope = {}
    exec((ROOT/'deqdet/_modidx.py').read_text(encoding='utf-8'), scope)
    names = public_names(scope['d'])
    assert {'create_detector','det_learner','predict'} <= {name for name,*_ in names}
    lost = [(name, place) for name,place,*_ in names if docs_check.check_link(site, site.pages['api.ipynb'], place)]
    assert not lost, lost

def test_tables_are_formatted(processed):
    "No table of the site shows NaN, or a count with a decimal point"
    for f in processed.rglob('*.ipynb'):
        for c in read_nb(f).cells:
            for o in c.get('outputs', []):
                html = docs_check.joined(o.get('data', {}).get('text/html', ''))
                if '<table' in html: assert not re.search(r'<td[^>]*>(NaN|\d{5,}\.0)</td>', html), f'{f.name}: {html[:400]}'

needs_pandoc = pytest.mark.skipif(not render.pandoc(), reason='pandoc is not here (pip install pypandoc_binary)')
needs_browser = pytest.mark.skipif(not render.chromium(), reason='Chromium is not here (apt install chromium)')

@pytest.fixture(scope='module')
def html(processed):
    "path -> the page as HTML"
    css = (ROOT/'nbs/styles.css').read_text(encoding='utf-8')
    files = sorted(processed.rglob('*.ipynb'))
    return render.all_as_html({f.relative_to(processed).as_posix(): read_nb(f) for f in files}, css)

@needs_pandoc
def test_options_keep_their_hyphens(site, html):
    assert site.yml['format']['html']['from']=='markdown-smart' # what render.py says to pandoc
    for path,page in html.items():
        text = re.sub(r'<(pre|code|script|style)\b.*?</\1>', '', page, flags=re.S)
        assert not re.search(r'(?<![\w\d])[–—](?=[a-z][\w-]+)', text), f'{path}: a dash where an option had two hyphens'

@needs_pandoc
def test_every_image_has_words(html):
    "Figures, films and drawings, on every page"
    for path,page in html.items():
        wordless = [t[:80] for t in re.findall(r'<img [^>]*>', page) if not re.search(r'\balt="[^"]', t)]
        assert not wordless, f'{path}: {wordless}'

@needs_pandoc
def test_formulas_are_mathml(html):
    for path,page in html.items(): assert 'class="math' not in page, f'{path}: pandoc cannot say a formula in MathML'

@pytest.fixture(scope='module')
def measured(html, tmp_path_factory):
    "path -> what Chromium says of the page"
    found = render.measured(html, tmp_path_factory.mktemp('measured'))
    assert found.keys()==html.keys()
    return found

@needs_pandoc
@needs_browser
def test_no_page_scrolls_sideways(measured):
    wide = {path: m for path,m in measured.items() if m.excess > 0}
    assert not wide, '\n'.join(f'{path}: {m.excess} px too wide: {m.wide}' for path,m in wide.items())

SCREENS = 15 # a page is no higher

@needs_pandoc
@needs_browser
def test_no_page_is_long(measured):
    "A longer page holds a second idea, which has a page of its own; the index of names is looked through"
    limits = dict.fromkeys(measured, SCREENS) | {'api.ipynb': 1000}
    long = {path: m.screens for path,m in measured.items() if m.screens > limits[path]}
    assert not long, '\n'.join(f'{path}: {n:.1f} screens, of {limits[path]}' for path,n in long.items())

@needs_pandoc
@needs_browser
def test_a_wide_page_is_seen(tmp_path):
    "The measure works: a line that cannot break is wider than a phone, and not in a box that scrolls"
    line = 'x'*200
    css = (ROOT/'nbs/styles.css').read_text(encoding='utf-8')
    pages = {'bad': render.as_html(new_nb([md(f'<div>{line}</div>')]), css),
             'code': render.as_html(new_nb([md(f'```python\n{line}\n```')]), css),
             'long': render.as_html(new_nb([md('word\n\n'*40)]), css),
             'formula': render.as_html(new_nb([md('$$' + '+'.join(f'a_{{{i}}}' for i in range(60)) + '$$')]), css)}
    found = render.measured(pages, tmp_path/'wide')
    assert found['bad'].excess > 100 and found['code'].excess==0 and found['formula'].excess==0, found
    assert found['bad'].screens < 1 < found['long'].screens < 3, found

def test_backticks_become_links():
    "The package's entry point is installed, so that nbdev knows where its symbols are documented"
    from nbdev.doclinks import NbdevLookup
    assert 'boxes.html#xyzr_to_xyxy' in NbdevLookup().linkify('see `xyzr_to_xyxy`')

@pytest.mark.parametrize('name', ['README.md','CONTRIBUTING.md','CHANGELOG.md'])
def test_links_of_the_other_texts(name):
    text = Text((ROOT/name).read_text(encoding='utf-8'))
    links = [u.split('#')[0] for u in text.links + text.images if not re.match('[a-z]+:|#', u)]
    ours = [u.split('/blob/main/')[1] for u in text.links if u.startswith('https://github.com/deqdet/deqdet/blob/main/')]
    assert not [u for u in links + ours if not (ROOT/u).exists()]

def test_recipe_of_a_solver():
    "The method that CONTRIBUTING writes down is one"
    import deqdet.solver, torch
    from dataclasses import dataclass
    source, = re.findall(r'```python\n(.*?)```', (ROOT/'CONTRIBUTING.md').read_text(encoding='utf-8'), re.S)
    scope = vars(deqdet.solver) | dict(dataclass=dataclass)
    exec(source, scope)
    solve = lambda method: deqdet.solver.solve(lambda z: .8*z + 1, torch.zeros(3, 4), method=method, tol=1e-6, max_iter=100)
    mine,plain = solve(scope['HeavyBall']()), solve(deqdet.solver.Picard())
    assert torch.allclose(mine.z, torch.full((3, 4), 5.), atol=1e-4) and (mine.n < plain.n).all()

# ---- a small site, sound and broken

MODIDX = """# Auto
d = {'syms': {'deqdet.shapes': { 'deqdet.shapes.Disc': ('shapes.html#disc', 'deqdet/shapes.py'),
                                'deqdet.shapes.round_off': ('shapes.html#round_off', 'deqdet/shapes.py')}},
     'settings': {'branch': 'main', 'doc_baseurl': '/deqdet', 'doc_host': 'https://deqdet.github.io',
                  'git_url': 'https://github.com/deqdet/deqdet', 'lib_path': 'deqdet'}}
"""
MODULE = """__all__ = ['SIDES', 'Disc', 'round_off']
SIDES = 4
class Disc:
    radius: float
def round_off(x): return x
"""
YML = """website:
  sidebar:
    contents:
      - index.ipynb
      - section: More
        contents: [00_shapes.ipynb]
"""

GROW = "'deqdet.shapes.Disc.grow': ('shapes.html#disc.grow', 'deqdet/shapes.py'), " # a method that no page shows

def listed(page): return YML.replace('- index', f'- {page}.ipynb\n      - index')
def md(s): return mk_cell(s, 'markdown')
def code(s, text=None, **out):
    "A code cell, with the text it printed or another output"
    cell = mk_cell(s)
    if text: out = dict(output_type='stream', name='stdout', text=[text])
    if out: cell.outputs = [out]
    return cell

@pytest.fixture
def small(tmp_path):
    "Two pages without fault; `small(name=[cells])` adds cells to a page, or a page, and lists the faults"
    pages = {
        'index.ipynb': [md('# Small\n\n> A site'),
                        md('[Shapes](00_shapes.ipynb#why-discs), [again](shapes.html), [below](#more)'),
                        md('![a disc](images/disc.png) <a href="https://example.com/no">out</a>'), md('## More')],
        '00_shapes.ipynb': [md('# Shapes\n\n> round'), code('#| default_exp shapes'), code('#| export\n' + MODULE),
            md('## Why *discs*?'),
            md('`round_off` a `Disc`, `Disc.radius`, `deqdet.shapes.SIDES`, `print()`, `x.y()`, `backward()`'),
            md('```\n[code](nowhere.ipynb) `deqdet.nothing`\n```\n`[a](b.ipynb)`'), code('round_off(1)', '1')]}
    (tmp_path/'deqdet').mkdir()
    (tmp_path/'nbs/images').mkdir(parents=True)
    (tmp_path/'nbs/images/disc.png').touch()
    def check(modidx=MODIDX, module=MODULE, yml=YML, **more):
        files = {'deqdet/_modidx.py': modidx, 'deqdet/shapes.py': module, '_quarto.yml': yml}
        for name,text in files.items(): (tmp_path/name).write_text(text)
        for name in pages.keys() | {f'{k}.ipynb' for k in more}:
            write_nb(new_nb(pages.get(name, []) + more.get(Path(name).stem, [])), tmp_path/'nbs'/name)
        return faults(Site(tmp_path))
    check.root = tmp_path
    return check

def test_sound_site(small): assert small()==[]

NOT_ALONE = "import os\nprint(os.name)"
ERROR = dict(output_type='error', ename='ValueError', evalue='no', traceback=['no'])
BROKEN = [ # kind, what is said of it, the site
    ('sidebar entry without a page', '03_gone.ipynb', dict(yml=listed('03_gone'))),
    ('sidebar entry without a page', 'stands there 2 times', dict(yml=listed('index'))),
    ('page without a sidebar entry', '_quarto.yml lacks it', {'07_new': [md('# New')]}),
    ('dead link', '05_gone.ipynb', dict(index=[md('[x](05_gone.ipynb)')])),
    ('dead link', 'gone.html', dict(index=[md('see <a href="gone.html">x</a>')])),
    ('dead link', '../README.md', dict(index=[md('[x](../README.md)')])),
    ('dead link', 'blob/main/gone.md', dict(index=[md('[x](https://github.com/deqdet/deqdet/blob/main/gone.md)')])),
    ('dead anchor', '#below-that', dict(index=[md('[x](#below-that)')])),
    ('dead anchor', '00_shapes.ipynb#why-squares', dict(index=[md('[x](00_shapes.ipynb#why-squares)')])),
    ('dead anchor', 'shapes.html#disc.grow', dict(modidx=MODIDX.replace("{ '", '{ ' + GROW + "'", 1),
                                                   index=[md('see `Disc.grow`')])),
    ('missing image', 'images/gone.png', dict(index=[md('![x](images/gone.png)')])),
    ('missing image', 'gone.svg', dict(index=[md('<img src="gone.svg" alt="x" width=9>')])),
    ('missing image', 'attachment:gone.png', dict(index=[md('![x](attachment:gone.png)')])),
    ('no stored output', 'shows nothing', {'07_quiet': [md('# Quiet'), code('#| export\nx = 1')]}),
    ('stored error', 'ValueError: no', dict(index=[code('int("x")', **ERROR)])),
    ('unknown symbol', '`deqdet.shapes.nothing`', dict(index=[md('`deqdet.shapes.nothing`')])),
    ('unknown symbol', '`deqdet.squares`', dict(index=[md('`deqdet.squares`')])),
    ('unknown symbol', '`round_of`: did you mean round_off?', dict(index=[md('`round_of`')])),
    ('unknown symbol', '`sharpen()`', dict(index=[md('`sharpen()`')])),
    ('unknown symbol', '`Disc.perimeter`', dict(index=[md('`Disc.perimeter`')])),
    ('unknown symbol', 'exports grow', dict(module=MODULE.replace("'SIDES'", "'grow'") + 'def grow(x): return x\n')),
    ('import beside other code', 'print(os.name)', dict(index=[code(NOT_ALONE)])),
    ('path of a machine', '/home/me/x.py', dict(index=[code('f()', 'File /home/me/x.py, line 1')])),
    ('long output', '20 lines, the first: 0', dict(index=[code('f()', '\n'.join(map(str, range(20))))])),
    ('long text', '61 words', dict(index=[md('word '*61)])),
    ('heavy notebook', 'KB, of 400', dict(index=[code('1', 'word '*90_000)])),
    ('image without words', 'images/disc.png', dict(index=[md('![](images/disc.png)')])),
    ('image without words', '<img src=', dict(index=[md('<img src="images/disc.png">')])),
    ('missing file of the site', 'gone.css', dict(yml=YML + 'format: {html: {css: gone.css, html-math-method: mathml}}')),
    ('missing file of the site', 'gone.scss', dict(yml=YML + 'format: {html: {theme: {dark: [cosmo, gone.scss]}, html-math-method: mathml}}')),
    ('missing file of the site', 'gone.svg', dict(yml=YML.replace('website:', 'website:\n  favicon: gone.svg'))),
    ('fetched from outside', 'https://cdn.example.com/a.js', dict(index=[md('<script src="https://cdn.example.com/a.js"></script>')])),
    ('fetched from outside', 'html-math-method', dict(yml=YML + 'format: {html: {toc: true}}')),
    ('lost text', 'An introduction', {'07_title': [md('# Title\n\n> and subtitle\n\nAn introduction.')]}),
]

@pytest.mark.parametrize('kind,what,broken', BROKEN, ids=[f'{k}-{i}' for i,(k,*_) in enumerate(BROKEN)])
def test_fault_is_caught(small, kind, what, broken):
    new = [k for k in broken if re.match(r'\d', k) and 'page without' not in kind]
    yml = {'yml': listed(new[0])} if new else {}
    found = small(**broken, **yml)
    assert [f.kind for f in found]==[kind] and what in str(found[0]), found

def test_every_kind_is_shown(): assert {k for k,*_ in BROKEN}==set(KINDS)

# ---- its parts

@pytest.mark.parametrize('heading,anchor', [
    ('Why discs?', 'why-discs'), ('3 steps: a *map* of `f(x)`', 'steps-a-map-of-fx'),
    ('SetLoss.decodes', 'setloss.decodes'), ('xyzr_to_xyxy', 'xyzr_to_xyxy'), ('RAG — and RAP', 'rag-and-rap'),
    ('42', 'section')])
def test_slug(heading, anchor):
    "The identifiers that pandoc's manual says headings get"
    assert slug(Text(f'## {heading}').headings[0])==anchor

def test_explicit_and_repeated_anchors(small):
    ok = [md('# A'), md('## Twice\n\n## Twice\n\n## Named {#own}\n\n<a id="here"></a>'),
          md('[a](#twice) [b](#twice-1) [c](#own) [d](#here)')]
    assert small(**{'07_anchors': ok}, yml=listed('07_anchors'))==[]

def test_readme_of_cells():
    assert as_md(md('[a](00_boxes.ipynb) ![p](images/p.png) [out](https://x.org) [top](#top)')) == \
        '[a](nbs/00_boxes.ipynb) ![p](nbs/images/p.png) [out](https://x.org) [top](#top)'
    assert as_md(code('1+1', '2')) == '``` python\n1+1\n```\n\n    2'
    with pytest.raises(ValueError, match='nbs/images'):
        as_md(code('plot()', output_type='display_data', data={'image/png': 'x', 'text/plain': '<Figure>'}))
