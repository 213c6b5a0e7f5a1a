"Stored outputs are compared with fresh ones: words exactly, numbers to a tolerance"
import pytest
from fastcore.nbio import mk_cell, new_nb, write_nb
import outputs, run
from run import check_notebook
from test_run import exported, few_libraries, project

@pytest.mark.parametrize('stored,fresh,equal', [
    ('loss 1.90 of 3', 'loss 1.93 of 3', True),
    ('loss 1.90 of 3', 'loss 2.90 of 3', False),
    ('3', '4', False), ('100', '102', True), ('0.1', '0.2', True), ('0.10', '0.20', False),           # the last digit may differ by one
    ('1.2e-16', '3.1e-17', True), ('1.2e-01', '3.1e-01', False),
    ('tensor([nan, 1.])', 'tensor([nan, 1.])', True), ('nan', '1.0', False), ('nan', 'nan', True),
    ('2 cats', '2 dogs', False), ('2  cats\n', '2 cats', True),
    ("{'a': 1}", "{'a': 1, 'b': 2}", False)])
def test_same(stored, fresh, equal): assert outputs.same(stored, fresh)==outputs.same(fresh, stored)==equal

def cell(source, *outs): return dict(cell_type='code', id=source[:8], source=source, outputs=list(outs))
def printed(text): return dict(output_type='stream', name='stdout', text=[text])
def shown(**data): return dict(output_type='execute_result', data={k.replace('_', '/'): v for k,v in data.items()})

def test_text_and_no_figures():
    c = cell('x', printed('a\n'), shown(text_plain=['b']), shown(text_plain='<Figure>', image_png='...'),
             dict(output_type='stream', name='stderr', text='warning'))
    assert outputs.text_of(c)=='a\nb'

def test_differences():
    stored = dict(cells=[cell('a', printed('1.0')), cell('#| varies: "by the machine"\nb', printed('1.0'))])
    fresh = dict(cells=[cell('a', printed('2.0')), cell('#| varies: "by the machine"\nb', printed('2.0'))])
    assert outputs.differences(stored, fresh)==[outputs.Difference(0, '1.0', '2.0')]
    assert outputs.differences(stored, stored)==[]
    assert 'cell 0' in str(outputs.differences(stored, fresh)[0])

@pytest.mark.parametrize('text,status', [('3', 'passed'), ('4', 'failed')])
def test_a_page(project, few_libraries, monkeypatch, text, status):
    "Run once; its stored output is compared, and its file stays as it was"
    monkeypatch.setattr(run, 'OUTPUTS', True)
    c = mk_cell('1+2')
    c.outputs = [dict(output_type='execute_result', data={'text/plain': [text]}, metadata={}, execution_count=1)]
    path = project/'nbs/05_tried.ipynb'
    write_nb(new_nb([c]), path)
    before = path.read_bytes()
    res = check_notebook(project, path)
    assert res.status==status and path.read_bytes()==before, res
    assert (status=='passed') or '- 4\n+ 3' in res.note
