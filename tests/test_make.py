"What each target of the Makefile sets up, and what it says where something is absent. pip and Python are stand-ins."
import os, re, shutil, subprocess, tempfile
from pathlib import Path
import pytest, yaml

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not shutil.which('make'), reason='make is not installed')
TOOLS = 'make','sh','sed','tr','rm','touch','find','mkdir','cat','chmod','echo','basename'

VENV = '''#!/bin/sh
echo "$(basename "$0") $*" >> log
case "$*" in *pip*) [ ! -e no-network ] ;; esac
'''
PYTHON = f'''#!/bin/sh
case "$1" in
  -c) [ ! -e too-old ] ;;
  --version) echo "Python 3.11.0" ;;
  -m) if [ -e no-venv ]; then echo "ensurepip is not available"; exit 1; fi
      mkdir -p "$3/bin" || exit 1
      for f in python deqdet_demo nbdev-export nbdev-clean nbdev-docs jupyter; do
        cat > "$3/bin/$f" <<'EOF'
{VENV}EOF
        chmod +x "$3/bin/$f"
      done ;;
esac
'''

class Checkout:
    "A folder with our Makefile, and nothing but `TOOLS` and stand-ins on the path"
    def __init__(self, path):
        self.path,self.bin,self.user = path, path/'bin', None
        self.bin.mkdir()
        for f in 'Makefile','settings.ini','setup.py','pyproject.toml','constraints.txt': shutil.copy(ROOT/f, path)
        for f in TOOLS: (self.bin/f).symlink_to(shutil.which(f))
        for o in 'nbs','deqdet','tests','benchmarks': (path/o).mkdir()
        self.script('python3', PYTHON)

    def script(self, name, text):
        (self.bin/name).write_text(text)
        (self.bin/name).chmod(0o755)

    def make(self, *args):
        "Exit status, what was printed, and what was called since"
        (self.path/'log').unlink(missing_ok=True)
        res = subprocess.run(['make', *args], cwd=self.path, env={'PATH': str(self.bin)}, user=self.user,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        log = self.path/'log'
        return res.returncode, res.stdout, log.read_text().splitlines() if log.exists() else []

@pytest.fixture
def checkout(tmp_path): return Checkout(tmp_path)

def installs(log): return [o.split()[-1] for o in log if 'pip install' in o]
def jobs(log): return [o for o in log if 'pip install' not in o]

@pytest.mark.parametrize('target,extra,calls', [
    ('demo', '.[lite]', ['deqdet_demo --out demo']),
    ('test', '.[dev]', ['python tests/run.py']),
    ('export', '.[dev]', ['nbdev-export ', 'nbdev-clean ', 'python tests/readme.py']),
    ('playground', '.[dev]', ['python -W ignore benchmarks/playground.py nbs/playground']),
    ('docs', '.[dev]', ['python -W ignore benchmarks/playground.py nbs/playground', 'nbdev-export ', 'python tests/readme.py', 'nbdev-docs ']),
    ('lab', '.[dev]', ['jupyter lab --notebook-dir=nbs'])])
def test_target_sets_itself_up(checkout, target, extra, calls):
    "In a fresh clone each makes .venv, installs once and does its job"
    checkout.script('quarto', '#!/bin/sh\n')
    code,out,log = checkout.make(target)
    assert code==0 and 'Making .venv with Python 3.11.0' in out and 'Installing deqdet' in out, out
    assert installs(log)==[extra] and [o.rstrip() for o in jobs(log)]==[o.rstrip() for o in calls]
    assert '--constraint constraints.txt' in log[0]
    code,out,log = checkout.make(target)
    assert code==0 and 'Installing' not in out and not installs(log)

def test_oldest_pair(checkout):
    "`TORCH=oldest` is an environment of its own, with the least torch and torchvision that settings.ini allows"
    code,out,log = checkout.make('test', 'TORCH=oldest')
    pair = (checkout.path/'.venv-oldest/oldest.txt').read_text().splitlines()
    least = re.search(r'torch>=(\S+) torchvision>=(\S+)', (ROOT/'settings.ini').read_text()).groups()
    assert code==0 and pair==[f'torch=={least[0]}', f'torchvision=={least[1]}'] and not (checkout.path/'.venv').exists(), out
    assert '--constraint .venv-oldest/oldest.txt' in log[0] and jobs(log)==['python tests/run.py']
    assert not installs(checkout.make('test', 'TORCH=oldest')[2])
    assert installs(checkout.make('test')[2])==['.[dev]'] and (checkout.path/'.venv').exists()

def test_unknown_pair(checkout):
    code,out,log = checkout.make('test', 'TORCH=newest')
    assert code and 'TORCH is `tested` or `oldest`, not `newest`' in out and not log

def test_bench_runs_every_script(checkout):
    code,out,log = checkout.make('bench', 'BENCH=step loader')
    assert code==0 and installs(log)==['.'], out
    assert [o.split()[3:] for o in jobs(log)]==[[f'benchmarks/{k}.py', '--threads', '2', '--out', f'bench/{k}.json'] for k in ('step','loader')]

def test_bench_names_scripts_that_exist():
    line = next(l for l in (ROOT/'Makefile').read_text().splitlines() if l.startswith('BENCH :='))
    assert all((ROOT/f'benchmarks/{k}.py').exists() for k in line.split()[2:])

def test_options_reach_the_job(checkout):
    assert checkout.make('demo', 'DEMO=--minutes 2')[2][-1]=='deqdet_demo --out demo --minutes 2'
    assert checkout.make('demo', 'DATA=a folder')[2][-1]=='deqdet_demo --out demo --data a folder'
    assert checkout.make('lab', 'LAB=--no-browser')[2][-1]=='jupyter lab --notebook-dir=nbs --no-browser'

def test_changed_requirements_install_again(checkout):
    checkout.make('test')
    assert not installs(checkout.make('demo')[2]) # the dev extra holds what running needs
    stamp = (checkout.path/'.venv/.installed-dev').stat().st_mtime
    os.utime(checkout.path/'settings.ini', (stamp + 5, stamp + 5))
    assert installs(checkout.make('test')[2])==['.[dev]']

def test_no_python(checkout):
    (checkout.bin/'python3').unlink()
    code,out,_ = checkout.make('test')
    assert code and 'deqdet needs Python 3.11 or newer; none of these is: python3' in out and 'make PYTHON=' in out

def test_old_python(checkout):
    (checkout.path/'too-old').touch()
    code,out,_ = checkout.make('demo')
    assert code and 'deqdet needs Python 3.11 or newer' in out

def test_no_venv_module(checkout):
    (checkout.path/'no-venv').touch()
    code,out,_ = checkout.make('test')
    assert code and 'its venv module (python3-venv on Debian and Ubuntu) is needed' in out
    assert not (checkout.path/'.venv').exists()

def test_no_network(checkout):
    "An install that failed is told, and tried again the next time"
    (checkout.path/'no-network').touch()
    code,out,log = checkout.make('test')
    assert code and 'pip could not install' in out and jobs(log)==[]
    (checkout.path/'no-network').unlink()
    code,_,log = checkout.make('test')
    assert code==0 and installs(log)==['.[dev]']

def test_no_quarto(checkout):
    code,out,log = checkout.make('docs')
    version = checkout.make('-s', 'quarto-version')[1].strip()
    assert code and 'Quarto is not installed' in out and f'version {version} from https://quarto.org' in out
    assert not log and not (checkout.path/'.venv').exists() # said before anything is installed

def test_read_only():
    "A checkout that cannot be written to is called that"
    with tempfile.TemporaryDirectory() as d:
        path = Path(d)/'checkout'
        path.mkdir()
        c = Checkout(path)
        for p in (Path(d), path): p.chmod(0o555)
        c.user = 65534 if os.geteuid()==0 else None
        code,out,_ = c.make('test')
        for p in (path, Path(d)): p.chmod(0o755)
    assert code and 'cannot be written to' in out and str(path) in out and 'venv module' not in out, out

def test_clean(checkout):
    "What targets wrote goes; .venv, training runs and sources stay"
    checkout.make('test')
    wrote = '_proc/x','_docs/x','demo/x','bench/x','build/x','dist/x','deqdet.egg-info/x','.pytest_cache/x','tests/__pycache__/x',\
            'nbs/.ipynb_checkpoints/x','nbs/nbdev.yml','nbs/playground/start.onnx','nbs/playground/scene1.png'
    kept = 'nbs/playground/playground.js','.venv/.installed-dev','.venv-oldest/x','runs/x','nbs/01_boxes.ipynb','deqdet/boxes.py'
    for o in wrote + kept:
        (checkout.path/o).parent.mkdir(parents=True, exist_ok=True)
        (checkout.path/o).touch()
    assert checkout.make('clean')[0]==0
    assert not [o for o in wrote if (checkout.path/o).exists()]
    assert all((checkout.path/o).exists() for o in kept)
    assert checkout.make('clean')[0]==0 # twice is fine

def test_plain_make_lists_targets(checkout):
    out = checkout.make()[1]
    for o in 'demo','test','export','docs','playground','bench','lab','clean': assert f'make {o} ' in out

# ---- what CI calls

def steps(name):
    "The steps of a workflow"
    flow = yaml.safe_load((ROOT/f'.github/workflows/{name}.yml').read_text())
    assert flow[True].keys() >= {'push','workflow_dispatch'} # YAML reads `on` as True
    return [s for job in flow['jobs'].values() for s in job['steps']]

@pytest.mark.parametrize('beside', [True, False], ids=['data beside','no data'])
def test_ci_runs_make_test(tmp_path, beside):
    "`.ci/run` is `make test`, with the real data where they lie beside the checkout, from wherever it is called"
    root = tmp_path/'checkout'
    shutil.copytree(ROOT/'.ci', root/'.ci')
    if beside: (tmp_path/'shared/data').mkdir(parents=True)
    (tmp_path/'bin').mkdir()
    fake = tmp_path/'bin/make'
    fake.write_text('#!/bin/sh\necho "make $*|$PWD|${DEQDET_DATA-unset}"; exit 3\n')
    fake.chmod(0o755)
    env = {'PATH': f"{tmp_path/'bin'}:{os.environ['PATH']}"}
    res = subprocess.run([root/'.ci/run'], cwd='/', env=env, capture_output=True, text=True)
    assert res.stdout.strip()==f"make test|{root}|{tmp_path/'shared/data' if beside else 'unset'}", res
    assert res.returncode==3

def test_workflows():
    "Tests go through `.ci/run`, docs through `make docs`, with the Quarto that the Makefile names"
    assert [s['run'] for s in steps('test') if 'run' in s]==['.ci/run']
    docs = steps('docs')
    assert 'make docs' in [s.get('run') for s in docs]
    pin, = [s for s in docs if s.get('id')=='pin']
    assert 'make -s quarto-version' in pin['run']
    quarto, = [s for s in docs if s.get('uses', '').startswith('quarto-dev/quarto-actions/setup@')]
    assert quarto['with']['version']=='${{ steps.pin.outputs.quarto }}' and docs.index(pin) < docs.index(quarto)
    assert [s['with']['path'] for s in docs if 'upload-pages-artifact' in s.get('uses', '')]==['_docs']
    uses = [s['uses'] for s in docs + steps('test') if 'uses' in s]
    assert all(re.fullmatch(r'[\w-]+/[\w/-]+@v\d+', u) for u in uses), uses

def test_python_versions():
    "CI starts at the least version that settings.ini names, and the package's metadata ask for it"
    flow = yaml.safe_load((ROOT/'.github/workflows/test.yml').read_text())
    least = re.search(r'^min_python *= *(.*)', (ROOT/'settings.ini').read_text(), re.M)[1]
    assert flow['jobs']['test']['strategy']['matrix']['python'][0]==least
    assert f'Python {least} or newer' in (ROOT/'README.md').read_text()
    assert f'Python {least} or newer' in (ROOT/'CONTRIBUTING.md').read_text()

@pytest.mark.parametrize('name', ['bug','no_convergence','reproduction_gap'])
def test_issue_templates(name):
    form = yaml.safe_load((ROOT/f'.github/ISSUE_TEMPLATE/{name}.yml').read_text())
    assert form.keys() >= {'name','description','labels','body'}
    ids = [o['id'] for o in form['body'] if o['type']!='markdown']
    assert len(ids)==len(set(ids)) and all(o['attributes'].get('label') for o in form['body'] if o['type']!='markdown')
