"What a user can put right: one line that says what is wrong, and where"
import errno
import pytest, torch
from deqdet.ops.errors import CommandError, blame, check_writable, is_out_of_memory, make_folder, one_line

WORKER = 'Caught DataError in worker\nTraceback:\n  File "a.py"\ndeqdet.data.DataError: a.jpg: unreadable'


@pytest.mark.parametrize('e, said', [
    (KeyError("no detector 'x'\nhere"), "no detector 'x' here"),
    (KeyError('hyper'), "no 'hyper'"),
    (ValueError(WORKER), 'a.jpg: unreadable'),
    (FileNotFoundError(errno.ENOENT, 'No such file or directory', 'nothing/there'),
     'nothing/there: No such file or directory'),
    (OSError('cannot identify image file <_io.BytesIO object at 0x7f>'), 'cannot identify image file'),
    (RuntimeError('Weights only load failed. In PyTorch 2.6 we changed\nthe default'), 'not a file of weights'),
    (RuntimeError(), 'RuntimeError'),
    (ValueError('x'*500), 'x'*400 + ' …')])
def test_one_line(e, said): assert one_line(e) == said


def test_memory_of_all_kinds():
    full = RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried")
    for e in torch.OutOfMemoryError('CUDA out of memory.'), MemoryError(), full:
        assert is_out_of_memory(e) and one_line(e).startswith('out of memory (') and '--bs' in one_line(e)
    assert not is_out_of_memory(RuntimeError('shapes differ'))


def test_blame_names_the_place_once():
    def half(text):
        with blame('weights.pth', RuntimeError): raise RuntimeError(text)
    for text in 'unexpected end\n of file', 'weights.pth: unexpected end of file':
        with pytest.raises(CommandError) as e: half(text)
        assert str(e.value) == 'weights.pth: unexpected end of file'


def test_blame_leaves_bugs_alone():
    with pytest.raises(AttributeError):
        with blame('weights.pth', RuntimeError): [].weights


def test_places_to_write_to(tmp_path):
    taken = tmp_path/'taken'
    taken.write_text('mine')
    for f, path in (make_folder, taken), (check_writable, taken/'x.json'), (make_folder, taken/'below'):
        with pytest.raises(CommandError, match=str(taken)): f(path)
    with pytest.raises(CommandError, match=str(tmp_path)): check_writable(tmp_path)
    assert make_folder(tmp_path/'a/b').is_dir() and not list((tmp_path/'a/b').iterdir())
    assert taken.read_text() == 'mine'
