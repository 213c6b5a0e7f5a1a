"Damaged files give one line that names the file, and hostile ones run no code"
import json, pickle, sys
from pathlib import Path
import pytest, torch, yaml
sys.path.insert(0, str(Path(__file__).parents[1]/'benchmarks'))
from fuzz import KINDS, MAKE, fuzz, is_clear
from deqdet.convert import load_official
from deqdet.data import DataError, det_dls
from deqdet.learner import Resume
from deqdet.ops.errors import CommandError
from deqdet.sets.images import load_image
from deqdet.training.resume import _read
from deqdet.using.hub import Detector

@pytest.mark.parametrize('kind', KINDS)
def test_mutated_files(kind, tmp_path):
    "A few seconds of what benchmarks/fuzz.py does for minutes"
    counts,faults = fuzz(kind, trials=25, work=tmp_path)
    assert not faults, faults
    assert counts.get('refused') and counts.get('read')

def test_ids_have_64_bits(tmp_path):
    "An array holds no larger ones"
    MAKE['coco'](tmp_path/'c')
    file = next((tmp_path/'c').rglob('instances_train.json'))
    coco = json.loads(file.read_text())
    for key in 'images', 'categories':
        for large in 2**63, -2**63 - 1:
            changed = json.loads(json.dumps(coco))
            changed[key][0]['id'] = large
            file.write_text(json.dumps(changed))
            with pytest.raises(DataError, match=rf'{key}\[0\] id: {large}: a whole number of 64 bits') as e: det_dls(tmp_path/'c', num_workers=0, device='cpu')
            assert is_clear(e.value, tmp_path/'c')

def test_names_with_line_breaks_stay_on_a_line(tmp_path):
    "Of images, and of entries in a description"
    with pytest.raises(DataError, match='a b.jpg: no such image') as e: load_image(tmp_path/'a\nb.jpg')
    assert is_clear(e.value, tmp_path)
    (tmp_path/'c\x0cd.jpg').write_text('no image')
    with pytest.raises(DataError, match='c d.jpg: unreadable image') as e: load_image(tmp_path/'c\x0cd.jpg')
    assert is_clear(e.value, tmp_path)
    MAKE['yolo'](tmp_path/'y')
    file = tmp_path/'y'/'data.yaml'
    file.write_text(yaml.safe_dump(dict(yaml.safe_load(file.read_text()), train='a\nb')))
    with pytest.raises(DataError, match="field 'train': a b does not exist") as e: det_dls(tmp_path/'y', num_workers=0, device='cpu')
    assert is_clear(e.value, tmp_path)

class Touch:
    "A pickle that writes a file when it is read"
    def __init__(self, file): self.file = file
    def __reduce__(self): return open, (str(self.file), 'w')

@pytest.mark.parametrize('zipped', [True, False], ids=['zip','legacy'])
@pytest.mark.parametrize('read', [load_official, _read], ids=['load_official','resume'])
def test_a_pickle_runs_no_code(tmp_path, zipped, read):
    mark = tmp_path/'mark'
    file = tmp_path/'a.pth'
    torch.save(dict(state_dict={'a': torch.ones(1)}, train_iter=Touch(mark)), file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(Exception): read(file)
    assert not mark.exists()
    torch.load(file, weights_only=False) # it would
    assert mark.exists()

def test_a_bare_pickle_runs_no_code(tmp_path):
    mark = tmp_path/'mark'
    for name in 'a.pth', 'a.safetensors':
        (tmp_path/name).write_bytes(pickle.dumps(Touch(mark)))
        with pytest.raises((ValueError, CommandError), match=name): load_official(tmp_path/name)
    assert not mark.exists()

@pytest.mark.parametrize('name', ['os.system', 'deqdet.shell.os', 'deqdet.model.Path', 'subprocess.Popen', 'deqdet.ops.errors.CommandError'])
def test_a_configuration_names_records_only(tmp_path, name):
    MAKE['pretrained'](tmp_path/'m')
    file = tmp_path/'m'/'config.json'
    file.write_text(file.read_text().replace('deqdet.families.adamixer.AdaMixer', name))
    with pytest.raises((ValueError, CommandError), match='is no record of deqdet') as e: Detector.from_pretrained(tmp_path/'m')
    assert is_clear(e.value, tmp_path/'m')

def test_yaml_runs_no_code(tmp_path):
    MAKE['yolo'](tmp_path/'y')
    file = tmp_path/'y'/'data.yaml'
    mark = tmp_path/'mark'
    file.write_text(f'{file.read_text()}\nx: !!python/object/apply:os.mkdir ["{mark}"]\n')
    with pytest.raises(DataError, match='data.yaml: no readable yaml'): det_dls(tmp_path/'y', num_workers=0, device='cpu')
    assert not mark.exists()
