"""What `make test` runs: everything that CI checks, counted.

In a copy of the tree: exporting changes nothing, cleaning changes nothing, nbdev-test passes on every notebook.
In the tree itself: pytest, in a process for each worker. The last line is `N passed, M failed`, `, K skipped` following where something was.
A notebook of which no cell runs is not a pass. Each notebook has a process of its own, a fork of one that has
imported `LIBRARIES` and nothing of ours: importing them takes longer than many a notebook."""
import ast, atexit, gc, json, os, re, shutil, signal, subprocess, sys, tempfile, threading, time, traceback, warnings
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple
import outputs

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
THREADS = 'OMP_NUM_THREADS','MKL_NUM_THREADS','OPENBLAS_NUM_THREADS'
WORKERS = min(os.cpu_count() or 1, 4)
TIMEOUT = 900 # seconds for a notebook
LIBRARIES = ['torch','pandas','timm','torchvision.transforms.v2','scipy.optimize','pycocotools.coco','matplotlib.pyplot','nbdev.test']
# fastai changes what tensors can do: it is imported for pages that import it themselves, which follow those that do not
LATER = ['fastai.data.core','fastai.learner']
# what takes longest, started first so that it does not run alone at the end
LONGEST = ['tutorials/train','tutorials/own_data','tutorials/steps_vs_accuracy','14_learner','19_runs','training/13_contraction',
           'tutorials/equilibrium','training/03_callbacks','training/14_pairs','tutorials/round_trip']
# the files of tests that take longest, longest first: they are dealt to the processes before the others
HEAVY = ['test_cli','test_resume','test_docs','test_equilibrium','test_using_exported','test_processes','test_commands_use',
         'test_training_callbacks','test_run','test_learner','test_keys','test_speed','test_demo','test_evaluate']
OUTPUTS = bool(os.environ.get('DEQDET_OUTPUTS')) # are stored outputs compared with fresh ones?
FLAG = 'notest' # cells that nbdev-test skips (tst_flags of nbdev)
NOT_OURS = '.*','_proc','_docs','demo','bench','runs','build','dist','*.egg-info','__pycache__'

class Result(NamedTuple):
    name: str
    status: str     # passed, failed or skipped
    seconds: float
    note: str=''    # why it failed or was skipped

def copy_tree(src, dest):
    "Copy the files of `src` that belong to the project: what git tracks or would track"
    git = subprocess.run(['git','ls-files','-zco','--exclude-standard'], cwd=src, capture_output=True, text=True)
    ignore = shutil.ignore_patterns(*NOT_OURS)
    if git.returncode: return shutil.copytree(src, dest, symlinks=True, dirs_exist_ok=True, ignore=ignore)
    for f in sorted(set(git.stdout.split('\0')) - {''}):
        if not os.path.lexists(src/f): continue
        (dest/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(src/f, dest/f, follow_symlinks=False)

def environ(root):
    "The environment of a child: one thread each, the package of `root` first"
    env = {k:v for k,v in os.environ.items() if k!='IN_TEST'}
    return env | dict.fromkeys(THREADS, '1') | {'PYTHONPATH': str(root)}

def call(cmd, root, timeout=TIMEOUT):
    "Run `cmd` in `root`: return code, what it printed, seconds"
    start = time.time()
    with tempfile.TemporaryFile('w+', encoding='utf-8', errors='replace') as f:
        kw = dict(cwd=root, env=environ(root), stdout=f, stderr=f, timeout=timeout)
        try: code = subprocess.run([str(c) for c in cmd], **kw).returncode
        except subprocess.TimeoutExpired: code = f'stopped after {timeout} s'
        f.seek(0)
        return code, re.sub(r'\x1b\[[0-9;]*m', '', f.read()), time.time()-start

def contents(root):
    "Every file below `root`, with its bytes"
    paths = (p for p in root.rglob('*') if p.is_file() and '__pycache__' not in p.parts)
    return {str(p.relative_to(root)): p.read_bytes() for p in paths}

def changes_nothing(name, cmd, root, before=None):
    "A check that `cmd` leaves the tree in `root` as it was"
    before = before or contents(root)
    code,out,secs = call(cmd, root)
    after = contents(root)
    diff = sorted(f for f in before.keys()|after.keys() if before.get(f)!=after.get(f))
    if code: return Result(name, 'failed', secs, f'{out[-2000:]}\n({code})')
    if diff: return Result(name, 'failed', secs, 'these change: ' + ', '.join(diff))
    return Result(name, 'passed', secs)

def check_export(root):
    "Modules are what the notebooks export, and nothing else is in the package"
    before = contents(root)
    for p in (root/'deqdet').rglob('*.py'):
        if p.name!='__init__.py': p.unlink()
    return changes_nothing('nbdev-export changes nothing', [BIN/'nbdev-export'], root, before)

def check_clean(root): return changes_nothing('nbdev-clean changes nothing', [BIN/'nbdev-clean'], root)

def runs(path):
    "How many cells of a notebook nbdev-test executes"
    from nbdev.test import nb_test_cells
    return sum(bool(c.source.strip()) for c in nb_test_cells(path, skip_flags=FLAG))

# ---- what a page imports

def imports(source, package=()):
    "Modules that Python imports outside of functions; `package` holds the names of the folders it stands in"
    found = set()
    todo = list(ast.parse(source).body)
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.With, ast.Try)): todo += node.body
        if isinstance(node, ast.Import): found |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            base = package[:len(package)+1-node.level] if node.level else ()
            name = '.'.join([*base, node.module] if node.module else base)
            found |= {name} | {f'{name}.{a.name}' for a in node.names}
    return found

@cache
def module_imports(root, name):
    "What a module of the project imports, nothing for other modules"
    parts = tuple(name.split('.'))
    for file,package in ((root/f"{'/'.join(parts)}.py", parts[:-1]), (root.joinpath(*parts)/'__init__.py', parts)):
        if file.exists(): return imports(file.read_text(encoding='utf-8'), package)
    return set()

def page_imports(path):
    "What a notebook imports; nothing where it cannot be read, which it says when it runs"
    from nbdev.test import nb_test_cells
    try: return set().union(*(imports(re.sub('^[%!].*', 'pass', c.source, flags=re.M)) for c in nb_test_cells(path, skip_flags=FLAG)))
    except (SyntaxError, ValueError): return set() # of a cell, of the file

def needs(root, path):
    "Those of `LATER` that a notebook imports, itself or through modules of the project"
    seen = set()
    todo = page_imports(path)
    while todo:
        name = todo.pop()
        seen.add(name)
        todo |= module_imports(root, name) - seen
    last = max((i for i,lib in enumerate(LATER) if lib in seen), default=-1)
    return LATER[:last+1] # in their order, so that what is imported grows

# ---- notebooks, each in a fork

def redirect(out):
    "Nothing to read, and a file for what is printed"
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    file = os.open(out, os.O_WRONLY|os.O_APPEND)
    for fd in (1, 2): os.dup2(file, fd)

def in_fork(root, nb, out, fresh=None):
    "In a new process: run nbdev-test on a notebook, write what it prints to a file, and the notebook to `fresh`; end"
    os.setsid() # so that what it started can be stopped with it
    redirect(out)
    os.chdir(root)
    os.environ['PYTHONPATH'] = root
    sys.path.insert(0, root)
    sys.argv = ['nbdev-test', nb]
    code = 0
    try:
        test = import_module('nbdev.test')
        write_nb = test.write_nb
        test.write_nb = lambda ran, path: write_nb(ran, fresh)
        test.nbdev_test.__wrapped__(nb, n_workers=0, save=bool(fresh))
    except SystemExit as e: code = e.code
    except BaseException: code = traceback.print_exc() or 1
    atexit._run_exitfuncs() # temporary folders go
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

def ended(pid, timeout):
    "The exit status of a child; what runs for too long is stopped, with all that it started"
    end = time.time() + timeout
    try:
        while time.time() < end:
            done,status = os.waitpid(pid, os.WNOHANG)
            if done: return os.waitstatus_to_exitcode(status)
            time.sleep(.02)
        return f'stopped after {timeout} s'
    finally:
        try: os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError: pass

def hold(libraries):
    "Import libraries for all forks"
    if not set(libraries) - set(sys.modules): return
    with warnings.catch_warnings(action='ignore'):
        for lib in libraries: import_module(lib)
    gc.collect()
    gc.freeze() # the half million objects of libraries: no page collects them, or copies their memory

def nursery(libraries):
    "Fork for each line of stdin, `[root, notebook, libraries, file for the output, file for the notebook, seconds]`; answer with the exit status"
    hold(libraries)
    for line in sys.stdin:
        root,nb,more,out,fresh,timeout = json.loads(line)
        hold(more)
        pid = os.fork()
        if not pid: in_fork(root, nb, out, fresh)
        print(json.dumps(ended(pid, timeout)), flush=True)

own = threading.local()

def my_nursery(more):
    "The nursery of this thread; a new one where there is none, where it has died, or where it holds more than `more` of `LATER`"
    old = getattr(own, 'nursery', None)
    if old is None or old.poll() is not None or len(own.more) > len(more):
        if old: old.stdin.close() # it ends
        cmd = [sys.executable, __file__, '--nursery', *LIBRARIES]
        own.nursery = subprocess.Popen(cmd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ(ROOT))
    own.more = more
    return own.nursery

def run_notebook(root, nb, timeout=TIMEOUT, fresh=None):
    "nbdev-test on a notebook: exit status, what it printed, seconds; `fresh` gets the notebook with its new outputs"
    start = time.time()
    with tempfile.NamedTemporaryFile('r', encoding='utf-8', errors='replace') as f:
        more = needs(root, nb)
        process = my_nursery(more)
        request = str(root), str(nb), more, f.name, fresh and str(fresh), timeout
        print(json.dumps(request), file=process.stdin, flush=True)
        answer = process.stdout.readline()
        code = json.loads(answer) if answer else 'the process that starts notebooks died'
        return code, re.sub(r'\x1b\[[0-9;]*m', '', f.read()), time.time()-start

def check_notebook(root, nb):
    "nbdev-test on one notebook"
    name = str(nb.relative_to(root))
    with tempfile.TemporaryDirectory() as d:
        fresh = Path(d)/'fresh.ipynb' if OUTPUTS else None
        code,out,secs = run_notebook(root, nb, fresh=fresh)
        differ = outputs.differences(json.loads(nb.read_text()), json.loads(fresh.read_text())) if fresh and fresh.exists() else []
    if code: return Result(name, 'failed', secs, f'{out[-4000:]}\n({code})')
    if 'Success.' not in out: return Result(name, 'skipped', secs, out.strip() or 'nbdev-test did not run it')
    if not runs(nb): return Result(name, 'skipped', secs, 'none of its cells runs')
    if differ: return Result(name, 'failed', secs, 'stored outputs differ from fresh ones:\n' + '\n'.join(map(str, differ)))
    return Result(name, 'passed', secs)

# ---- tests

def read_junit(path):
    "One `Result` for each pytest case of a junit file"
    res = []
    for case in ET.parse(path).iter('testcase'):
        kinds = {c.tag:c for c in case}
        bad = kinds.get('failure', kinds.get('error'))
        status = 'failed' if bad is not None else 'skipped' if 'skipped' in kinds else 'passed'
        why = kinds['skipped'].get('message', '') if status=='skipped' else ''
        res.append(Result(f"{case.get('classname')}::{case.get('name')}", status, float(case.get('time', 0)), why))
    return res

def groups(root, n=WORKERS):
    "The files of tests/ in n lists, for n processes: dealt forth and back, `HEAVY` first, so that they take nearly as long"
    def rank(p): return HEAVY.index(p.stem) if p.stem in HEAVY else len(HEAVY)
    found = sorted((root/'tests').rglob('test_*.py'), key=lambda p: (rank(p), p))
    dealt = [[] for _ in range(n)]
    for i,p in enumerate(found):
        turn,k = divmod(i, n)
        dealt[n-1-k if turn%2 else k].append(str(p.relative_to(root)))
    return [files for files in dealt if files]

def check_pytest(root, files=('tests',)):
    "pytest on tests/ or some of its files: its cases, and one more failure where pytest itself did not finish"
    with tempfile.TemporaryDirectory() as d:
        xml = Path(d)/'junit.xml'
        cmd = [sys.executable, '-m', 'pytest', '-q', f'--rootdir={root}', *files, '--continue-on-collection-errors', f'--junitxml={xml}']
        code,out,secs = call(cmd, root, timeout=4*TIMEOUT)
        res = read_junit(xml) if xml.exists() else []
    if not code: return res
    if any(r.status=='failed' for r in res): print(out)
    else: res.append(Result('pytest', 'failed', secs, f'{out[-4000:]}\n({code})'))
    return res

def notebooks(root):
    "The notebooks that nbdev would take, nothing hidden or private: those that need less of `LATER` first, then those that take long"
    found = [p for p in (root/'nbs').rglob('*.ipynb') if not any(o[0] in '._' for o in p.relative_to(root).parts)]
    names = {p:p.relative_to(root/'nbs').with_suffix('').as_posix() for p in found}
    def rank(p): return LONGEST.index(names[p]) if names[p] in LONGEST else len(LONGEST)
    return sorted(found, key=lambda p: (len(needs(root, p)), rank(p), p))

def slowest(results, n=10):
    "The slowest, with their seconds; those of a test include the fixtures that it was the first to need"
    first = sorted(results, key=lambda r: -r.seconds)[:n]
    return ', '.join(f"{r.name.removeprefix('nbs/').removeprefix('tests.')} {r.seconds:.0f} s" for r in first)

def report(results):
    "Print failures, skips, what was slowest and the totals; the exit status"
    for r in results:
        if r.status=='failed' and r.note: print(f'\n---- {r.name}\n{r.note}')
    print()
    for r in results:
        if r.status!='passed': print(f'{r.status}: {r.name}' + (f' ({r.note})' if r.status=='skipped' else ''))
    print('Slowest notebooks: ' + slowest([r for r in results if r.name.endswith('.ipynb')]))
    print('Slowest tests: ' + slowest([r for r in results if '::' in r.name]))
    n = {s:sum(r.status==s for r in results) for s in ('passed','failed','skipped')}
    skipped = f", {n['skipped']} skipped" if n['skipped'] else ''
    print(f"{n['passed']} passed, {n['failed']} failed{skipped}", flush=True)
    return int(n['failed']>0 or n['passed']==0)

def show(results):
    "One line for a finished job"
    if isinstance(results, Result): results = [results]
    if len(results)==1: r = results[0]; print(f'{r.status:8}{r.name}  {r.seconds:.1f} s', flush=True)
    else: print(f'finished pytest: {len(results)} cases  {sum(r.seconds for r in results):.1f} s', flush=True)
    return results

def main():
    start = time.time()
    with tempfile.TemporaryDirectory() as d:
        copy = Path(d).resolve()/ROOT.name
        copy.mkdir()
        copy_tree(ROOT, copy)
        results = []
        with ThreadPoolExecutor(WORKERS) as pool:
            def begin(jobs): return pool.map(lambda j: show(j[0](*j[1:])), jobs)
            tests = begin([(check_pytest, ROOT, files) for files in groups(ROOT)])
            for check in check_export, check_clean: results += show(check(copy)) # before a page runs, beside tests
            pages = begin([(check_notebook, copy, nb) for nb in notebooks(copy)])
            for res in (*tests, *pages): results += res
    print(f'\n{time.time()-start:.0f} s with {WORKERS} workers')
    return report(results)

if __name__=='__main__':
    if sys.argv[1:2]==['--nursery']: nursery(sys.argv[2:])
    else: sys.exit(main())
