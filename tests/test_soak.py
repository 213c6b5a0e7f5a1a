"The harness of benchmarks/soak.py: what it calls wrong, and half a minute of it where DEQDET_SOAK is set"
import json, os, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
import pytest
BENCHMARKS = Path(__file__).parents[1]/'benchmarks'
sys.path.insert(0, str(BENCHMARKS))
from soak import Disk, faulty, growth, in_session, line, lost, rest

def life(start, end, by='kill', status=-9, left=0): return dict(start=start, end=end, by=by, status=status, said='', left=left)

def soak(*lives, epochs=(0,1,2)): return SimpleNamespace(lives=list(lives), every=10, epochs=list(epochs))

GOOD = life(0, 57), life(50, 83, 'term', 143), life(83, 90, 'fill', 2), life(80, 95, 'term', 143)

def test_nothing_is_wrong():
    assert faulty(soak(*GOOD))==[]
    assert lost(list(GOOD))==[dict(by='kill', updates=7), dict(by='term', updates=0), dict(by='fill', updates=10)]

@pytest.mark.parametrize('bad,said', [
    ((life(0, 57), life(40, 60)), '17 updates lost by kill'),
    ((life(0, 57, 'term', 143), life(56, 60)), '1 updates lost by term'),
    ((life(0, 57), life(60, 70)), '-3 updates lost'),
    ((life(0, 57, 'fill', 1),), 'ended by fill with status 1'),
    ((life(0, 57, 'stop', 2),), 'ended by stop with status 2'),
    ((life(0, 57, left=2),), '2 processes left behind'),
    ((life(None, None, None, 1),), 'did not begin')])
def test_what_is_wrong(bad, said): assert any(said in o for o in faulty(soak(*bad)))

def test_a_hole_in_the_log(): assert 'epochs in the log' in faulty(soak(*GOOD, epochs=(0, 2)))[0]

def test_line_and_growth():
    slope,error = line([(x, 3*x + (-1)**x) for x in range(100)])
    assert abs(slope-3) < .01 and 0 < error < .01
    late = [(1, 2*t, 10*t, 500 + t/1800*5) for t in range(100, 400)] # 5 MB an hour, after a steep start
    early = [(1, 2*t, 10*t, 400 + t) for t in range(100)]
    short = [(0, t, t, 100) for t in range(20)]
    found = growth(short + early + late, 200)
    assert abs(found['mb_an_hour'] - 5) < .1 and found['updates']==2980

def test_processes_are_found_by_their_session():
    p = subprocess.Popen(['sh', '-c', 'sleep 600 & sleep 600 & wait'], start_new_session=True)
    try:
        while len(in_session(p.pid)) < 3: time.sleep(.05)
        p.kill()
        assert len(rest(p.pid, .5)[0])==2 # the first one has ended, though not waited for
    finally: os.killpg(p.pid, signal.SIGKILL)
    assert rest(p.pid, 30)[0]==[]
    p.wait()

def test_a_small_disk(tmp_path):
    disk = Disk(tmp_path/'disk', 1)
    try:
        if not disk.small: pytest.skip('mounting is not allowed here')
        disk.fill()
        with pytest.raises(OSError): (disk.folder/'more').write_bytes(bytes(1<<16))
        disk.empty()
        (disk.folder/'more').write_bytes(bytes(1<<16))
    finally: disk.close()

@pytest.mark.skipif(not os.environ.get('DEQDET_SOAK'), reason='DEQDET_SOAK is not set: half a minute of training, or more')
def test_half_a_minute(tmp_path):
    cmd = [sys.executable, BENCHMARKS/'soak.py', '--minutes', '.5', '--calm', '.3', '--pause', '2', '--warmup', '0', '--out', tmp_path/'soak.json']
    res = subprocess.run(list(map(str, cmd)), capture_output=True, text=True)
    assert res.returncode==0, res.stdout[-3000:] + res.stderr[-3000:]
    found = json.loads((tmp_path/'soak.json').read_text())['result']
    assert found['wrong']==[] and found['left_behind']==0 and found['updates'] and found['faults']
