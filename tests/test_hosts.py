"""Two hosts: network namespaces joined by a cable, on one machine. They train as one process; a lost one ends the other

The parts that start hosts take minutes and root, so they run where DEQDET_HOSTS is set."""
import os, re, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch, torch.distributed as dist
from deqdet.data import synth_coco
from deqdet.training.processes import Watch, lost_process

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent

# ---- in one process

def watches(n, store, ended, silence=.4):
    def leave(rank): return lambda text: ended.setdefault(rank, text)
    return [Watch(store, r, n, silence, leave(r), tick=.02) for r in range(n)]

def test_one_that_is_done_is_not_lost():
    ended = {}
    first,second = watches(2, dist.HashStore(), ended)
    time.sleep(.2)
    second.stop()
    time.sleep(.8)
    first.stop()
    assert ended=={}

class Unplugged:
    "A store that does not answer from some moment on"
    def __init__(self, store): self.store, self.cut = store, False
    def __getattr__(self, k):
        while self.cut: time.sleep(.05)
        return getattr(self.store, k)

def test_a_lost_process_ends_all_others_and_so_does_a_lost_store():
    ended = {}
    store = dist.HashStore()
    ways = [Unplugged(store) for _ in range(4)]
    all_ = [Watch(way, r, 4, .4, lambda text, r=r: ended.setdefault(r, text), tick=.02) for r,way in enumerate(ways)]
    time.sleep(.2)
    assert ended=={}
    ways[2].cut = True # this machine alone
    for _ in range(200):
        if len(ended)==4: break
        time.sleep(.05)
    assert {ended[r].split(',')[0] for r in (0,1,3)}=={f'lost: process 2 on {os.uname().nodename}'}
    assert ended[2].startswith('lost: the store of the first process')
    ways[2].cut = False
    for o in all_: o.stop()

def test_lines_for_errors_of_connections():
    text = '[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:1234'
    assert lost_process(RuntimeError(text))=='lost the connection to another process at 10.0.0.2'
    assert lost_process(dist.DistBackendError('NCCL error: remote process exited'))
    assert not lost_process(RuntimeError('mat1 and mat2 shapes cannot be multiplied'))

# ---- two hosts

class Host:
    "A network namespace with one address"
    def __init__(self, name, address):
        self.name, self.address, self.started = name, address, []

    def start(self, *cmd, log, **env):
        env = os.environ | dict(OMP_NUM_THREADS='1', GLOO_SOCKET_IFNAME='eth0', CUDA_VISIBLE_DEVICES='', PYTHONWARNINGS='ignore') | env
        cmd = ['ip', 'netns', 'exec', self.name, *map(str, cmd)]
        with log.open('wb') as f: p = subprocess.Popen(cmd, env=env, stdout=f, stderr=f, start_new_session=True)
        p.log = log
        self.started.append(p)
        return p

    def kill(self):
        "Everything that runs here ends at once, without a word"
        for pid in ip('netns', 'pids', self.name).split(): os.kill(int(pid), signal.SIGKILL)

def ip(*args, check=True):
    return subprocess.run(['ip', *args], check=check, capture_output=True, text=True).stdout

@pytest.fixture(scope='module')
def hosts():
    if not os.environ.get('DEQDET_HOSTS'): pytest.skip('DEQDET_HOSTS is not set: minutes, and root')
    if not shutil.which('ip'): pytest.skip('the command ip (iproute2) is not here')
    a,b = (Host(f'deqdet{k}{os.getpid()}', f'10.213.77.{i}') for i,k in enumerate('ab', 1))
    try: ip('netns', 'add', a.name)
    except subprocess.CalledProcessError as e: pytest.skip(f'no network namespaces: {e.stderr.strip()}')
    try:
        ip('netns', 'add', b.name)
        ip('link', 'add', 'eth0', 'netns', a.name, 'type', 'veth', 'peer', 'name', 'eth0', 'netns', b.name)
        for o in (a, b):
            ip('-n', o.name, 'addr', 'add', f'{o.address}/24', 'dev', 'eth0')
            for link in ('lo', 'eth0'): ip('-n', o.name, 'link', 'set', link, 'up')
        yield a, b
    finally:
        for o in (a, b):
            o.kill()
            for p in o.started: p.wait()
            ip('netns', 'del', o.name, check=False)

@pytest.fixture(scope='module')
def path(tmp_path_factory):
    return synth_coco(tmp_path_factory.mktemp('hosts')/'shapes', n_train=8, n_valid=5, size=64, seed=3)

def launch(hosts, folder, port, *script, extra=()):
    "`accelerate launch` on both"
    shared = ['--multi_gpu', '--num_machines', '2', '--num_processes', '2', '--main_process_ip', hosts[0].address,
              '--main_process_port', str(port), *extra]
    return [o.start(sys.executable, '-m', 'accelerate.commands.launch', *shared, '--machine_rank', i, *script, log=folder/f'said{i}.txt')
            for i,o in enumerate(hosts)]

def said(p): return p.log.read_text(errors='replace')

WORKER = '''
import sys, torch
from pathlib import Path
from fastai.torch_core import rank_distrib
sys.path.insert(0, {tests!r})
from test_processes import train_and_validate
path = Path(sys.argv[1])
torch.save(train_and_validate(path, True), path/f'host{{rank_distrib()}}.pt')
'''

def test_two_hosts_are_one_process(hosts, path, tmp_path):
    "Gradients of each update, weights, and AP before and after"
    from test_processes import train_and_validate
    (tmp_path/'worker.py').write_text(WORKER.format(tests=str(HERE)))
    running = launch(hosts, tmp_path, 29511, tmp_path/'worker.py', path)
    one = train_and_validate(path, False, accumulate=2)
    for p in running: assert p.wait(3000)==0, said(p)[-3000:]
    for r in range(2):
        two = torch.load(path/f'host{r}.pt', weights_only=False)
        scale = one['grads'].abs().max()
        torch.testing.assert_close(two['grads'], one['grads'], atol=1e-4*scale, rtol=0)
        torch.testing.assert_close(two['weights'], one['weights'], atol=1e-5, rtol=0)
        assert two['before']==pytest.approx(one['before'], nan_ok=True, abs=1e-9)
        assert two['after']==pytest.approx(two['evaluated'], nan_ok=True, abs=1e-9)

def train_command(path, out, epochs):
    return [BIN/'deqdet_train', path, '--model', 'deqdet_tiny', '--out', out, '--epochs', epochs, '--bs', 2, '--size', 64,
            '--every', 2, '--resume']

def wait_for(test, seconds, *running):
    "Seconds until something is true"
    begun = time.monotonic()
    while not test():
        assert time.monotonic()-begun < seconds, [said(p)[-2000:] for p in running]
        time.sleep(.2)
    return time.monotonic()-begun

def ended(p): return p.poll() is not None

def begin(hosts, path, folder, port):
    "A training on both that has written a checkpoint"
    out = folder/'run'
    running = launch(hosts, folder, port, *train_command(path, out, 9999), extra=['--no_python'])
    wait_for(lambda: (out/'log.csv').exists() or any(map(ended, running)), 3000, *running)
    assert not any(map(ended, running)), [said(p)[-3000:] for p in running]
    return out, running

def updates(out): return torch.load(out/'resume.pt', weights_only=True)['train_iter']

@pytest.mark.parametrize('lost', [0, 1])
def test_a_killed_host_ends_the_other_and_one_host_goes_on(hosts, path, tmp_path, lost):
    "Both machines in turn; then both processes on one"
    out,running = begin(hosts, path, tmp_path, 29521+lost)
    hosts[lost].kill()
    other = running[1-lost]
    line = re.compile(r'^deqdet_train: lost the connection to another process at [\d.]+; to go on: in 2 processes again, '
                      'deqdet_train .* --resume$', re.M)
    wait_for(lambda: line.search(said(other)), 60, other)
    wait_for(lambda: ended(other), 300, other) # Python and the launcher end in seconds, where they have a core
    assert other.returncode
    if not lost: return
    before = updates(out)
    epochs = before//2 + 2 # an epoch has two updates
    cmd = ['torchrun', '--standalone', '--nproc-per-node', '2', '--no-python', *train_command(path, out, epochs)]
    again = hosts[0].start(BIN/cmd[0], *cmd[1:], log=tmp_path/'again.txt', GLOO_SOCKET_IFNAME='lo')
    assert again.wait(3000)==0, said(again)[-3000:]
    assert re.search(r'going on in epoch', said(again))
    assert updates(out)==2*epochs

def test_an_unplugged_host_ends_the_other(hosts, path, tmp_path):
    "No connection is closed: the silence ends both"
    out,running = begin(hosts, path, tmp_path, 29531)
    ip('-n', hosts[1].name, 'link', 'set', 'eth0', 'down')
    try:
        wait_for(lambda: all('lost: ' in said(p) for p in running), 60, *running)
        wait_for(lambda: all(map(ended, running)), 300, *running)
        assert re.search('^lost: process 1 on .*, silent for 40 s', said(running[0]), re.M), said(running[0])[-3000:]
        assert re.search('^lost: the store of the first process, silent for 40 s', said(running[1]), re.M), said(running[1])[-3000:]
    finally: ip('-n', hosts[1].name, 'link', 'set', 'eth0', 'up')

def test_elastic_restart(path, tmp_path):
    "A killed worker: torchrun starts all again, and they go on from the last checkpoint"
    if not os.environ.get('DEQDET_HOSTS'): pytest.skip('DEQDET_HOSTS is not set: minutes')
    out = tmp_path/'run'
    cmd = [BIN/'torchrun', '--standalone', '--nproc-per-node', 2, '--max-restarts', 1, '--no-python', *train_command(path, out, 12)]
    # a store that outlives the workers keeps their old addresses, and new ones hang or fail (issue 135712 of PyTorch)
    env = os.environ | dict(OMP_NUM_THREADS='1', GLOO_SOCKET_IFNAME='lo', CUDA_VISIBLE_DEVICES='', PYTHONWARNINGS='ignore',
                            TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1')
    log = tmp_path/'said.txt'
    with log.open('wb') as f: p = subprocess.Popen(list(map(str, cmd)), env=env, stdout=f, stderr=f)
    try:
        p.log = log
        wait_for(lambda: (out/'log.csv').exists() or ended(p), 3000, p)
        workers = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(p.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        assert p.wait(3000)==0, said(p)[-3000:]
    finally:
        if not ended(p): p.terminate()
    assert 'going on in epoch' in said(p) and updates(out)==2*12
