"What every test file may use"
import os
for k in 'OMP_NUM_THREADS','MKL_NUM_THREADS','OPENBLAS_NUM_THREADS': os.environ.setdefault(k, '1') # before torch
os.environ.setdefault('MPLBACKEND', 'Agg')
from pathlib import Path
import pytest

@pytest.fixture(scope='session')
def data_dir():
    "Folder with the real data sets: `bccd/` (VOC) and `cocoeval/` (COCO json)"
    path = os.environ.get('DEQDET_DATA')
    if not path: pytest.skip('DEQDET_DATA is not set: it names the folder with the real data (bccd/, cocoeval/)')
    path = Path(path)
    if not path.is_dir(): pytest.skip(f'DEQDET_DATA={path} is not a folder')
    return path
