"The runner behind `make test` counts what happened, and nothing else"
import os, shutil, subprocess, sys, time
from pathlib import Path
import pytest
from fastcore.nbio import mk_cell, new_nb, write_nb
import run
from run import Result, check_clean, check_export, check_notebook, check_pytest, copy_tree, report

TOML = '[project]\nname = "deqdet"\n\n[tool.nbdev]\nput_version_in_init = false\nupdate_pyproject = false\n'
EXPORTS = [mk_cell('# Page\n\n> small', 'markdown'), mk_cell('#| default_exp page'),
           mk_cell('#| export\ndef one(): return 1')]

@pytest.fixture(scope='module')
def few_libraries():
    "A quick start for notebooks that need none of them"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, 'LIBRARIES', ['nbdev.test'])
        patch.setattr(run, 'own', run.threading.local())
        yield
        run.own.nursery.stdin.close()
        assert run.own.nursery.wait(30)==0

@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    "An nbdev project with one exporting notebook, exported"
    root = tmp_path_factory.mktemp('exported')
    (root/'nbs').mkdir()
    (root/'deqdet').mkdir()
    (root/'pyproject.toml').write_text(TOML)
    write_nb(new_nb(EXPORTS), root/'nbs/00_page.ipynb')
    code,out,_ = run.call([run.BIN/'nbdev-export'], root)
    assert not code, out
    run.call([run.BIN/'nbdev-clean'], root)
    return root

@pytest.fixture
def project(exported, tmp_path):
    "A copy of it"
    return shutil.copytree(exported, tmp_path, dirs_exist_ok=True)

def test_sound_project(project):
    assert check_export(project).status=='passed'
    assert check_clean(project).status=='passed'

def test_modules_in_folders(project):
    "Folders of modules keep what no notebook makes: `__init__.py`, templates, weights"
    (project/'nbs/wing').mkdir()
    cells = [mk_cell('# Room', 'markdown'), mk_cell('#| default_exp wing.room'), mk_cell('#| export\nx = 1')]
    write_nb(new_nb(cells), project/'nbs/wing/01_room.ipynb')
    for cmd in 'nbdev-export','nbdev-clean': assert not run.call([run.BIN/cmd], project)[0]
    (project/'deqdet/wing/page.html').write_text('<html>')
    assert check_export(project).status=='passed'
    assert {p.name for p in (project/'deqdet/wing').iterdir()}=={'__init__.py','room.py','page.html'}
    assert (project/'nbs/wing/01_room.ipynb') in run.notebooks(project)
    (project/'deqdet/wing/orphan.py').write_text('x = 1\n')
    assert 'deqdet/wing/orphan.py' in check_export(project).note

def test_unexported_change_fails(project):
    write_nb(new_nb(EXPORTS + [mk_cell('#| export\ndef two(): return 2')]), project/'nbs/00_page.ipynb')
    res = check_export(project)
    assert res.status=='failed' and 'deqdet/page.py' in res.note

def test_module_without_notebook_fails(project):
    (project/'deqdet/orphan.py').write_text('x = 1\n')
    res = check_export(project)
    assert res.status=='failed' and 'deqdet/orphan.py' in res.note

def test_unclean_notebook_fails(project):
    cell = mk_cell('1', metadata={'tags': ['x']})
    write_nb(new_nb([cell]), project/'nbs/01_more.ipynb')
    res = check_clean(project)
    assert res.status=='failed' and 'nbs/01_more.ipynb' in res.note

@pytest.mark.parametrize('cells,status,note', [
    (['from deqdet.page import one', 'assert one()==1'], 'passed', ''),
    (['assert 1+1==3'], 'failed', 'AssertionError'),
    (['#| eval: false\n1/0', '#| notest\n1/0'], 'skipped', 'none of its cells runs'),
    ([], 'skipped', 'none of its cells runs')], ids=['passes','fails','skips all','has no code'])
def test_notebook(project, few_libraries, cells, status, note):
    path = project/'nbs/05_tried.ipynb'
    write_nb(new_nb([mk_cell('# Tried', 'markdown')] + [mk_cell(c) for c in cells]), path)
    res = check_notebook(project, path)
    assert res.status==status and note in res.note, res

def test_notebooks_share_nothing(project, few_libraries):
    "Each begins in a process that holds libraries and nothing of ours, in its own folder, and leaves nothing behind"
    cell = 'import sys, os\nassert not [m for m in sys.modules if m.split(".")[0]=="deqdet"] and not hasattr(sys, "left")\n' \
           'from pathlib import Path\nassert Path.cwd().name=="nbs" and os.environ["PYTHONPATH"]==str(Path.cwd().parent)\n' \
           'import deqdet.page\nassert Path(deqdet.page.__file__).parents[1]==Path.cwd().parent\nsys.left = 1\n' \
           'import tempfile\nkept = tempfile.TemporaryDirectory()\nprint(kept.name, file=open("name", "w"))'
    for i in range(2):
        write_nb(new_nb([mk_cell('# Tried', 'markdown'), mk_cell(cell)]), project/f'nbs/0{i}_tried.ipynb')
        res = check_notebook(project, project/f'nbs/0{i}_tried.ipynb')
        assert res.status=='passed', res
        assert not Path((project/'nbs/name').read_text().strip()).exists()
    assert not [m for m in run.LIBRARIES if m.startswith('deqdet')]

def test_a_notebook_that_hangs_is_stopped_with_what_it_started(tmp_path):
    code = 'import subprocess, sys, time\np = subprocess.Popen(["sleep", "600"])\n' \
           'print(p.pid, file=open("pid", "w"), flush=True)\ntime.sleep(600)'
    parent = subprocess.Popen([sys.executable, '-c', code], cwd=tmp_path, start_new_session=True)
    while not (tmp_path/'pid').exists() or not (tmp_path/'pid').read_text().strip(): time.sleep(.05)
    assert run.ended(parent.pid, .2)=='stopped after 0.2 s'
    pid = int((tmp_path/'pid').read_text())
    for _ in range(100):
        if not alive(pid): break
        time.sleep(.1)
    assert not alive(pid)
    parent.wait()

def test_a_notebook_that_dies(project, few_libraries):
    "It fails, and the next one runs"
    def tried(source):
        write_nb(new_nb([mk_cell('# Tried', 'markdown'), mk_cell(source)]), project/'nbs/05_tried.ipynb')
        return check_notebook(project, project/'nbs/05_tried.ipynb')
    res = tried('import os, signal; os.kill(os.getpid(), signal.SIGKILL)')
    assert res.status=='failed' and '(-9)' in res.note
    assert tried('1').status=='passed'
    run.own.nursery.kill()
    run.own.nursery.wait()
    assert tried('1').status=='passed'

def alive(pid):
    "True if a process runs; one that has ended, but was not waited for, does not"
    try: return Path(f'/proc/{pid}/stat').read_text().split(') ')[1][0]!='Z'
    except FileNotFoundError: return False

def test_longest_notebooks_exist_and_come_first():
    "Among those that need the same of `LATER`"
    found = run.notebooks(run.ROOT)
    names = [str(p.relative_to(run.ROOT/'nbs'))[:-6] for p in found]
    assert set(run.LONGEST) <= set(names) and len(names)==len(set(names))
    levels = {n: len(run.needs(run.ROOT, p)) for n,p in zip(names, found)}
    assert list(levels.values())==sorted(levels.values()) and set(levels.values())=={0, 1, 2}
    for level in range(3):
        same = [n for n in names if levels[n]==level]
        first = [n for n in run.LONGEST if levels[n]==level]
        assert same[:len(first)]==first

def test_libraries_that_only_some_notebooks_import(project, few_libraries, monkeypatch):
    "They are there for a notebook that imports one, itself or through a module; a notebook before or after it does not get them"
    monkeypatch.setattr(run, 'LATER', ['colorsys','sched'])
    (project/'deqdet/colours.py').write_text('with open("/dev/null"): import colorsys\ndef lazy(): import sched\n')
    (project/'deqdet/wing').mkdir()
    (project/'deqdet/wing/__init__.py').touch()
    (project/'deqdet/wing/room.py').write_text('from .. import colours\nfrom ..page import one\n')
    held = 'import sys\nassert {!r}==[m for m in ("colorsys","sched") if m in sys.modules]'
    tried = {'01_none': ([], 'from deqdet.page import one'), '02_through': (['colorsys'], 'from deqdet.wing.room import one'),
             '03_itself': (['colorsys','sched'], 'import sched'), '04_lazy': (['colorsys'], 'import deqdet.colours\ndeqdet.colours.lazy')}
    paths = {}
    for name,(libraries,later) in tried.items():
        paths[name] = project/f'nbs/{name}.ipynb'
        write_nb(new_nb([mk_cell('# Tried', 'markdown'), mk_cell(held.format(libraries)), mk_cell(later)]), paths[name])
        assert run.needs(project, paths[name])==libraries
    for name in [*tried, '01_none']: assert check_notebook(project, paths[name]).status=='passed', name
    assert [p.stem for p in run.notebooks(project)]==['00_page', '01_none', '02_through', '04_lazy', '03_itself']

def test_a_notebook_that_cannot_be_read_fails_alone(project, few_libraries):
    "It is listed, as is one with a cell that is no Python"
    (project/'nbs/01_text.ipynb').write_text('no json')
    write_nb(new_nb([mk_cell('# Tried', 'markdown'), mk_cell('%time 1'), mk_cell('def f(:')]), project/'nbs/02_cell.ipynb')
    found = run.notebooks(project)
    assert [p.stem for p in found]==['00_page', '01_text', '02_cell']
    assert [check_notebook(project, p).status for p in found[1:]]==['failed', 'failed']

def test_what_hangs_is_stopped(tmp_path):
    code,out,secs = run.call([sys.executable, '-uc', 'import time; print("on"); time.sleep(60)'], tmp_path, timeout=3)
    assert code=='stopped after 3 s' and out.strip()=='on' and secs < 30

def test_pytest(tmp_path):
    (tmp_path/'tests').mkdir()
    (tmp_path/'tests/test_x.py').write_text('import pytest\n'
        'def test_a(): pass\ndef test_b(): assert 0\ndef test_c(): pytest.skip("no data")\n'
        '@pytest.fixture\ndef f(): yield 1; raise ValueError\ndef test_d(f): pass\n')
    (tmp_path/'tests/test_y.py').write_text('import nothing_of_this_name\n')
    res = {r.name.split('::')[-1]:r for r in check_pytest(tmp_path)}
    assert {k:r.status for k,r in res.items()} == {
        'test_a': 'passed', 'test_b': 'failed', 'test_c': 'skipped', 'test_d': 'failed', 'tests.test_y': 'failed'}
    assert res['test_c'].note=='no data'

@pytest.mark.parametrize('n', [1, 2, 4])
def test_each_file_of_tests_is_in_one_group(n):
    "As many files in each, and as many of those that take long, of which two neighbours are apart"
    dealt = run.groups(run.ROOT, n)
    files = sorted(str(p.relative_to(run.ROOT)) for p in (run.ROOT/'tests').rglob('test_*.py'))
    assert sorted(sum(dealt, []))==files and len(dealt)==n
    heavy = [[Path(f).stem for f in group if Path(f).stem in run.HEAVY] for group in dealt]
    assert sorted(sum(heavy, []))==sorted(run.HEAVY)
    for found in dealt, heavy: assert max(map(len, found)) - min(map(len, found)) <= 1
    assert n < 2 or not any({a, b} <= set(group) for group in heavy for a,b in zip(run.HEAVY[::2], run.HEAVY[1::2]))

def test_few_files_of_tests_make_few_groups(tmp_path):
    (tmp_path/'tests').mkdir()
    (tmp_path/'tests/test_x.py').touch()
    assert run.groups(tmp_path, 4)==[['tests/test_x.py']]

def test_pytest_that_finds_nothing_fails(tmp_path):
    (tmp_path/'tests').mkdir()
    assert [r.status for r in check_pytest(tmp_path)]==['failed']

@pytest.mark.parametrize('statuses,last,code', [
    (['passed','passed'], '2 passed, 0 failed', 0),
    (['passed','failed'], '1 passed, 1 failed', 1),
    (['passed','skipped'], '1 passed, 0 failed, 1 skipped', 0),
    (['skipped'], '0 passed, 0 failed, 1 skipped', 1)])
def test_last_line(capsys, statuses, last, code):
    assert report([Result(f'{i}.ipynb', s, 1.) for i,s in enumerate(statuses)])==code
    assert capsys.readouterr().out.splitlines()[-1]==last

def test_what_was_slow_is_named(capsys):
    report([Result(f'nbs/a/{i}.ipynb', 'passed', i) for i in range(12)] + [Result(f'tests.test_x::test_{i}', 'passed', i) for i in (3, 1, 2)])
    pages,tests,_ = capsys.readouterr().out.splitlines()[-3:]
    assert pages=='Slowest notebooks: ' + ', '.join(f'a/{i}.ipynb {i} s' for i in range(11, 1, -1))
    assert tests=='Slowest tests: test_x::test_3 3 s, test_x::test_2 2 s, test_x::test_1 1 s'

def test_copy_follows_git(tmp_path):
    src,dest = tmp_path/'src',tmp_path/'dest'
    src.mkdir()
    for f in '.gitignore','kept','left','gone': (src/f).write_text('left\n')
    (src/'link').symlink_to('kept')
    run.call(['git','init','-q'], src)
    run.call(['git','add','.'], src)
    (src/'gone').unlink()
    copy_tree(src, dest)
    assert {p.name for p in dest.iterdir()}=={'.gitignore','kept','link'} and os.readlink(dest/'link')=='kept'
