"The package builds and installs with everything it declares, each thing said once"
import ast, os, re, subprocess, sys, tarfile, tempfile, zipfile
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

def files_of_the_package():
    "Every file below deqdet/ that git tracks or would track"
    with tempfile.TemporaryDirectory() as d:
        copy_tree(ROOT, Path(d))
        return {p.relative_to(d).as_posix() for p in (Path(d)/'deqdet').rglob('*') if p.is_file()}

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
    'requires-python': 'Requires-Python', 'keywords': 'Keywords', 'description': 'Summary', 'version': 'Version',
    'license': 'License-Expression',
    'dependencies': 'Requires-Dist', 'optional-dependencies': 'Provides-Extra', 'readme': 'Description-Content-Type',
    'authors': 'Author-email', 'classifiers': 'Classifier'}

def test_every_dynamic_field_is_supplied(built):
    meta,entry,err = built
    dynamic = set(tomllib.loads((ROOT/'pyproject.toml').read_text())['project']['dynamic'])
    assert dynamic==FIELDS.keys() | {'entry-points','scripts'}
    assert not [k for k,v in FIELDS.items() if not meta[v]] and len(meta.get_all('Project-URL'))==2
    assert meta['Requires-Python']==f">={cfg['min_python']}"
    assert entry['nbdev']['deqdet']=='deqdet._modidx:d'
    assert 'defined outside of' not in err, err # what setuptools says of a field that is not called dynamic

def test_long_description_works_anywhere(built):
    "An index shows README.md, and has neither our notebooks nor our images"
    links = re.findall(r'\]\(([^)\s]+)', built[0].get_payload())
    assert links and not [u for u in links if not re.match('https://|#', u)]
    assert [u.split('/')[5] for u in links if u.endswith(('.jpg','.svg'))]==['raw','raw']

def test_source_archive_builds(built, tmp_path):
    "The archive that goes to an index holds what its own setup.py reads"
    copy_tree(ROOT, tmp_path/'src')
    sdist,_ = backend(tmp_path/'src', 'build_sdist', tmp_path)
    with tarfile.open(sdist) as f: f.extractall(tmp_path/'out', filter='data')
    root, = (tmp_path/'out').iterdir()
    info,_ = backend(root, 'prepare_metadata_for_build_wheel', tmp_path)
    assert Parser().parsestr((info/'METADATA').read_text()).items()==built[0].items()
    assert {p.relative_to(root).as_posix() for p in (root/'deqdet').rglob('*') if p.is_file()}==files_of_the_package()

def test_wheel_holds_the_package(tmp_path):
    "Modules in folders, `py.typed`, weights, templates: what is installed is what the repository has, and no more"
    copy_tree(ROOT, tmp_path/'src')
    wheel,_ = backend(tmp_path/'src', 'build_wheel', tmp_path)
    names = {n for n in zipfile.ZipFile(wheel).namelist() if '.dist-info/' not in n}
    assert names==files_of_the_package() and 'deqdet/py.typed' in names

def test_scripts_exist(built):
    "Every console script names a function that there is"
    _,entry,_ = built
    for name,target in (entry['console_scripts'] if 'console_scripts' in entry else {}).items():
        mod,func = target.split(':')
        tree = ast.parse((ROOT/(mod.replace('.', '/') + '.py')).read_text())
        assert func in {getattr(t, 'name', None) for t in tree.body}, f'{name} = {target}'

def test_no_caps():
    "What running needs has lower bounds only: a cap would hold back, or downgrade, what a user's environment has"
    reqs = cfg['requirements'].split()
    assert not [r for r in reqs if not re.fullmatch(r'[\w-]+(>=[\d.]+)?', r)]
    assert any(r.startswith('torch>=') for r in reqs) and any(r.startswith('torchvision>=') for r in reqs)

def test_versions_stand_in_one_place():
    "No other file says which version of a library is needed; constraints.txt pins the tested pair, and nothing else"
    names = {re.split('[<>=]', r)[0] for k,v in cfg.items() if k.endswith('requirements') for r in v.split()} - {'setuptools'}
    for f in 'Makefile','setup.py','pyproject.toml','CONTRIBUTING.md':
        found = re.findall(rf"\b({'|'.join(names)})\s*[<>=~]=\s*\d", (ROOT/f).read_text())
        assert not found, f'{f}: {found}'
    lines = [l for l in (ROOT/'constraints.txt').read_text().splitlines() if not l.startswith('#')]
    assert [re.sub(r'==[\d.]+$', '', l) for l in lines]==['torch','torchvision']

def test_tested_pair_is_allowed():
    as_numbers = lambda v: tuple(map(int, v.split('.')))
    least = dict(r.split('>=') for r in cfg['requirements'].split() if '>=' in r)
    for name,v in re.findall(r'^(\w+)==([\d.]+)', (ROOT/'constraints.txt').read_text(), re.M):
        assert as_numbers(v) >= as_numbers(least[name])

def test_nothing_is_said_twice():
    """settings.ini and pyproject.toml have neither a key nor a value in common, but the name, which the standard for
    pyproject.toml demands"""
    toml = tomllib.loads((ROOT/'pyproject.toml').read_text())
    project,nbdev = toml['project'],toml['tool']['nbdev']
    assert project['name']==cfg['lib_name']
    said = {k:v for d in (project, project['urls'], nbdev) for k,v in d.items() if k not in ('name','dynamic','urls')}
    assert not {k.lower() for k in said} & (cfg.keys() - {'lib_name'}) and not set(project['dynamic']) & project.keys()
    texts = {v for v in said.values() if isinstance(v, str)}
    assert not texts & set(cfg.values()), texts & set(cfg.values())
    assert not any(t in v for t in texts for v in cfg.values())

def test_nbdev_is_told_what_it_does_not_assume():
    from nbdev.config import nbdev_defaults
    nbdev = tomllib.loads((ROOT/'pyproject.toml').read_text())['tool']['nbdev']
    assert not [k for k,v in nbdev.items() if nbdev_defaults.get(k, ...)==v]

def test_version_is_said_once(built):
    "settings.ini says it; the metadata of the installed package tell it to `deqdet.__version__`"
    import deqdet
    from importlib.metadata import version
    assert cfg['version']==built[0]['Version']
    assert deqdet.__version__==version('deqdet') and cfg['version'] not in (ROOT/'deqdet/__init__.py').read_text()
    with pytest.raises(AttributeError, match='nothing_of_this_name'): deqdet.nothing_of_this_name

def test_environment_is_consistent():
    res = subprocess.run([sys.executable, '-m', 'pip', 'check'], capture_output=True, text=True)
    assert res.returncode==0, res.stdout

def test_models_need_no_fastai(loaded):
    "What a detector is made of starts quickly: fastai comes with data and learner only"
    assert {'boxes','backbone','mixing','decoder','mixer','solver','equilibrium','loss','model'} <= loaded.keys()
    assert not [k for k,v in loaded.items() if 'fastai' in v]

# ---- into an empty environment, where somebody asks for it: it downloads gigabytes and takes minutes

NEEDS_DEV = {'deqdet.docs', 'deqdet.pages'} # what only building the documentation imports
IMPORT = """
import importlib, pkgutil, sys, deqdet
for m in pkgutil.walk_packages(deqdet.__path__, 'deqdet.'):
    if m.name not in %r: importlib.import_module(m.name)
print(deqdet.__file__, deqdet.__version__)
"""

def in_venv(bin, *cmd):
    "What a command of a new environment printed, run where this repository cannot be seen"
    env = {k:v for k,v in os.environ.items() if k!='PYTHONPATH'}
    res = subprocess.run([str(c) for c in (bin/cmd[0], *cmd[1:])], cwd=bin.parent, env=env, capture_output=True, text=True)
    assert res.returncode==0, f'{cmd}: {res.stdout[-2000:]}{res.stderr[-4000:]}'
    return res.stdout

@pytest.mark.skipif(not os.environ.get('DEQDET_PACKAGING'), reason='DEQDET_PACKAGING is not set: minutes, and 6 GB')
def test_installs_beside_the_newest_fastai(tmp_path):
    "The wheel changes no version of an environment that has fastai, imports, and trains; so does the source archive"
    copy_tree(ROOT, tmp_path/'src')
    built = [backend(tmp_path/'src', f'build_{k}', tmp_path)[0] for k in ('wheel','sdist')]
    bin = tmp_path/'venv/bin'
    subprocess.run([sys.executable, '-m', 'venv', tmp_path/'venv'], check=True)
    in_venv(bin, 'python', '-m', 'pip', 'install', '-q', 'fastai')
    before = set(in_venv(bin, 'python', '-m', 'pip', 'freeze').splitlines())
    for archive,options in zip(built, ([], ['--force-reinstall','--no-deps'])):
        in_venv(bin, 'python', '-m', 'pip', 'install', '-q', *options, archive)
        after = set(in_venv(bin, 'python', '-m', 'pip', 'freeze').splitlines())
        assert before <= after, before - after
        in_venv(bin, 'python', '-m', 'pip', 'check')
        where,version = in_venv(bin, 'python', '-W', 'ignore', '-c', IMPORT % NEEDS_DEV).split()
        assert where.startswith(str(tmp_path)) and version==cfg['version']
    in_venv(bin, 'python', '-m', 'pip', 'install', '-q', *cfg['lite_requirements'].split()) # where no hub is reached
    in_venv(bin, 'deqdet_demo', '--quick', '--out', tmp_path/'demo')
    assert (tmp_path/'demo/index.html').exists()
