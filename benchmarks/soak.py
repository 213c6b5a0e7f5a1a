"""A training that is disturbed for minutes or hours: signals, a full disk, images deleted and truncated

`deqdet_train` trains deqdet_tiny on generated images. It is ended again and again, and goes on with --resume. Every end
is checked: how much was lost, what was said, what was left. The last part of the time (`--calm`) has only faults that a
training survives, so that one process lives long enough for a line through its memory.

    python benchmarks/soak.py --minutes 60 --out soak.json

Memory is resident memory (`MB`), the part of it that is no file (`anonymous`), what malloc has given out (`in_use`) and
holds free (`free`), and Python's small blocks (`blocks`). Only a growth of `in_use` or `blocks` is kept by the program.

The disk is a tmpfs of `--disk` MB where mounting is allowed (as root on Linux); elsewhere that fault is left out."""
import argparse, atexit, ctypes, os, random, shutil, signal, struct, subprocess, sys, tempfile, time, traceback
from pathlib import Path

PLACES = struct.Struct('qq5q') # updates at the start of this process, and now; what it holds
GAUGES = 'MB', 'anonymous', 'in_use', 'free', 'blocks' # columns of the memory


# ---- what a process holds

class _Mallinfo(ctypes.Structure):
    "What glibc tells about its heaps, in bytes"
    _fields_ = [(k, ctypes.c_size_t) for k in ('arena', 'ordblks', 'smblks', 'hblks', 'hblkhd', 'usmblks',
                                               'fsmblks', 'uordblks', 'fordblks', 'keepcost')]

def _asker():
    "glibc's `mallinfo2`, or None elsewhere"
    f = getattr(ctypes.CDLL(None), 'mallinfo2', None)
    if f: f.restype = _Mallinfo
    return f

def resident():
    "Bytes in memory, and those of them that are no file"
    lines = Path('/proc/self/status').read_text().splitlines()
    kb = {k: int(v.split()[0]) for k,_,v in (o.partition(':') for o in lines) if k in ('VmRSS', 'RssAnon')}
    return 1024*kb['VmRSS'], 1024*kb['RssAnon']

def held(ask=_asker()):
    "What this process holds, in the order of `GAUGES`: bytes, and small blocks of Python"
    m = ask() if ask else _Mallinfo()
    return *resident(), m.uordblks + m.hblkhd, m.fordblks, sys.getallocatedblocks()


# ---- the training: the usual command, which also writes its updates where the harness reads them

def train(progress, options):
    "`deqdet_train` with these options; the status of the process"
    from deqdet import cli, runs
    from deqdet.learner import Resume
    from deqdet.ops.heap import keep_heap
    from fastai.callback.core import Callback
    class Progress(Callback):
        order = Resume.order - 2 # an update counts as soon as it is made
        start = None
        file = os.open(progress, os.O_WRONLY | os.O_CREAT)
        def before_batch(self):
            if self.start is None: self.start = self.train_iter
        def after_batch(self):
            if self.training: os.pwrite(self.file, PLACES.pack(self.start, self.train_iter, *held()), 0)
    plain = runs._callbacks
    runs._callbacks = lambda *args: plain(*args) + [Progress()]
    keep_heap() # as the command does when a shell calls it
    try: cli.deqdet_train(**options)
    except SystemExit as e: return e.code
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

def fork(f, file):
    "Number of a new process, in a session of its own, that calls `f` and prints to a file; the imports are done already"
    if pid := os.fork(): return pid
    os.setsid()
    out = os.open(file, os.O_WRONLY | os.O_CREAT)
    for o in (1, 2): os.dup2(out, o)
    status = f()
    atexit._run_exitfuncs() # as the end of Python does
    sys.stdout.flush()
    os._exit(status or 0)


class Life:
    "One process of the training, from its start to its end"
    def __init__(self, number, work, options):
        self.number = number
        self.progress = work/f'progress_{number}'
        self.said = work/f'said_{number}.txt'
        self.status = None
        self.pid = fork(lambda: train(self.progress, options), self.said)

    @property
    def places(self):
        "Updates at its start and now; None before the first"
        try: return PLACES.unpack(self.progress.read_bytes())
        except (OSError, struct.error): return None

    @property
    def made(self):
        "Updates of this process"
        places = self.places
        return places[1]-places[0] if places else 0

    def alive(self):
        if self.status is None:
            pid,status = os.waitpid(self.pid, os.WNOHANG)
            if pid: self.status = os.waitstatus_to_exitcode(status)
        return self.status is None

    def signal(self, number): os.kill(self.pid, number)

    def wait_for(self, updates, seconds):
        "True when it has made so many updates; False if it ended, or after so many seconds"
        end = time.monotonic() + seconds
        while self.alive() and time.monotonic() < end:
            if self.made >= updates: return True
            time.sleep(.2)
        return False

    def wait(self, seconds):
        "True when it has ended; False after so many seconds"
        self.wait_for(float('inf'), seconds)
        return not self.alive()

    def last_words(self):
        "The last line that it printed"
        text = self.said.read_text(errors='replace').replace(str(self.said.parent), 'WORK')
        lines = text.strip().splitlines()
        return lines[-1][:300] if lines else ''


def stat_of(pid):
    "Fields of /proc/PID/stat after the name: state, parent, group, session, ...; None for a process that has ended"
    try: fields = Path(f'/proc/{pid}/stat').read_text().rpartition(') ')[2].split()
    except OSError: return None
    return None if not fields or fields[0]=='Z' else fields

def in_session(number):
    "Numbers of the living processes of a session: a training and those that load for it"
    pids = [int(p.name) for p in Path('/proc').glob('[0-9]*')]
    return [p for p in pids if (found := stat_of(p)) and found[3]==str(number)]

def rest(session, seconds=120):
    "Processes that are still there after so many seconds, and how long the last of them took to end"
    begun = time.monotonic()
    while (found := in_session(session)) and time.monotonic()-begun < seconds: time.sleep(.2)
    return found, time.monotonic()-begun


# ---- the faults

class Disk:
    "A folder on a file system of a few MB, or a plain folder where mounting is not allowed"
    def __init__(self, folder, mb):
        self.folder = folder
        folder.mkdir()
        cmd = ['mount', '-t', 'tmpfs', '-o', f'size={mb}m', 'tmpfs', str(folder)]
        try: self.small = subprocess.run(cmd, capture_output=True).returncode==0
        except OSError: self.small = False

    def fill(self):
        with (self.folder/'ballast').open('ab', buffering=0) as f:
            try:
                while True: f.write(bytes(1<<16))
            except OSError: pass

    def empty(self): (self.folder/'ballast').unlink(missing_ok=True)

    def close(self):
        if self.small: subprocess.run(['umount', '-l', str(self.folder)])


class Images:
    "The images of a set, some of which are deleted or truncated for a while"
    def __init__(self, folder, rng):
        self.whole = {p: p.read_bytes() for p in sorted(folder.glob('*.*'))}
        self.rng = rng

    def damage(self, share=.05):
        chosen = self.rng.sample(list(self.whole), max(1, int(share*len(self.whole))))
        for p in chosen:
            if self.rng.random() < .5: p.unlink(missing_ok=True)
            else: p.write_bytes(self.whole[p][:self.rng.randrange(len(self.whole[p]))])
        return len(chosen)

    def mend(self):
        for p,data in self.whole.items():
            if not p.exists() or p.stat().st_size!=len(data): p.write_bytes(data)


# ---- one fault of each kind: what it did to the training

def stop(soak, life):
    "SIGSTOP, and SIGCONT after a while: the training goes on"
    os.killpg(life.pid, signal.SIGSTOP)
    seconds = soak.rng.uniform(.5, 8)
    time.sleep(seconds)
    os.killpg(life.pid, signal.SIGCONT)
    return dict(seconds=round(seconds, 1))

def images(soak, life):
    "Some images are gone or cut off while it makes some updates"
    n = soak.images.damage()
    life.wait_for(life.made + 20, 120)
    soak.images.mend()
    return dict(images=n)

def term(soak, life):
    "SIGTERM: it finishes the update, saves, and ends"
    life.signal(signal.SIGTERM)
    return dict(ended=life.wait(600))

def kill(soak, life):
    "SIGKILL: nothing can be saved"
    life.signal(signal.SIGKILL)
    return dict(ended=life.wait(600))

def fill(soak, life):
    "The disk is full until it ends, which it does when it wants to save"
    soak.disk.fill()
    life.wait_for(life.made + 2*soak.every + 1, 600)
    ended = not life.alive()
    soak.disk.empty()
    return dict(ended=ended)

SURVIVED = stop, images
ENDS = dict(term=128+signal.SIGTERM, kill=-signal.SIGKILL, fill=2) # the status that each must have


class Soak:
    "A disturbed training, and what was seen"
    def __init__(self, work, minutes, calm, seed, every, disk, pause, workers):
        from deqdet import cli, runs, zoo # before the clock, and before the first process is forked
        from deqdet.data import synth_coco
        self.work = work
        self.rng = random.Random(seed)
        self.every = every
        self.pause = pause
        self.disk = Disk(work/'disk', disk)
        data = synth_coco(work/'shapes', n_train=120, n_valid=12, size=64, seed=seed)
        self.images = Images(data/'images', self.rng)
        self.options = dict(data=str(data), model='deqdet_tiny', out=str(work/'disk'/'run'), epochs=10**6, size='64',
                            bs=2, every=every, workers=workers, skip_bad=True, resume=True)
        self.begun = time.monotonic()
        self.seconds = 60*minutes
        self.rough = (1-calm)*self.seconds
        self.lives = []
        self.faults = []
        self.memory = [] # of (process, seconds, updates, *GAUGES)

    def now(self): return time.monotonic()-self.begun

    def sample(self, life):
        "Note the memory of the process that trains"
        if not (life.alive() and life.places): return
        _,n,*sizes,blocks = life.places # as they were after its last update
        mb = [round(o/1e6, 3) for o in sizes]
        self.memory.append((life.number, round(self.now(), 1), n, *mb, blocks))

    def watch(self, life, seconds):
        "Let it train for a while"
        end = self.now() + seconds
        while life.alive() and self.now() < min(end, self.seconds):
            self.sample(life)
            time.sleep(min(2, seconds))

    def disturb(self, life, f):
        "One fault"
        at = self.now()
        seen = f(self, life)
        self.faults.append(dict(kind=f.__name__, process=life.number, at=round(at, 1), **seen))

    def live(self):
        "One process: faults that it survives, then one that ends it, except in the calm part"
        life = Life(len(self.lives), self.work, self.options)
        self.current = life
        life.wait_for(1, 900)
        n = self.rng.randrange(3)
        while life.alive() and self.now() < self.seconds:
            self.watch(life, self.pause*self.rng.uniform(.5, 1.5))
            if not life.alive() or self.now() >= self.seconds: break
            calm = self.now() > self.rough
            if calm or n > 0: self.disturb(life, self.rng.choice(SURVIVED))
            else: self.disturb(life, self.rng.choice([term, kill, fill] if self.disk.small else [term, kill]))
            n -= not calm
        how = self.faults[-1]['kind'] if self.faults and self.faults[-1]['process']==life.number else None
        if life.alive():
            how = 'term'
            self.disturb(life, term)
        self.note(life, how)

    def note(self, life, how):
        "What an ended process did"
        left,seconds = rest(life.pid)
        for pid in left: os.kill(pid, signal.SIGKILL)
        start,end = life.places[:2] if life.places else (None, None)
        self.lives.append(dict(
            start=start, end=end, by=how, status=life.status, said=life.last_words(), left=len(left),
            last_process_ended_after=round(seconds, 1)))

    def run(self):
        try:
            while self.now() < self.seconds: self.live()
        finally:
            for pid in in_session(self.current.pid): os.kill(pid, signal.SIGKILL)
            self.epochs = rows(self.work/'disk'/'run'/'log.csv')
            self.disk.close()
        return self

def rows(file):
    "Numbers of the epochs in a log"
    if not file.exists(): return []
    first,*lines = file.read_text().splitlines()
    at = first.split(',').index('epoch')
    return [int(o.split(',')[at]) for o in lines]


# ---- what it proves

def lost(lives):
    "Updates that were made and had to be made again, after each process but the last"
    reached = [(a, b) for a,b in zip(lives, lives[1:]) if a['end'] is not None and b['start'] is not None]
    return [dict(by=a['by'], updates=a['end']-b['start']) for a,b in reached]

def line(points):
    "Slope of y over x with its standard error, by least squares"
    n = len(points)
    mx,my = (sum(o)/n for o in zip(*points))
    sxx = sum((x-mx)**2 for x,_ in points)
    slope = sum((x-mx)*(y-my) for x,y in points)/sxx
    rest = sum((y-my-slope*(x-mx))**2 for x,y in points)
    return slope, (rest/max(n-2, 1)/sxx)**.5

def late_part(memory, warmup):
    "(seconds, updates, *gauges) of the process that lived longest, after its first seconds"
    lives = {}
    for k,*rest in memory: lives.setdefault(k, []).append(rest)
    if not lives: return []
    longest = max(lives.values(), key=lambda o: o[-1][0]-o[0][0])
    return [o for o in longest if o[0] > longest[0][0]+warmup]

def growth(memory, warmup):
    "MB an hour and MB per 1000 updates of that process; of each gauge per 1000 updates"
    late = late_part(memory, warmup)
    if len(late) < 10: return None
    slope,error = line([(o[0]/3600, o[2]) for o in late])
    by_update = {}
    for i,k in enumerate(GAUGES[:len(late[0])-2]):
        found = line([(o[1]/1000, o[2+i]) for o in late])
        by_update[k] = [round(v, 3) for v in found] # with its standard error
    return dict(mb_an_hour=round(slope, 2), error=round(error, 2), mb_per_1000_updates=by_update['MB'][0],
                per_1000_updates=by_update, minutes=round((late[-1][0]-late[0][0])/60, 1),
                updates=late[-1][1]-late[0][1], mb=round(late[-1][2]))

def faulty(soak):
    "What went wrong, as lines"
    bad = []
    for i,o in enumerate(soak.lives):
        expected = ENDS.get(o['by'])
        if o['status']!=expected: bad.append(f"process {i} ended by {o['by']} with status {o['status']}: {o['said']}")
        if o['left']: bad.append(f"process {i}: {o['left']} processes left behind")
        if o['start'] is None and o['by'] is None: bad.append(f"process {i} did not begin: {o['said']}")
    for o in lost(soak.lives):
        most = 0 if o['by']=='term' else soak.every
        if not 0 <= o['updates'] <= most: bad.append(f"{o['updates']} updates lost by {o['by']}, at most {most} expected")
    if soak.epochs!=list(range(len(soak.epochs))): bad.append(f'epochs in the log: {soak.epochs}')
    return bad

def summary(soak, warmup):
    "The result as JSON holds it"
    kinds = [o['kind'] for o in soak.faults]
    gone = lost(soak.lives)
    most = {k: max((o['updates'] for o in gone if o['by']==k), default=None) for k in ENDS}
    return dict(minutes=round(soak.now()/60, 1), every=soak.every, small_disk=soak.disk.small,
                faults={k: kinds.count(k) for k in sorted(set(kinds))}, processes=len(soak.lives),
                updates=max((o['end'] or 0 for o in soak.lives), default=0), epochs=len(soak.epochs),
                most_updates_lost=most, left_behind=sum(o['left'] for o in soak.lives),
                last_loader_ended_after=max(o['last_process_ended_after'] for o in soak.lives),
                memory=growth(soak.memory, warmup), wrong=faulty(soak), lives=soak.lives, events=soak.faults,
                samples=soak.memory[::max(1, -(-len(soak.memory)//400))])

def arguments():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--minutes', type=float, default=60)
    p.add_argument('--calm', type=float, default=.5, help='share of the time without faults that end the process')
    p.add_argument('--pause', type=float, default=20, help='seconds between faults, on average')
    p.add_argument('--warmup', type=float, default=300, help='seconds that do not count in the line through the memory')
    p.add_argument('--every', type=int, default=10, help='updates between checkpoints')
    p.add_argument('--disk', type=int, default=64, help='MB of the disk')
    p.add_argument('--workers', type=int, default=1, help='processes that load')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--work', help='folder for all files; by default a temporary one')
    p.add_argument('--out', help='write the result here as JSON')
    return p.parse_args()

def main():
    a = arguments()
    work = Path(a.work or tempfile.mkdtemp(prefix='deqdet_soak_'))
    work.mkdir(parents=True, exist_ok=True)
    soak = Soak(work, a.minutes, a.calm, a.seed, a.every, a.disk, a.pause, a.workers)
    try: soak.run()
    finally:
        from common import report
        result = report(summary(soak, a.warmup), a.out)['result']
        if not a.work: shutil.rmtree(work, ignore_errors=True)
    return int(bool(result['wrong']))

if __name__=='__main__': sys.exit(main())
