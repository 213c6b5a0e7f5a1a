"Files are whole or absent, and JSON holds what it can"
import errno, json, math
import pytest
from deqdet.ops.files import finite, write_atomic, write_json

@pytest.fixture
def file(tmp_path): return write_atomic(lambda f: f.write(b'old'), tmp_path/'a')

def alone(file, content=b'old'):
    "The file holds this, and nothing lies beside it"
    assert [o.name for o in file.parent.iterdir()]==[file.name]
    assert file.read_bytes()==content

def test_a_write_that_fails_leaves_the_old_file(file):
    def fails(f):
        f.write(b'ne')
        raise OSError('disk full')
    with pytest.raises(OSError, match='disk full'): write_atomic(fails, file)
    alone(file)

def test_a_full_disk_is_named_whatever_torch_says(file):
    def full(f):
        try: raise OSError(errno.ENOSPC, 'No space left on device')
        except OSError: raise RuntimeError('unexpected pos 704 vs 598')
    with pytest.raises(OSError, match=f"No space left on device: '{file}'"): write_atomic(full, file)
    alone(file)

def test_other_errors_come_through_as_they_are(file):
    def broken(f): raise RuntimeError('broken')
    with pytest.raises(RuntimeError, match='^broken$'): write_atomic(broken, file)
    alone(file)

def test_folders_are_made(tmp_path):
    file = write_atomic(lambda f: f.write(b'new'), str(tmp_path/'b'/'c'/'d'))
    alone(file, b'new')

def test_finite_replaces_what_json_lacks():
    assert finite(dict(a=[1., math.nan], b='x'))==dict(a=[1., None], b='x')
    assert finite([(math.inf, -math.inf), 3, True])==[[None, None], 3, True]

def test_json_is_whole_or_the_old_one(tmp_path):
    file = write_json(dict(a=[1, None]), tmp_path/'a.json')
    assert file.read_text()==json.dumps(dict(a=[1, None]), indent=1)
    with pytest.raises(TypeError, match='not JSON serializable'): write_json(dict(a={1}), file)
    alone(file, b'{\n "a": [\n  1,\n  null\n ]\n}')
