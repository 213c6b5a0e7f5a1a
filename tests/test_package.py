"The package installs with everything it declares, and its modules stand in the order of their notebooks"
import ast, re, subprocess, sys, tarfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path
import pytest, tomllib
from run import copy_tree

ROOT = Path(__file__).resolve().parents[1]
ini = ConfigParser(delimiters=['='])
ini.read(ROOT/'settings.ini')
cfg = ini['DEFAULT']

def backend(src, do, dest):
    "What the build backend makes of the project in `src`: the path in `dest`, and its complaints"
    cmd = f"from setuptools.build_meta import *; print({do}({str(dest)!r}))"
    res = subprocess.run([sys.executable, '-c', cmd], cwd=src, capture_output=True, text=True)
    assert res.returncode==0, res.stderr
    return dest/res.stdout.split()[-1], res.stderr

@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "Metadata and entry points as the build backend makes them"
    d = tmp_path_factory.mktemp('build')
    copy_tree(ROOT, d/'src')
    info,err = backend(d/'src', 'prepare_metadata_for_build_wheel', d)
    entry = ConfigParser(delimiters=['='])
    entry.optionxform = str
    entry.read(info/'entry_points.txt')
    return Parser().parsestr((info/'METADATA').read_text()), entry, err

FIELDS = { # what pyproject.toml calls it -> what the metadata calls it
    'keywords': 'Keywords', 'description': 'Summary', 'version': 'Version', 'license': 'License-Expression',
    'dependencies': 'Requires-Dist', 'optional-dependencies': 'Provides-Extra', 'readme': 'Description-Content-Type',
    'authors': 'Author-email', 'classifiers': 'Classifier', 'urls': 'Project-URL'}

def test_every_dynamic_field_is_supplied(built):
    meta,entry,err = built
    dynamic = set(tomllib.loads((ROOT/'pyproject.toml').read_text())['project']['dynamic'])
    assert dynamic==FIELDS.keys() | {'entry-points','scripts'}
    assert not [k for k,v in FIELDS.items() if not meta[v]]
    assert entry['nbdev']['deqdet']=='deqdet._modidx:d'
    assert 'defined outside of' not in err, err # what setuptools says of a field that is not called dynamic

def test_long_description_works_anywhere(built):
    "An index shows README.md, and has neither our notebooks nor our pictures"
    links = re.findall(r'\]\(([^)\s]+)', built[0].get_payload())
    assert links and not [u for u in links if not re.match('https://|#', u)]
    assert [u.split('/')[5] for u in links if u.endswith(('.jpg','.gif'))]==['raw','raw']

def test_source_archive_builds(built, tmp_path):
    "The archive that goes to an index holds what its own setup.py reads"
    copy_tree(ROOT, tmp_path/'src')
    sdist,_ = backend(tmp_path/'src', 'build_sdist', tmp_path)
    with tarfile.open(sdist) as f: f.extractall(tmp_path/'out', filter='data')
    root, = (tmp_path/'out').iterdir()
    info,_ = backend(root, 'prepare_metadata_for_build_wheel', tmp_path)
    assert Parser().parsestr((info/'METADATA').read_text()).items()==built[0].items()
    assert {p.name for p in root.glob('deqdet/*.py')}=={p.name for p in (ROOT/'deqdet').glob('*.py')}

def test_scripts_exist(built):
    "Every console script names a function that there is"
    _,entry,_ = built
    for name,target in (entry['console_scripts'] if 'console_scripts' in entry else {}).items():
        mod,func = target.split(':')
        tree = ast.parse((ROOT/(mod.replace('.', '/') + '.py')).read_text())
        assert func in {getattr(t, 'name', None) for t in tree.body}, f'{name} = {target}'

def test_caps(built):
    "nbdev 2.4 with the libraries it works with, in the package and in its dev extra"
    reqs = [r.replace(' ', '') for r in built[0].get_all('Requires-Dist')]
    assert 'fastcore<2' in reqs
    for r in 'nbdev<3,>=2.4.14', 'execnb<0.2', 'ghapi<2': assert any(o.startswith(r + ';extra==') for o in reqs), r
    assert built[0]['Requires-Python']==f">={cfg['min_python']}"

def test_caps_stand_in_one_place():
    for f in 'constraints.txt','Makefile','setup.py','pyproject.toml':
        assert not re.search(r'(fastcore|execnb|ghapi|nbdev)\s*[<>=]', (ROOT/f).read_text()), f

def order():
    "Module name -> number of its notebook and the package's modules it imports"
    res = {}
    for p in sorted((ROOT/'deqdet').glob('[!_]*.py')):
        src = p.read_text()
        nb = re.search(r'File to edit: \S*/(\d+[a-z]?)_', src)
        froms = [t for t in ast.walk(ast.parse(src)) if isinstance(t, ast.ImportFrom)]
        names = [('deqdet.' if t.level else '') + (t.module or '') for t in froms]
        used = {n.split('.')[1] for n in names if n.startswith('deqdet.')} - {''}
        res[p.stem] = (nb.group(1) if nb else None, used)
    return res

def test_modules_import_only_earlier_ones():
    mods = order()
    for name,(number,used) in mods.items():
        assert number is not None, f'{name} comes from no numbered notebook'
        late = [u for u in used if u not in mods or mods[u][0] >= number]
        assert not late, f'{number}_{name} imports {late}'

def test_models_need_no_fastai():
    "What a detector is made of starts quickly: fastai comes with data and learner only"
    names = 'boxes','backbone','mixing','decoder','solver','equilibrium','loss','model'
    parts = [m for m in names if (ROOT/f'deqdet/{m}.py').exists()]
    code = f"import sys, {', '.join(f'deqdet.{m}' for m in parts)}; sys.exit('fastai' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode==0
