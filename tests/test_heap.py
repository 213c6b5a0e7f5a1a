"`deqdet.ops.heap`: freed memory stays in the process, if malloc is glibc's and the user has not set it otherwise"
import os, platform, subprocess, sys
import pytest
from deqdet import shell

FAULTS = """
import resource, torch
from deqdet.ops.heap import keep_heap
def faults():
    first = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4): torch.zeros(10_000_000) + 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - first
faults()
before = faults()
kept = keep_heap()
faults()
print(kept, faults() < before/4)
"""

def run(code, **env):
    "Lines that a fresh interpreter prints"
    clean = {k: v for k,v in os.environ.items() if not k.startswith('MALLOC_')}
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], env=clean | env, capture_output=True, text=True, check=True)
    return out.stdout.split()

@pytest.mark.skipif(platform.libc_ver()[0]!='glibc', reason='another C library')
def test_fewer_page_faults():
    assert run(FAULTS)==['True', 'True']

def test_the_users_choice_stays():
    assert run(FAULTS, MALLOC_TRIM_THRESHOLD_='100000')[0]=='False'

@pytest.mark.skipif(platform.libc_ver()[0]!='glibc', reason='another C library')
def test_other_variables_do_not_matter(): assert run(FAULTS, MALLOC_ARENA_MAX='2')[0]=='True'

def test_without_glibc(monkeypatch):
    from deqdet.ops import heap
    for k in [k for k in os.environ if k.startswith('MALLOC_')]: monkeypatch.delenv(k)
    for missing in (object(), None):
        def library(name):
            if missing is None: raise OSError('no library')
            return missing
        monkeypatch.setattr(heap.ctypes, 'CDLL', library)
        assert heap.keep_heap() is False

def test_commands_of_a_shell_keep_it(tmp_path, monkeypatch):
    script = tmp_path/'hello.py'
    script.write_text("from deqdet import shell\nshell.keep_heap = lambda: print('kept')\n"
                      "@shell.command\ndef hello(): print('hello')\nhello()\n")
    out = subprocess.run([sys.executable, '-W', 'ignore', script], capture_output=True, text=True, check=True)
    assert out.stdout.split()==['kept', 'hello']
    monkeypatch.setattr(shell, 'keep_heap', lambda: pytest.fail('called in a library'))
    @shell.command
    def quiet(): return 'quiet'
    assert quiet()=='quiet'
