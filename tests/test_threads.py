"`deqdet.ops.threads`: threads that wait sleep soon, if PyTorch is not loaded and the user has not chosen"
import os, subprocess, sys
import pytest
from deqdet import shell
from deqdet.ops.threads import CHOICES

CODE = 'import os; from deqdet.ops.threads import sleep_soon; print(sleep_soon(), os.environ.get("GOMP_SPINCOUNT"))'

def run(code, **env):
    "What a fresh interpreter prints, in words"
    clean = {k: v for k,v in os.environ.items() if k not in CHOICES}
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], env=clean | env, capture_output=True, text=True, check=True)
    return out.stdout.split()

def test_before_torch(): assert run(CODE)==['True', '10000']

def test_after_torch_it_is_too_late(): assert run('import torch; ' + CODE)==['False', 'None']

@pytest.mark.parametrize('choice,count', [(dict(GOMP_SPINCOUNT='7'), '7'), (dict(OMP_WAIT_POLICY='active'), 'None')])
def test_the_users_choice_stays(choice, count): assert run(CODE, **choice)==['False', count]

def test_openmp_follows():
    "The library that PyTorch loads says what it has read"
    code = CODE.replace('import os;', 'import os; os.environ["OMP_DISPLAY_ENV"] = "verbose";') + '; import torch; torch.ones(9).sum()'
    clean = {k: v for k,v in os.environ.items() if k not in CHOICES}
    said = subprocess.run([sys.executable, '-c', code], env=clean, capture_output=True, text=True, check=True).stderr
    if 'GOMP_SPINCOUNT' not in said: pytest.skip('not the OpenMP library of GNU')
    assert "GOMP_SPINCOUNT = '10000'" in said

def test_a_command_comes_before_torch(tmp_path):
    script = tmp_path/'hello.py'
    script.write_text("import os, sys\nfrom deqdet.cli import command\n"
                      "@command\ndef hello(): print('torch' in sys.modules, os.environ['GOMP_SPINCOUNT'])\nhello()\n")
    clean = {k: v for k,v in os.environ.items() if k not in CHOICES}
    out = subprocess.run([sys.executable, '-W', 'ignore', script], env=clean, capture_output=True, text=True, check=True)
    assert out.stdout.split()==['False', '10000']

def test_a_library_call_changes_nothing(monkeypatch):
    monkeypatch.setattr(shell, 'sleep_soon', lambda: pytest.fail('called in a library'))
    @shell.command
    def quiet(): return 'quiet'
    assert quiet()=='quiet'
