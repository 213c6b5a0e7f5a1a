"What every test file may use"
import os
for k in 'OMP_NUM_THREADS','MKL_NUM_THREADS','OPENBLAS_NUM_THREADS': os.environ.setdefault(k, '1') # before torch
os.environ.setdefault('MPLBACKEND', 'Agg')
import gc, json, subprocess, sys
from pathlib import Path
import pytest

def pytest_collection_finish():
    "What libraries and test files hold stays: collections of garbage leave it out"
    gc.collect()
    gc.freeze()

@pytest.fixture(scope='session')
def data_dir():
    "Folder with the real data sets: `bccd/` (VOC) and `cocoeval/` (COCO json)"
    path = os.environ.get('DEQDET_DATA')
    if not path: pytest.skip('DEQDET_DATA is not set: it names the folder with the real data (bccd/, cocoeval/)')
    path = Path(path)
    if not path.is_dir(): pytest.skip(f'DEQDET_DATA={path} is not a folder')
    return path

@pytest.fixture(scope='module')
def read_once():
    "A `torch.export` program is read from its file once in a file of tests: it takes seconds"
    import torch
    read = {}
    load = torch.export.load
    def loaded(file, extra_files=None):
        if file not in read:
            known = {'about.json': ''}
            read[file] = load(file, extra_files=known), known
        program,known = read[file]
        if extra_files is not None: extra_files.update(known)
        return program
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.export, 'load', loaded)
        yield

PARTS = 'solver','boxes','backbone','mixing','decoder','mixer','equilibrium','loss','model'
LOADED = """
import json, sys
from importlib import import_module
loaded = {}
for name in sys.argv[1:]:
    import_module(f'deqdet.{name}')
    loaded[name] = sorted({m.split('.')[0] for m in sys.modules})
print(json.dumps(loaded))
"""

@pytest.fixture(scope='session')
def loaded():
    "{part of a detector: all that a process holds once it is imported}: one process, the lightest part first"
    res = subprocess.run([sys.executable, '-c', LOADED, *PARTS], capture_output=True, text=True, check=True)
    return {k: set(v) for k,v in json.loads(res.stdout).items()}
